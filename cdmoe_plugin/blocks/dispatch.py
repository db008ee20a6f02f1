"""The call of a block to its routed experts, in which the routing can be observed and replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .weights import UnsupportedModelError


class Routing(NamedTuple):
    """A router's choice for T tokens: experts, `[T, k]` int64, and the weights of their outputs, `[T, k]`."""

    experts: Tensor
    weights: Tensor


class RoutedCall(NamedTuple):
    """One call of the routed experts: their inputs, the routing, and the scores that the block may also return."""

    inputs: Tensor
    routing: Routing
    scores: Tensor | None


class Dispatch:
    """The common call, with tokens, chosen experts and their weights; quirks may override it.

    Args:
        module (`nn.Module`): The block.
        experts (`nn.Module`): Its child with the stacked weights.
    """

    # Whether `run` computes the output of the whole block, not the routed sum alone.
    runs_block = False

    def __init__(self, module: nn.Module, experts: nn.Module) -> None:
        self.module = module
        self.experts: Any = experts

    def watch(self, note: Callable[[RoutedCall | None], None]) -> RemovableHandle:
        """Pass every call to `note` until the handle is removed; None for a call of another kind."""

        def on_call(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            routing = _routing_of(args, kwargs)
            note(routing and RoutedCall((*args, *kwargs.values())[0], routing, routing.weights))

        return self.experts.register_forward_pre_hook(on_call, with_kwargs=True)

    def giving(self, routed: Tensor) -> AbstractContextManager[None]:
        """Replace the sum of the experts' outputs by `routed` `[1, T, ...]` inside the context."""
        return patched_forward(self.experts, lambda h, *_, **__: routed.reshape(h.shape))

    def run(self, x: Tensor, routing: Routing) -> Tensor:
        """Run the experts on `x` `[T, ...]` with a given routing."""
        return self.experts(x, *routing)

    def block(self, x: Tensor, input_ids: Tensor | None = None) -> Any:
        """Run the block on `x` `[B, S, H]` (and token ids `[B, S]`) with its own routing."""
        return self.module(x)


def router_of(module: nn.Module) -> nn.Module:
    """Return the child of a block that is named "router".

    Raises:
        UnsupportedModelError: if there is none.
    """
    router = getattr(module, "router", None)
    if not isinstance(router, nn.Module):
        raise UnsupportedModelError("its experts are not called with the routed indices and weights of each token")
    return router


def _routing_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Routing | None:
    """Find the routed indices (integers) and weights (floats) among the arguments of an experts module."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    if len(tensors) != 3 or len(args) + len(kwargs) != 3:
        return None
    index = [t for t in tensors[1:] if not t.is_floating_point()]
    weights = [t for t in tensors[1:] if t.is_floating_point()]
    if len(index) != 1 or len(weights) != 1 or index[0].shape != weights[0].shape:
        return None
    return Routing(index[0].long(), weights[0])


def hidden_of(output: Any) -> Tensor:
    """Return the hidden states in the output of a block or a condensed MLP, which may add its router's scores."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def patched_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace a module's `forward` inside the context, and restore the former one, including accelerate's hooks."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
