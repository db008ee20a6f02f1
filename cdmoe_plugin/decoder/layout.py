"""The layout of a decoder: the values between its layers and the modules after the last one, found by running it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import patched_forward
from ..offload import in_memory

# One call of a decoder layer: hidden states, the other arguments by place and by name.
Call = tuple[Tensor, tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Gathered:
    """The stacked inputs `[B, S, m, H]` of some decoder layers, which all later layers take as one argument.

    Args:
        layers (`frozenset[int]`): The layers.
        argument (`int` or `str`): Position (after the hidden states) or name of the argument.
    """

    layers: frozenset[int]
    argument: int | str

    def put(self, stack: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Add this argument to the other arguments of a layer."""
        if isinstance(self.argument, str):
            return args, kwargs | {self.argument: stack}
        return (*args[: self.argument], stack, *args[self.argument + 1 :]), kwargs

    def of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return this argument from the arguments of a layer."""
        return kwargs[self.argument] if isinstance(self.argument, str) else args[self.argument]

    def after(self, layer: int, stack: Tensor, hidden: Tensor) -> Tensor:
        """Return the stack after a layer, from the stack before it and its input."""
        if layer not in self.layers:
            return stack
        return torch.cat([stack.to(hidden.device), hidden.unsqueeze(-2)], dim=-2)


@dataclass(frozen=True)
class HeadStep:
    """A module after the last decoder layer; `stack_at` is the position of the gathered inputs in its two arguments."""

    module: nn.Module
    stack_at: int | None = None

    def __call__(self, hidden: Tensor, stack: Any) -> Tensor:
        args = [hidden]
        if self.stack_at is not None:
            args.insert(self.stack_at, stack)
        return _first(self.module(*args))


@dataclass(frozen=True)
class DecoderLayout:
    """The layout of a decoder: the values between its layers, and the modules after the last one.

    Args:
        output_class (`type`): Type of the decoder's output.
        num_results (`int`): Length of the tuple that a layer returns; 0 if it returns a tensor.
        carried (`dict[str, int]`): Keyword arguments of a layer that are extra results of the one before, by position.
        gathered (`Gathered`, *optional*): Inputs of some layers that all later layers take.
        streams (`bool`): Whether hidden states are several residual streams, `[B, S, n, H]`.
        head (`list[HeadStep]`): The modules after the last layer.
        cast (`bool`): Whether the model casts their output to the dtype of its layers.
    """

    output_class: type
    num_results: int
    carried: dict[str, int]
    gathered: Gathered | None
    streams: bool
    head: list[HeadStep]
    cast: bool


def learn_layout(base: Any, layers: Any, forward: Callable[[], Tensor]) -> tuple[DecoderLayout, Tensor]:
    """Find the layout of a decoder from a forward pass, and return it with the last hidden state of that pass.

    Args:
        base (`PreTrainedModel`): The decoder.
        layers (`nn.ModuleList`): Its layers.
        forward (`Callable`): Runs the model around the decoder on a few tokens; returns the last hidden state.
    """
    outputs: list[Any] = []
    calls: list[Call] = []
    events: list[tuple[nn.Module, tuple[Any, ...], Any]] = []
    classes: list[type] = []

    def note_layer(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.append(split_hidden(args, kwargs))
        outputs.append(output)

    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        events.append((module, args, output))

    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(patched_forward(layer, _holding(layer, layer.forward)))
            stack.callback(layer.register_forward_hook(note_layer, with_kwargs=True).remove)
        for child in base.children():
            stack.callback(child.register_forward_hook(note).remove)
        stack.callback(base.register_forward_hook(lambda _module, _args, output: classes.append(type(output))).remove)
        last = forward()
    num_results = len(outputs[0]) if isinstance(outputs[0], tuple) else 0
    head, gathered = [], _gathered(calls)
    hidden, inputs = _first(outputs[-1]), [hidden for hidden, _, _ in calls]
    for module, args, result in events:
        if any(each is hidden for each in args[:1]):
            head.append(HeadStep(module))
        elif gathered is not None and len(args) == 2 and args[1] is hidden:
            # Only here can be seen whether the last layer's input is gathered too.
            gathered = Gathered(frozenset(_places(args[0], inputs)), gathered.argument)
            head.append(HeadStep(module, stack_at=0))
        else:
            continue
        hidden = _first(result)
    carried = _handed_on(outputs, calls) if num_results else {}
    streams, cast = inputs[0].ndim == 4, hidden.dtype != last.dtype
    return DecoderLayout(classes[0], num_results, carried, gathered, streams, head, cast), last


def split_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Split a decoder layer's arguments into hidden states and the others."""
    if args:
        return args[0], args[1:], kwargs
    kwargs = dict(kwargs)
    return kwargs.pop("hidden_states"), args, kwargs


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _handed_on(outputs: Sequence[tuple[Any, ...]], calls: Sequence[Call]) -> dict[str, int]:
    carried = {}
    for results, (_, _, kwargs) in zip(outputs, calls[1:], strict=False):
        for index, result in enumerate(results[1:], start=1):
            carried.update({k: index for k, v in kwargs.items() if isinstance(v, Tensor) and v is result})
    return carried


def _gathered(calls: Sequence[Call]) -> Gathered | None:
    hidden, args, kwargs = calls[-1]
    others: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for argument, value in others:
        if not isinstance(value, Tensor) or value.ndim != hidden.ndim + 1 or not value.numel():
            continue
        if (*value.shape[:-2], value.shape[-1]) == hidden.shape:
            places = _places(value, [each for each, _, _ in calls])
            if len(places) == value.shape[-2]:
                return Gathered(frozenset(places), argument)
    return None


def _places(stack: Tensor, inputs: Sequence[Tensor]) -> list[int]:
    """Find the layers whose inputs are stacked, by depth."""
    places: list[int] = []
    for part in stack.unbind(-2):
        later = range(places[-1] + 1 if places else 0, len(inputs))
        places += [layer for layer in later if torch.equal(part, inputs[layer].to(part.device))][:1]
    return places


def _holding(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    def held(*args: Any, **kwargs: Any) -> Any:
        with in_memory(module):
            return forward(*args, **kwargs)

    return held
