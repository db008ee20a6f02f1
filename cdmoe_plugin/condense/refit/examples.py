"""The examples to which a condensed layer is fitted: its inputs and target outputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...blocks import Routing, SparseBlock
from ...decoder.record import LayerRecorder
from ...decoder.stream import LayerStream
from ...decoder.tails import PlaybackTail
from ...decoder.whole import LayerOutput
from ...model.layers_cdmoe import CondensedMLP
from ...processes import Processes
from ..mixed import MixedLayer

# One in so many sequences is held out for validation.
HELD_OUT_EVERY = 5
# Activations in float64 that are computed at a time.
_ELEMENTS = 2**24


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

    def split(self, width: int) -> Iterator[Example]:
        """Yield the tokens in parts whose activations in a layer of this width need little memory."""
        tokens = max(1, _ELEMENTS // max(1, width))
        yield from map(Example._make, zip(*(part.split(tokens) for part in self), strict=True))


class _Recorded(NamedTuple):
    example: Example
    routing: Routing
    held_out: Tensor  # bool, [T]


@dataclass(frozen=True)
class RefitLayer:
    """The result of a fit: weighted squared errors on held-out calibration tokens, relative to the target's size.

    Args:
        before (`float`): Error of the folded layer.
        after (`float`): Error of the kept weights; never larger.
        strength (`float`, *optional*): The chosen ridge strength; None if the folded layer was kept.
        neurons (`dict[int, int]`, *optional*): The number of neurons from each routed expert; None for whole experts.
        gated (`bool`, defaults to `False`): Whether the layer has gates per token for its routed experts.
    """

    before: float
    after: float
    strength: float | None = None
    neurons: dict[int, int] | None = None
    gated: bool = False


class LayerExamples:
    """The examples of one sparse layer on a process's batches, computed on demand and cached if they fit.

    Sums over them are those over all calibration tokens after `processes.add_up`.

    Args:
        stream (`LayerStream`): The model, with earlier layers condensed.
        block (`SparseBlock`): The layer's sparse block.
        inputs (`Sequence[LayerOutput]`): The layer's input in the condensed model, per batch.
        goals (`Sequence[LayerOutput] | None`): The layer's output in the unmodified model, per batch. The target is
            then the block output with which the condensed model reaches it, which also corrects errors of earlier
            layers; with several residual streams `[B, S, n, H]`, the output that comes nearest. If None, and in layers
            that do more with their block's output than adding it, the target is the sparse block's output for the same
            inputs.
        cache_bytes (`int`): Memory for cached examples.
        processes (`Processes`, *optional*): The processes of the refit; a single one by default.
        beside (`MixedLayer`, *optional*): The layer with experts behind its router. Its dense part is then fitted, to
            the part of the target that these experts do not give.
    """

    def __init__(
        self,
        stream: LayerStream,
        block: SparseBlock,
        inputs: Sequence[LayerOutput],
        goals: Sequence[LayerOutput] | None,
        cache_bytes: int,
        processes: Processes | None = None,
        beside: MixedLayer | None = None,
    ) -> None:
        self.stream = stream
        self.block = block
        self.inputs = inputs
        self.goals = goals
        self.beside = beside
        self._left = self._cache_bytes = cache_bytes
        self._kept: dict[int, _Recorded] = {}
        self.processes = processes or Processes(None, len(stream.batches))
        sizes = self.processes.in_order([len(batch.input_ids) for batch in stream.batches])
        self._first_sequence = self.processes.mine([sum(sizes[:batch]) for batch in range(len(sizes))])

    def __len__(self) -> int:
        return len(self.inputs)

    def of_whole_layer(self) -> LayerExamples:
        """Return the same examples with the targets of the whole layer, in place of those of its dense part."""
        self._kept.clear()
        return LayerExamples(self.stream, self.block, self.inputs, self.goals, self._cache_bytes, self.processes)

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

    def numbers_to_fit(self) -> list[int]:
        """Count the tokens to fit on in each batch of all processes."""
        masks = [batch.attention_mask.sum(1) for batch in self.stream.batches]
        return self.processes.in_order(
            [int(mask[~self._held_out(torch.arange(len(mask)), i)].sum()) for i, mask in enumerate(masks)]
        )

    def drawn(self, batch: int, rows: Tensor) -> Example:
        """Return some tokens to fit on of a batch of all processes, by their indices, in every process."""
        index, owner = divmod(batch, self.processes.count)
        if owner == self.processes.index:
            found = Example(*(part[rows.to(part.device)] for part in self.fit(index)))
        else:
            inputs = torch.empty(len(rows), self.block.hidden_size, dtype=self.block.dtype, device=self.block.device)
            found = Example(inputs, torch.empty_like(inputs, dtype=torch.float32), inputs.new_empty(len(rows)).float())
        self.processes.send(owner, *found)
        return found

    def routed(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the inputs `[T, H]` of all tokens of a batch, their experts and router weights, `[T, k]` each."""
        recorded = self._recorded(batch)
        return recorded.example.inputs, *recorded.routing

    def choices_to_fit(self, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the inputs `[T, H]` of a batch's tokens to fit on, in parts, and their experts `[T, k]`."""
        recorded = self._recorded(batch)
        parts = (recorded.example.inputs, recorded.routing.experts)
        tokens = max(1, _ELEMENTS // (self.block.hidden_size + self.block.num_experts))
        yield from zip(*(part[~recorded.held_out].split(tokens) for part in parts), strict=True)

    def _part(self, batch: int, held_out: bool) -> Example:
        recorded = self._recorded(batch)
        rows = recorded.held_out if held_out else ~recorded.held_out
        return Example(*(part[rows] for part in recorded.example))

    def _recorded(self, batch: int) -> _Recorded:
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
            hidden = self.goals[batch][0].to(hidden.device)[valid].float()
            target, weights = call.tail.nearest(hidden)
        # The next norm divides by the size of a token's hidden state.
        weights = weights / hidden.flatten(1).square().mean(-1).clamp_min(1e-8)
        if self.beside is not None:
            target, weights = self.beside.missing(call.inputs, target, weights)
        held_out = self._held_out(valid.nonzero()[:, 0], batch)
        found = _Recorded(Example(call.inputs, target, weights), call.routing, held_out)
        size = sum(part.nbytes for part in (*found.example, *found.routing))
        if size <= self._left:
            self._left -= size
            self._kept[batch] = found
        return found

    def _held_out(self, sequences: Tensor, batch: int) -> Tensor:
        """Return whether sequences of one of this process's batches, given by their indices, are held out."""
        return (sequences + self._first_sequence[batch]) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1


def squared_error(mlp: CondensedMLP | MixedLayer, example: Example) -> Tensor:
    """Compute the weighted sum of squared errors, a scalar; before the layer's norm, if any."""
    error = (mlp.sum_of_experts(example.inputs.float()) - example.target).square().sum(-1)
    return (error * example.weights).sum()


def size_of(example: Example) -> Tensor:
    """Compute the weighted sum of squares of the target, a scalar to which errors are relative."""
    return (example.target.square().sum(-1) * example.weights).sum().clamp_min(1e-30)


@torch.no_grad()
def held_out_error(mlp: CondensedMLP | MixedLayer, examples: LayerExamples) -> float:
    """Compute the error of a float32 layer on all tokens for validation, relative to the target's size."""
    sums = torch.zeros(2, dtype=torch.float64)
    for batch in range(len(examples)):
        for part in examples.held_out(batch).split(mlp.intermediate_size):
            sums += torch.stack([squared_error(mlp, part), size_of(part)]).double().cpu()
    examples.processes.add_up(sums)
    error, size = sums.tolist()
    return error / max(size, 1e-30)
