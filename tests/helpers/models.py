"""Tiny models with weights of different sizes, and models whose routers choose everything alike."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from cdmoe_plugin import CondenseConfig, CondensePlan, apply_plan, search_plan
from cdmoe_plugin.blocks import find_sparse_blocks
from tests.helpers.tiny_models import (
    ARCHITECTURES,
    _randomize,
    available,
    random_ids,
    tiny_config,
    tiny_inputs,
    tiny_model,
)

TYPES = [name for name in ARCHITECTURES if available(name)]


# One of each quirk.
QUIRKS = [
    *("axk1", "cohere2_moe", "deepseek_v3", "ernie4_5_moe", "gemma4_text", "gpt_oss", "granitemoeshared", "jetmoe"),
    *("llama4_text", "minimax_m3_vl_text", "mixtral", "nemotron_h", "qwen2_moe"),
]


SEARCHABLE = [name for name in TYPES if not ARCHITECTURES[name].inputs_embeds]


# AutoModelForCausalLM does not know mistral4
FROM_DISK = ["deepseek", *(name for name in TYPES if ARCHITECTURES[name].causal_lm and name != "mistral4")]


FOLDS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in TYPES),
    ("ernie4_5_moe", {"use_bias": True}),
    ("hy_v3", {"mlp_bias": True}),
    ("granitemoeshared", {"shared_width": 0}),
    ("qwen2_moe", {"hidden_act": "gelu"}),
    ("nemotron_h", {"moe_latent_size": 24}),
    ("nemotron_h", {"moe_latent_size": 24, "mlp_bias": True}),
]


IDS = random_ids(3, 9)


def build(model_type: str, norm: bool | None = None, **overrides: Any) -> PreTrainedModel:
    """A tiny model whose layers and experts differ in size, so that orders are no matter of course."""
    overrides = {"num_experts": 6, **overrides} | ({} if norm is None else {"norm_topk_prob": norm})
    if model_type == "deepseek":
        like = tiny_config("dots1", **overrides).to_dict()
        config = AutoConfig.for_model("deepseek", **{name: like[name] for name in like if name != "model_type"})
        model = AutoModelForCausalLM.from_config(config).eval()
        _randomize(model, seed=3)
    else:
        model = tiny_model(model_type, seed=3, **overrides)
    for index, layer in enumerate(model.model.layers):
        if hasattr(layer.mlp, "experts"):
            sizes = torch.linspace(0.7, 1.3, len(layer.mlp.experts.down_proj)).roll(index)[:, None, None]
            layer.mlp.experts.down_proj.data *= sizes * (1.2 if index == 1 + len(model_type) % 3 else 2.5)
    return model


def sparse_model(model_type: str) -> PreTrainedModel:
    """`tiny_model`, which does not know "deepseek"."""
    return build("deepseek", num_experts=8) if model_type == "deepseek" else tiny_model(model_type)


@torch.no_grad()
def output(model: PreTrainedModel) -> Tensor:
    """Logits (hidden states without a head) of all tokens that are no padding."""
    inputs = tiny_inputs(model, IDS)
    result = model(**inputs)
    return (result.logits if "logits" in result else result.last_hidden_state)[inputs["attention_mask"].bool()]


def uniform_sparse(model_type: str, **overrides: Any) -> PreTrainedModel:
    """A model whose routers give every expert the same constant weight, and choose all (also by token ids)."""
    count = 2 if model_type == "phimoe" else 4  # its router always takes two, with weights 0.5 and 1
    return make_uniform(tiny_model(model_type, num_experts=count, top_k=count, **overrides))


def make_uniform(model: PreTrainedModel) -> PreTrainedModel:
    """Set the routers of a model that choose all experts to zero."""
    for block in find_sparse_blocks(model):
        for name, tensor in (*block.module.named_parameters(), *block.module.named_buffers()):
            if name.startswith(("gate.", "router.")) or name.endswith(("expert_bias", "correction_bias")):
                tensor.data.zero_()
            if name.endswith("tid2eid"):
                tensor.copy_(torch.arange(block.num_experts).expand_as(tensor))
        for module in block.modules[1:]:  # gemma4's router, of the decoder layer; a scale per expert stays
            if hasattr(module, "proj"):
                module.proj.weight.data.zero_()
    return model


@cache
def uniform(model_type: str) -> tuple[PreTrainedModel, CondensePlan, Tensor]:
    """`uniform_sparse` with all condensed; its plan; its output before."""
    model = uniform_sparse(model_type)
    before = output(model)
    layers, count = ARCHITECTURES[model_type].sparse_layers, find_sparse_blocks(model)[0].num_experts
    config = CondenseConfig(len(layers), count, batch_size=2)
    plan = search_plan(model, config, calibration=IDS)
    return apply_plan(model, plan), plan, before
