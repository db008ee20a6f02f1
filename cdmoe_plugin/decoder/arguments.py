"""The arguments of all decoder layers by batch, kept within a given memory and captured again beyond it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from ..calibration import TokenBatch
from .layout import DecoderLayout
from .whole import LayerArguments, LayerOutput, layer_arguments


class BatchArguments:
    """The arguments that a model gives its decoder layers, other than hidden states.

    Some do not depend on the number of tokens (rotary embeddings), others grow with its square (attention masks).

    Args:
        model (`PreTrainedModel`): The whole model.
        layers (`Sequence[nn.Module]`): Its decoder layers.
        layout (`DecoderLayout`): The layout of its decoder.
        memory (`int`, *optional*): Bytes for kept arguments; no limit by default. Those of the last batch always stay.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[nn.Module],
        layout: DecoderLayout,
        memory: int | None = None,
    ) -> None:
        self._capture = partial(layer_arguments, model, layers, layout)
        self._left = memory
        # By the batch's identity, which is its own as long as it is referred to.
        self._kept: dict[int, tuple[TokenBatch, list[LayerArguments]]] = {}
        self._last: tuple[TokenBatch, list[LayerArguments]] | None = None

    def __getitem__(self, batch: TokenBatch) -> list[LayerArguments]:
        if id(batch) in self._kept:
            return self._kept[id(batch)][1]
        if self._last is None or self._last[0] is not batch:
            self.entering(batch)
        assert self._last is not None
        return self._last[1]

    def entering(self, batch: TokenBatch) -> LayerOutput:
        """Return the input of the first layer, which is not kept."""
        self._last = None  # released before the next ones are made
        calls, entering = self._capture(batch)
        self._last = (batch, calls)
        size = 0 if self._left is None else _size(calls)
        if id(batch) not in self._kept and (self._left is None or size <= self._left):
            self._kept[id(batch)] = self._last
            self._left = None if self._left is None else self._left - size
        return entering


def _size(calls: Sequence[LayerArguments]) -> int:
    """Return the bytes of all tensors; layers share most of them."""
    leaves = pytree.tree_leaves(list(calls))
    storages = (leaf.untyped_storage() for leaf in leaves if isinstance(leaf, Tensor))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
