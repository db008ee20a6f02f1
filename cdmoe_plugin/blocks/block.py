"""A sparse block seen as shared expert plus routed experts, whatever its class."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from ..model.layers_cdmoe import GATED_ACTIVATIONS
from ..plan import SparseLayerShape
from .calls import RoutedCall, Routing, calls_of
from .weights import GatedWeights, UnsupportedModelError, read_experts, read_gated_mlp

# Numbers in one projection of the experts that compute at once: a product copies halves of a fused weight, which on a
# CPU should not take as much memory again as the layer.
_WEIGHT_ELEMENTS = {"cpu": 2**24, "cuda": 2**30}


@dataclass
class SparseBlock:
    """One sparse block of a model, seen as shared expert plus routed experts.

    Args:
        layer (`int`): Decoder layer index.
        path (`str`): Name of the block in the base model, such as "layers.3.mlp".
        module (`nn.Module`): The block.
        experts (`nn.Module`): What holds the stacked expert weights: a child of the block, or the block itself.
        hidden_act (`str`): Name of the activation in `ACT2FN`.
        activation (`dict`): Form of the experts' gated activation in `GATED_ACTIVATIONS` and its constants; empty for
            `act(gate) * up`.
        shared_activation (`dict`): That of the shared expert.
        shared (`nn.Module`, *optional*): The shared expert, wherever it lives.
        shared_name (`str`, *optional*): Name of the shared expert where the decoder layer owns it, not the block.
        shared_gate (`nn.Linear`, *optional*): Per-token gate of the shared expert, before the sigmoid.
        routed_scale (`float`): Constant c that the block multiplies the routed sum with.
        shared_scale (`float`): Constant d that the block multiplies the shared output with.
        router (`nn.Module`, *optional*): The router where the decoder layer owns it and calls the experts itself, which
            are the block then.
        router_name (`str`, *optional*): Its name in the decoder layer.
        latent (`tuple`, *optional*): Linear maps into the space that the routed experts work in, and back.
        norm_name (`str`, *optional*): Name of the block's child that norms the sum of shared and routed experts.
        returns_tuple (`bool`): Whether the block returns its router's scores beside its output.
    """

    layer: int
    path: str
    module: nn.Module
    experts: nn.Module
    hidden_act: str
    shared: nn.Module | None = None
    shared_name: str | None = None
    shared_gate: nn.Linear | None = None
    routed_scale: float = 1.0
    shared_scale: float = 1.0
    router: nn.Module | None = None
    router_name: str | None = None
    latent: tuple[nn.Linear, nn.Linear] | None = None
    norm_name: str | None = None
    activation: dict[str, Any] = field(default_factory=dict)
    shared_activation: dict[str, Any] = field(default_factory=dict)
    returns_tuple: bool = False

    def __post_init__(self) -> None:
        self.calls = calls_of(self.module, self.experts, self.router)
        weights = self.expert_weights()
        self.num_experts, self.intermediate_size, features = weights.gate.shape
        self.hidden_size = features if self.latent is None else self.latent[0].in_features
        shared = self.shared_weights()
        self.shared_intermediate_size = 0 if shared is None else shared.gate.shape[0]

    @property
    def shape(self) -> SparseLayerShape:
        return SparseLayerShape(self.layer, self.num_experts, self.intermediate_size, self.shared_intermediate_size)

    @property
    def device(self) -> torch.device:
        return self.expert_weights().gate.device

    @property
    def dtype(self) -> torch.dtype:
        return self.expert_weights().gate.dtype

    def glu(self, shared: bool = False) -> Callable[[Tensor, Tensor], Tensor]:
        """What the experts (or the shared one) do between their projections, of gate and up, which it may overwrite."""
        act = ACT2FN[self.hidden_act]
        constants = dict(self.shared_activation if shared else self.activation)
        form = constants.pop("form", None)
        if form is None:  # as `GATED_ACTIVATIONS["plain"]`, with less memory
            return lambda gate, up: act(gate).mul_(up)
        return lambda gate, up: GATED_ACTIVATIONS[form](act, gate, up, **constants)

    def check_trimming(self) -> None:
        """Checks that dropping the block drops the whole MLP of its decoder layer.

        Raises:
            UnsupportedModelError: if the layer has a dense MLP beside it.
        """
        if self.router is not None:
            raise UnsupportedModelError(
                f"The experts of decoder layer {self.layer} are but a part of its MLP, apart from a dense one: "
                "`form='trim_layer'` can't drop it whole. Use the form 'condense' or 'trim_block'."
            )

    @property
    def norm(self) -> nn.Module | None:
        """What the block does with the sum of shared and routed experts; None where that sum is its output."""
        return None if self.norm_name is None else self.module.get_submodule(self.norm_name)

    def like_output(self, y: Tensor) -> Any:
        """What the block returns where the sum of shared and routed experts is `y`, in its own form."""
        if self.norm is not None:
            y = self.norm(y)
        return (y, None) if self.returns_tuple else y

    def expert_weights(self) -> GatedWeights:
        """Views of all routed experts' weights, stacked; in latent space, where the experts work there."""
        return read_experts(self.experts)

    def expert(self, index: int) -> GatedWeights:
        """One routed expert as an MLP on hidden states: maps into latent space and back are folded in, in float32."""
        weights = self.expert_weights().of(index)
        return weights if self.latent is None else weights.between(*self.latent)

    @property
    def gates_inputs(self) -> bool:
        """Whether a router's weight multiplies what an expert is given, and not what it gives."""
        return self.calls.gates_inputs

    def output_bias(self) -> Tensor | None:
        """What the block adds to its output for every token, `[H]`, whatever the experts give."""
        biases = [getattr(self.module, "bias", None), None if self.latent is None else self.latent[1].bias]
        found = [bias for bias in biases if bias is not None]
        return sum(found[1:], found[0]) if found else None

    def shared_weights(self) -> GatedWeights | None:
        """Views of the shared expert's weights; None without one."""
        return None if self.shared is None else read_gated_mlp(self.shared)

    @torch.no_grad()
    def expert_outputs(
        self, x: Tensor, experts: Sequence[int] | None = None, input_gates: Tensor | None = None
    ) -> Tensor:
        """`E_i(x)` of routed experts, ungated: `[N, T, H]` for `x` of shape `[T, H]`, in the dtype of `x`.

        Args:
            experts (`Sequence[int]`, *optional*): Which ones, in this order (then N counts these); all by default.
            input_gates (`Tensor`, *optional*): `[N]` of these, for `E_i(g_i x)`.
        """
        weights = self.expert_weights()
        if experts is not None:
            weights = weights.of(list(experts))
        if self.latent is not None:
            x = self.latent[0](x)
        if input_gates is not None:
            x = x * input_gates.to(x)[:, None, None]
        number, glu = len(weights.up), self.glu()
        step = max(1, _WEIGHT_ELEMENTS.get(x.device.type, _WEIGHT_ELEMENTS["cpu"]) // weights.up[0].numel())
        if step >= number:
            return self.from_latent(weights(x, glu))
        outputs = x.new_empty(number, x.shape[-2], self.hidden_size)
        for start in range(0, number, step):
            some = slice(start, start + step)
            outputs[some] = self.from_latent(weights.of(some)(x if input_gates is None else x[some], glu))
        return outputs

    def from_latent(self, outputs: Tensor) -> Tensor:
        """`[..., H]` for what the experts give, as it is without a latent space; biases are in `output_bias`."""
        return outputs if self.latent is None else outputs @ self.latent[1].weight.T

    @torch.no_grad()
    def shared_output(self, x: Tensor) -> Tensor:
        """What the block gives without routed experts, `d · [sigmoid(w·x) ·] S(x)` and any bias of its output.

        Float32 `[T, H]` for `x` of shape `[T, H]`; zeros without a shared expert.
        """
        output = torch.zeros_like(x, dtype=torch.float32)
        if self.shared is not None:
            output = self.shared(x[None])[0].float() * self.shared_scale
        if self.shared_gate is not None:
            output = output * torch.sigmoid(self.shared_gate(x).float())
        bias = self.output_bias()
        return output if bias is None else output + bias.float()

    @contextmanager
    def recording_routes(self) -> Iterator[list[Routing]]:
        """Collects a `Routing` per call of the block; weights include the block's own scale."""
        routes: list[Routing] = []

        def record(call: RoutedCall | None) -> None:
            assert call is not None  # _probe_routing has seen such a call before
            routes.append(Routing(call.routing.experts, call.routing.weights.float() * self.routed_scale))

        handle = self.calls.watch(record)
        try:
            yield routes
        finally:
            handle.remove()

    @contextmanager
    def recording_norm_inputs(self) -> Iterator[list[Tensor]]:
        """Collects the sum of shared and routed experts, per call of the block; nothing where that is its output."""
        sums: list[Tensor] = []
        if self.norm is None:
            yield sums
            return
        handle = self.norm.register_forward_pre_hook(lambda _, args: sums.append(args[0]))
        try:
            yield sums
        finally:
            handle.remove()
