"""The weights of gated MLPs, single or stacked, read from the layouts of all architectures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

# Names of the projections of gated MLPs; a fused one is [gate; up].
_MLP_LAYOUTS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_FUSED_MLP_LAYOUTS = (("gate_up_proj", "down_proj"), ("input_linear", "output_linear"))
_UNGATED_MLP_LAYOUTS = (("up_proj", "down_proj"),)


class UnsupportedModelError(ValueError):
    """The model has no sparse layers, or sparse layers that can't be condensed to a dense gated MLP."""


class GatedWeights(NamedTuple):
    """The weights of one gated MLP, or of N stacked ones (leading dimension N). Biases may be None.

    For MLPs without gates, `gate` is `up`.
    """

    gate: Tensor  # [(N,) I, H]
    up: Tensor  # [(N,) I, H]
    down: Tensor  # [(N,) H, I]
    gate_bias: Tensor | None = None  # [(N,) I]
    up_bias: Tensor | None = None  # [(N,) I]
    down_bias: Tensor | None = None  # [(N,) H]

    def __call__(self, x: Tensor, glu: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Compute the output `[(N,) T, H]` for `x` `[T, H]`; `glu` may overwrite gate and up, `[(N,) T, I]`."""
        return _affine(self.inner(x, glu), self.down, self.down_bias)

    def inner(self, x: Tensor, glu: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Compute the activations of the neurons, `[(N,) T, I]`."""
        up = _affine(x, self.up, self.up_bias)
        gate = up if self.ungated else _affine(x, self.gate, self.gate_bias)
        return glu(gate, up)

    def of(self, experts: Any) -> GatedWeights:
        """Select one or some of N stacked MLPs by index."""
        biases = (None if bias is None else bias[experts] for bias in self[3:])
        up = self.up[experts]
        return GatedWeights(up if self.ungated else self.gate[experts], up, self.down[experts], *biases)

    def of_neurons(self, neurons: Tensor) -> GatedWeights:
        """Select some neurons of one MLP by index, `[n]`. Its output bias is scaled by their share, `n / I`."""
        up, share = self.up[neurons], len(neurons) / len(self.up)
        gate_bias, up_bias = (None if bias is None else bias[neurons] for bias in (self.gate_bias, self.up_bias))
        down_bias = None if self.down_bias is None else self.down_bias * share
        gate = up if self.ungated else self.gate[neurons]
        return GatedWeights(gate, up, self.down[:, neurons], gate_bias, up_bias, down_bias)

    def between(self, first: nn.Linear, last: nn.Linear) -> GatedWeights:
        """Fold the linear layers before and after one MLP into it, except the bias of `last`, in float32 or wider."""
        dtype = torch.promote_types(self.up.dtype, torch.float32)
        into, out = first.weight.to(dtype), last.weight.to(dtype)

        def folded(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
            weight = weight.to(dtype)
            if first.bias is not None:
                moved = weight @ first.bias.to(dtype)
                bias = moved if bias is None else moved + bias.to(dtype)
            return weight @ into, bias

        up, up_bias = folded(self.up, self.up_bias)
        gate, gate_bias = (up, None) if self.ungated else folded(self.gate, self.gate_bias)
        down_bias = None if self.down_bias is None else out @ self.down_bias.to(dtype)
        return GatedWeights(gate, up, out @ self.down.to(dtype), gate_bias, up_bias, down_bias)

    def of_scaled_inputs(self, factor: float) -> GatedWeights:
        """Fold a factor of the input into gate and up, in float32 or wider: the result computes `E(factor · x)`."""
        dtype = torch.promote_types(self.up.dtype, torch.float32)
        up = self.up.to(dtype) * factor
        return self._replace(gate=up if self.ungated else self.gate.to(dtype) * factor, up=up)

    @property
    def ungated(self) -> bool:
        return self.gate is self.up

    @property
    def matrices(self) -> tuple[Tensor, ...]:
        """Gate, up and down; only up and down for MLPs without gates."""
        return (self.up, self.down) if self.ungated else (self.gate, self.up, self.down)

    @property
    def biased(self) -> bool:
        return any(bias is not None for bias in self[3:])


def has_stacked_weights(module: nn.Module) -> bool:
    # A single stacked "weight" is one linear layer per expert, or a convolution.
    own = (parameter for name, parameter in module.named_parameters(recurse=False) if name != "weight")
    return any(parameter.ndim == 3 for parameter in own) or _is_dbrx_like(module) or are_parallel(module)


def are_parallel(module: nn.Module) -> bool:
    """Return whether two children are the stacked projections of gated MLPs, `[N, 2I, H]` and `[N, H, I]` (jetmoe).

    Jetmoe's attention, a mixture of query and output projections, has children with these names and other shapes.
    """
    into, out = (getattr(getattr(module, name, None), "weight", None) for name in ("input_linear", "output_linear"))
    if not isinstance(into, Tensor) or not isinstance(out, Tensor) or into.ndim != 3 or out.ndim != 3:
        return False
    return into.shape == (out.shape[0], 2 * out.shape[2], out.shape[1])


def _is_dbrx_like(experts: nn.Module) -> bool:
    inner = getattr(experts, "mlp", None)
    return isinstance(inner, nn.Module) and all(
        isinstance(getattr(inner, name, None), nn.Parameter) for name in ("w1", "v1", "w2")
    )


def read_experts(experts: Any) -> GatedWeights:
    """Return views of stacked expert weights as gate, up `[N, I, H]` and down `[N, H, I]`.

    Raises:
        UnsupportedModelError: if they are not those of gated MLPs.
    """
    if _is_dbrx_like(experts):
        mlp, num = experts.mlp, experts.num_experts
        gate, up, down = (getattr(mlp, name).unflatten(0, (num, -1)) for name in ("w1", "v1", "w2"))
        return GatedWeights(gate, up, down.transpose(1, 2))
    if not getattr(experts, "has_gate", True):
        return _read_ungated(experts)
    if are_parallel(experts):
        gate, up = experts.input_linear.weight.chunk(2, dim=1)
        return GatedWeights(gate, up, experts.output_linear.weight)
    gate_up, down = getattr(experts, "gate_up_proj", None), getattr(experts, "down_proj", None)
    if not isinstance(gate_up, Tensor) or not isinstance(down, Tensor):
        raise UnsupportedModelError("its experts are not gated MLPs with stacked weights gate_up_proj and down_proj")
    if getattr(experts, "has_post_expert_norm", False):
        raise UnsupportedModelError("it normalises the output of every expert")
    if gate_up.shape[1:] == (down.shape[2], 2 * down.shape[1]):  # transposed
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    gate, up = _halves(experts, gate_up)
    if len(down) < len(gate) and gate.shape[1:] == down.mT.shape[1:]:
        identity = any(isinstance(child, nn.Identity) for child in experts.children())
        raise UnsupportedModelError(
            f"{len(gate) - len(down)} of the {len(gate)} experts that its router chooses from have no weights"
            + (" and add the token itself, times the router's weight (identity experts)" if identity else "")
        )
    if gate.shape != (down.shape[0], down.shape[2], down.shape[1]):
        raise UnsupportedModelError(
            f"the shapes of its expert weights, {tuple(gate_up.shape)} and {tuple(down.shape)}, do not belong together"
        )
    gate_up_bias, down_bias = getattr(experts, "gate_up_proj_bias", None), getattr(experts, "down_proj_bias", None)
    gate_bias, up_bias = (None, None) if gate_up_bias is None else _halves(experts, gate_up_bias)
    return GatedWeights(gate, up, down, gate_bias, up_bias, down_bias)


def _read_ungated(experts: nn.Module) -> GatedWeights:
    up, down = getattr(experts, "up_proj", None), getattr(experts, "down_proj", None)
    if not isinstance(up, Tensor) or not isinstance(down, Tensor) or up.shape != down.mT.shape:
        raise UnsupportedModelError("its experts are not MLPs with stacked weights up_proj and down_proj")
    if getattr(experts, "has_bias", False) or getattr(experts, "is_transposed", False):
        raise UnsupportedModelError("its experts without gates have biases or transposed weights")
    return GatedWeights(up, up, down)


def _halves(experts: nn.Module, gate_up: Tensor) -> tuple[Tensor, ...]:
    if getattr(experts, "is_concatenated", True):
        return gate_up.chunk(2, dim=1)
    return gate_up[:, ::2], gate_up[:, 1::2]


def mlp_linears(module: nn.Module) -> tuple[nn.Linear, ...] | None:
    """Return an MLP's projections: (gate, up, down), (fused, down) or (up, down). None if it is not an MLP."""
    for names in (*_MLP_LAYOUTS, *_FUSED_MLP_LAYOUTS, *_UNGATED_MLP_LAYOUTS):
        parts = [getattr(module, name, None) for name in names]
        linears = tuple(part for part in parts if isinstance(part, nn.Linear))
        if len(linears) == len(names):
            return linears
    return None


def read_gated_mlp(module: nn.Module) -> GatedWeights | None:
    """Return views of a gated MLP's weights, or None if the module is not an MLP made of `nn.Linear`s."""
    linears = mlp_linears(module)
    if linears is None:
        return None
    *first, down = linears
    fused = first[0]
    if len(first) == 2:
        gate, up = first
        return GatedWeights(gate.weight, up.weight, down.weight, gate.bias, up.bias, down.bias)
    if is_ungated(module):
        return GatedWeights(fused.weight, fused.weight, down.weight, None, fused.bias, down.bias)
    gate_bias, up_bias = (None, None) if fused.bias is None else fused.bias.chunk(2)
    gate_weight, up_weight = fused.weight.chunk(2)
    return GatedWeights(gate_weight, up_weight, down.weight, gate_bias, up_bias, down.bias)


def is_ungated(module: nn.Module) -> bool:
    """Return whether a module is an MLP made of `nn.Linear`s without a gate projection."""
    linears = mlp_linears(module)
    return linears is not None and len(linears) == 2 and linears[0] is getattr(module, "up_proj", None)


def activation_name(experts: nn.Module, config: Any) -> str:
    """Find the name of the experts' activation: the config's if it matches the module, else by the module's type."""
    holders = (experts, getattr(experts, "mlp", None))
    names = ("act_fn", "activation_fn", "activation", "act")
    modules = [getattr(holder, name, None) for holder in holders for name in names]
    act = next((module for module in modules if isinstance(module, nn.Module)), None)
    named = [getattr(config, name, None) for name in ("hidden_act", "hidden_activation")]
    candidates = [name for name in (*named, "silu", *ACT2FN) if isinstance(name, str) and name in ACT2FN]
    if act is None:
        return candidates[0]
    return next((name for name in candidates if type(ACT2FN[name]) is type(act)), candidates[0])


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product = x @ weight.mT
    return product if bias is None else product + bias.unsqueeze(-2)


def expert_parameters(experts: Any, count: int) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """List the stacked weights of `count` experts: their module, their name in it, and the weight."""
    parts = (experts.input_linear, experts.output_linear) if are_parallel(experts) else experts.modules()
    for module in parts:
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.ndim >= 2 and parameter.shape[0] % count == 0:
                yield module, name, parameter


def shrink_experts(experts: Any, count: int, kept: int) -> None:
    """Resize a module of stacked expert weights from `count` to `kept` experts, on the meta device."""
    for module, name, parameter in expert_parameters(experts, count):
        shape = (parameter.shape[0] // count * kept, *parameter.shape[1:])
        setattr(module, name, nn.Parameter(torch.empty(shape, dtype=parameter.dtype, device="meta")))
    parts = (experts.input_linear, experts.output_linear) if are_parallel(experts) else experts.modules()
    for module in parts:
        if getattr(module, "num_experts", None) == count:
            setattr(module, "num_experts", kept)  # noqa: B010  (nn.Module declares its attributes to be tensors)
