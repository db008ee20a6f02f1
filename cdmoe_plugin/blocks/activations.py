"""Detection of a gated MLP's activation: its form and its constants."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from ..model.layers_cdmoe import GATED_ACTIVATIONS
from .dispatch import patched_forward
from .weights import UnsupportedModelError, is_ungated, mlp_linears

# Attributes of modules or fields of configs with the constants of a gated activation.
_CONSTANTS = {
    "limit": ("limit", "swiglu_limit"),
    "alpha": ("alpha", "swiglu_alpha"),
    "gate_softcap": ("mlp_gate_softcap",),
    "up_softcap": ("mlp_up_softcap",),
}


def experts_activation(experts: nn.Module, hidden_act: str, config: Any) -> dict[str, Any]:
    """Find the form of the routed experts' gated activation and its constants, as `CondensedMLP` takes them.

    Raises:
        UnsupportedModelError: if it is not one of `GATED_ACTIVATIONS`.
    """
    if not getattr(experts, "has_gate", True):
        return {"form": "ungated"}
    apply_gate = getattr(experts, "_apply_gate", None)
    if apply_gate is None:  # the probe of the whole block checks it
        return {}
    # For one gate and one value, it does not matter whether they are concatenated or interleaved.
    return _find(lambda gate, up: apply_gate(torch.cat([gate, up], -1)), (experts, config), hidden_act, "experts are")


def shared_activation(shared: nn.Module, hidden_act: str) -> dict[str, Any]:
    """Find the form of a shared expert's gated activation and its constants; see `experts_activation`.

    Raises:
        UnsupportedModelError: if it is not one of `GATED_ACTIVATIONS`.
    """
    if is_ungated(shared):
        return {"form": "ungated"}
    *first, down = mlp_linears(shared) or ()

    def apply(gate: Tensor, up: Tensor) -> Tensor:
        inner: list[Tensor] = []

        def last(x: Tensor) -> Tensor:
            inner.append(x)
            return x

        outputs = [gate, up] if len(first) == 2 else [torch.cat([gate, up], -1)]
        with patched_forward(down, last):
            _with_outputs(first, outputs, lambda: shared(gate))
        return inner[0]

    return _find(apply, (shared,), hidden_act, "shared expert is")


def _with_outputs(linears: list[nn.Linear], outputs: list[Tensor], run: Callable[[], Any]) -> None:
    if not linears:
        run()
        return
    with patched_forward(linears[0], lambda *_: outputs[0]):
        _with_outputs(linears[1:], outputs[1:], run)


@torch.no_grad()
def _find(
    apply: Callable[[Tensor, Tensor], Tensor], holders: tuple[Any, ...], hidden_act: str, what: str
) -> dict[str, Any]:
    known = {name: _constant(names, holders) for name, names in _CONSTANTS.items()}
    # Values far from zero show a clamp. On the CPU, as the weights may be on the meta device.
    exact: Any = {"device": "cpu", "dtype": torch.float64}
    sizes = torch.tensor([1.0, 10.0, 50.0, 3 * (known["limit"] or 1.0)], **exact).repeat_interleave(64)[:, None]
    generator = torch.Generator("cpu").manual_seed(0)
    gate, up = (torch.randn(sizes.shape, generator=generator, **exact) * sizes for _ in range(2))
    expected = apply(gate, up)
    for form, function in GATED_ACTIVATIONS.items():
        if form == "ungated":
            continue
        constants = {name: known[name] for name in list(signature(function).parameters)[3:]}
        if None in constants.values():
            continue
        if torch.allclose(function(ACT2FN[hidden_act], gate, up, **constants), expected, rtol=1e-4, atol=1e-5):
            return {"form": form, **constants} if form != "plain" else {}
    raise UnsupportedModelError(f"its {what} not {hidden_act}(gate) * up, nor a supported variant of it")


def _constant(names: tuple[str, ...], holders: tuple[Any, ...]) -> float | None:
    found = [getattr(holder, name, None) for holder in holders for name in names]
    numbers = [value for value in found if isinstance(value, (int, float)) and value < float("inf")]
    return float(numbers[0]) if numbers else None
