"""Tensors in a checkpoint's safetensors files, read on demand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.modeling_utils import str_to_torch_dtype


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
    wanted: torch.dtype | None = None

    @property
    def files(self) -> set[str]:
        return {self.file}

    def get_shape(self) -> list[int]:
        return self.shape

    def get_dtype(self) -> str:
        return self.dtype

    @property
    def torch_dtype(self) -> torch.dtype:
        return self.wanted or str_to_torch_dtype[self.dtype]

    def __getitem__(self, index: Any) -> Tensor:
        tensor = self._read(index)
        return tensor if self.wanted is None else tensor.to(self.wanted)

    def _read(self, index: Any) -> Tensor:
        with safe_open(self.file, framework="pt", device="cpu") as handle:
            part = handle.get_slice(self.key)
            if self.rows is None:
                return part[index]
            if index is not Ellipsis:
                raise IndexError("only all kept experts can be read at once")
            return torch.cat([part[rows.start : rows.stop] for rows in self.rows])

    def to(self, dtype: torch.dtype) -> Unread:
        """Return the same tensor in another dtype."""
        return replace(self, wanted=dtype)

    def of_experts(self, experts: Sequence[int], count: int) -> Unread:
        """Select the rows of some of the `count` experts that this tensor stacks, as `[N, ...]` or `[N*a, ...]`."""
        rows = self.shape[0] // count
        shape = [rows * len(experts), *self.shape[1:]]
        return replace(self, shape=shape, rows=[range(e * rows, (e + 1) * rows) for e in experts])


def unread_tensors(files: Sequence[str]) -> dict[str, Unread]:
    """List the tensors in safetensors files by their names on disk."""
    tensors = {}
    for file in files:
        with safe_open(file, framework="pt", device="cpu") as handle:
            for key in handle.keys():  # noqa: SIM118  (the handle is not a dict)
                part = handle.get_slice(key)
                tensors[key] = Unread(file, key, part.get_shape(), part.get_dtype())
    return tensors
