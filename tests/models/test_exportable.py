"""`CondenseConfig.exportable`: the search chooses only layers with which the result can be exported."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel
from transformers.utils import logging
from transformers.utils.logging import warning_once

from cdmoe_plugin import (
    CondenseConfig,
    CondensePlan,
    apply_plan,
    condense_pretrained,
    export_dense,
    export_stock,
    search_plan,
)
from cdmoe_plugin.blocks import UnsupportedModelError, find_sparse_blocks
from cdmoe_plugin.condense.forms.patterns import broken_patterns
from cdmoe_plugin.export.check import check_export
from cdmoe_plugin.export.gguf import check_gguf, export_gguf
from cdmoe_plugin.export.restrict import exportable_groups
from cdmoe_plugin.scripts.plan import show
from tests.helpers.models import IDS, sparse_model
from tests.helpers.naive import close, distance, naive_double, run
from tests.helpers.tiny_models import tiny_model
from tests.helpers.trimming import trimmed_by_hand


def chosen(model: PreTrainedModel, **fields: Any) -> list[int]:
    config = CondenseConfig(num_experts=2, exportable="stock", **fields)
    return [row.layer for row in search_plan(model, config, calibration=IDS).layers]


@pytest.mark.parametrize(("model_type", "number"), [("deepseek_v3", 2), ("glm4_moe", 1), ("lfm2_moe", 2), ("afmoe", 2)])
@pytest.mark.parametrize("selection", ["greedy", "global", "similarity"])
def test_first_layers(model_type: str, number: int, selection: str, tmp_path: Path) -> None:
    model = sparse_model(model_type)
    config = CondenseConfig(number, 2, layer_selection=selection, exportable="stock")
    plan = search_plan(model, config, calibration=IDS)
    assert [row.layer for row in plan.layers] == list(range(1, number + 1))
    assert plan.config is not None
    assert plan.config["exportable"] == "stock"
    export_stock(apply_plan(model, plan), tmp_path)


def test_the_cost_is_that_of_the_free_choice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    model, config = sparse_model("deepseek_v3"), CondenseConfig(1, 2)
    free = search_plan(model, config, calibration=IDS)
    logging.enable_propagation()
    try:
        plan = search_plan(model, CondenseConfig(1, 2, exportable="stock"), calibration=IDS)
    finally:
        logging.disable_propagation()
    assert free.layer_divergences is not None
    assert plan.layer_divergences == free.layer_divergences
    assert plan.layers[0].score == close(free.layer_divergences[1])
    said = re.search(r"layers \[1\]: .* is (\S+), against (\S+) for the free choice, \[(\d)\]", caplog.text)
    assert said is not None
    assert float(said[1]) == pytest.approx(plan.layers[0].score, rel=1e-3)
    assert float(said[2]) == pytest.approx(free.layers[0].score, rel=1e-3)
    assert int(said[3]) == free.layers[0].layer
    assert free.restricted is None
    assert plan.restricted == {
        "divergence": plan.layers[0].score,
        "free_divergence": free.layers[0].score,
        "free_layers": [free.layers[0].layer],
    }
    plan.save(tmp_path / "plan.json")
    assert CondensePlan.load(tmp_path / "plan.json") == plan
    show([str(tmp_path / "plan.json")])
    assert f"against {free.layers[0].score:.3e} for the free choice of decoder layers" in capsys.readouterr().out
    assert plan.truncate(num_experts=1).restricted is None
    assert "restricted" not in free.to_dict()
    with pytest.raises(ValueError, match="`restricted` should have divergence, free_divergence, free_layers, but has"):
        CondensePlan.from_dict({**plan.to_dict(), "restricted": {"divergence": 1.0}})


def test_the_best_of_several_sets(tmp_path: Path) -> None:
    """ernie4_5_moe can mark the first layers, the last ones, or all but every n-th."""
    model = sparse_model("ernie4_5_moe")
    groups = exportable_groups(model, find_sparse_blocks(model), CondenseConfig(2, 2, exportable="stock"))
    assert groups is not None
    possible = groups(())
    for layers in combinations((1, 2, 3), 2):
        condensed = apply_plan(sparse_model("ernie4_5_moe"), search_plan(model, given(layers), calibration=IDS))
        try:
            export_stock(condensed, tmp_path / str(layers))
        except UnsupportedModelError:
            assert layers not in possible
        else:
            assert layers in possible
    scores = {layers: score_of(model, layers) for layers in possible}
    assert tuple(sorted(chosen(model, num_layers=2))) == min(scores, key=lambda layers: scores[layers])


def given(layers: tuple[int, ...]) -> CondenseConfig:
    return CondenseConfig(layers=list(layers), num_experts=2)


def score_of(model: PreTrainedModel, layers: tuple[int, ...]) -> float:
    """The divergence of the last hidden states with these layers condensed, computed without the layer search."""
    condensed = apply_plan(sparse_model("ernie4_5_moe"), search_plan(model, given(layers), calibration=IDS))
    return distance("js", run(naive_double(model), IDS, "hidden"), run(naive_double(condensed), IDS, "hidden"))


def trimmed_score(model: PreTrainedModel, layers: tuple[int, ...]) -> float:
    double = naive_double(model)
    target = run(double, IDS, "hidden")
    with trimmed_by_hand(double, "trim_block", layers):
        return distance("js", target, run(double, IDS, "hidden"))


def test_any_layers_stay_free() -> None:
    model = sparse_model("qwen3_moe")
    assert chosen(model, num_layers=2) == [
        row.layer for row in search_plan(model, CondenseConfig(2, 2), calibration=IDS).layers
    ]


def test_whole_periods_of_dropped_blocks(tmp_path: Path) -> None:
    layers = chosen(tiny_model("gpt_oss", num_layers=6), form="trim_block", num_layers=2)
    model = tiny_model("gpt_oss", num_layers=6)
    assert broken_patterns(model.config, 6, layers) == {}
    assert layers[1] == layers[0] + 1
    scores = {pair: trimmed_score(model, pair) for pair in [(i, i + 1) for i in range(5)]}
    assert tuple(layers) == min(scores, key=lambda pair: scores[pair])
    config = CondenseConfig(2, form="trim_block", exportable="stock")
    export_stock(condense_pretrained(model, config, calibration=IDS), tmp_path)
    with pytest.raises(ValueError, match=r"`num_layers` is 3, but .* whole periods of 2 layers"):
        chosen(tiny_model("gpt_oss", num_layers=6), form="trim_block", num_layers=3)
    assert len(chosen(tiny_model("mixtral"), form="trim_block", num_layers=1)) == 1  # no pattern


def test_dense_needs_all_layers(tmp_path: Path) -> None:
    model = sparse_model("mixtral")
    with pytest.raises(ValueError, match=r"needs all 4 sparse layers condensed, but `num_layers` is 3\. Set"):
        search_plan(model, CondenseConfig(3, 2, exportable="dense"), calibration=IDS)
    plan = search_plan(model, CondenseConfig(4, 2, exportable="dense"), calibration=IDS)
    export_dense(apply_plan(model, plan), tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"olmoe.*no dense sibling"):
        search_plan(sparse_model("olmoe"), CondenseConfig(4, 2, exportable="dense"), calibration=IDS)
    search_plan(sparse_model("olmoe"), CondenseConfig(4, 2, exportable="top_k"), calibration=IDS)


def test_what_llama_cpp_reads(tmp_path: Path) -> None:
    """The first layers, also where the architecture's own config could mark others."""
    sparse_model("ernie4_5_moe").save_pretrained(tmp_path / "base")
    config = CondenseConfig(2, 2, exportable="gguf")
    plan = search_plan(sparse_model("ernie4_5_moe"), config, calibration=IDS)
    assert [row.layer for row in plan.layers] == [1, 2]
    check_gguf(tmp_path / "base", config)
    check_gguf(tmp_path / "base", plan)
    written = export_gguf(apply_plan(sparse_model("ernie4_5_moe"), plan), tmp_path / "first")
    assert written.fields["moe_layer_start_index"] == 3
    last = search_plan(sparse_model("ernie4_5_moe"), given((3,)), calibration=IDS)
    export_stock(apply_plan(sparse_model("ernie4_5_moe"), last), tmp_path / "last")
    with pytest.raises(
        UnsupportedModelError, match=r"only as the first ones, \[1\], but the condensed layers are \[3\]"
    ):
        export_gguf(apply_plan(sparse_model("ernie4_5_moe"), last), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    with pytest.raises(UnsupportedModelError, match="only as the first ones"):
        check_gguf(tmp_path / "base", last)
    with pytest.raises(UnsupportedModelError, match="set `exportable='gguf'`"):
        check_gguf(tmp_path / "base", CondenseConfig(2, 2, exportable="stock"))


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        ("qwen3_moe", {"num_layers": 2, "exportable": "gguf"}, "does not read partly condensed models of type 'qwen3"),
        ("mixtral", {"num_layers": 2}, "has no field for dense layers"),
        ("granitemoehybrid", {"num_layers": 2}, "can only describe 4 condensed layers"),
        ("deepseek_v3", {"layers": [2]}, "`first_k_dense_replace` can only mark the first layers"),
        ("gpt_oss", {"layers": [1], "form": "trim_block"}, "break the pattern of .'layer_types'"),
        (
            "mixtral",
            {"num_layers": 2, "exportable": "onnx"},
            "`exportable` is 'onnx', but only",
        ),
        ("mixtral", {"num_layers": 1, "exportable": "dense", "form": "trim_block"}, "needs `form='condense'`"),
    ],
)
def test_refused_before_the_search(model_type: str, fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    sparse_model(model_type).save_pretrained(tmp_path)
    config = CondenseConfig(num_experts=2, **{"exportable": "stock", **fields})
    with pytest.raises(ValueError, match=message):
        condense_pretrained(tmp_path, config, calibration="no-such-file.txt")


def test_a_free_search_for_blocks_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    warning_once.cache_clear()
    logging.enable_propagation()
    try:
        for model_type in ("gpt_oss", "mixtral"):
            config = CondenseConfig(1, form="trim_block", layer_selection="similarity")
            search_plan(sparse_model(model_type), config, calibration=IDS)
            assert "`layer_types` of the config give the layers a pattern" in caplog.text
            assert len([record for record in caplog.records if "a pattern" in record.getMessage()]) == 1
    finally:
        logging.disable_propagation()


def test_the_check_before_a_search_agrees(tmp_path: Path) -> None:
    sparse_model("deepseek_v3").save_pretrained(tmp_path)
    check_export(tmp_path, CondenseConfig(2, 2, exportable="stock"))
    with pytest.raises(UnsupportedModelError, match=r"with `exportable='stock'`"):
        check_export(tmp_path, CondenseConfig(2, 2))


def test_of_a_wrong_type() -> None:
    with pytest.raises(ValueError, match="`exportable` should be a name"):
        CondenseConfig(exportable=1)  # type: ignore[arg-type]
