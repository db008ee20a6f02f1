"""The examples to which a condensed layer is fitted: its inputs and target outputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...blocks import SparseBlock
from ...decoder.record import LayerRecorder
from ...decoder.stream import LayerOutput, LayerStream
from ...decoder.tails import PlaybackTail

# One in so many sequences is held out for validation.
HELD_OUT_EVERY = 5


class Example(NamedTuple):
    """The layer's inputs and targets for T tokens of a batch.

    Args:
        inputs (`Tensor`): Inputs, `[T, H]` in the model's dtype.
        target (`Tensor`): Target outputs, float32 `[T, H]`.
        weights (`Tensor`): Weights of the tokens' squared errors, float32 `[T]`.
    """

    inputs: Tensor
    target: Tensor
    weights: Tensor


@dataclass(frozen=True)
class RefitLayer:
    """The result of a fit: weighted squared errors on held-out calibration tokens, relative to the target's size.

    Args:
        before (`float`): Error of the folded layer.
        after (`float`): Error of the kept weights; never larger.
        strength (`float`, *optional*): The chosen ridge strength; None if the folded layer was kept.
    """

    before: float
    after: float
    strength: float | None = None


class LayerExamples:
    """The examples of one sparse layer on all calibration batches, computed on demand and cached if they fit.

    Args:
        stream (`LayerStream`): The model, with earlier layers condensed.
        block (`SparseBlock`): The layer's sparse block.
        inputs (`list[LayerOutput]`): The layer's input in the condensed model, per batch.
        goals (`list[Tensor] | None`): The layer's output in the unmodified model, `[B, S, H]` per batch. The target is
            then the block output with which the condensed model reaches it, which also corrects errors of earlier
            layers; with several residual streams `[B, S, n, H]`, the output that comes nearest. If None, and in layers
            that do more with their block's output than adding it, the target is the sparse block's output for the same
            inputs.
        cache_bytes (`int`): Memory for cached examples.
    """

    def __init__(
        self,
        stream: LayerStream,
        block: SparseBlock,
        inputs: list[LayerOutput],
        goals: list[Tensor] | None,
        cache_bytes: int,
    ) -> None:
        self.stream = stream
        self.block = block
        self.inputs = inputs
        self.goals = goals
        self._left = cache_bytes
        self._kept: dict[int, tuple[Example, Tensor]] = {}
        counts = torch.tensor([0, *(len(batch.input_ids) for batch in stream.batches)]).cumsum(0).tolist()
        self._first_sequence = counts[:-1]

    def __len__(self) -> int:
        return len(self.inputs)

    def fit(self, batch: int) -> Example:
        """Return the tokens of a batch to fit on."""
        return self._part(batch, held_out=False)

    def held_out(self, batch: int) -> Example:
        """Return the tokens of a batch for validation: whole sequences."""
        return self._part(batch, held_out=True)

    def both(self) -> Iterator[tuple[Example, Example]]:
        """Yield both parts of every batch."""
        for batch in range(len(self)):
            yield self.fit(batch), self.held_out(batch)

    def _part(self, batch: int, held_out: bool) -> Example:
        example, is_held_out = self._example(batch)
        rows = is_held_out if held_out else ~is_held_out
        return Example(*(part[rows] for part in example))

    def _example(self, batch: int) -> tuple[Example, Tensor]:
        if batch in self._kept:
            return self._kept[batch]
        valid = self.stream.valid(batch)
        call, output = LayerRecorder(self.stream, self.block).record(
            self.inputs[batch], batch, torch.ones(int(valid.sum()))
        )
        valid = valid.to(output[0].device)
        target, hidden = call.target, output[0][valid].float()
        weights = hidden.new_ones(len(hidden))
        if self.goals is not None and not isinstance(call.tail, PlaybackTail):
            hidden = self.goals[batch].to(hidden.device)[valid].float()
            target, weights = call.tail.nearest(hidden)
        # The next norm divides by the size of a token's hidden state.
        weights = weights / hidden.flatten(1).square().mean(-1).clamp_min(1e-8)
        sequence = valid.nonzero()[:, 0] + self._first_sequence[batch]
        found = Example(call.inputs, target, weights), sequence % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        size = sum(part.numel() * part.element_size() for part in found[0])
        if size <= self._left:
            self._left -= size
            self._kept[batch] = found
        return found
