"""Loading of sparse checkpoints, unchanged or as condensed models. Dropped experts are never read.

transformers does the loading, with its device maps, dtypes, shards and renamings. In a layer that the plan condenses,
the model is built with K experts instead of N, and only the kept experts' tensors are passed to transformers. The
small sparse blocks are then folded, layer by layer.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from ..blocks import (
    SparseBlock,
    describe_sparse_blocks,
    find_sparse_blocks,
    model_shape,
    probe_blocks,
)
from ..cards.base_model import remember_base
from ..condense.apply import become_condensed, refuse_condensed, refuse_quantised
from ..condense.forms import FORMS, Replacing
from ..model.adapters import refuse_adapter_files, refuse_adapters
from ..model.own_code import check_own_code
from ..offload import unreachable
from ..plan import CondensedLayer, CondensePlan
from .auto import auto_class, text_config
from .dequantize import find_method, forget_quantisation
from .files import check_folder, check_weights
from .packed import Method
from .reader import Reading, check_whole, read_model

# What `sketch_model` notes on a sketch for the functions that open the checkpoint.
_METHOD = "quantisation"


def opens_in_part(plan: CondensePlan) -> bool:
    """Return whether `load_condensed` supports a plan. To drop decoder layers, the whole model is read and checked."""
    return isinstance(FORMS[plan.form], Replacing)


def load_condensed(
    path: str | os.PathLike, plan: CondensePlan, keep_extra: bool = False, **model_kwargs: Any
) -> PreTrainedModel:
    """Open a sparse checkpoint condensed by a plan, reading only the weights that the condensed model needs.

    Args:
        path (`str` or `os.PathLike`): Hub name or folder of a sparse checkpoint.
        plan (`CondensePlan`): A plan for which `opens_in_part` is true.
        keep_extra (`bool`, defaults to `False`): Whether to carry over weights for which the model has no place.
        **model_kwargs: Passed to `from_pretrained`.

    Raises:
        UnsupportedModelError: if the model is dense or has sparse layers that can't be condensed.
        ValueError: if the plan does not fit the model. No weight has been read then.
    """
    sketch, blocks = sketch_model(path, model_kwargs)
    plan = plan.for_model(model_shape(sketch, blocks))
    form = FORMS[plan.form]
    assert isinstance(form, Replacing)
    form.check(sketch, blocks, [layer.layer for layer in plan.layers])
    form.check_layers(blocks, plan.layers)
    counts = {block.layer: block.num_experts for block in blocks}
    # In the order of the checkpoint: where all experts are kept, weights are read as they are.
    kept = {layer.layer: sorted({*layer.experts, *(layer.routed or ())}) or [0] for layer in plan.layers}
    check_weights(path, model_kwargs, kept=True)
    reading = Reading(sketch, method_of(sketch), kept, counts, keep_extra)
    model = read_model(path, reading, model_kwargs)
    remember_base(model, path, **hub_kwargs(model_kwargs))
    renumbered = [_renumbered(layer, kept[layer.layer]) for layer in plan.layers]
    small = [block for block in describe_sparse_blocks(model) if block.layer in kept]
    for block in small:
        block.loaded, block.router_experts = kept[block.layer], counts[block.layer]
        probe_blocks(model, [block])
    specs = form.install(model, small, renumbered, at_once=False)
    become_condensed(model, plan, specs, len(specs) == len(blocks), sketch.num_parameters())
    return model


def _renumbered(layer: CondensedLayer, kept: list[int]) -> CondensedLayer:
    """Number the experts of a plan's layer as those in memory."""
    routed = None if layer.routed is None else list(map(kept.index, layer.routed))
    return replace(layer, experts=list(map(kept.index, layer.experts)), routed=routed)


def load_sparse(
    path: str | os.PathLike, sketch: PreTrainedModel, model_kwargs: dict[str, Any], keep_extra: bool = False
) -> PreTrainedModel:
    """Open a sparse checkpoint unchanged, with plain weights.

    Args:
        path (`str` or `os.PathLike`): Hub name or folder of a sparse checkpoint.
        sketch (`PreTrainedModel`): The same model on the meta device, from `sketch_model`.
        model_kwargs (`dict`): For `from_pretrained`. With an `offload_folder` and no `device_map`, decoder layers stay
            on disk.
        keep_extra (`bool`, defaults to `False`): Whether to carry over weights for which the model has no place.

    Raises:
        ValueError: if the checkpoint lacks weights.
    """
    method = method_of(sketch)
    if "offload_folder" in model_kwargs or model_kwargs.get("text_only") or method is not None or keep_extra:
        model = read_model(path, Reading(sketch, method, keep_extra=keep_extra), model_kwargs)
    else:
        ours = ("quantization_config", "text_only")
        kwargs = {name: value for name, value in model_kwargs.items() if name not in ours}
        auto = auto_class(sketch.config, model_kwargs.get("trust_remote_code"))
        opened: Any = auto.from_pretrained(path, output_loading_info=True, **kwargs)
        model, loading_info = opened
        check_whole(model, loading_info)
    remember_base(model, path, **hub_kwargs(model_kwargs))
    return model


def check_files(
    path: str | os.PathLike, sketch: PreTrainedModel, model_kwargs: dict[str, Any], keep_extra: bool = False
) -> None:
    """Check that the weights of a local checkpoint are there, before they are needed.

    Args:
        path, sketch, model_kwargs, keep_extra: As for `load_sparse`.

    Raises:
        ValueError: naming the folder and what was found.
    """
    check_weights(path, model_kwargs, one_by_one=keep_extra or method_of(sketch) is not None)


def method_of(sketch: PreTrainedModel) -> tuple[str, Method] | None:
    """Return how the weights of a sketch's checkpoint are dequantised; None if they are not quantised."""
    return vars(sketch).get(_METHOD)


def hub_kwargs(model_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Select the arguments of `from_pretrained` that locate a checkpoint, for its config and tokenizer."""
    names = ("cache_dir", "force_download", "local_files_only", "revision", "token", "trust_remote_code", "subfolder")
    return {name: model_kwargs[name] for name in names if name in model_kwargs}


def sketch_model(path: str | os.PathLike, model_kwargs: dict[str, Any]) -> tuple[PreTrainedModel, list[SparseBlock]]:
    """Build the model of a sparse checkpoint on the meta device, from its config alone; return it and its blocks.

    Args:
        path (`str` or `os.PathLike`): Hub name or folder of a sparse checkpoint.
        model_kwargs (`dict`): Arguments of `from_pretrained`, such as the `dtype` of the model, and `text_only` for
            the text model in a multimodal checkpoint.

    Raises:
        UnsupportedModelError: if the model is dense or has sparse layers that can't be condensed.
        ValueError: if there is no checkpoint, if it is condensed already, if it would be quantised, or if its weights
            are and can't be dequantised, or if it is or has an adapter.
    """
    check_folder(path, model_kwargs)
    refuse_adapter_files(path, model_kwargs)
    given = model_kwargs.get("config")
    config = given or _read_config(path, model_kwargs)
    if model_kwargs.get("text_only") and (given is None or given.get_text_config() is not given):
        config = text_config(path, config)
    trust_remote_code = model_kwargs.get("trust_remote_code")
    with torch.device("meta"):
        sketch = auto_class(config, trust_remote_code).from_config(config, trust_remote_code=trust_remote_code)
    refuse_condensed(sketch)
    check_own_code(type(sketch))
    _check_attention(sketch, model_kwargs.get("attn_implementation"))
    method = find_method(config, model_kwargs.get("quantization_config"), path)
    if method is not None:
        vars(sketch)[_METHOD] = method
        forget_quantisation(sketch.config)
        if getattr(config, "dtype", None) is None:  # as gpt-oss, whose weights are 16 bit where they are not quantised
            sketch.config.dtype = torch.bfloat16
            sketch.to(torch.bfloat16)
    dtype = model_kwargs.get("dtype", model_kwargs.get("torch_dtype"))
    if isinstance(dtype, str) and dtype != "auto":
        name, dtype = dtype, getattr(torch, dtype, None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            meant = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}.get(
                name, "auto', 'bfloat16' or 'float32"
            )
            raise ValueError(f"`dtype` is {name!r}, which is not a floating-point dtype of torch: use '{meant}'.")
    if isinstance(dtype, torch.dtype):
        sketch.to(dtype)
    return sketch, find_sparse_blocks(sketch)


def _check_attention(sketch: PreTrainedModel, name: Any) -> None:
    """Check that a model can be opened with an `attn_implementation`, whose library may not be installed.

    Raises:
        ValueError: naming it, with transformers' reason.
    """
    if isinstance(name, str):
        try:
            sketch.set_attn_implementation(name)
        except (ImportError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"`attn_implementation` is {name!r}, which can't be used here: {reason}") from error


def _read_config(path: str | os.PathLike, model_kwargs: dict[str, Any]) -> Any:
    try:
        return AutoConfig.from_pretrained(path, **hub_kwargs(model_kwargs))
    except OSError as error:  # neither there nor on the hub
        reason = " ".join(str(error).split())
        raise ValueError(f"{os.fspath(path)} is neither a folder here nor a checkpoint on the hub: {reason}") from error


def open_blocks(model: PreTrainedModel) -> list[SparseBlock]:
    """Find the sparse blocks of a loaded model, and check that its weights are accessible.

    Raises:
        UnsupportedModelError: if the model is dense or has sparse layers that can't be condensed.
        ValueError: if it is not a loaded model, is condensed already or quantised, has adapters, or has weights on the
            meta device.
    """
    refuse_adapters(model)
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"`model` should be a loaded PreTrainedModel, but is a {type(model).__name__}. If it wraps a model (PEFT, "
            "DDP), pass the model inside."
        )
    refuse_condensed(model)
    check_own_code(type(model))
    refuse_quantised(model)
    blocks = find_sparse_blocks(model)
    missing = unreachable(model)
    if missing:
        raise ValueError(
            f"{len(missing)} weights of the model are on the meta device, such as {missing[0]}: load it from a "
            "checkpoint, with `device_map` and `offload_folder` if it is larger than memory."
        )
    return blocks
