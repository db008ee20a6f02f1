"""Plans: files in and out, smaller budgets, the authors' files, and whatever somebody may have edited."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cdmoe_plugin import CondenseConfig, CondensedLayer, CondensePlan
from cdmoe_plugin.shapes import ModelShape, SparseLayerShape
from tests.helpers.broken_json import ODD, RAW, edited, places, written

LAYERS = [
    CondensedLayer(2, [4, 0, 7], [0.25, 0.125, 0.1], 0.011, [0.09, 0.05, 0.04, 0.03], [40, 9, 0]),
    CondensedLayer(3, [1, 6, 2], [0.3, 1 / 3, 0.05], 0.024, [0.08, 0.06, 0.05, 0.01]),
    CondensedLayer(1, [5, 3, 0], [0.2, 0.4, -0.1], 0.05, [0.07, 0.02, 0.04, 0.03]),
]
MODEL = ModelShape("qwen2_moe", 4, 32, [SparseLayerShape(layer, 8, 16, 24) for layer in (1, 2, 3)])
PLAN = CondensePlan(
    LAYERS,
    MODEL,
    CondenseConfig(num_layers=3, num_experts=3).to_dict(),
    {"source": "token ids", "num_samples": 8, "num_tokens": 100, "fingerprint": "a0"},
    {1: 0.04, 2: 0.011, 3: 0.013},
)


def test_save_and_load(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "condense_plan.json")
    assert [path.name for path in tmp_path.iterdir()] == ["condense_plan.json"]
    assert CondensePlan.load(tmp_path / "condense_plan.json") == PLAN
    assert CondensePlan.load(str(tmp_path)) == PLAN  # a checkpoint's folder
    on_disk = json.loads((tmp_path / "condense_plan.json").read_text())
    assert on_disk["layers"][1]["gates"] == [0.3, 1 / 3, 0.05]
    assert on_disk["layer_divergences"] == {"1": 0.04, "2": 0.011, "3": 0.013}
    assert CondensePlan.from_dict(on_disk) == PLAN
    (bare := CondensePlan([CondensedLayer(1, [], [])])).save(tmp_path / "bare.json")
    assert CondensePlan.load(tmp_path / "bare.json") == bare
    with pytest.raises(FileNotFoundError):
        CondensePlan.load(tmp_path / "none.json")


def test_a_checkpoint_with_its_plan_in_config_json_alone(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"condense_config": {"plan": PLAN.to_dict()}}))
    assert CondensePlan.load(tmp_path) == PLAN
    PLAN.truncate(num_layers=1).save(tmp_path / "condense_plan.json")
    assert CondensePlan.load(tmp_path) == PLAN.truncate(num_layers=1)
    (tmp_path / "condense_plan.json").unlink()
    for values in ({}, {"condense_config": None}, {"condense_config": {"plan": None}}):
        config.write_text(json.dumps(values))
        with pytest.raises(FileNotFoundError, match=r"condense_plan\.json"):
            CondensePlan.load(tmp_path)
    for text in ("{", "[]", '{"condense_config": 1}', '{"condense_config": {"plan": []}}'):
        config.write_text(text)
        with pytest.raises(ValueError, match=r"config\.json is not a valid condense plan"):
            CondensePlan.load(tmp_path)


def test_tokens_of_kept_experts(tmp_path: Path) -> None:
    rows = PLAN.to_dict()["layers"]
    assert rows[0]["tokens"] == [40, 9, 0]
    # A plan without them is the file that version 0.1 wrote.
    assert list(rows[1]) == ["layer", "experts", "gates", "score", "expert_scores"]
    assert CondensePlan.load(Path(__file__).parents[1] / "data" / "checkpoint_0_1").layers[0].tokens is None
    for wrong, message in (([1, 2], "3 experts but 2 counts"), ([1, 2, -3], "whole number"), (5, "should be a list")):
        with pytest.raises(ValueError, match=message):
            CondensedLayer.from_dict({**rows[0], "tokens": wrong})


def test_experts_that_stay_and_a_width(tmp_path: Path) -> None:
    rows = PLAN.layers
    plan = replace(PLAN, layers=[replace(rows[0], routed=[0, 5], width=24), *rows[1:]])
    plan.save(tmp_path / "plan.json")
    assert CondensePlan.load(tmp_path / "plan.json") == plan
    assert (plan.truncate(num_experts=1).layers[0].routed, plan.truncate(num_experts=1).layers[0].width) == (
        [0, 5],
        None,
    )
    row = plan.layers[0].to_dict()
    for changes, message in (
        ({"routed": [5, 0]}, "ascending"),
        ({"routed": []}, "ascending"),
        ({"routed": [1, 1]}, "once"),
        ({"routed": 3}, "should be a list"),
        ({"width": -1}, "whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            CondensedLayer.from_dict({**row, **changes})
    with pytest.raises(ValueError, match=r"experts \[99\]"):
        replace(PLAN, layers=[replace(rows[0], routed=[0, 99])])


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    PLAN.save(path)
    with pytest.raises(ValueError, match="JSON"):
        replace(PLAN, calibration={"source": float("nan")}).save(path)
    assert CondensePlan.load(path) == PLAN
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


def test_truncate() -> None:
    small = PLAN.truncate(num_layers=2, num_experts=1)
    assert [(row.layer, row.experts, row.gates) for row in small.layers] == [(2, [4], [0.25]), (3, [1], [0.3])]
    assert [row.expert_scores for row in small.layers] == [[0.09, 0.05], [0.08, 0.06]]
    assert [row.score for row in small.layers] == [None, None]  # measured with more experts
    assert [row.tokens for row in small.layers] == [[40], None]
    assert small.layer_divergences is None
    assert (small.config["num_layers"], small.config["num_experts"]) == (2, 1)
    assert small.model == MODEL
    assert small == PLAN.truncate(num_experts=1).truncate(num_layers=2)
    before = {"num_layers": 3, "num_experts": 3, "expert_budget": None}
    again = PLAN.truncate(num_experts=1).truncate(num_layers=2)
    assert small.cut_from == again.cut_from == CondensePlan.from_dict(small.to_dict()).cut_from == before
    assert "cut_from" not in PLAN.to_dict()
    assert PLAN.truncate(3, 3) == PLAN.truncate() == PLAN
    assert PLAN.truncate(num_layers=1).layers == LAYERS[:1]
    assert PLAN.truncate(num_layers=1).layer_divergences == PLAN.layer_divergences
    assert [row.experts for row in PLAN.truncate(num_experts=0).layers] == [[], [], []]
    named = replace(PLAN, config={**PLAN.config, "layers": [2, 3, 1]}).truncate(num_layers=2)
    assert CondenseConfig.from_dict(named.config).layers == [2, 3]
    assert (len(PLAN.layers[0].experts), PLAN.config["num_layers"]) == (3, 3)  # it is as it was


@pytest.mark.parametrize("wrong", [{"num_layers": 4}, {"num_layers": 0}, {"num_experts": 4}, {"num_experts": -1}])
@pytest.mark.parametrize("kind", [int, float, str])
def test_truncate_to_more_than_there_is(wrong: dict[str, int], kind: type) -> None:
    with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` should be between"):
        PLAN.truncate(**{name: kind(value) for name, value in wrong.items()})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mixtral"}, "its model_type is 'qwen2_moe', this model's is 'mixtral'"),
        ({"num_hidden_layers": 5}, "its num_hidden_layers is 4, this model's is 5"),
        ({"hidden_size": 64}, "its hidden_size is 32, this model's is 64"),
        ({"sparse_layers": MODEL.sparse_layers[:2]}, "it has SparseLayerShape"),
    ],
)
def test_a_plan_for_another_model(changes: dict[str, Any], message: str) -> None:
    PLAN.check_fits(MODEL)
    with pytest.raises(ValueError, match=f"made for another model: {message}"):
        PLAN.check_fits(replace(MODEL, **changes))


def test_a_plan_of_unknown_origin_must_name_what_is_there() -> None:
    plan = replace(PLAN, model=None)
    plan.check_fits(MODEL)
    with pytest.raises(ValueError, match=r"decoder layer 1, which is not a sparse layer .* sparse layers are \[2, 3\]"):
        plan.check_fits(replace(MODEL, sparse_layers=MODEL.sparse_layers[1:]))
    small = [SparseLayerShape(layer, 6, 16, 24) for layer in (1, 2, 3)]
    with pytest.raises(ValueError, match=r"experts \[7\] of decoder layer 2, which has 6 \(0 to 5\)"):
        plan.check_fits(replace(MODEL, sparse_layers=small))
    with pytest.raises(ValueError, match=r"experts \[7\] of decoder layer 2"):
        CondensePlan(LAYERS, replace(MODEL, sparse_layers=small))
    with pytest.raises(ValueError, match=r"\[2\] more than once"):
        CondensePlan([*LAYERS, LAYERS[0]])
    with pytest.raises(ValueError, match="no layer"):
        CondensePlan([])


# --- the authors' files: sparse layers count from 0 there ---

WEIGHTS = {
    f"{layer}-{expert}": [100.0 * layer + expert, 400, (100.0 * layer + expert) / 400]
    for layer in range(3)
    for expert in range(4)
    if (layer, expert) != (1, 3)  # no token chose it
}
EXPERTS = {"0": [2, 0], "1": [1, 0], "2": [3, 1]}
ORDER = [2, 0, 1]


@pytest.mark.parametrize("first", [0, 1, 3])
def test_from_reference(first: int, tmp_path: Path) -> None:
    files = {"expert_weights": WEIGHTS, "expert_order": EXPERTS, "layer_order": ORDER}
    for name, values in files.items():
        (tmp_path / name).write_text(json.dumps(values))
    plan = CondensePlan.from_reference(**{name: tmp_path / name for name in files}, first_sparse_layer=first)
    expected = [
        CondensedLayer(2 + first, [3, 1], [203 / 400, 201 / 400], tokens=[400, 400]),
        CondensedLayer(0 + first, [2, 0], [2 / 400, 0.0], tokens=[400, 400]),
        CondensedLayer(1 + first, [1, 0], [101 / 400, 100 / 400], tokens=[400, 400]),
    ]
    assert plan == CondensePlan(expected) == CondensePlan.from_reference(**files, first_sparse_layer=first)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_order": [0, 3]}, "no list of experts for layer 3"),
        ({"layer_order": [0, "1"]}, "layer '1'"),
        ({"layer_order": [0, 1.0]}, "layer 1.0"),
        ({"layer_order": [0, 0]}, "more than once"),
        ({"layer_order": {"0": 1}}, "`layer_order` should hold a list"),
        ({"layer_order": []}, "no layer"),
        ({"expert_order": {**EXPERTS, "1": [1, 3]}}, "expert 3 of layer 1: no token chose it"),
        ({"expert_order": {**EXPERTS, "1": [1, 1]}}, "more than once"),
        ({"expert_order": {**EXPERTS, "1": 5}}, "no list of experts for layer 1"),
        ({"expert_order": [[2, 0]]}, "`expert_order` should hold a dict"),
        ({"expert_weights": {**WEIGHTS, "1-1": [1.0, 2]}}, "expert 1 of layer 1"),
        ({"expert_weights": {**WEIGHTS, "1-1": [1, 2, None]}}, "expert 1 of layer 1"),
        ({"expert_weights": {**WEIGHTS, "1-1": [1, 2, "a"]}}, "expert 1 of layer 1"),
        ({"expert_weights": {**WEIGHTS, "1-1": [1.0, 2, float("nan")]}}, "finite"),
    ],
)
def test_from_files_that_do_not_belong_together(changes: dict[str, Any], message: str) -> None:
    files = {"expert_weights": WEIGHTS, "expert_order": EXPERTS, "layer_order": ORDER, **changes}
    with pytest.raises(ValueError, match=message):
        CondensePlan.from_reference(**files)


def understood_or_refused(text: str, path: Path) -> None:
    path.write_text(text)
    try:
        plan = CondensePlan.load(path)
    except ValueError:
        return
    plan.save(path)
    assert CondensePlan.load(path) == plan


@pytest.mark.parametrize("field", ["version", "layers", "model", "layer_divergences", "config", "calibration"])
def test_any_one_change_is_understood_or_refused(field: str, tmp_path: Path) -> None:
    for *path, key in places({field: PLAN.to_dict()[field]})[1:]:
        for odd in [*ODD, *RAW, "@delete"]:
            values = json.loads(json.dumps(PLAN.to_dict()))
            holder = values
            for step in path:
                holder = holder[step]
            holder[key] = odd
            if odd == "@delete":
                del holder[key]
            understood_or_refused(written(values), tmp_path / "edited.json")


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(values=edited(PLAN.to_dict()))
def test_any_changes_are_understood_or_refused(values: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    understood_or_refused(written(values), tmp_path_factory.getbasetemp() / "edited.json")


@settings(max_examples=100, deadline=None, derandomize=True)
@given(content=st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-16")))
def test_any_other_file_is_refused(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    (path := tmp_path_factory.getbasetemp() / "other.json").write_bytes(content)
    with pytest.raises(ValueError, match="not a valid condense plan"):
        CondensePlan.load(path)
