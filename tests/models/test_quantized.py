"""Condensed checkpoints opened in 4 and 8 bit by bitsandbytes on the CPU, and saved again; nothing is mocked."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from cdmoe_plugin import CondensedLayer, CondensePlan, apply_plan
from cdmoe_plugin.blocks import find_sparse_blocks
from cdmoe_plugin.model import bitsandbytes
from cdmoe_plugin.model.lookup import condensed_layers
from tests.helpers.quantized import (
    IDS,
    KINDS,
    WEIGHT_ERROR,
    WIDE,
    by_hand,
    checkpoint,
    distance,
    logits,
    open_in,
    quantised,
    with_weights_by_hand,
)
from tests.helpers.states import differing, state
from tests.helpers.tiny_models import tiny_model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("model_type", "num_experts", "num_layers"),
    [("qwen2_moe", 2, 2), ("deepseek", 2, 2), ("mixtral", 2, 2), ("qwen2_moe", 0, None), ("olmoe", 0, None)],
)
def test_output(model_type: str, num_experts: int, num_layers: int | None, kind: str, tmp_path: Path) -> None:
    full = checkpoint(tmp_path, model_type, num_experts, num_layers)
    model = open_in(tmp_path, kind)
    for name, linear in quantised(model).items():
        assert distance(by_hand(linear), full.get_submodule(name).weight) < 1.4 * WEIGHT_ERROR[kind], name
    found, expected = logits(model), logits(full)
    # The weights alone are rounded in 4 bit, and the activations, too, in 8 bit; random layers amplify what enters.
    assert distance(found, logits(with_weights_by_hand(tmp_path, model))) < (0.06 if kind == "int8" else 1e-5)
    assert distance(found, expected) < (0.08 if kind == "int8" else 0.7)
    assert distance(logits(open_in(tmp_path, kind, "bfloat16")), expected) < (0.13 if kind == "int8" else 0.7)
    texts = model.generate(IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert texts.shape == (1, IDS.shape[1] + 4)


@pytest.mark.parametrize("kind", KINDS)
def test_condensed_layers_compute_what_they_should(kind: str, tmp_path: Path) -> None:
    """Layer by layer in float64, in 8 bit with activations rounded as LLM.int8() does."""
    full = checkpoint(tmp_path)
    mlp = condensed_layers(open_in(tmp_path, kind))[1]
    x = torch.randn(7, WIDE["hidden"], generator=torch.Generator().manual_seed(0))

    def linear(module: nn.Module, values: Tensor) -> Tensor:
        exact = (values.abs() >= 6).any(dim=0) if kind == "int8" else torch.ones(values.shape[1], dtype=torch.bool)
        rest = values.half().double().masked_fill(exact, 0)
        scale = rest.abs().amax(-1, keepdim=True).clamp(min=1e-9)
        return (values.where(exact, (rest * 127 / scale).round() * scale / 127)) @ by_hand(module).T

    inner = nn.functional.silu(linear(mlp.gate_proj, x.double())) * linear(mlp.up_proj, x.double())
    inner[:, : mlp.shared_intermediate_size] *= linear(mlp.shared_expert_gate, x.double()).sigmoid()
    with torch.no_grad():
        assert distance(mlp(x), linear(mlp.down_proj, inner)) < (5e-3 if kind == "int8" else 1e-6)
        # Three projections are rounded (in 8 bit with what enters them), and independent errors add up in squares.
        roundings = 6 if kind == "int8" else 3
        assert distance(mlp(x), condensed_layers(full)[1](x)) < 1.4 * WEIGHT_ERROR[kind] * roundings**0.5


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_what_is_quantised(kind: str, tmp_path: Path) -> None:
    full = checkpoint(tmp_path)
    attention = {f"model.layers.{i}.self_attn.{part}_proj" for i in range(4) for part in "qkvo"}
    projections = ("gate_proj", "up_proj", "down_proj")
    dense = {f"model.layers.0.mlp.{part}" for part in projections}
    condensed = {f"model.layers.{i}.mlp.{part}" for i in (1, 2) for part in (*projections, "shared_expert_gate")}
    shared = {f"model.layers.3.mlp.shared_expert.{part}" for part in projections}
    model = open_in(tmp_path, kind)
    assert set(quantised(model)) == attention | dense | condensed | shared | {"model.layers.3.mlp.shared_expert_gate"}
    before, after = state(full), state(model)
    changed = {name.removesuffix(".weight") for name in differing(before, after)}
    assert changed == set(quantised(model))
    for name in ("gate.weight", "experts.gate_up_proj", "experts.down_proj"):
        assert after[f"model.layers.3.mlp.{name}"].dtype == torch.float32
    skipped = open_in(tmp_path, kind, llm_int8_skip_modules=["model.layers.1.mlp", "lm_head"])
    assert set(quantised(model)) - set(quantised(skipped)) == {name for name in condensed if ".1.mlp" in name}


@pytest.mark.parametrize(("model_type", "kind"), [("qwen2_moe", "nf4"), ("mixtral", "int8")])
def test_mixed_layers(model_type: str, kind: str, tmp_path: Path) -> None:
    """Dense neurons are quantised, beside experts as they are in the sparse model."""
    full = tiny_model(model_type, **WIDE)
    layers = [block.layer for block in find_sparse_blocks(full)]
    plan = CondensePlan([CondensedLayer(i, [0], [0.5], routed=[1, 3, 4, 6]) for i in layers])
    apply_plan(full, plan).save_pretrained(tmp_path)
    model = open_in(tmp_path, kind)
    found = quantised(model)
    dense = condensed_layers(model)
    assert all(mlp.up_proj in found.values() for mlp in dense.values())
    assert len(dense) == len(layers)
    assert distance(logits(model), logits(full)) < (0.08 if kind == "int8" else 0.7)
    assert distance(logits(with_weights_by_hand(tmp_path, model)), logits(model)) < (0.08 if kind == "int8" else 1e-5)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(model))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("model_type", "num_experts"), [("qwen2_moe", 2), ("mixtral", 0)])
def test_saved_and_opened_again(model_type: str, num_experts: int, kind: str, tmp_path: Path) -> None:
    plan = checkpoint(tmp_path, model_type, num_experts).condense_plan
    model = open_in(tmp_path, kind)
    before, expected = {name: t.clone() for name, t in model.state_dict().items()}, logits(model)  # saved after use
    for generation in ("first", "second"):
        model.save_pretrained(tmp_path / generation)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / generation)
        assert differing(before, model.state_dict()) == []
        assert torch.equal(logits(model), expected)
    files = [{path.name: path.read_bytes() for path in (tmp_path / g).iterdir()} for g in ("first", "second")]
    assert files[0] == files[1]
    assert "quantised, by bitsandbytes" in (tmp_path / "first" / "README.md").read_text()
    config = json.loads((tmp_path / "first" / "config.json").read_text())
    assert config["quantization_config"]["load_in_8bit"] == (kind == "int8")
    assert model.condense_plan == plan


@pytest.mark.parametrize(("kind", "lost"), [("nf4", ".absmax"), ("nf4", ""), ("int8", ".weight"), ("int8", "")])
def test_lost_weights(kind: str, lost: str, tmp_path: Path) -> None:
    checkpoint(tmp_path)
    open_in(tmp_path, kind).save_pretrained(tmp_path)
    file, place = tmp_path / "model.safetensors", "model.layers.1.mlp.up_proj"
    weights = load_file(file)
    for name in [name for name in weights if name.startswith(place) and name.endswith(lost)]:
        del weights[name]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(RuntimeError):  # from transformers: it can't make up quantised weights
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["double", "int8"])
def test_dequantised(kind: str, tmp_path: Path) -> None:
    checkpoint(tmp_path, "mixtral")
    model = open_in(tmp_path, kind)
    logits(model)
    expected = with_weights_by_hand(tmp_path, model)
    model = model.dequantize()
    assert quantised(model) == {}
    assert distance(logits(model), logits(expected)) < 1e-5
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


@pytest.mark.slow
def test_opened_without_the_package(tmp_path: Path) -> None:
    checkpoint(tmp_path / "checkpoint")
    model = open_in(tmp_path / "checkpoint", "nf4")
    model.save_pretrained(tmp_path / "checkpoint")
    code = """
import sys
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
save_file({"logits": model(load_file(sys.argv[2])["ids"]).logits.detach()}, sys.argv[2])
assert "cdmoe_plugin" not in sys.modules
"""
    save_file({"ids": IDS}, tmp_path / "ids")
    command = [sys.executable, "-c", code, str(tmp_path / "checkpoint"), str(tmp_path / "ids")]
    environment = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, cwd=tmp_path)
    assert distance(load_file(tmp_path / "ids")["logits"], logits(model)) < 1e-6


def test_narrow_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes' kernel for some CPUs mixes up blocks of weights where rows end within a block."""
    said: list[str] = []
    monkeypatch.setattr(bitsandbytes.logger, "warning", said.append)
    apply_plan(tiny_model("mixtral"), CondensePlan([CondensedLayer(0, [1], [1.0])])).save_pretrained(tmp_path)
    open_in(tmp_path, "int8")
    assert said == []
    open_in(tmp_path, "nf4")
    assert len(said) == 1
    assert "widths of 19 layers in 4 bit, such as model.layers.0.self_attn.q_proj, are not multiples of 64" in said[0]
