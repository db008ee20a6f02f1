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
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ..blocks import (
    SparseBlock,
    describe_sparse_blocks,
    find_sparse_blocks,
    layers_path,
    model_shape,
    probe_blocks,
    shrink_experts,
)
from ..condense.apply import become_condensed, refuse_condensed, refuse_quantised
from ..condense.forms import FORMS, Replacing
from ..offload import unreachable
from ..plan import CondensePlan
from .layers_on_disk import CheckpointLayers, bring_from, load_but_layers
from .tensors import unread_tensors


def opens_in_part(plan: CondensePlan) -> bool:
    """Return whether `load_condensed` supports a plan. To drop decoder layers, the whole model is read and checked."""
    return isinstance(FORMS[plan.form], Replacing)


def load_condensed(path: str | os.PathLike, plan: CondensePlan, **model_kwargs: Any) -> PreTrainedModel:
    """Open a sparse checkpoint condensed by a plan, reading only the weights that the condensed model needs.

    Args:
        path (`str` or `os.PathLike`): Hub name or folder of a sparse checkpoint.
        plan (`CondensePlan`): A plan for which `opens_in_part` is true.
        **model_kwargs: Passed to `AutoModelForCausalLM.from_pretrained`.

    Raises:
        UnsupportedModelError: if the model is dense or has sparse layers that can't be condensed.
        ValueError: if the plan does not fit the model. No weight has been read then.
    """
    sketch, blocks = sketch_model(path, model_kwargs)
    plan = plan.for_model(model_shape(sketch, blocks))
    form = FORMS[plan.form]
    assert isinstance(form, Replacing)
    form.check(sketch, blocks, [layer.layer for layer in plan.layers])
    kept = {layer.layer: layer.experts or [0] for layer in plan.layers}
    counts = {block.layer: block.num_experts for block in blocks}
    model = _open(path, sketch, model_kwargs, kept, counts)
    renumbered = [replace(layer, experts=list(range(len(layer.experts)))) for layer in plan.layers]
    small = [block for block in describe_sparse_blocks(model) if block.layer in kept]
    for block in small:
        probe_blocks(model, [block], router_experts=counts[block.layer])
    specs = form.install(model, small, renumbered, at_once=False)
    become_condensed(model, plan, specs, len(specs) == len(blocks), sketch.num_parameters())
    return model


def load_sparse(path: str | os.PathLike, sketch: PreTrainedModel, model_kwargs: dict[str, Any]) -> PreTrainedModel:
    """Open a sparse checkpoint unchanged.

    Args:
        path (`str` or `os.PathLike`): Hub name or folder of a sparse checkpoint.
        sketch (`PreTrainedModel`): The same model on the meta device.
        model_kwargs (`dict`): For `from_pretrained`. With an `offload_folder` and no `device_map`, decoder layers stay
            on disk.

    Raises:
        ValueError: if the checkpoint lacks weights.
    """
    if "offload_folder" in model_kwargs:
        return _open(path, sketch, model_kwargs, {}, {})
    opened: Any = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **model_kwargs)
    model, loading_info = opened
    check_whole(model, loading_info)
    return model


def _open(
    path: str | os.PathLike,
    sketch: PreTrainedModel,
    model_kwargs: dict[str, Any],
    kept: dict[int, list[int]],
    counts: dict[int, int],
) -> PreTrainedModel:
    on_disk = None
    if "offload_folder" in model_kwargs and model_kwargs.get("device_map") is None:
        on_disk = _layers_path(sketch)
        model_kwargs = model_kwargs | {"device_map": layers_on_disk(sketch, on_disk)}
    layers: list[CheckpointLayers] = []
    loader = _loader_class(type(sketch), kept, counts, on_disk, layers)
    opened: Any = loader.from_pretrained(path, output_loading_info=True, **model_kwargs)
    model, loading_info = opened
    check_whole(model, loading_info)
    model.__class__ = type(sketch)
    for each in layers:
        bring_from(model, each)
    return model


def _layers_path(sketch: PreTrainedModel) -> str:
    """Return the name of the list of decoder layers in the whole model, such as "model.layers"."""
    in_base = layers_path(find_sparse_blocks(sketch))
    layers = sketch.base_model.get_submodule(in_base)
    return next(name for name, module in sketch.named_modules() if module is layers)


def layers_on_disk(sketch: PreTrainedModel, layers_path: str) -> dict[str, str | int]:
    """Make a device map with all decoder layers on disk and the rest on the GPU, or on the CPU without one."""
    device = torch.accelerator.current_device_index() if torch.accelerator.is_available() else "cpu"
    device_map: dict[str, str | int] = {}
    for name, module in sketch.named_modules():
        if name == layers_path:
            device_map |= {f"{name}.{i}": "disk" for i, _ in enumerate(module.children())}
        elif not f"{layers_path}.".startswith(f"{name}.") and not name.startswith(f"{layers_path}."):
            own = any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False)))
            if name and (own or not any(True for _ in module.children())):
                device_map[name] = device
    return device_map


def hub_kwargs(model_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Select the arguments of `from_pretrained` that locate a checkpoint, for its config and tokenizer."""
    names = ("cache_dir", "force_download", "local_files_only", "revision", "token", "trust_remote_code", "subfolder")
    return {name: model_kwargs[name] for name in names if name in model_kwargs}


def sketch_model(path: str | os.PathLike, model_kwargs: dict[str, Any]) -> tuple[PreTrainedModel, list[SparseBlock]]:
    """Build the model of a sparse checkpoint on the meta device, from its config alone; return it and its blocks.

    Args:
        path (`str` or `os.PathLike`): Hub name or folder of a sparse checkpoint.
        model_kwargs (`dict`): Arguments of `from_pretrained`, such as the `dtype` of the model.

    Raises:
        UnsupportedModelError: if the model is dense or has sparse layers that can't be condensed.
        ValueError: if the checkpoint is condensed already, or is or would be quantised.
    """
    config = model_kwargs.get("config") or AutoConfig.from_pretrained(path, **hub_kwargs(model_kwargs))
    with torch.device("meta"):
        sketch = AutoModelForCausalLM.from_config(config, trust_remote_code=model_kwargs.get("trust_remote_code"))
    refuse_condensed(sketch)
    refuse_quantised(model_kwargs.get("quantization_config"), getattr(sketch.config, "quantization_config", None))
    dtype = model_kwargs.get("dtype", model_kwargs.get("torch_dtype"))
    if isinstance(dtype, str) and dtype != "auto":
        name, dtype = dtype, getattr(torch, dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"`dtype` is {name!r}, which is not a dtype of torch: use 'auto', 'bfloat16' or similar.")
    if isinstance(dtype, torch.dtype):
        sketch.to(dtype)
    return sketch, find_sparse_blocks(sketch)


def open_blocks(model: PreTrainedModel) -> list[SparseBlock]:
    """Find the sparse blocks of a loaded model, and check that its weights are accessible.

    Raises:
        UnsupportedModelError: if the model is dense or has sparse layers that can't be condensed.
        ValueError: if it is not a loaded model, is condensed already or quantised, or has weights on the meta device.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"`model` should be a loaded PreTrainedModel, but is a {type(model).__name__}. If it wraps a model (PEFT, "
            "DDP), pass the model inside."
        )
    refuse_condensed(model)
    refuse_quantised(getattr(model, "hf_quantizer", None))
    blocks = find_sparse_blocks(model)
    missing = unreachable(model)
    if missing:
        raise ValueError(
            f"{len(missing)} weights of the model are on the meta device, such as {missing[0]}: load it from a "
            "checkpoint, with `device_map` and `offload_folder` if it is larger than memory."
        )
    return blocks


def check_whole(model: PreTrainedModel, loading_info: Any) -> None:
    """Check that all weights of a model returned by `from_pretrained` came from the checkpoint.

    Raises:
        ValueError: naming newly initialised weights, about which transformers only warns.
    """
    lost = {str(key) for key in loading_info.get("missing_keys", ())}
    lost |= {str(key[0]) for key in loading_info.get("mismatched_keys", ())}
    if lost:
        some = sorted(lost)[:3]
        raise ValueError(f"The checkpoint {model.name_or_path!r} lacks {len(lost)} of its weights, such as {some}.")


def _loader_class(
    base: type[PreTrainedModel],
    kept: dict[int, list[int]],
    counts: dict[int, int],
    layers_path: str | None,
    layers: list[CheckpointLayers],
) -> type[PreTrainedModel]:
    """Make a subclass of the base class that builds and reads only the kept experts of condensed layers.

    With a `layers_path`, it does not read decoder layers, but adds them to `layers`.
    """

    def init(self: PreTrainedModel, config: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        for block in describe_sparse_blocks(self):
            if block.layer in kept:
                shrink_experts(block.experts, counts[block.layer], len(kept[block.layer]))

    def load(model: Any, state_dict: Any, files: list[str] | None, load_config: Any, *args: Any) -> Any:
        if files is not None:
            if not all(str(file).endswith(".safetensors") for file in files):
                raise ValueError("With a plan, the checkpoint should be in safetensors, which is read in part.")
            state_dict, files = unread_tensors(files, kept, counts), None
            if layers_path is not None:
                info, found = load_but_layers(model, layers_path, state_dict, base._load_pretrained_model, load_config)
                layers.append(found)
                return info, {}
        return base._load_pretrained_model(model, state_dict, files, load_config, *args)

    # With the base's name and module, transformers treats it as the base class.
    namespace = {"__module__": base.__module__, "__init__": init, "_load_pretrained_model": staticmethod(load)}
    return type(base.__name__, (base,), namespace)
