"""Exports for readers other than today's transformers: older spellings, fields that contradict each other, warnings."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import logging

from cdmoe_plugin import CondenseConfig, apply_plan, export_stock
from cdmoe_plugin.blocks import UnsupportedModelError
from cdmoe_plugin.condense.forms.patterns import broken_patterns, period_of
from cdmoe_plugin.export.check import check_export
from cdmoe_plugin.export.stock_config import stock_model_of
from tests.helpers.exporting import CASES, condensed
from tests.helpers.plans import some_plan
from tests.helpers.tiny_models import tiny_config, tiny_model
from tests.helpers.trimming import trim_plan

WHOLE = {name: layers for name, layers in CASES if name not in ("qwen3_omni_moe_text", "deepseek_ocr2_text")}


def written(model: Any, folder: Path) -> dict[str, Any]:
    export_stock(model, folder)
    return json.loads((folder / "config.json").read_text())


# --- spellings ---


@pytest.mark.parametrize(
    ("model_type", "overrides", "fields"),
    [
        ("qwen3_moe", {"rope_theta": 1e6}, {"rope_theta": 1e6, "rope_scaling": None, "num_experts": 8}),
        ("glm4_moe", {}, {"rope_theta": 10000.0, "partial_rotary_factor": 0.5, "n_routed_experts": 8}),
        ("mellum", {}, {"rope_theta": 500000.0, "swa_rope_theta": 10000.0, "num_experts": 8, "num_local_experts": 8}),
        ("mimo_v2_flash", {}, {"moe_layer_freq": [0, 0, 1, 1], "hybrid_layer_pattern": [0, 1, 1, 1]}),
        ("kimi_linear", {}, {"first_k_dense_replace": 2}),
        ("ernie4_5_moe", {}, {"rope_theta": 500000.0, "moe_num_experts": 8}),
    ],
)
def test_older_spellings(model_type: str, overrides: Any, fields: dict[str, Any], tmp_path: Path) -> None:
    found = written(condensed(model_type, [1], **overrides), tmp_path)
    assert {name: found.get(name, "missing") for name in fields} == fields
    assert found["torch_dtype"] == found["dtype"] == "float32"


def test_scaled_rotary_embeddings(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 16.0}
    model = condensed("deepseek_v3", [1], rope_parameters={**yarn, "rope_theta": 5e5})
    found = written(model, tmp_path)
    assert found["rope_theta"] == 5e5
    assert {name: found["rope_scaling"][name] for name in yarn} == yarn
    assert found["rope_scaling"]["type"] == "yarn"
    assert "rope_theta" not in found["rope_scaling"]


@pytest.mark.parametrize("model_type", WHOLE)
def test_transformers_reads_the_same_config(model_type: str, tmp_path: Path) -> None:
    model = condensed(model_type, WHOLE[model_type])
    found, again = written(model, tmp_path), type(model)._base_class.config_class.from_pretrained(tmp_path)
    own = model.config.to_dict()
    changed = {
        "architectures",
        "model_type",
        "condense_config",
        "_name_or_path",
        "dtype",
        *stock_model_of(model).fields,
    }
    rope, kept = again.to_dict().get("rope_parameters"), own.get("rope_parameters")
    assert {name: value for name, value in again.to_dict().items() if name in own and name not in changed} | {
        "rope_parameters": rope and {name: rope[name] for name in kept}
    } == {name: value for name, value in own.items() if name not in changed} | {"rope_parameters": kept}
    if kept and "rope_theta" in kept:
        assert found["rope_theta"] == kept["rope_theta"]


# --- fields that other readers read beside the marker ---


@pytest.mark.parametrize(("layers", "step"), [([1, 2, 3], 0), ([2], 2)])
def test_step_of_llama4(layers: list[int], step: int, tmp_path: Path) -> None:
    found = written(condensed("llama4_text", layers), tmp_path)
    sparse = [] if not step else [i for i in range(4) if not (i + 1) % step]
    assert found["moe_layers"] == sparse
    assert found["interleave_moe_layer_step"] == step


def test_fully_dense_ernie(tmp_path: Path) -> None:
    found = written(condensed("ernie4_5_moe", [1, 2, 3]), tmp_path)
    names = ("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval")
    assert [found[name] for name in names] == [4, 4, 1]


def test_flags_of_the_base_checkpoint(tmp_path: Path) -> None:
    """A field of the base checkpoint's own config.json that transformers keeps without reading it."""
    model = tiny_model("mimo_v2_flash")
    model.config.moe_layer_freq = [0, 1, 1, 1]
    model.config.first_k_dense_replace = 1
    found = written(apply_plan(model, some_plan([2, 1])), tmp_path)
    assert found["moe_layer_freq"] == [0, 0, 0, 1]
    assert found["first_k_dense_replace"] == 3


@pytest.mark.parametrize(
    ("model_type", "layers", "named"),
    [
        ("llama4_text", [1], "`interleave_moe_layer_step` (1) can't say. vLLM, SGLang, llama.cpp and mlx-lm"),
        ("qwen3_moe", [2], "`mlp_only_layers` of the exported config names the dense layers [0, 2]. llama.cpp's"),
        ("llama4_text", [2], None),
        ("llama4_text", [1, 2, 3], None),
        ("deepseek", [1, 3], None),
        ("ernie4_5_moe", [1, 2, 3], None),
    ],
)
def test_warnings(
    model_type: str, layers: list[int], named: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logging.enable_propagation()
    try:
        export_stock(condensed(model_type, layers), tmp_path)
    finally:
        logging.disable_propagation()
    said = "\n".join(record.getMessage() for record in caplog.records if "exported config" in record.getMessage())
    assert said == "" if named is None else named in said


# --- patterns over the layers ---


def test_periods() -> None:
    assert [period_of(kinds) for kinds in ("aaaa", "abab", "aaba", "aab", "abaab")] == [1, 2, 3, 3, 3]
    config = tiny_config("gpt_oss", num_layers=6)
    assert broken_patterns(config, 6, [1]) == {"layer_types": 2}
    assert broken_patterns(config, 6, [0, 3]) == {"layer_types": 2}
    for dropped in ([0, 1], [1, 2], [5], [1, 4], [0, 1, 3, 4]):
        kinds = [config.layer_types[i] for i in range(6) if i not in dropped]
        assert (broken_patterns(config, 6, dropped) == {}) == (kinds == config.layer_types[: len(kinds)])


@pytest.mark.parametrize(
    ("model_type", "broken", "kept", "fields"),
    [
        ("gpt_oss", [1], [1, 2], ["layer_types"]),
        ("llama4_text", [2], [1, 2, 3, 4], ["layer_types", "no_rope_layers"]),
        ("qwen3_next", [3], [3, 4], ["layer_types"]),
        ("mixtral", None, [2], []),
        ("deepseek_v3", None, [2, 4], []),
    ],
)
def test_dropped_blocks_that_break_a_pattern(
    model_type: str, broken: list[int] | None, kept: list[int], fields: list[str], tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        whole = apply_plan(tiny_model(model_type, num_layers=6), trim_plan("trim_block", kept))
    export_stock(whole, tmp_path / "whole")
    if broken is None:
        return
    plan = trim_plan("trim_block", broken)
    with pytest.warns(UserWarning, match="llama.cpp") as caught:
        model = apply_plan(tiny_model(model_type, num_layers=6), plan)
    assert all(f"`{name}`" in str(caught[0].message) for name in fields)
    with pytest.raises(UnsupportedModelError, match=f"break the pattern of .*`{fields[0]}`"):
        export_stock(model, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(UnsupportedModelError, match="break the pattern"):  # trimming again mends nothing
        export_stock(apply_plan(model, trim_plan("trim_block", [4])), tmp_path / "refused")


def test_patterns_are_checked_before_the_search(tmp_path: Path) -> None:
    tiny_model("gpt_oss").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"`layer_types`.*pattern of 2 layers"):
        check_export(tmp_path, CondenseConfig(layers=[2], form="trim_block"))
    check_export(tmp_path, CondenseConfig(layers=[2, 1], form="trim_block"))
