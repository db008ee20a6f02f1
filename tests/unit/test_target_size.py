"""Plans for a size, as far as no model is needed: the choice of forms, smaller sizes, files, tables and options."""

from __future__ import annotations

import itertools
import random
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from cdmoe_plugin import CondenseConfig, CondensePlan
from cdmoe_plugin.cards.tables import plan_table
from cdmoe_plugin.plan_layer import layers_of
from cdmoe_plugin.scripts.plan import main as plan_command
from cdmoe_plugin.search.check import check_methods
from cdmoe_plugin.sizes import read_target
from cdmoe_plugin.spread import Choice, Curve, LayerCurves, Spread


def some_spread(seed: int, layers: int = 4) -> Spread:
    rng = random.Random(seed)
    rows = []
    for layer in range(1, layers + 1):
        curves = []
        for routed in (0, 4):
            errors = sorted((rng.uniform(0, 1 / (1 + routed)) for _ in range(3)), reverse=True)
            curves.append(Curve(routed, 30 + 110 * routed, [0, 8, 16], errors))
        rows.append(LayerCurves(layer, 8, 910, 10, rng.random(), rng.sample(range(8), 8), curves))
    return Spread(1000 + 910 * layers, 2, rows)


def some_plan(seed: int = 0, size: float = 0.6) -> CondensePlan:
    spread = some_spread(seed)
    chosen = spread.solve(int(size * spread.parameters))
    return CondensePlan(layers_of(spread, chosen), config={"target_size": size, "seed": 0}, spread=spread)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("alike", [False, True])
def test_no_other_forms_are_better(seed: int, alike: bool) -> None:
    spread = some_spread(seed, 3)
    options = [layer.options() for layer in spread.layers]
    every = [dict(zip((1, 2, 3), choices, strict=True)) for choices in itertools.product(*options)]
    every = [choices for choices in every if not alike or len(set(choices.values())) == 1]
    for parameters in (1100, 1900, 2500, 3000, 3700, 9999):
        found = spread.solve(parameters, alike)
        size = 1000 + sum(own[choice][1] for own, choice in zip(options, found.values(), strict=True))
        assert spread.size(found) == size <= parameters
        fitting = [choices for choices in every if spread.size(choices) <= parameters]
        assert spread.effect(found) == pytest.approx(min(map(spread.effect, fitting)), rel=1e-12)
    with pytest.raises(ValueError, match=r"smallest model that this search can make has 1,090 parameters"):
        spread.solve(1089, alike)


def test_options_and_experts_that_stay() -> None:
    row = LayerCurves(3, 8, 910, 10, 0.5, [6, 2, 5], [Curve(0, 30, [0, 8], [0.9, 0.4]), Curve(2, 250, [8], [0.1])])
    assert row.options() == {
        Choice(8, 0): (0.0, 910),
        Choice(2, 8): (0.05, 330),
        Choice(0, 8): (0.2, 110),
        Choice(0, 0): (0.45, 30),
    }
    assert (row.stay(2), row.stay(0)) == ([2, 6], None)


def test_smaller_sizes_need_no_model(tmp_path: Path) -> None:
    plan = some_plan()
    plan.save(tmp_path / "plan.json")
    loaded = CondensePlan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert plan.spread is not None
    small = loaded.truncate(target_size=0.4)
    assert small.layers == some_plan(0, 0.4).layers
    assert (small.config, small.cut_from) == ({"target_size": 0.4, "seed": 0}, {"target_size": 0.6})
    assert CondensePlan.from_dict(small.to_dict()) == small
    assert small.truncate(target_size="2000 params").layers == small.truncate(target_size="4KB").layers
    plan_command(
        ["truncate", str(tmp_path / "plan.json"), "--target_size", ".4", "--output_file", f"{tmp_path}/s.json"]
    )
    assert CondensePlan.load(tmp_path / "s.json") == small
    for budget in ({"num_layers": 1}, {"num_experts": 2}, {"num_layers": 1, "target_size": 0.4}):
        with pytest.raises(ValueError, match="have no meaning for a size"):
            plan.truncate(**budget)
    with pytest.raises(ValueError, match="was not searched for a size"):
        replace(plan, spread=None).truncate(target_size=0.4)
    with pytest.raises(ValueError, match="smallest model that this search can make"):
        plan.truncate(target_size=0.1)
    assert plan.as_trimming("trim_layer").spread is None


def test_table() -> None:
    plan = some_plan()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in plan_table(plan).splitlines()]
    assert rows[0][:4] == ["decoder layer", "form", "experts", "dense neurons"]
    found = {int(row[0]): row for row in rows[2:]}
    assert list(found) == [1, 2, 3, 4]
    changed = {layer.layer: layer for layer in plan.layers}
    for layer, row in found.items():
        own = changed.get(layer)
        form = "untouched" if own is None else "mixed" if own.routed else "condensed"
        assert row[1:4] == [form, f"{8 if own is None else len(own.routed or ())} of 8", str(own.width if own else 0)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": [1, 1]}, "name some of 8 experts once"),
        ({"experts": [8]}, "name some of 8 experts once"),
        ({"curves": []}, "not empty"),
        ({"sensitivity": "high"}, "finite number"),
        ({"neuron": -1}, "whole number"),
        ({"curves": [{"routed": 9, "parameters": 1, "widths": [0], "errors": [0.1]}]}, "at most 8 experts"),
        ({"curves": [{"routed": 0, "parameters": 1, "widths": [8, 0], "errors": [0.1, 0.2]}]}, "ascend"),
        ({"curves": [{"routed": 0, "parameters": 1, "widths": [0], "errors": []}]}, "ascend"),
        ({"other": 1}, "unknown fields"),
    ],
)
def test_edited_plans(changes: dict[str, Any], message: str) -> None:
    values = some_plan().to_dict()
    values["spread"]["layers"][1] |= changes
    with pytest.raises(ValueError, match=message):
        CondensePlan.from_dict(values)
    doubled = asdict(some_spread(0))
    doubled["layers"][1]["layer"] = 1
    with pytest.raises(ValueError, match="once, by depth"):
        Spread.from_dict(doubled)


@pytest.mark.parametrize(
    ("text", "expected"),
    [(0.64, 640), ("0.6K params", 600), ("900 parameters", 900), ("1KB", 500), ("1KiB", 512), (0.999, 999)],
)
def test_sizes(text: Any, expected: int) -> None:
    assert read_target(text, 1000, 2) == expected
    config = CondenseConfig.best(target_size=text)
    assert CondenseConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("wrong", [0, 1, 24, 1.0, 0.0, 1.5, -0.5, True, "half", "0.5", "24", "24Gb", "0 params", []])
def test_unreadable_sizes(wrong: Any) -> None:
    with pytest.raises(ValueError, match="`target_size` should be a share of the sparse model's parameters"):
        CondenseConfig.best(target_size=wrong)


def test_fields_without_a_meaning() -> None:
    for name, value in (
        ("num_layers", 3),
        ("num_experts", 2),
        ("num_routed", 2),
        ("layers", [1]),
        ("form", "trim_layer"),
    ):
        with pytest.raises(ValueError, match=f"`{name}` has no meaning beside it"):
            CondenseConfig.best(target_size=0.5, **{name: value})
    with pytest.raises(ValueError, match=r"leave out \['num_layers'\]"):
        CondenseConfig.best(target_size=0.5).check_given({"num_layers", "target_size", "seed"})
    with pytest.raises(ValueError, match="needs a refit of single neurons"):
        check_methods(CondenseConfig(target_size=0.5))
    with pytest.raises(ValueError, match="only 'stock' is possible"):
        check_methods(CondenseConfig.best(target_size=0.5, exportable="dense"))
    check_methods(CondenseConfig.fast(target_size="24GB", exportable="stock"))
