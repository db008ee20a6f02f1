"""Spellings of config fields that readers other than today's transformers know, beside its own.

transformers 5 reads older spellings and writes only its own: `rope_parameters` in place of `rope_theta`, and one name
of a field that has another in published checkpoints. transformers 4.57, mlx-lm and programs that pin them then compute
with defaults, silently. An older spelling is written only if transformers reads the same config with it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from ..atomic import read_json, write_json

# Architectures that published configs describe by the distance between layers of full attention.
_INTERVALS = {"qwen3_next": "full_attention_interval", "qwen3_5_moe_text": "full_attention_interval"}
_INTERVALS |= dict.fromkeys(("cohere2", "cohere2_moe", "exaone4", "gemma3_text"), "sliding_window_pattern")
_LETTERS = {"linear_attention": "M", "mamba": "M", "moe": "E", "full_attention": "*", "attention": "*", "mlp": "-"}


def write_older_spellings(folder: Path, config: PreTrainedConfig) -> None:
    """Add older spellings to the config.json of a checkpoint.

    Args:
        folder (`Path`): The checkpoint's folder.
        config (`PreTrainedConfig`): The config that was saved in it.
    """
    path = folder / "config.json"
    own = config.to_dict()
    written, expected = dict(read_json(path)), _read(config, {})
    for fields in older_spellings(config):
        new = {name: value for name, value in fields.items() if name not in own}
        same = {name: value for name, value in (expected or {}).items() if name not in new}
        if new and expected is not None and _read(config, new) == same:
            written |= new
    write_json(path, written)


def older_spellings(config: PreTrainedConfig) -> Iterator[dict[str, Any]]:
    """Yield groups of fields that say the same as a config in older spellings, one group per fact."""
    yield from _rotary(config)
    yield from _names(config)
    yield from _layers(config)
    if isinstance(dtype := config.to_dict().get("dtype"), str):
        yield {"torch_dtype": dtype}


def _rotary(config: Any) -> Iterator[dict[str, Any]]:
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, dict):
        return
    if any(isinstance(value, dict) for value in parameters.values()):  # by kind of layer
        for kind, each in parameters.items():
            if isinstance(each, dict) and "rope_theta" in each:
                yield {"swa_rope_theta" if kind == "sliding_attention" else "rope_theta": each["rope_theta"]}
        return
    alone = {name: parameters[name] for name in ("rope_theta", "partial_rotary_factor") if name in parameters}
    scaling = {name: value for name, value in parameters.items() if name not in alone and value is not None}
    kind = scaling.setdefault("rope_type", "default")
    scaled = kind != "default" or len(scaling) > 1  # or sections of a multimodal embedding
    # Together, as transformers completes a given `rope_scaling` with the other two.
    yield {**alone, "rope_scaling": {**scaling, "type": kind} if scaled else None}
    yield from ({name: value} for name, value in alone.items())


def _names(config: Any) -> Iterator[dict[str, Any]]:
    """Yield numbers of experts that the architecture calls by one name and writes under another one."""
    declared = {name for each in type(config).__mro__ for name in vars(each).get("__annotations__", {})}
    for name, written in type(config).attribute_map.items():
        value = getattr(config, written, None)
        if "experts" in name and name in declared and isinstance(value, int):
            yield {name: value}


def _layers(config: Any) -> Iterator[dict[str, Any]]:
    """Yield patterns over the layers by a number or a list in the spelling of published checkpoints."""
    kinds, mlps = getattr(config, "layer_types", None), getattr(config, "mlp_layer_types", None)
    if isinstance(mlps, list):
        dense = [kind == "dense" for kind in mlps]
        if dense == sorted(dense, reverse=True):
            yield {"first_k_dense_replace": sum(dense)}
        if config.model_type in ("mimo_v2_flash", "minimax_m3_vl_text"):
            yield {"moe_layer_freq": [int(not each) for each in dense]}
    if not isinstance(kinds, list):
        return
    full = [kind == "full_attention" for kind in kinds]
    step = next((n for n in range(2, len(full) + 1) if full == [not (i + 1) % n for i in range(len(full))]), None)
    if config.model_type in _INTERVALS and step is not None:
        yield {_INTERVALS[config.model_type]: step}
    if config.model_type == "mimo_v2_flash":
        yield {"hybrid_layer_pattern": [int(not each) for each in full]}
    if config.model_type == "nemotron_h" and all(kind in _LETTERS for kind in kinds):
        yield {"hybrid_override_pattern": "".join(_LETTERS[kind] for kind in kinds)}
    if config.model_type == "kimi_linear":
        numbers = {flag: [i + 1 for i, each in enumerate(full) if each is flag] for flag in (True, False)}
        sizes = {"head_dim": config.linear_head_dim, "num_heads": config.linear_num_heads}
        sizes["short_conv_kernel_size"] = config.linear_conv_kernel_dim
        yield {"linear_attn_config": {**sizes, "full_attn_layers": numbers[True], "kda_layers": numbers[False]}}


def _read(config: PreTrainedConfig, more: dict[str, Any]) -> dict[str, Any] | None:
    """Return all other fields that transformers reads with `more` beside a config's own; None if it refuses them."""
    values = json.loads(json.dumps({**config.to_dict(), **more}, default=str))
    try:
        read = type(config).from_dict(values).to_dict()
    except (ValueError, TypeError, LookupError, AttributeError):
        return None
    rope = read.get("rope_parameters")
    if isinstance(rope, dict):  # empty entries, and the older name of `rope_type`, say nothing
        read["rope_parameters"] = {name: value for name, value in rope.items() if value is not None and name != "type"}
    return {name: value for name, value in read.items() if name not in more}
