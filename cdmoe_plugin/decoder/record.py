"""Decoder layers taken apart at their sparse block, whose surroundings can be run again on other block outputs.

The surroundings of a block (a residual, a norm, a factor, several residual streams) are not looked up anywhere:
everything before the block is replayed, and the rest of the layer runs as usual.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..blocks import Routing, SparseBlock, UnsupportedModelError, patched_forward
from .stream import LayerStream
from .tails import AffineTail, Finish, PlaybackTail, StreamsTail, Tail, added_to_streams, as_it_is, side_by_side
from .whole import LayerOutput


@dataclass
class LayerCall:
    """One decoder layer on one batch, taken apart at its sparse block. T counts the tokens that are not padding.

    Args:
        inputs (`Tensor`): The block's inputs, `[T, H]` in the model's dtype.
        target (`Tensor`): The output of block and shared expert, float32 `[T, H]`, before the block's norm, if any.
        routing (`Routing`): The router's choice for the T tokens.
        tail (`Tail`): The rest of the layer: from other outputs in place of `target`, float32 `[..., T, H]`, to the
            compared values, float32.
        token_weights (`Tensor`): float32 `[T]`, weight of each token in a mean over sequences of means over tokens.
    """

    inputs: Tensor
    target: Tensor
    routing: Routing
    tail: Tail
    token_weights: Tensor


class LayerRecorder:
    """A decoder layer that is run on batches and taken apart at its sparse block."""

    def __init__(self, stream: LayerStream, block: SparseBlock) -> None:
        self.stream = stream
        self.block = block
        self.is_last = block.layer == len(stream) - 1
        self.finish: Finish = side_by_side if stream.layout.streams else as_it_is
        if self.is_last:
            self.finish = stream.finish
        self.owner = stream.layers[block.layer]
        own = {id(module) for module in block.summands}
        self.others = [child for child in self.owner.children() if id(child) not in own]

    @torch.no_grad()
    def record(self, entering: LayerOutput, batch: int, token_weights: Tensor) -> tuple[LayerCall, LayerOutput]:
        """Run the layer on its input for a batch; return the parts and the input of the next layer."""
        before: dict[int, list[Any]] = {id(child): [] for child in self.others}

        with ExitStack() as stack:
            record = stack.enter_context(self.block.recording())

            def on_other(module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
                if not record.complete:
                    before[id(module)].append(output)

            for child in self.others:
                stack.callback(child.register_forward_hook(on_other).remove)
            output = self.stream.run_layer(self.block.layer, entering, batch)
        self.stream.check_finite()
        valid = self.stream.valid(batch).to(output[0].device)
        target = record.total(valid)
        replay = _Replay(self, entering, batch, before)
        call = LayerCall(
            inputs=record.inputs(valid),
            target=target[valid],
            routing=record.routing_at(valid),
            tail=replay.tail(target, output[0], valid),
            token_weights=token_weights.to(target.device),
        )
        return call, output


class _Replay:
    """A decoder layer's forward in float32 that replays the modules before the block."""

    def __init__(
        self, recorder: LayerRecorder, entering: LayerOutput, batch: int, before: dict[int, list[Any]]
    ) -> None:
        self.recorder = recorder
        self.entering = tuple(map(_float, entering))
        self.batch = batch
        self.before = {key: pytree.tree_map(_float, outputs) for key, outputs in before.items()}

    def compared(self, y: Tensor) -> Tensor:
        """Compute the compared values for the block output `y` `[B, S, H]`."""
        return self.recorder.finish(self._run(y))

    def __call__(self, y: Tensor) -> Tensor:
        """Compute the layer's output `[B, S, ...]` for the block output `y` `[B, S, H]`."""
        return self._run(y)[0]

    def _run(self, y: Tensor) -> LayerOutput:
        recorder = self.recorder
        with ExitStack() as stack:
            for child in recorder.others:
                outputs = iter(self.before[id(child)])
                stack.enter_context(patched_forward(child, _replayed(outputs, _in_own_dtype(child))))
            stack.enter_context(recorder.block.playing(y))
            return recorder.stream.call_layer(recorder.block.layer, self.entering, self.batch)

    def tail(self, target: Tensor, output: Tensor, valid: Tensor) -> Tail:
        """Find the tail of the layer on valid tokens. Most layers add their block's output to the residual."""
        again = self(target)
        precision = 8 * torch.finfo(output.dtype).eps
        if not torch.allclose(again, output.float(), rtol=precision, atol=precision * float(output.abs().max())):
            raise UnsupportedModelError(
                f"decoder layer {self.recorder.block.layer} ({type(self.recorder.owner).__name__}) can't be searched: "
                "replaying it with the recorded output of its block gives another layer output."
            )
        if self.recorder.is_last and self.recorder.stream.layout.gathered is not None:
            return PlaybackTail(self.compared, valid)  # the modules after it need more than the layer's output
        offset = self(torch.zeros_like(target))
        # A random output as large as the rest of the sum distinguishes a norm after the block from a plain addition.
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(target.shape, generator=generator).to(target) * offset.std().clamp_min(1e-3)
        change = self(noise) - offset
        finish = self.recorder.finish
        if change.shape == noise.shape:
            slope = float((change * noise).sum(dtype=torch.float64) / noise.square().sum(dtype=torch.float64))
            if (change - slope * noise).norm() <= 1e-4 * change.norm():
                return AffineTail(offset[valid], 1.0 if abs(slope - 1.0) < 1e-5 else slope, finish)
        elif change.flatten(2).shape[-1] % noise.shape[-1] == 0:
            slopes = _slopes(change, noise)
            # Another size and sign show a norm, which divides by the size, and an activation.
            other = self(-2 * noise) - offset
            if all(
                (c - added_to_streams(slopes, y, c)).norm() <= 1e-4 * c.norm()
                for c, y in ((change, noise), (other, -2 * noise))
            ):
                return StreamsTail(offset[valid], slopes[valid], finish)
        return PlaybackTail(self.compared, valid)


def _slopes(change: Tensor, noise: Tensor) -> Tensor:
    """Fit the factors `[B, S, n, 1]` with which n streams take a block's output, from the change of the streams."""
    streams = change.flatten(2).unflatten(-1, (-1, noise.shape[-1])).double()
    squares = noise.double().square().sum(-1, keepdim=True)
    return ((streams @ noise.double().unsqueeze(-1)) / squares.unsqueeze(-1)).float()


def _replayed(outputs: Iterator[Any], live: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        try:
            return next(outputs)
        except StopIteration:
            return live(*args, **kwargs)

    return forward


def _in_own_dtype(module: nn.Module) -> Callable[..., Any]:
    """Wrap a module's forward to take float32, even if its matrices are in half precision (norms take any dtype)."""
    forward = module.forward
    dtype = next((parameter.dtype for parameter in module.parameters() if parameter.ndim > 1), torch.float32)
    if dtype == torch.float32:
        return forward

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    def run(*args: Any, **kwargs: Any) -> Any:
        return pytree.tree_map(_float, forward(*pytree.tree_map(cast, args), **pytree.tree_map(cast, kwargs)))

    return run


def _float(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
