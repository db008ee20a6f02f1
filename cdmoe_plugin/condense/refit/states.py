"""Hidden states of all batches between two decoder layers, on disk beyond a given memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, overload

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils import _pytree as pytree

from ...decoder.stream import LayerOutput


class HiddenStates(Sequence[LayerOutput]):
    """The inputs of a decoder layer by batch, which may be replaced one by one.

    What does not fit into memory is in temporary files, which are removed with the object.

    Args:
        states (`Iterable[LayerOutput]`): One entry per batch.
        memory (`int`): Bytes of all tensors in memory.
    """

    def __init__(self, states: Iterable[LayerOutput], memory: int) -> None:
        self._left = memory
        self._kept: list[_InMemory | _InFile] = []
        self._folder: TemporaryDirectory[str] | None = None
        for output in states:
            self._kept.append(self._store(output, len(self._kept)))

    def __len__(self) -> int:
        return len(self._kept)

    @overload
    def __getitem__(self, batch: int) -> LayerOutput: ...
    @overload
    def __getitem__(self, batch: slice) -> list[LayerOutput]: ...
    def __getitem__(self, batch: int | slice) -> LayerOutput | list[LayerOutput]:
        return [kept.read() for kept in self._kept[batch]] if isinstance(batch, slice) else self._kept[batch].read()

    def __iter__(self) -> Iterator[LayerOutput]:
        return (kept.read() for kept in self._kept)

    def __setitem__(self, batch: int, output: LayerOutput) -> None:
        self._left += self._kept[batch].size
        self._kept[batch] = self._store(output, batch)

    def _store(self, output: LayerOutput, batch: int) -> _InMemory | _InFile:
        tensors = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
        size = sum(tensor.nbytes for tensor in tensors)
        if size <= self._left:
            self._left -= size
            return _InMemory(output, size)
        if self._folder is None:
            self._folder = TemporaryDirectory(prefix="cdmoe-refit-")
        return _InFile(output, Path(self._folder.name) / f"{batch}.safetensors")


class _InMemory:
    def __init__(self, output: LayerOutput, size: int) -> None:
        self.output = output
        self.size = size

    def read(self) -> LayerOutput:
        return self.output


class _InFile:
    size = 0

    def __init__(self, output: LayerOutput, path: Path) -> None:
        self.path = path
        leaves, self.tree = pytree.tree_flatten(output)
        tensors = {str(i): leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
        self.devices = {name: tensor.device for name, tensor in tensors.items()}
        self.others: list[Any] = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        save_file(
            {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()},
            path,
        )

    def read(self) -> LayerOutput:
        leaves = list(self.others)
        for name, tensor in load_file(self.path).items():
            # A copy, as the file is mapped into memory, and will be written again.
            leaves[int(name)] = tensor.to(self.devices[name], copy=True)
        return pytree.tree_unflatten(leaves, self.tree)
