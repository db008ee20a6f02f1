"""Tensors in a checkpoint's safetensors files, read on demand."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.modeling_utils import str_to_torch_dtype

# On disk, an expert has its own tensors ("...layers.3.mlp.experts.17.up_proj.weight", with varying names around the
# numbers), or all experts of a layer share one.
_LAYER = r"(?:^|\.)(?:layers|blocks|h)\.(?P<layer>\d+)\."
_ONE_EXPERT = re.compile(_LAYER + r".*?\.experts\.(?P<expert>\d+)\.")
_ALL_EXPERTS = re.compile(_LAYER + r".*?\.experts\b")
_IN_LAYER = re.compile(_LAYER)


@dataclass(frozen=True)
class Unread:
    """A tensor in a safetensors file, or some rows of it, read when indexed, as a slice of safetensors.

    The file is open only then: the pages read from an open file count as memory in use.
    """

    file: str
    key: str
    shape: list[int]
    dtype: str
    rows: list[range] | None = None

    def get_shape(self) -> list[int]:
        return self.shape

    def get_dtype(self) -> str:
        return self.dtype

    @property
    def torch_dtype(self) -> torch.dtype:
        return str_to_torch_dtype[self.dtype]

    def __getitem__(self, index: Any) -> Tensor:
        with safe_open(self.file, framework="pt", device="cpu") as handle:
            part = handle.get_slice(self.key)
            if self.rows is None:
                return part[index]
            if index is not Ellipsis:
                raise IndexError("only all kept experts can be read at once")
            return torch.cat([part[rows.start : rows.stop] for rows in self.rows])


def numbered_experts(tensors: Mapping[str, Unread]) -> list[int]:
    """List the experts of a layer that have tensors of their own; none if they share one."""
    matches = (_ONE_EXPERT.search(key) for key in tensors)
    return sorted({int(match["expert"]) for match in matches if match})


def some_experts(tensors: Mapping[str, Unread], experts: Sequence[int]) -> dict[str, Unread]:
    """Select the tensors of some experts of a layer, renumbered from 0."""
    found = {}
    for key, tensor in tensors.items():
        match = _ONE_EXPERT.search(key)
        if match is not None and int(match["expert"]) in experts:
            start, end = match.span("expert")
            found[f"{key[:start]}{experts.index(int(match['expert']))}{key[end:]}"] = tensor
    return found


def without_experts(tensors: Mapping[str, Unread]) -> dict[str, Unread]:
    """Select the tensors that do not belong to a single expert."""
    return {key: tensor for key, tensor in tensors.items() if _ONE_EXPERT.search(key) is None}


def unread_tensors(
    files: Sequence[str], kept: Mapping[int, Sequence[int]], counts: Mapping[int, int]
) -> dict[str, Any]:
    """List the tensors of a checkpoint that the condensed model needs, with renumbered experts.

    Args:
        files (`Sequence[str]`): Safetensors files.
        kept (`Mapping[int, Sequence[int]]`): The kept experts of condensed layers, by decoder layer.
        counts (`Mapping[int, int]`): Numbers of experts by decoder layer.
    """
    tensors: dict[str, Any] = {}
    for file in files:
        with safe_open(file, framework="pt", device="cpu") as handle:
            shapes = {key: (part.get_shape(), part.get_dtype()) for key, part in _slices(handle)}
        for key, (shape, dtype) in shapes.items():
            match = _ONE_EXPERT.search(key)
            experts = kept.get(int(match["layer"])) if match else None
            if match is not None and experts is not None:
                if int(match["expert"]) not in experts:
                    continue
                place = experts.index(int(match["expert"]))
                key_start, key_end = match.span("expert")
                tensors[f"{key[:key_start]}{place}{key[key_end:]}"] = Unread(file, key, shape, dtype)
                continue
            layer = layer_of(key)
            if layer is not None and layer in kept and _is_stack(key, shape, counts[layer]):
                rows = shape[0] // counts[layer]
                shape = [rows * len(kept[layer]), *shape[1:]]
                tensors[key] = Unread(file, key, shape, dtype, [range(e * rows, (e + 1) * rows) for e in kept[layer]])
            else:
                tensors[key] = Unread(file, key, shape, dtype)
    return tensors


def _slices(handle: Any) -> list[tuple[str, Any]]:
    return [(key, handle.get_slice(key)) for key in handle.keys()]  # noqa: SIM118  (the handle is not a dict)


def _is_stack(key: str, shape: Sequence[int], count: int) -> bool:
    """Return whether a tensor on disk stacks all experts, as `[N, a, b]` or `[N*a, b]`.

    Convolutions also have three dimensions, and attention may be a mixture of experts itself (jetmoe).
    """
    if "attention" in key:
        return False
    if len(shape) == 3:
        return shape[0] == count and "conv" not in key
    return len(shape) == 2 and _ALL_EXPERTS.search(key) is not None and shape[0] % count == 0


def layer_of(key: str) -> int | None:
    """Return the decoder layer of a tensor on disk; None for tensors outside of the layers."""
    match = _IN_LAYER.search(key)
    return int(match["layer"]) if match else None
