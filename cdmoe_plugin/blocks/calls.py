"""How blocks call their routed experts: what a router decided, seen and put in by hand, in each of the known forms."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .weights import UnsupportedModelError, are_parallel


class Routing(NamedTuple):
    """What a router decided for T tokens: the experts, `[T, k]` int64, and what they are multiplied with, `[T, k]`."""

    experts: Tensor
    weights: Tensor


class RoutedCall(NamedTuple):
    """A block's call of its routed experts: their inputs, the routing, and scores that the block may return, too."""

    inputs: Tensor
    routing: Routing
    scores: Tensor | None


class StackedExperts:
    """Experts that a block calls with tokens, chosen experts and their weights: the form of nearly all architectures.

    Args:
        module (`nn.Module`): The block.
        experts (`nn.Module`): Its child with the stacked weights.
    """

    gates_inputs = False  # whether a router's weight multiplies what the expert is given, not what it gives
    runs_block = False  # whether `run` gives what the whole block does, not the routed sum alone

    def __init__(self, module: nn.Module, experts: nn.Module) -> None:
        self.module = module
        self.experts: Any = experts

    def watch(self, note: Callable[[RoutedCall | None], None]) -> RemovableHandle:
        """Tells `note` of every call, of None where it is another form of call, until the handle is removed."""

        def on_call(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            routing = _routing_of(args, kwargs)
            note(routing and RoutedCall((*args, *kwargs.values())[0], routing, routing.weights))

        return self.experts.register_forward_pre_hook(on_call, with_kwargs=True)

    def giving(self, routed: Tensor) -> AbstractContextManager[None]:
        """Puts in `routed`, `[1, T, ...]`, for what the experts together give, for a while."""
        return patched_forward(self.experts, lambda h, *_, **__: routed.reshape(h.shape))

    def run(self, x: Tensor, routing: Routing) -> Tensor:
        """What comes of this routing for `x` of shape `[T, ...]`."""
        return self.experts(x, *routing)

    def block(self, x: Tensor, input_ids: Tensor | None = None) -> Any:
        """What the block does with `x` of shape `[B, S, H]`, by its own routing.

        Args:
            input_ids (`Tensor`, *optional*): `[B, S]`, for routers that go by them; by default 0, 1, 2, ...
        """
        if "input_ids" not in signature(type(self.module).forward).parameters:
            return self.module(x)
        ids = torch.arange(x.shape[1]).expand(x.shape[:2]) if input_ids is None else input_ids
        return self.module(x, input_ids=ids.to(x.device))


class LayerExperts(StackedExperts):
    """Experts that are the block themselves: the decoder layer asks its router and calls them (gemma4)."""

    def __init__(self, experts: nn.Module, router: nn.Module) -> None:
        super().__init__(experts, experts)
        self.router = router

    def block(self, x: Tensor, input_ids: Tensor | None = None) -> Any:
        _, weights, chosen = self.router(x[0])
        return self.experts(x[0], chosen, weights)


class InputGatedExperts(StackedExperts):
    """Experts that are each called with all tokens, times the router's weight or 0 (llama4): `sum_i E_i(g_i x)`."""

    gates_inputs = True
    runs_block = True

    def __init__(self, module: nn.Module, experts: nn.Module) -> None:
        super().__init__(module, experts)
        self.router = _router(module)

    def watch(self, note: Callable[[RoutedCall | None], None]) -> RemovableHandle:
        def on_router(router: Any, args: tuple[Any, ...], output: Any) -> None:
            scores, logits = output
            chosen = logits.topk(router.top_k, dim=-1).indices
            note(RoutedCall(args[0], Routing(chosen, scores.gather(1, chosen)), logits))

        return self.router.register_forward_hook(on_router)

    def giving(self, routed: Tensor) -> AbstractContextManager[None]:
        def forward(h: Tensor) -> Tensor:
            one = routed.reshape(-1, h.shape[-1])  # the first expert's tokens
            return torch.cat([one, one.new_zeros(len(h) - len(one), h.shape[-1])])

        return patched_forward(self.experts, forward)

    def run(self, x: Tensor, routing: Routing) -> Tensor:
        scores = x.new_zeros(len(x), len(self.experts.down_proj)).scatter(1, routing.experts, routing.weights)
        with patched_forward(self.router, lambda _x: (scores, scores)):
            return hidden_of(self.module(x[None]))


class ParallelExperts(StackedExperts):
    """Experts whose projections are children of the block, called with tokens sorted by expert (jetmoe)."""

    runs_block = True

    def __init__(self, module: nn.Module, experts: nn.Module) -> None:
        super().__init__(module, experts)
        self.router = _router(module)

    def watch(self, note: Callable[[RoutedCall | None], None]) -> RemovableHandle:
        def on_router(_router: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            order, _, weights, sizes, logits = output  # `order`: where, among all choices, the sorted ones were
            experts = torch.repeat_interleave(torch.tensor(sizes, device=order.device))
            unsorted = (torch.empty_like(part).scatter_(0, order, part) for part in (experts, weights))
            note(RoutedCall(args[0], Routing(*(part.view(len(logits), -1) for part in unsorted)), None))

        return self.router.register_forward_hook(on_router)

    @contextmanager
    def giving(self, routed: Tensor) -> Iterator[None]:
        seen: list[Any] = []

        def outputs(*_: Any) -> Tensor:
            """What makes the weighted sum of each token's experts `routed`."""
            _, tokens, weights, *_ = seen[-1]
            flat = routed.reshape(-1, routed.shape[-1])
            total = flat.new_zeros(len(flat)).index_add(0, tokens, weights.to(flat.dtype))
            return (flat / total[:, None])[tokens]

        with ExitStack() as stack:
            stack.callback(self.router.register_forward_hook(lambda _m, _a, output: seen.append(output)).remove)
            into, out = self.experts.input_linear, self.experts.output_linear
            width = into.weight.shape[1]
            stack.enter_context(patched_forward(into, lambda h, _sizes: h.new_zeros(len(h), width)))
            stack.enter_context(patched_forward(out, outputs))
            yield

    def run(self, x: Tensor, routing: Routing) -> Tensor:
        chosen = routing.experts.flatten()
        order = chosen.argsort(stable=True)
        sizes = torch.bincount(chosen, minlength=len(self.experts.input_linear.weight)).tolist()
        output = (order, order // routing.experts.shape[1], routing.weights.flatten()[order], sizes, None)
        with patched_forward(self.router, lambda _x: output):
            return self.module(x[None])


def calls_of(module: nn.Module, experts: nn.Module, router: nn.Module | None = None) -> StackedExperts:
    """The form in which a block calls its routed experts.

    Args:
        router (`nn.Module`, *optional*): That of the decoder layer, where it calls the experts itself.

    Raises:
        UnsupportedModelError: if it lacks what goes with that form.
    """
    if router is not None:
        return LayerExperts(experts, router)
    if are_parallel(experts):
        return ParallelExperts(module, experts)
    only_tokens = len(signature(type(experts).forward).parameters) == 2  # and self
    return (InputGatedExperts if only_tokens else StackedExperts)(module, experts)


def _router(module: nn.Module) -> nn.Module:
    router = getattr(module, "router", None)
    if not isinstance(router, nn.Module):
        raise UnsupportedModelError("its experts are not called with the routed indices and weights of each token")
    return router


def _routing_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Routing | None:
    """Routed indices and weights among the arguments of an experts module: told apart by being whole numbers or not."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    if len(tensors) != 3 or len(args) + len(kwargs) != 3:
        return None
    index = [t for t in tensors[1:] if not t.is_floating_point()]
    weights = [t for t in tensors[1:] if t.is_floating_point()]
    if len(index) != 1 or len(weights) != 1 or index[0].shape != weights[0].shape:
        return None
    return Routing(index[0].long(), weights[0])


def hidden_of(output: Any) -> Tensor:
    """The hidden states that a block or a condensed MLP returns, alone or with its router's scores."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def patched_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replaces a module's `forward` for a while, and puts back what was there (accelerate's hooks included)."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
