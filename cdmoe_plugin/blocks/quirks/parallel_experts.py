"""Experts whose stacked projections are children of the block, called with tokens sorted by expert (jetmoe)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..dispatch import Dispatch, RoutedCall, Routing, patched_forward, router_of
from ..quirk import Quirk
from ..site import Site
from ..weights import are_parallel


class ParallelExperts(Quirk):
    """A block that owns the expert weights itself."""

    @classmethod
    def experts_are_block(cls, site: Site) -> bool:
        return are_parallel(site.experts)

    @classmethod
    def find(cls, site: Site) -> Quirk | None:
        return cls() if are_parallel(site.experts) else None

    def dispatch(self, module: nn.Module, experts: nn.Module) -> Dispatch:
        return _ParallelDispatch(module, experts)


class _ParallelDispatch(Dispatch):
    runs_block = True

    def __init__(self, module: nn.Module, experts: nn.Module) -> None:
        super().__init__(module, experts)
        self.router = router_of(module)

    def watch(self, note: Callable[[RoutedCall | None], None]) -> RemovableHandle:
        def on_router(_router: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            order, _, weights, sizes, logits = output  # `order`: index of each sorted choice among all choices
            experts = torch.repeat_interleave(torch.tensor(sizes, device=order.device))
            unsorted = (torch.empty_like(part).scatter_(0, order, part) for part in (experts, weights))
            note(RoutedCall(args[0], Routing(*(part.view(len(logits), -1) for part in unsorted)), None))

        return self.router.register_forward_hook(on_router)

    @contextmanager
    def giving(self, routed: Tensor) -> Iterator[None]:
        seen: list[Any] = []

        def outputs(*_: Any) -> Tensor:
            """Return outputs whose weighted sum over the experts of each token is `routed`."""
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
