"""Tails: the part of a decoder layer after its sparse block, as a function of the block's output."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .whole import LayerOutput


def as_it_is(output: LayerOutput) -> Tensor:
    """Return the output of a decoder layer, for the comparison."""
    return output[0]


def side_by_side(output: LayerOutput) -> Tensor:
    """Join several residual streams `[..., n, H]` to one vector `[..., n * H]`, for the comparison.

    The next layer reads all streams, with weights that it computes from them. The model's own way to merge them after
    the last layer is trained for that layer's output (or is their mean, in which differences may cancel out), so it is
    of little use for earlier layers. Equal streams compare like a single one.
    """
    return output[0].flatten(-2)


# From a decoder layer's output to the compared values. For the last layer, the final norm, as in the published code.
Finish = Callable[[LayerOutput], Tensor]


def added_to_streams(slopes: Tensor, y: Tensor, like: Tensor) -> Tensor:
    """Compute what a block's output `[..., H]` adds to streams, `[..., n, H]` or `[..., n * H]` as in `like`."""
    added = slopes * y.unsqueeze(-2)
    return added if added.shape[-2:] == like.shape[-2:] else added.flatten(-2)


class AffineTail:
    """A decoder layer that adds its block's output to the residual: `finish(offset + slope * y)`."""

    divisible = True
    streams = 1

    def __init__(self, offset: Tensor, slope: float, finish: Finish) -> None:
        self.offset = offset  # [T, H]
        self.slope = slope
        self.finish = finish

    def __call__(self, y: Tensor, rows: slice = slice(None)) -> Tensor:
        """Compute the compared values for block outputs `y` `[..., t, H]` at the `rows` of the T tokens."""
        return self.finish((torch.add(self.offset[rows], y, alpha=self.slope),))

    def part(self, rows: slice) -> AffineTail:
        """Return the tail of some of the T tokens."""
        return AffineTail(self.offset[rows], self.slope, self.finish)

    def nearest(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """Find the `y` `[T, H]` that gives the layer's output `[T, H]`, and the weights `[T]` of its errors."""
        return (output - self.offset) / self.slope, output.new_ones(len(output))


class StreamsTail:
    """A decoder layer that adds its block's output to n residual streams, times a factor per token and stream.

    It computes `finish(offset + slopes * y)`, with the streams joined if the layer returns them so.
    """

    divisible = True

    def __init__(self, offset: Tensor, slopes: Tensor, finish: Finish) -> None:
        self.offset = offset  # [T, n, H] or [T, n * H]
        self.slopes = slopes  # [T, n, 1]
        self.finish = finish
        self.streams = slopes.shape[-2]

    def __call__(self, y: Tensor, rows: slice = slice(None)) -> Tensor:
        """Compute the compared values for block outputs `y` `[..., t, H]` at the `rows` of the T tokens."""
        offset = self.offset[rows]
        return self.finish((offset + added_to_streams(self.slopes[rows], y, offset),))

    def part(self, rows: slice) -> StreamsTail:
        """Return the tail of some of the T tokens."""
        return StreamsTail(self.offset[rows], self.slopes[rows], self.finish)

    def nearest(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """Find the `y` `[T, H]` for which all streams are nearest to `output`, and the weights `[T]` of its errors."""
        left = (output - self.offset).reshape(len(output), self.streams, -1)
        squares = self.slopes.square().sum(-2)
        return (self.slopes * left).sum(-2) / squares.clamp_min(1e-12), squares[:, 0]


class PlaybackTail:
    """A decoder layer that does more with its block's output (a norm, a convolution) and is run each time."""

    divisible = False
    streams = 1

    def __init__(self, compared: Callable[[Tensor], Tensor], valid: Tensor) -> None:
        self.compared = compared
        self.valid = valid

    def __call__(self, y: Tensor, rows: slice = slice(None)) -> Tensor:
        """Compute the compared values `[..., T, H']` for block outputs `y` `[..., T, H]` of all T tokens."""
        assert rows == slice(None)
        results = []
        for candidate in y.reshape(-1, *y.shape[-2:]):
            padded = torch.zeros(*self.valid.shape, y.shape[-1], device=y.device)
            padded[self.valid] = candidate
            results.append(self.compared(padded)[self.valid])
        return torch.stack(results).reshape(*y.shape[:-2], *results[0].shape)

    def part(self, rows: slice) -> PlaybackTail:
        """Return the tail itself: it only runs on all T tokens at once."""
        assert rows == slice(None)
        return self


Tail = AffineTail | StreamsTail | PlaybackTail
