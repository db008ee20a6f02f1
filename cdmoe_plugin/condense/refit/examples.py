"""What a condensed layer is fitted to: inputs, and the outputs that it should give for them."""

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

# Every so many sequences, one is held out to choose on.
HELD_OUT_EVERY = 5


class Example(NamedTuple):
    """T tokens of a batch.

    Args:
        inputs (`Tensor`): What the layer sees, `[T, H]` in the model's dtype.
        target (`Tensor`): What it should give, float32 `[T, H]`.
        weights (`Tensor`): float32 `[T]`, how much the squared error of each token counts.
    """

    inputs: Tensor
    target: Tensor
    weights: Tensor


@dataclass(frozen=True)
class RefitLayer:
    """How well a layer is fitted: weighted squared errors on held-out calibration tokens, relative to the target's.

    Args:
        before (`float`): Of the folded experts.
        after (`float`): Of what was kept; never larger.
        strength (`float`, *optional*): Ridge strength that was chosen, None where the folded layer was kept.
    """

    before: float
    after: float
    strength: float | None = None


class LayerExamples:
    """The examples of one sparse layer on all calibration batches, computed when asked for and kept if they fit.

    Args:
        stream (`LayerStream`): The model, condensed below this layer.
        block (`SparseBlock`): The layer's sparse block.
        states (`list[LayerOutput]`): The layer's input in the condensed model, per batch.
        goals (`list[Tensor] | None`): The layer's output in the unmodified model, `[B, S, H]` per batch: the target is
            then what takes the condensed model's hidden states there (of several residual streams `[B, S, n, H]`, as
            near as it can), errors of the layers below included. With None, and in layers that do more with their
            block's output than adding it, the target is what the sparse block gives for the same inputs.
        cache_bytes (`int`): Memory for examples that are kept.
    """

    def __init__(
        self,
        stream: LayerStream,
        block: SparseBlock,
        states: list[LayerOutput],
        goals: list[Tensor] | None,
        cache_bytes: int,
    ) -> None:
        self.stream = stream
        self.block = block
        self.states = states
        self.goals = goals
        self._left = cache_bytes
        self._kept: dict[int, tuple[Example, Tensor]] = {}
        counts = torch.tensor([0, *(len(batch.input_ids) for batch in stream.batches)]).cumsum(0).tolist()
        self._first_sequence = counts[:-1]

    def __len__(self) -> int:
        return len(self.states)

    def fit(self, batch: int) -> Example:
        """The tokens of a batch to fit on."""
        return self._part(batch, held_out=False)

    def held_out(self, batch: int) -> Example:
        """The tokens of a batch to choose on: whole sequences."""
        return self._part(batch, held_out=True)

    def both(self) -> Iterator[tuple[Example, Example]]:
        """Both parts of every batch."""
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
            self.states[batch], batch, torch.ones(int(valid.sum()))
        )
        valid = valid.to(output[0].device)
        target, hidden = call.target, output[0][valid].float()
        weights = hidden.new_ones(len(hidden))
        if self.goals is not None and not isinstance(call.tail, PlaybackTail):
            hidden = self.goals[batch].to(hidden.device)[valid].float()
            target, weights = call.tail.nearest(hidden)
        # The norm in front of whatever comes next divides the size of a token's hidden state out.
        weights = weights / hidden.flatten(1).square().mean(-1).clamp_min(1e-8)
        sequence = valid.nonzero()[:, 0] + self._first_sequence[batch]
        found = Example(call.inputs, target, weights), sequence % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        size = sum(part.numel() * part.element_size() for part in found[0])
        if size <= self._left:
            self._left -= size
            self._kept[batch] = found
        return found
