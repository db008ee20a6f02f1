"""Places of a checkpoint's tensors in the model: names on disk translated to names of the model's weights.

On disk, an expert has its own tensors, which transformers stacks, or all experts of a layer share one. Names on disk
are those of their authors. transformers knows how to rename them, and only what it makes of a name tells to which layer
a tensor belongs: "mtp.layers.0" and "visual.blocks.0" are not the first decoder layer.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from .tensors import Unread

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Place:
    """The place of a tensor on disk.

    Args:
        name (`str`): The weight of the model that it becomes, or the first of them.
        known (`bool`): Whether the model has that weight.
        layer (`int`, *optional*): Its decoder layer, if it is in one.
        expert (`int`, *optional*): Its expert, if it is stacked with those of others.
        around (`tuple[str, str]`): The name on disk before and after the expert's number.
    """

    name: str
    known: bool
    layer: int | None = None
    expert: int | None = None
    around: tuple[str, str] = ("", "")

    def key_of(self, expert: int) -> str:
        """Return the name on disk of the same tensor of another expert."""
        return f"{self.around[0]}{expert}{self.around[1]}"


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint and its place in the model."""

    tensor: Unread
    place: Place


class Places:
    """The places of tensors in a model.

    Args:
        model (`PreTrainedModel`): The model, which may be on the meta device.
        layers_path (`str`): Name of the list of decoder layers in the model, such as "model.layers".
        weight_mapping (`Sequence`): transformers' renamings and conversions of names on disk.
    """

    def __init__(self, model: PreTrainedModel, layers_path: str, weight_mapping: Sequence[Any]) -> None:
        mapping = copy.deepcopy(list(weight_mapping))  # they remember whether they were used
        self.renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
        self.converters = [each for each in mapping if isinstance(each, WeightConverter)]
        self.prefix = model.base_model_prefix
        self.weights = model.state_dict()
        self.layer = re.compile(re.escape(f"{layers_path}.") + r"(\d+)\.")
        self.num_layers = len(model.get_submodule(layers_path))  # type: ignore[arg-type]

    def of(self, keys: Iterable[str]) -> dict[str, Place]:
        """Find the places of tensors by their names on disk."""
        # Some renamings depend on those before them, in this order.
        return {key: self._place(key) for key in sorted(keys, key=dot_natural_key)}

    def dtype_of(self, place: Place) -> torch.dtype | None:
        """Return the dtype of the model's weight, or None if it has no such weight."""
        return self.weights[place.name].dtype if place.known else None

    def _renamed(self, key: str) -> tuple[str, str | None]:
        """Rename a tensor as transformers does when it loads it; return the pattern of its conversion too, if any."""
        name, pattern = rename_source_key(key, self.renamings, self.converters, self.prefix, self.weights)
        if name not in self.weights and key in self.weights:
            return rename_source_key(key, [], [], self.prefix, self.weights)
        return name, pattern

    def _place(self, key: str) -> Place:
        name, pattern = self._renamed(key)
        match = self.layer.match(name)
        layer = int(match[1]) if match and int(match[1]) < self.num_layers else None
        if pattern is not None and "*" in pattern:
            for number in reversed(list(_NUMBER.finditer(key))):
                # The tensors that are stacked have the same name but for this number.
                around = key[: number.start()], key[number.end() :]
                if self._renamed(f"{around[0]}{int(number[0]) + 1}{around[1]}") == (name, pattern):
                    return Place(name, name in self.weights, layer, int(number[0]), around)
        return Place(name, name in self.weights, layer)


def kept_only(
    stored: Mapping[str, Stored], resized: set[str], kept: Mapping[int, Sequence[int]], counts: Mapping[int, int]
) -> dict[str, Stored]:
    """Select the tensors that a model with fewer experts in some layers needs, with renumbered experts.

    Args:
        stored (`Mapping[str, Stored]`): The checkpoint, by names on disk.
        resized (`set[str]`): The model's weights that have fewer rows than on disk.
        kept (`Mapping[int, Sequence[int]]`): The kept experts of these layers.
        counts (`Mapping[int, int]`): Numbers of experts by decoder layer.
    """
    found = {}
    for key, each in stored.items():
        place = each.place
        if place.layer is None or place.layer not in kept or place.name not in resized:
            found[key] = each
        elif place.expert is None:
            found[key] = Stored(each.tensor.of_experts(kept[place.layer], counts[place.layer]), place)
        elif place.expert in kept[place.layer]:
            found |= _renumbered(each, kept[place.layer])
    return found


def some_experts(stored: Mapping[str, Stored], experts: Sequence[int]) -> dict[str, Unread]:
    """Select the tensors of some experts of a layer that are stored one by one, renumbered from 0."""
    chosen = [each for each in stored.values() if each.place.expert in experts]
    return {key: new.tensor for each in chosen for key, new in _renumbered(each, experts).items()}


def without_experts(stored: Mapping[str, Stored]) -> dict[str, Unread]:
    """Select the tensors that do not belong to a single expert."""
    return {key: each.tensor for key, each in stored.items() if each.place.expert is None}


def numbered_experts(stored: Mapping[str, Stored]) -> list[int]:
    """List the experts of a layer that have tensors of their own; none if they share one."""
    return sorted({each.place.expert for each in stored.values() if each.place.expert is not None})


def resized_weights(model: nn.Module, whole: nn.Module) -> set[str]:
    """Return the names of a model's weights that have another shape in the whole model."""
    shapes = {name: weight.shape for name, weight in whole.named_parameters()}
    return {name for name, weight in model.named_parameters() if weight.shape != shapes.get(name)}


def _renumbered(each: Stored, experts: Sequence[int]) -> dict[str, Stored]:
    place = each.place
    assert place.expert is not None
    number = experts.index(place.expert)
    new = Place(place.name, place.known, place.layer, number, place.around)
    return {place.key_of(number): Stored(each.tensor, new)}
