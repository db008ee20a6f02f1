"""Condensed layers and models: what they compute, what is on disk, what is read from disk, how they generate and train."""

from __future__ import annotations

import json
import random
import re
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.models.qwen2_moe.modeling_qwen2_moe import load_balancing_loss_func

from cdmoe_plugin import (
    CondenseConfig,
    CondensedLayer,
    CondensePlan,
    apply_plan,
    condense_pretrained,
    condensed_module_names,
    loading,
    search_plan,
    unfreeze_condensed,
)
from cdmoe_plugin.condensed import fold
from cdmoe_plugin.sparse import SparseBlock, find_sparse_blocks

from . import naive
from .test_search import build
from .tiny_models import ARCHITECTURES, available, random_ids, tiny_inputs, tiny_model

TYPES = [name for name in ARCHITECTURES if available(name)]
SEARCHABLE = [name for name in TYPES if not ARCHITECTURES[name].inputs_embeds]
# AutoModelForCausalLM does not know mistral4
FROM_DISK = ["deepseek", *(name for name in TYPES if ARCHITECTURES[name].causal_lm and name != "mistral4")]
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("ernie4_5_moe", {"use_bias": True}),
    ("hy_v3", {"mlp_bias": True}),
    ("granitemoeshared", {"shared_width": 0}),
    ("qwen2_moe", {"hidden_act": "gelu"}),
]
IDS = random_ids(3, 9)


def state(model: PreTrainedModel) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[k].dtype == other[k].dtype and torch.equal(one[k], other[k]) for k in one
    )


@torch.no_grad()
def output(model: PreTrainedModel, ids: list[list[int]] = IDS) -> Tensor:
    """Logits (hidden states without a head) of all tokens that are no padding."""
    inputs = tiny_inputs(model, ids)
    result = model(**inputs)
    return (result.logits if "logits" in result else result.last_hidden_state)[inputs["attention_mask"].bool()]


def random_plan(layers: list[int], num_experts: int = 8, kept: int = 3) -> CondensePlan:
    rng = random.Random(0)
    rows = [(layer, rng.sample(range(num_experts), kept)) for layer in layers]
    return CondensePlan([CondensedLayer(i, experts, [rng.uniform(-1, 1) for _ in experts]) for i, experts in rows])


# --- one layer ---


def naive_block(model: PreTrainedModel, block: SparseBlock, experts: list[int], gates: list[float], x: Tensor) -> Tensor:
    """`[sigmoid] shared + sum g_i E_i` in float64 from the raw weights, which every architecture keeps in its own way."""
    act = getattr(functional, getattr(model.config, "hidden_act", None) or "silu")
    owner = model.base_model.get_submodule(block.path.rpartition(".")[0])
    places = [(holder, name) for holder in (block.module, owner) for name in ("shared_expert", "shared_experts", "shared_mlp")]
    shared = next((getattr(*place) for place in places if getattr(*place, None) is not None), None)
    y = torch.zeros_like(x)

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return functional.linear(x, weight.double(), None if bias is None else bias.double())

    if shared is not None and hasattr(shared, "input_linear"):
        gate, up = linear(x, shared.input_linear.weight).chunk(2, -1)
        y = linear(act(gate) * up, shared.output_linear.weight)
    elif shared is not None:
        gate, up = (linear(x, p.weight, p.bias) for p in (shared.gate_proj, shared.up_proj))
        y = linear(act(gate) * up, shared.down_proj.weight, shared.down_proj.bias)
    if hasattr(block.module, "shared_expert_gate"):
        y = y * torch.sigmoid(linear(x, block.module.shared_expert_gate.weight))
    for expert, factor in zip(experts, gates, strict=True):
        if model.config.model_type == "dbrx":
            rows = slice(16 * expert, 16 * expert + 16)
            gate, up, down = (getattr(block.experts.mlp, name)[rows] for name in ("w1", "v1", "w2"))
            gate, up, down = linear(x, gate), linear(x, up), down.T
        else:
            gate_up, down = block.experts.gate_up_proj[expert], block.experts.down_proj[expert]
            if model.config.model_type == "aria_text":
                gate_up, down = gate_up.T, down.T
            gate, up = linear(x, gate_up).chunk(2, -1)
        y = y + factor * linear(act(gate) * up, down)
    return y


@pytest.mark.parametrize(("model_type", "overrides"), [*((name, {}) for name in TYPES), *VARIANTS])
@torch.no_grad()
def test_fold(model_type: str, overrides: dict[str, Any]) -> None:
    model = tiny_model(model_type, **overrides)
    blocks = find_sparse_blocks(model)
    assert [block.layer for block in blocks] == list(ARCHITECTURES[model_type].sparse_layers)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 5, 32, generator=generator)
    for block in (blocks[0], blocks[-1]):
        for kept in ([], [5], [3, 0, 7, 1, 2, 6, 4, 5]):
            gates = torch.randn(len(kept), generator=generator).tolist()
            expected = naive_block(model, block, kept, gates, x.double())
            mlp = fold(block, kept, gates)
            assert mlp.gate_proj.out_features == block.shared_intermediate_size + 16 * len(kept)
            torch.testing.assert_close(mlp(x).double(), expected, rtol=1e-5, atol=1e-6 + 1e-6 * float(expected.abs().max()))


def test_fold_rounds_once() -> None:
    block = find_sparse_blocks(tiny_model("qwen2_moe", dtype=torch.bfloat16))[0]
    shared, routed, gates = block.module.shared_expert, block.module.experts, [0.123456789, 1.987654321]
    mlp = fold(block, [6, 2], gates)
    downs = [(routed.down_proj[e].float() * gate).bfloat16() for e, gate in zip([6, 2], gates, strict=True)]
    assert torch.equal(mlp.down_proj.weight, torch.cat([shared.down_proj.weight, *downs], dim=1))
    pairs = [routed.gate_up_proj[e] for e in (6, 2)]
    assert torch.equal(mlp.gate_proj.weight, torch.cat([shared.gate_proj.weight, *(pair[:16] for pair in pairs)]))
    assert torch.equal(mlp.up_proj.weight, torch.cat([shared.up_proj.weight, *(pair[16:] for pair in pairs)]))
    assert torch.equal(mlp.shared_expert_gate.weight, block.module.shared_expert_gate.weight)


# --- whole models ---


@cache
def uniform(model_type: str) -> tuple[PreTrainedModel, CondensePlan, Tensor]:
    """A model whose routers give every expert the same constant weight, all condensed; its plan; its output before."""
    sparse = ARCHITECTURES[model_type].sparse_layers
    count = 2 if model_type == "phimoe" else 4  # its router always takes two, with weights 0.5 and 1
    model = tiny_model(model_type, num_experts=count, top_k=count)
    for block in find_sparse_blocks(model):
        for name, tensor in state(block.module).items():
            if name.startswith(("gate.", "router.")) or name.endswith(("expert_bias", "correction_bias")):
                tensor.data.zero_()
    before = output(model)
    plan = search_plan(model, CondenseConfig(len(sparse), count, batch_size=2), calibration=IDS)
    return apply_plan(model, plan), plan, before


@pytest.mark.parametrize("model_type", SEARCHABLE)
def test_uniform_router_is_condensed_exactly(model_type: str) -> None:
    model, plan, before = uniform(model_type)
    after = output(model)
    assert (after - before).abs().max() < 1e-5 * before.abs().max()
    for row in plan.layers:
        assert abs(row.score) < 1e-7
        assert abs(row.expert_scores[-1]) < 1e-3 * row.expert_scores[0]


@pytest.mark.parametrize("model_type", SEARCHABLE)
def test_save_and_open(model_type: str, tmp_path: Path) -> None:
    model, plan, _ = uniform(model_type)
    model.save_pretrained(tmp_path)
    arch = ARCHITECTURES[model_type]
    auto = AutoModelForCausalLM if arch.causal_lm else AutoModel
    again = (auto if arch.config_class in auto._model_mapping else type(model)).from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert type(again).__name__ == "CDMoE" + arch.model
    assert equal(state(again), state(model))
    assert torch.equal(output(again), output(model))
    assert again.condense_plan == CondensePlan.load(tmp_path) == plan
    on_disk = json.loads((tmp_path / "config.json").read_text())
    for holder in (model.config, again.config):  # what TRL asks
        assert not (hasattr(holder, "output_router_logits") and getattr(holder, "router_aux_loss_coef", 0.0) != 0.0)
        assert not getattr(holder, "output_router_logits", False)
    assert not on_disk.get("output_router_logits")
    assert not on_disk.get("router_aux_loss_coef")
    assert not on_disk.get("aux_loss_alpha")
    if arch.causal_lm:
        ids = torch.tensor(IDS[:1])
        logits = again(ids).logits[0, :-1].float()
        assert again(ids, labels=ids).loss.item() == pytest.approx(functional.cross_entropy(logits, ids[0, 1:]).item(), 1e-5)
