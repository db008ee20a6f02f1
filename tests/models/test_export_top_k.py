"""Fully condensed models written as sparse ones whose tokens all choose the same K experts with the same weights."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from cdmoe_plugin import CondenseConfig, apply_plan
from cdmoe_plugin.blocks import UnsupportedModelError
from cdmoe_plugin.export.top_k import check_top_k, export_top_k
from cdmoe_plugin.model.lookup import condensed_layers
from cdmoe_plugin.registry import EXPORT_TARGETS
from tests.helpers.exporting import NOT_TOP_K, opened, output, same
from tests.helpers.models import TYPES, sparse_model
from tests.helpers.programs import Programs
from tests.helpers.states import differing, state_of
from tests.helpers.tiny_models import tiny_model
from tests.helpers.trimming import trim_plan
from tests.models.test_export_dense import difference, fully_condensed


@pytest.mark.parametrize("model_type", ["deepseek", *(name for name in TYPES if name not in NOT_TOP_K)])
def test_exact(model_type: str, tmp_path: Path) -> None:
    model = fully_condensed(model_type, uneven=model_type != "phimoe")  # phimoe's router always takes two experts
    before, expected = state_of(model), output(model)
    report = export_top_k(model, tmp_path)
    tensors, rest = state_of(model)
    assert differing(before[0], tensors) == []
    assert rest == before[1]
    sparse = opened(model, tmp_path)
    assert sparse.config.model_type == report.model_type
    assert max(report.fields.values()) == (2 if model_type in ("phimoe", "jamba") else 3)  # jamba has two sparse layers
    assert report.parameters == sparse.num_parameters()
    assert difference(output(sparse), expected) < 2e-6


@pytest.mark.parametrize(("model_type", "count"), [("gpt_oss", 2), ("qwen2_moe", 3), ("deepseek_v3", 2)])
def test_experts_and_routers(model_type: str, count: int, tmp_path: Path) -> None:
    """Read from the checkpoint itself: routers of zeros, K experts, and zeros where a layer kept fewer."""
    model = fully_condensed(model_type, uneven=count == 3)
    export_top_k(model, tmp_path)
    sparse = opened(model, tmp_path)
    for layer, mlp in condensed_layers(model).items():
        block = sparse.model.layers[layer].mlp
        router = block.router if model_type == "gpt_oss" else block.gate
        assert not router.weight.any()
        assert len(block.experts.down_proj) == count
        kept = (mlp.intermediate_size - mlp.shared_intermediate_size) // 16
        assert [bool(expert.any()) for expert in block.experts.down_proj] == [i < kept for i in range(count)]
    if model_type == "qwen2_moe":
        gate = sparse.model.layers[1].mlp.shared_expert_gate.weight
        assert torch.equal(gate, condensed_layers(model)[1].shared_expert_gate.weight)


def test_weights_by_hand(tmp_path: Path) -> None:
    """Three experts of mixtral weigh a third each."""
    model = fully_condensed("mixtral", uneven=True)
    export_top_k(model, tmp_path)
    experts, mlp = opened(model, tmp_path).model.layers[2].mlp.experts, condensed_layers(model)[2]
    for expert in range(3):
        own = slice(16 * expert, 16 * expert + 16)
        assert torch.equal(
            experts.gate_up_proj[expert], torch.cat([mlp.gate_proj.weight[own], mlp.up_proj.weight[own]])
        )
        torch.testing.assert_close(experts.down_proj[expert], 3 * mlp.down_proj.weight[:, own])


@pytest.mark.parametrize(("model_type", "bias"), [("ernie4_5_moe", "use_bias"), ("hy_v3", "mlp_bias"), ("jamba", "")])
def test_biases(model_type: str, bias: str, tmp_path: Path) -> None:
    model = fully_condensed(model_type, True, **({bias: True} if bias else {"dense_layers": 1}))
    export_top_k(model, tmp_path)
    assert same(output(opened(model, tmp_path)), output(model))


def test_bfloat16(tmp_path: Path) -> None:
    model = fully_condensed("qwen2_moe", uneven=True).to(torch.bfloat16)
    export_top_k(model, tmp_path)
    sparse = opened(model, tmp_path)
    assert sparse.dtype == torch.bfloat16
    assert difference(output(sparse).float(), output(model).float()) < 1e-2


def test_trimmed_mlps(tmp_path: Path) -> None:
    model = apply_plan(sparse_model("olmoe"), trim_plan("trim_layer", [0, 1, 2, 3]))
    assert set(export_top_k(model, tmp_path).fields.values()) == {1}
    assert same(output(opened(model, tmp_path)), output(model))


@pytest.mark.parametrize("model_type", NOT_TOP_K)
def test_refused(model_type: str, tmp_path: Path) -> None:
    model = fully_condensed(model_type)
    with pytest.raises(UnsupportedModelError, match=r"constant weights|no number of experts|can't hold|does not run"):
        export_top_k(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_layers_that_are_sparse_still(tmp_path: Path) -> None:
    model: PreTrainedModel = apply_plan(sparse_model("olmoe"), trim_plan("trim_layer", [1, 3]))
    with pytest.raises(UnsupportedModelError, match=r"decoder layers \[0, 2\] are sparse still"):
        export_top_k(model, tmp_path)
    with pytest.raises(ValueError, match="is not condensed"):
        export_top_k(sparse_model("olmoe"), tmp_path)
    with pytest.raises(ValueError, match="`approximate` does nothing here"):
        EXPORT_TARGETS["top_k"].write(fully_condensed("olmoe"), tmp_path, True)


def test_before_a_search(tmp_path: Path) -> None:
    for model_type in ("olmoe", "jetmoe", "qwen2_moe"):
        tiny_model(model_type).save_pretrained(tmp_path / model_type)
    check_top_k(tmp_path / "olmoe", CondenseConfig(4, 2))
    check_top_k(tmp_path / "qwen2_moe", CondenseConfig(3, 2))
    with pytest.raises(UnsupportedModelError, match=r"`num_layers` is 2"):
        check_top_k(tmp_path / "olmoe", CondenseConfig(2, 2))
    with pytest.raises(UnsupportedModelError, match="can't hold this condensed model"):
        check_top_k(tmp_path / "jetmoe", CondenseConfig(4, 2))


def test_command(tmp_path: Path, programs: Programs) -> None:
    model = fully_condensed("gpt_oss", uneven=True)
    model.save_pretrained(tmp_path / "condensed")
    command: list[Any] = [programs.folder / "cdmoe", "export", tmp_path / "condensed", "--to", "top_k"]
    command += ["--output_dir", tmp_path / "out"]
    run = subprocess.run(command, env=programs.environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_local_experts"] == 3
    assert same(output(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), output(model))
