"""Condensed checkpoints quantised by bitsandbytes, and what their weights stand for, worked out by hand."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from cdmoe_plugin import CondensedLayer, CondensePlan, apply_plan
from cdmoe_plugin.blocks import find_sparse_blocks
from tests.helpers.models import build
from tests.helpers.tiny_models import random_ids, tiny_model

IDS = torch.tensor(random_ids(2, 12)[:1])
# Multiples of bitsandbytes' block of 64 weights, as those of real models are.
WIDE = {"hidden": 64, "heads": 2, "kv_heads": 1, "head_width": 64, "expert_width": 64, "shared_width": 64}
WIDE |= {"dense_width": 128}
FOUR_BIT: dict[str, dict[str, Any]] = {
    "nf4": {"bnb_4bit_quant_type": "nf4"},
    "fp4": {"bnb_4bit_quant_type": "fp4"},
    "double": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
}
KINDS = [*FOUR_BIT, "int8"]
# How far weights drawn from a normal distribution are from what they become, as a part of their norm; measured.
WEIGHT_ERROR = {"nf4": 0.092, "fp4": 0.122, "double": 0.092, "int8": 0.0065}


def quantisation(kind: str, **kwargs: Any) -> BitsAndBytesConfig:
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, **kwargs)
    return BitsAndBytesConfig(load_in_4bit=True, **FOUR_BIT[kind], **kwargs)


@cache
def condensed(model_type: str, num_experts: int = 2, num_layers: int | None = 2) -> PreTrainedModel:
    """A model of which some (or all) sparse layers are condensed to K experts; not to be changed."""
    model = build("deepseek", **WIDE) if model_type == "deepseek" else tiny_model(model_type, **WIDE)
    experts, gates = list(range(num_experts)), [0.3, 0.6, -0.4][:num_experts]
    blocks = find_sparse_blocks(model)[:num_layers]
    return apply_plan(model, CondensePlan([CondensedLayer(block.layer, experts, gates) for block in blocks]))


def checkpoint(folder: Path, *args: Any) -> PreTrainedModel:
    """`condensed`, once it is saved in a folder."""
    model = condensed(*(args or ("qwen2_moe",)))
    model.save_pretrained(folder)
    return model


def open_in(folder: Path, kind: str, dtype: str = "float32", **kwargs: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantisation(kind, **kwargs), dtype=dtype)


def quantised(model: nn.Module) -> dict[str, Any]:
    kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def by_hand(linear: Any) -> Tensor:
    """The weights that a quantised layer stands for, in float64."""
    if isinstance(linear, bnb.nn.Linear8bitLt):
        scale = linear.weight.SCB if linear.weight.SCB is not None else linear.state.SCB
        return linear.weight.data.double() * scale.double()[:, None] / 127
    packed, meaning = linear.weight.data.flatten().long(), linear.weight.quant_state
    scale = meaning.absmax
    if meaning.nested:  # the scales are quantised themselves, 256 at a time
        outer = meaning.state2.absmax.double().repeat_interleave(256)[: scale.numel()]
        scale = meaning.state2.code.double()[scale.long()] * outer + meaning.offset.double()
    values = meaning.code.double()[torch.stack([packed >> 4, packed & 15], dim=1).flatten()[: math.prod(meaning.shape)]]
    return (values * scale.double().repeat_interleave(64)[: values.numel()]).view(meaning.shape)


def with_weights_by_hand(folder: Path, model: PreTrainedModel) -> PreTrainedModel:
    """The checkpoint in full precision, with the weights of a quantised model that was opened from it."""
    full = AutoModelForCausalLM.from_pretrained(folder)
    for name, linear in quantised(model).items():
        full.get_submodule(name).weight.data = by_hand(linear).float()
    return full


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits.float()


def distance(one: Tensor, other: Tensor) -> float:
    return ((one.double() - other.double()).norm() / other.double().norm()).item()


def skipping(folder: Path, kind: str) -> PreTrainedModel:
    """The checkpoint with all but its condensed layers (1 and 2) quantised."""
    return open_in(folder, kind, llm_int8_skip_modules=["model.layers.1.mlp", "model.layers.2.mlp", "lm_head"])
