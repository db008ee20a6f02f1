"""What each architecture's config can say of dense layers, and helpers for models that are exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cdmoe_plugin import apply_plan
from tests.helpers.models import IDS, sparse_model
from tests.helpers.plans import some_plan
from tests.helpers.tiny_models import ARCHITECTURES, available, tiny_model
from tests.helpers.trimming import first_output

ANY = ([1], [2], [3, 1], [1, 2, 3])
PREFIX = ([1], [2, 1], [1, 2, 3])
# What each config can say of four layers, of which the first is dense from the start; all others can say nothing.
EXACT: dict[str, tuple[list[int], ...]] = {
    **dict.fromkeys(["bailing_hybrid", "deepseek_v32", "dots3_note_text", "exaone_moe", "flint", "glm4_moe_lite"], ANY),
    **dict.fromkeys(["glm_moe_dsa", "hy_v3", "kimi_linear", "laguna", "beam", "mellum", "mimo_v2_flash"], ANY),
    **dict.fromkeys(["qwen3_moe", "deepseek_ocr2_text", "unlimited_ocr_text", "mistral_large4_text"], ANY),
    **dict.fromkeys(["qwen3_vl_moe_text", "qwen3_omni_moe_text", "minimax_m3_vl_text", "glm5_next_text"], ANY),
    "llama4_text": ANY,
    **dict.fromkeys(["afmoe", "deepseek_v2", "deepseek_v3", "dots1", "glm4_moe"], PREFIX),
    **dict.fromkeys(["mistral4", "lfm2_moe", "glm4v_moe_text"], PREFIX),
    "deepseek": ([1], [2, 1], [1, 3], [1, 2, 3]),
    "ernie4_5_moe": ([1], [2], [3], [1, 3], [1, 2, 3]),
    "jamba": ([1, 3],),
    "granitemoehybrid": ([0, 1, 2, 3],),
    "nemotron_h": ([1], [3], [5, 1], [1, 3, 5]),
}
# The dense siblings of fully condensed models; all others have none.
DENSE = {
    **dict.fromkeys(["aria_text", "deepseek", "solar_open"], "llama"),
    **dict.fromkeys(["dots1", "hy_v3", "qwen3_moe"], "qwen3"),
    **dict.fromkeys(["deepseek_v2", "deepseek_v3", "glm4_moe_lite", "mistral4"], "youtu"),
    **dict.fromkeys(["granitemoe", "granitemoeshared"], "granite"),
    **{"cohere2_moe": "cohere2", "ernie4_5_moe": "ernie4_5", "flex_olmo": "olmo2", "granitemoe_swa": "granite_swa"},
    **{"hunyuan_v1_moe": "hunyuan_v1_dense", "lfm2_moe": "lfm2", "mixtral": "mistral"},
}
# With the gate per token replaced by a constant.
DENSE_GATED = {"qwen2_moe": "qwen2", "qwen3_5_moe_text": "qwen3_5_text"}
# Fully condensed, these have no top-K form: a router that chooses by token ids, numbers of experts that are nested or
# those of attention too, a forward pass without token ids.
NOT_TOP_K = ["dbrx", "deepseek_v4", "jetmoe", "qwen3_omni_moe_talker_text"]
GATED = ["qwen2_moe", "qwen3_next"]
NEVER = [name for name in ARCHITECTURES if name not in EXACT and name not in GATED]
# The last two say what all do where any layers or the first ones may be dense, so most are tried with these alone.
_ALL_SETS = ("deepseek_v3", "laguna", "lfm2_moe", "llama4_text", "qwen3_moe")
CASES = [
    (name, layers)
    for name, sets in EXACT.items()
    for layers in (sets[-2:] if sets in (ANY, PREFIX) and name not in _ALL_SETS else sets)
    if name == "deepseek" or available(name)
]


def condensed(model_type: str, layers: list[int], **overrides: Any) -> PreTrainedModel:
    model = tiny_model(model_type, **overrides) if overrides else sparse_model(model_type)
    return apply_plan(model, some_plan(layers))


def opened(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The checkpoint in the class that the model had before it was condensed."""
    return type(model)._base_class.from_pretrained(folder)


def output(model: PreTrainedModel) -> Tensor:
    return torch.cat(first_output(model, IDS))


def same(one: Tensor, other: Tensor) -> bool:
    """Not bitwise: a sum over more neurons, zeros among them, may be added up in another order."""
    return torch.allclose(one, other, rtol=1e-5, atol=1e-5 * float(one.abs().max()))
