"""State dicts with the names of checkpoints, which `load_state_dict` restores in condensed models.

transformers renames and merges weights when it opens a checkpoint (Mixtral's `block_sparse_moe` is `mlp` in memory, and
its experts are stacked). `load_state_dict` does not: with `strict=False`, as transformers' Trainer calls it to resume
or to load the best model, it leaves weights with other names as they were.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from .layers_cdmoe import CondensedMLP

_PROJECTIONS = tuple(f".{name}_proj.{kind}" for name in ("gate", "up", "down") for kind in ("weight", "bias"))


@torch.no_grad()
def use_names_in_memory(model: PreTrainedModel, state_dict: dict[str, Any], prefix: str) -> None:
    """Convert weights with the names of checkpoints to the names in memory, in place.

    Weights that are merged in memory are copied into the model at once: together they would take its memory again.

    Args:
        model (`PreTrainedModel`): A condensed model.
        state_dict (`dict`): The state dict, or a shard of it, for the model or for a module around it.
        prefix (`str`): The place of the model in `state_dict`, such as "module.".

    Raises:
        ValueError: if weights of the condensed layers are missing while there are others of such layers whose names the
            model does not know. With `strict=False`, the condensed layers would silently stay as they are.
    """
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    known: dict[str, Tensor] = dict(tensors) | {_without_wrappers(name): tensor for name, tensor in tensors}
    unknown = {key.removeprefix(prefix): key for key in state_dict if key.removeprefix(prefix) not in known}
    if not unknown:
        return
    names = _Names(model, known)
    merged: dict[str, dict[str, Tensor]] = {}
    others = []
    for name, key in unknown.items():
        target, converter = names.in_memory(name)
        if target not in known:
            others.append(key)
        elif converter is None:
            state_dict.setdefault(prefix + target, state_dict.pop(key))
        else:
            merged.setdefault(target, {})[name] = state_dict.pop(key)
    _refuse_other_names(model, state_dict, prefix, others)
    for target, parts in merged.items():
        for name, tensor in names.merge(target, parts).items():
            state_dict[prefix + name] = known[name].copy_(tensor)


class _Names:
    """The names of a model's weights on disk, as transformers converts them.

    Args:
        model (`PreTrainedModel`): The model.
        known (`Mapping[str, Tensor]`): Its weights by their names in memory.
    """

    def __init__(self, model: PreTrainedModel, known: Mapping[str, Tensor]) -> None:
        self.model = model
        self.known = known
        own = getattr(model, "_weight_conversions", None) or get_model_conversion_mapping(model)
        self.renamings = [each for each in own if isinstance(each, WeightRenaming)]
        self.converters = [each for each in own if isinstance(each, WeightConverter)]

    def in_memory(self, name: str) -> tuple[str, str | None]:
        """Return the name in memory and, if the weight is merged or split there, the pattern of its converter."""
        target, converter = rename_source_key(
            name, self.renamings, self.converters, self.model.base_model_prefix, dict(self.known)
        )
        if target not in self.known:  # a layer with LoRA keeps its weights one level deeper
            below = f"{target.rpartition('.')[0]}.base_layer.{target.rpartition('.')[2]}"
            target = below if below in self.known else target
        return target, converter

    def merge(self, target: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Merge or split weights on disk; weights that are in another shard stay as they are in the model."""
        like = self.known[target]
        given = {name: tensor.to(like) for name, tensor in tensors.items()}
        whole = {**revert_weight_conversion(self.model, {target: like}), **given}
        converter: Any = None
        for name in sorted(whole, key=dot_natural_key):
            _, pattern = self.in_memory(name)
            if converter is None:
                converter = copy.deepcopy(next(each for each in self.converters if pattern in each.source_patterns))
            converter.add_tensor(target, name, pattern, whole[name])
        made = converter.convert(target, model=self.model, config=self.model.config)
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}


def _without_wrappers(name: str) -> str:
    """Return a weight's name without those of FSDP and gradient checkpointing, which their hooks leave out too."""
    return re.sub(r"\b(_fsdp_wrapped_module|_checkpoint_wrapped_module)\.", "", name)


def _refuse_other_names(
    model: PreTrainedModel, state_dict: Mapping[str, Any], prefix: str, others: Sequence[str]
) -> None:
    mlps = [(name, module) for name, module in model.named_modules() if isinstance(module, CondensedMLP)]
    needed = [prefix + _without_wrappers(f"{name}.{own}") for name, mlp in mlps for own, _ in mlp.named_parameters()]
    missing = [name for name in needed if name not in state_dict]
    others = [key for key in others if key.endswith(_PROJECTIONS)]
    if others and missing:
        raise ValueError(
            f"The state dict lacks {len(missing)} weights of the condensed layers, such as {missing[0]!r}, but has "
            f"weights that the model does not know, such as {others[0]!r}: they belong to another model or wrapper. "
            "Open the checkpoint with `from_pretrained`."
        )
