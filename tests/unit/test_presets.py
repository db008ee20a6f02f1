"""Presets: what they set is in one table of the documentation, and the command line takes them as defaults."""

from __future__ import annotations

from pathlib import Path

import pytest

from cdmoe_plugin import CondenseConfig, CondensePlan
from cdmoe_plugin.presets import PRESETS
from cdmoe_plugin.scripts import condense
from cdmoe_plugin.scripts.estimate import requested
from cdmoe_plugin.scripts.parsing import given_fields
from cdmoe_plugin.search.check import check_methods
from tests.helpers.plans import some_plan

PAGE = Path(__file__).parents[2] / "docs" / "condense.md"


def on_the_command_line(*words: object) -> tuple[CondensePlan | None, CondenseConfig]:
    parser = condense.make_parser()
    args, search = parser.parse_args_and_config(["--model_name_or_path", "some/model", *map(str, words)])
    return requested(args, given_fields(search), args.calibration)


def test_the_table_is_true() -> None:
    lines = PAGE.read_text(encoding="utf-8").split("## Presets")[1].split("## ")[0].splitlines()
    header, _, *rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    assert sorted(header[1:]) == sorted(PRESETS)
    for column, name in enumerate(header[1:], start=1):
        config = getattr(CondenseConfig, name)()
        assert PRESETS[name].items() <= config.to_dict().items()
        check_methods(config)
        for row in rows:
            if row[column]:
                assert row[column] == str(PRESETS[name][row[0]])
            else:  # no effect
                assert PRESETS[name].get(row[0]) is None
    assert {row[0] for row in rows} == {field for preset in PRESETS.values() for field in preset}


def test_the_paper_fits_nothing_and_the_others_do() -> None:
    paper, best, fast = CondenseConfig.paper(), CondenseConfig.best(), CondenseConfig.fast()
    assert (paper.refit, paper.searches_experts) == (None, True)
    assert (best.refit, best.refit_neurons, best.searches_experts) == ("distill", "least_squares", False)
    assert (fast.refit, fast.refit_neurons, fast.searches_experts) == ("down_proj", "energy", False)


def test_other_values() -> None:
    assert CondenseConfig.best(num_layers=3, seed=5) == CondenseConfig(
        **{**PRESETS["best"], "num_layers": 3, "seed": 5}
    )
    assert CondenseConfig.fast(layers=[4, 2]).num_layers == 2
    assert CondenseConfig.paper(batch_size=3).batch_size == 3
    with pytest.raises(TypeError, match="layer_number"):
        CondenseConfig.paper(layer_number=3)


@pytest.mark.parametrize("name", list(PRESETS))
def test_command_line(name: str) -> None:
    assert on_the_command_line("--preset", name) == (None, getattr(CondenseConfig, name)())
    _, config = on_the_command_line("--preset", name, "--num_experts", 2, "--num_samples", 7, "--refit", "distill")
    assert config == getattr(CondenseConfig, name)(num_experts=2, num_samples=7, refit="distill")


def test_a_plan_is_fitted_as_the_preset_says(tmp_path: Path) -> None:
    some_plan([1, 2]).save(tmp_path / "plan.json")
    found, config = on_the_command_line("--plan", tmp_path / "plan.json", "--preset", "fast", "--calibration", "a.txt")
    assert found == some_plan([1, 2])
    assert config == CondenseConfig.fast()
    _, config = on_the_command_line("--plan", tmp_path / "plan.json", "--preset", "best", "--num_samples", 5)
    assert config == CondenseConfig.best(num_samples=5)
    with pytest.raises(ValueError, match="preset"):
        on_the_command_line("--plan", tmp_path / "plan.json", "--preset", "paper")
    with pytest.raises(ValueError, match="`--preset` is 'fastest', but only 'paper', 'best', 'fast' exist"):
        on_the_command_line("--preset", "fastest")
    _, config = on_the_command_line()
    assert config == CondenseConfig()
