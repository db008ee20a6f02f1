"""Experts whose inputs are multiplied by the router's weights (llama4): the layer computes `sum_i E_i(g_i x)`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..dispatch import Dispatch, RoutedCall, Routing, hidden_of, patched_forward, router_of
from ..quirk import Quirk
from ..site import Site
from ..weights import GatedWeights


class ScaledInputs(Quirk):
    """A router whose weights multiply the experts' inputs, not their outputs. Gates are folded into gate and up."""

    @classmethod
    def find(cls, site: Site) -> Quirk | None:
        only_tokens = len(signature(type(site.experts).forward).parameters) == 2  # and self
        return cls() if only_tokens and not site.is_block else None

    def dispatch(self, module: nn.Module, experts: nn.Module) -> Dispatch:
        return _ScaledDispatch(module, experts)

    def split_gates(self, gates: Tensor) -> tuple[Tensor | None, Tensor]:
        return gates, gates.where(gates.isnan(), 1.0)

    def fold(self, weights: GatedWeights, gate: float) -> tuple[GatedWeights, float]:
        return weights.of_scaled_inputs(gate), 1.0


class _ScaledDispatch(Dispatch):
    runs_block = True

    def __init__(self, module: nn.Module, experts: nn.Module) -> None:
        super().__init__(module, experts)
        self.router = router_of(module)

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
