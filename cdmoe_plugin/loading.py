"""Opens a sparse checkpoint as a condensed model: the experts that a plan drops are never read.

transformers does the loading, with its device maps, dtypes, shards and renamings. It is only given less: in a layer
that the plan condenses, the model is built with K experts instead of N, and of the checkpoint's expert tensors it sees
the kept ones. The small sparse blocks are then folded, layer by layer.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from .condensed import apply_layers, become_condensed, refuse_condensed, refuse_quantised
from .plan import CondensePlan
from .sparse import SparseBlock, describe_sparse_blocks, find_sparse_blocks, model_shape, probe_blocks

# On disk an expert has its own tensors ("...layers.3.mlp.experts.17.up_proj.weight", whatever the names around the
# numbers), or all experts of a layer share one.
_LAYER = r"(?:^|\.)(?:layers|blocks|h)\.(?P<layer>\d+)\."
_ONE_EXPERT = re.compile(_LAYER + r".*?\.experts\.(?P<expert>\d+)\.")
_ALL_EXPERTS = re.compile(_LAYER + r".*?\.experts\b")
_IN_LAYER = re.compile(_LAYER)


def load_condensed(path: str | os.PathLike, plan: CondensePlan, **model_kwargs: Any) -> PreTrainedModel:
    """Opens a sparse checkpoint and condenses it as a plan says, reading only what the condensed model needs.

    Args:
        path (`str` or `os.PathLike`): Hub name or folder of a sparse checkpoint.
        plan (`CondensePlan`): What to condense; its form is not "trim_block".
        **model_kwargs: Passed to `AutoModelForCausalLM.from_pretrained`.

    Raises:
        UnsupportedModelError: if the model is dense or has sparse layers that can't be condensed.
        ValueError: if the plan does not fit the model; before any weight is read.
    """
    sketch, blocks = sketch_model(path, model_kwargs)
    shape = model_shape(sketch, blocks)
    plan.check_fits(shape)
    kept = {layer.layer: layer.experts or [0] for layer in plan.layers}
    counts = {block.layer: block.num_experts for block in blocks}
    loader = _loader_class(type(sketch), kept, counts)
    opened: Any = loader.from_pretrained(path, output_loading_info=True, **model_kwargs)
    model, loading_info = opened
    check_whole(model, loading_info)
    model.__class__ = type(sketch)
    renumbered = [replace(layer, experts=list(range(len(layer.experts)))) for layer in plan.layers]
    small = [block for block in describe_sparse_blocks(model) if block.layer in kept]
    for block in small:
        probe_blocks(model, [block], router_experts=counts[block.layer])
    specs = apply_layers(model, small, renumbered, plan.form, at_once=False)
    plan = plan if plan.model is not None else replace(plan, model=shape)
    become_condensed(model, plan, specs, len(specs) == len(blocks), sketch.num_parameters())
    return model


def hub_kwargs(model_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of `from_pretrained`'s arguments that say where a checkpoint is found, for its config and tokenizer."""
    names = ("cache_dir", "force_download", "local_files_only", "revision", "token", "trust_remote_code", "subfolder")
    return {name: model_kwargs[name] for name in names if name in model_kwargs}


def sketch_model(path: str | os.PathLike, model_kwargs: dict[str, Any]) -> tuple[PreTrainedModel, list[SparseBlock]]:
    """The model of a sparse checkpoint on the meta device, from its config alone, and its sparse blocks.

    Raises:
        UnsupportedModelError: if the model is dense or has sparse layers that can't be condensed.
        ValueError: if the checkpoint is condensed already, or is or would be quantised.
    """
    config = model_kwargs.get("config") or AutoConfig.from_pretrained(path, **hub_kwargs(model_kwargs))
    with torch.device("meta"):
        sketch = AutoModelForCausalLM.from_config(config, trust_remote_code=model_kwargs.get("trust_remote_code"))
    refuse_condensed(sketch)
    refuse_quantised(model_kwargs.get("quantization_config"), getattr(sketch.config, "quantization_config", None))
    return sketch, find_sparse_blocks(sketch)


def check_whole(model: PreTrainedModel, loading_info: Any) -> None:
    """Checks that all weights of a model that `from_pretrained` returned came from the checkpoint.

    Raises:
        ValueError: naming weights that transformers made up, for it only warns.
    """
    lost = {str(key) for key in loading_info.get("missing_keys", ())}
    lost |= {str(key[0]) for key in loading_info.get("mismatched_keys", ())}
    if lost:
        some = sorted(lost)[:3]
        raise ValueError(f"The checkpoint {model.name_or_path!r} lacks {len(lost)} of its weights, such as {some}.")


def _loader_class(
    base: type[PreTrainedModel], kept: dict[int, list[int]], counts: dict[int, int]
) -> type[PreTrainedModel]:
    """The base class with fewer experts in condensed layers, which reads as many from the checkpoint."""

    def init(self: PreTrainedModel, config: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        for block in describe_sparse_blocks(self):
            if block.layer in kept:
                _shrink(block.experts, counts[block.layer], len(kept[block.layer]))

    def load(model: Any, state_dict: Any, files: list[str] | None, *args: Any, **kwargs: Any) -> Any:
        if files is not None:
            if not all(str(file).endswith(".safetensors") for file in files):
                raise ValueError("With a plan, only checkpoints in safetensors are read: others can't be read in part.")
            state_dict, files = _kept_tensors(files, kept, counts), None
        return base._load_pretrained_model(model, state_dict, files, *args, **kwargs)

    # Under the base's own name and module, transformers treats it as the class that it is.
    namespace = {"__module__": base.__module__, "__init__": init, "_load_pretrained_model": staticmethod(load)}
    return type(base.__name__, (base,), namespace)


def _shrink(experts: nn.Module, count: int, kept: int) -> None:
    for module in experts.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.ndim >= 2 and parameter.shape[0] % count == 0:
                shape = (parameter.shape[0] // count * kept, *parameter.shape[1:])
                setattr(module, name, nn.Parameter(torch.empty(shape, dtype=parameter.dtype, device=parameter.device)))
        if getattr(module, "num_experts", None) == count:
            setattr(module, "num_experts", kept)  # noqa: B010  (nn.Module declares its attributes to be tensors)


def _kept_tensors(files: Sequence[str], kept: dict[int, list[int]], counts: dict[int, int]) -> dict[str, Any]:
    """All tensors of a checkpoint that the condensed model needs, unread, experts renumbered."""
    tensors: dict[str, Any] = {}
    for file in files:
        handle = safe_open(file, framework="pt", device="cpu")
        for key in handle.keys():  # noqa: SIM118  (a safetensors handle is no dict)
            match = _ONE_EXPERT.search(key)
            experts = kept.get(int(match["layer"])) if match else None
            if match is not None and experts is not None:
                if int(match["expert"]) not in experts:
                    continue
                place = experts.index(int(match["expert"]))
                key_start, key_end = match.span("expert")
                tensors[f"{key[:key_start]}{place}{key[key_end:]}"] = handle.get_slice(key)
                continue
            part = handle.get_slice(key)
            match = _IN_LAYER.search(key)
            layer = int(match["layer"]) if match else -1
            if layer in kept and _is_stack(key, part.get_shape(), counts[layer]):
                part = _Rows(part, kept[layer], counts[layer])
            tensors[key] = part
    return tensors


def _is_stack(key: str, shape: Sequence[int], count: int) -> bool:
    """Whether a tensor on disk holds all experts: matrices `[N, a, b]`, or `[N*a, b]`, one on top of the other."""
    if len(shape) == 3:
        return shape[0] == count and "conv" not in key
    return len(shape) == 2 and _ALL_EXPERTS.search(key) is not None and shape[0] % count == 0


class _Rows:
    """Some experts of a stacked tensor on disk, read when asked for, as a safetensors slice is."""

    def __init__(self, part: Any, experts: Sequence[int], count: int) -> None:
        self.part = part
        self.experts = experts
        self.rows = part.get_shape()[0] // count

    def get_shape(self) -> list[int]:
        return [self.rows * len(self.experts), *self.part.get_shape()[1:]]

    def get_dtype(self) -> str:
        return self.part.get_dtype()

    def __getitem__(self, index: Any) -> Tensor:
        if index is not Ellipsis:
            raise IndexError("only all kept experts can be read at once")
        return torch.cat([self.part[e * self.rows : (e + 1) * self.rows] for e in self.experts])
