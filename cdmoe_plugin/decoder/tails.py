"""What a decoder layer makes of its sparse block's output, run again on stand-ins for it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .stream import LayerOutput


def as_it_is(output: LayerOutput) -> Tensor:
    """What is compared of a decoder layer that is not the last: its output."""
    return output[0]


def side_by_side(output: LayerOutput) -> Tensor:
    """The same for several residual streams `[..., n, H]`: one vector `[..., n * H]`.

    The next layer reads all streams, by weights that it computes from them. What the model itself does to make one of
    them is learnt for what the last layer gives (or is their mean, in which differences may cancel out), so that it
    says little of what layers before hand on. Streams that are all alike are compared as one would be.
    """
    return output[0].flatten(-2)


# From what a decoder layer hands on to what is compared; for the last one, what follows it (as in the published code).
Finish = Callable[[LayerOutput], Tensor]


def added_to_streams(slopes: Tensor, y: Tensor, like: Tensor) -> Tensor:
    """What a block's output `[..., H]` adds to streams, in the form `[..., n, H]` or `[..., n * H]` of others."""
    added = slopes * y.unsqueeze(-2)
    return added if added.shape[-2:] == like.shape[-2:] else added.flatten(-2)


class AffineTail:
    """A decoder layer that adds its block's output to what it has: `finish(offset + slope * y)`."""

    divisible = True
    streams = 1

    def __init__(self, offset: Tensor, slope: float, finish: Finish) -> None:
        self.offset = offset  # [T, H]
        self.slope = slope
        self.finish = finish

    def __call__(self, y: Tensor, rows: slice = slice(None)) -> Tensor:
        """What is compared for `y` `[..., t, H]`, the `rows` of the T tokens."""
        return self.finish((torch.add(self.offset[rows], y, alpha=self.slope),))

    def part(self, rows: slice) -> AffineTail:
        """The same for some of the T tokens."""
        return AffineTail(self.offset[rows], self.slope, self.finish)

    def nearest(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """The `y` `[T, H]` with which the layer gives an output `[T, H]`, and what an error of it counts, `[T]`."""
        return (output - self.offset) / self.slope, output.new_ones(len(output))


class StreamsTail:
    """A decoder layer that adds its block's output to each of n residual streams, times a factor of token and stream.

    `finish(offset + slopes * y)`, where the streams are side by side if the layer hands them on so.
    """

    divisible = True

    def __init__(self, offset: Tensor, slopes: Tensor, finish: Finish) -> None:
        self.offset = offset  # [T, n, H] or [T, n * H]
        self.slopes = slopes  # [T, n, 1]
        self.finish = finish
        self.streams = slopes.shape[-2]

    def __call__(self, y: Tensor, rows: slice = slice(None)) -> Tensor:
        """What is compared for `y` `[..., t, H]`, the `rows` of the T tokens."""
        offset = self.offset[rows]
        return self.finish((offset + added_to_streams(self.slopes[rows], y, offset),))

    def part(self, rows: slice) -> StreamsTail:
        """The same for some of the T tokens."""
        return StreamsTail(self.offset[rows], self.slopes[rows], self.finish)

    def nearest(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """The `y` `[T, H]` that comes nearest to an output in all streams, and what an error of it counts, `[T]`."""
        left = (output - self.offset).reshape(len(output), self.streams, -1)
        squares = self.slopes.square().sum(-2)
        return (self.slopes * left).sum(-2) / squares.clamp_min(1e-12), squares[:, 0]


class PlaybackTail:
    """A decoder layer that does more with its block's output (a norm, a convolution): run each time."""

    divisible = False
    streams = 1

    def __init__(self, compared: Callable[[Tensor], Tensor], valid: Tensor) -> None:
        self.compared = compared
        self.valid = valid

    def __call__(self, y: Tensor, rows: slice = slice(None)) -> Tensor:
        """What is compared `[..., T, H']` for `y` `[..., T, H]` of all T tokens."""
        assert rows == slice(None)
        results = []
        for candidate in y.reshape(-1, *y.shape[-2:]):
            padded = torch.zeros(*self.valid.shape, y.shape[-1], device=y.device)
            padded[self.valid] = candidate
            results.append(self.compared(padded)[self.valid])
        return torch.stack(results).reshape(*y.shape[:-2], *results[0].shape)

    def part(self, rows: slice) -> PlaybackTail:
        """All T tokens at once are all that there is."""
        assert rows == slice(None)
        return self


Tail = AffineTail | StreamsTail | PlaybackTail
