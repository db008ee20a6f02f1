"""The normal form of a sparse block, through which the rest of the package sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from ..model.layers_cdmoe import GATED_ACTIVATIONS, CondensedMLP
from ..shapes import SparseLayerShape
from .dispatch import Dispatch, RoutedCall, hidden_of, patched_forward
from .quirk import Quirk
from .record import BlockRecord
from .weights import GatedWeights, UnsupportedModelError, read_experts, read_gated_mlp

# Experts compute together up to this many elements per projection. A matrix product copies the halves of a fused
# weight, which on a CPU should not double the memory of the layer.
_WEIGHT_ELEMENTS = {"cpu": 2**24, "cuda": 2**30}


class DensePiece(NamedTuple):
    """A part of a condensed MLP: the weights of one MLP on hidden states, and a factor of its output."""

    weights: GatedWeights
    factor: float


@dataclass
class SparseBlock:
    """A sparse block as shared expert plus routed experts.

    Except for its quirks, it computes `y = d · [sigmoid(w·x) ·] S(x) + c · sum_i g_i(x) E_i(x) + b`.

    Args:
        layer (`int`): Decoder layer index.
        path (`str`): Name of the block in the base model, such as "layers.3.mlp".
        module (`nn.Module`): The block.
        experts (`nn.Module`): The module with the stacked expert weights: a child of the block, or the block itself.
        hidden_act (`str`): Name of the activation in `ACT2FN`.
        activation (`dict`): Form of the experts' gated activation in `GATED_ACTIVATIONS` and its constants; empty for
            `act(gate) * up`.
        shared_activation (`dict`): The same for the shared expert.
        shared (`nn.Module`, *optional*): The shared expert, in the block or beside it.
        shared_gate (`nn.Linear`, *optional*): Per-token gate of the shared expert, before the sigmoid.
        quirks (`tuple[Quirk, ...]`): The block's departures from the common form.
        routed_scale (`float`): Constant c, measured by a probe.
        shared_scale (`float`): Constant d, measured by a probe.
        loaded (`list[int]`, *optional*): Numbers of the experts in memory, if only those that a plan needs were read.
        router_experts (`int`): Number of experts that the router chooses from; those in memory by default.
    """

    layer: int
    path: str
    module: nn.Module
    experts: nn.Module
    hidden_act: str
    activation: dict[str, Any] = field(default_factory=dict)
    shared_activation: dict[str, Any] = field(default_factory=dict)
    shared: nn.Module | None = None
    shared_gate: nn.Linear | None = None
    quirks: tuple[Quirk, ...] = ()
    routed_scale: float = 1.0
    shared_scale: float = 1.0
    loaded: list[int] | None = None
    router_experts: int = 0

    def __post_init__(self) -> None:
        own = (quirk.dispatch(self.module, self.experts) for quirk in self.quirks)
        self.dispatch = next(filter(None, own), None) or Dispatch(self.module, self.experts)
        self.num_experts, self.intermediate_size, features = self.expert_weights().gate.shape
        self.router_experts = self.router_experts or self.num_experts
        self.hidden_size = self._through("hidden_size", features)
        shared = self.shared_weights()
        self.shared_intermediate_size = 0 if shared is None else shared.gate.shape[0]

    def _through(self, method: str, value: Any) -> Any:
        for quirk in self.quirks:
            value = getattr(quirk, method)(value)
        return value

    # --- sizes ---

    @property
    def shape(self) -> SparseLayerShape:
        """The sizes of the layer, for plans."""
        return SparseLayerShape(self.layer, self.num_experts, self.intermediate_size, self.shared_intermediate_size)

    @property
    def device(self) -> torch.device:
        return self.expert_weights().gate.device

    @property
    def dtype(self) -> torch.dtype:
        return self.expert_weights().gate.dtype

    def decoder_layer(self, model: PreTrainedModel) -> nn.Module:
        """Find the decoder layer of this block in a model, or in another model of the same architecture."""
        return model.base_model.get_submodule(self.path.rpartition(".")[0])

    @property
    def experts_features(self) -> int:
        """The size of the experts' outputs, before `leave`."""
        return self._through("experts_features", self.hidden_size)

    @property
    def norm(self) -> nn.Module | None:
        """The norm that the block applies to the sum of experts; None if the sum is its output."""
        return next((norm for quirk in self.quirks if (norm := quirk.norm()) is not None), None)

    # --- weights ---

    def expert_weights(self) -> GatedWeights:
        """Return views of all routed experts' weights, stacked."""
        return read_experts(self.experts)

    def shared_weights(self) -> GatedWeights | None:
        """Return views of the shared expert's weights; None without one."""
        return None if self.shared is None else read_gated_mlp(self.shared)

    def output_bias(self) -> Tensor | None:
        """Return the bias `[H]` of the block's output; None without one."""
        biases = [bias for quirk in self.quirks if (bias := quirk.bias()) is not None]
        return sum(biases[1:], biases[0]) if biases else None

    def pieces(
        self, experts: Sequence[int], gates: Sequence[float], neurons: Sequence[Tensor] | None = None
    ) -> list[DensePiece]:
        """List the parts of a condensed MLP: the shared expert, if there is one, and the given routed experts.

        Args:
            experts (`Sequence[int]`): The K kept routed experts.
            gates (`Sequence[float]`): Their constant gates.
            neurons (`Sequence[Tensor]`, *optional*): Indices of the neurons to keep of each, int64 on the block's
                device; all by default. An expert's output bias counts in proportion to them.

        Raises:
            UnsupportedModelError: if a gate per token scales a shared expert with biases, which no MLP can do.
        """
        pieces = []
        shared = self.shared_weights()
        if shared is not None:
            if shared.biased and self.shared_gate is not None:
                raise UnsupportedModelError("A shared expert with both biases and a gate per token can't be condensed.")
            pieces.append(DensePiece(shared, self.shared_scale))
        stacked = self.expert_weights()
        for place, (index, factor) in enumerate(zip(experts, gates, strict=True)):
            weights = stacked.of(index)
            if neurons is not None:
                weights = weights.of_neurons(neurons[place])
            for quirk in self.quirks:
                weights, factor = quirk.fold(weights, factor)
            pieces.append(DensePiece(weights, factor))
        return pieces

    # --- computing ---

    def glu(self, shared: bool = False) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the gated activation of the routed or the shared experts, a function of gate and up.

        It may overwrite both.
        """
        act = ACT2FN[self.hidden_act]
        constants = dict(self.shared_activation if shared else self.activation)
        form = constants.pop("form", None)
        if form is None:  # like `GATED_ACTIVATIONS["plain"]`, with less memory
            return lambda gate, up: act(gate).mul_(up)
        return lambda gate, up: GATED_ACTIVATIONS[form](act, gate, up, **constants)

    @torch.no_grad()
    def run(self, x: Tensor, input_ids: Tensor | None = None) -> Tensor:
        """Compute the block's output for `x` `[B, S, H]` (and token ids `[B, S]`): float32 `[B, S, H]`.

        It includes the shared expert even if the decoder layer adds that outside the block.
        """
        total = hidden_of(self.dispatch.block(x, input_ids)).float().view(x.shape)
        for quirk in self.quirks:
            for summand in quirk.summands():
                total = total + summand(x).float()
        return total

    @torch.no_grad()
    def expert_activations(self, expert: int, x: Tensor, gates: Tensor) -> Tensor:
        """Compute the gated activations of one routed expert's neurons, `[T, I]` in the dtype of `x`.

        Args:
            expert (`int`): The expert.
            x (`Tensor`): Hidden states of the tokens that chose it, `[T, H]`.
            gates (`Tensor`): Their router weights for it, `[T]`.
        """
        scales, factors = self.split_gates(gates)
        x = self.enter(x)
        if scales is not None:
            x = x * scales.to(x)[:, None]
        return self.expert_weights().of(expert).inner(x, self.glu()) * factors.to(x)[:, None]

    @torch.no_grad()
    def expert_outputs(self, x: Tensor, experts: Sequence[int] | None = None, gates: Tensor | None = None) -> Tensor:
        """Compute outputs of N routed experts, without their `output_factors`: `[N, T, H]` in the dtype of `x`.

        Args:
            x (`Tensor`): `[T, H]`.
            experts (`Sequence[int]`, *optional*): The experts to run, in this order; all by default.
            gates (`Tensor`, *optional*): Their gates, `[N]` or `[N, T]`. Needed if gates scale the experts' inputs.
        """
        weights = self.expert_weights()
        if experts is not None:
            weights = weights.of(list(experts))
        x = self._through("enter", x)
        scales = None if gates is None else self.split_gates(gates)[0]
        if scales is not None:
            x = x * scales.to(x).reshape(len(scales), -1, 1)
        number, glu = len(weights.up), self.glu()
        step = max(1, _WEIGHT_ELEMENTS.get(x.device.type, _WEIGHT_ELEMENTS["cpu"]) // weights.up[0].numel())
        if step >= number:
            return self.leave(weights(x, glu))
        outputs = x.new_empty(number, x.shape[-2], self.hidden_size)
        for start in range(0, number, step):
            some = slice(start, start + step)
            outputs[some] = self.leave(weights.of(some)(x if scales is None else x[some], glu))
        return outputs

    def output_factors(self, gates: Tensor) -> Tensor:
        """Return the factors of the experts' outputs for gates of any shape: the gates, unless they scale inputs."""
        return self.split_gates(gates)[1]

    def split_gates(self, gates: Tensor) -> tuple[Tensor | None, Tensor]:
        """Split router weights into factors of the experts' inputs (None for 1) and factors of their outputs."""
        scales, factors = None, gates
        for quirk in self.quirks:
            found, factors = quirk.split_gates(factors)
            scales = found if scales is None else scales
        return scales, factors

    def enter(self, x: Tensor) -> Tensor:
        """Map hidden states `[..., H]` to the inputs of the experts."""
        return self._through("enter", x)

    def leave(self, outputs: Tensor) -> Tensor:
        """Map outputs of the experts to hidden states `[..., H]`, without `output_bias`."""
        return self._through("leave", outputs)

    @torch.no_grad()
    def shared_output(self, x: Tensor) -> Tensor:
        """Compute the sum without routed experts, `d · [sigmoid(w·x) ·] S(x) + b`, for `x` of shape `[T, H]`.

        Returns:
            `Tensor`: float32 `[T, H]`; zeros without a shared expert and a bias.
        """
        output = torch.zeros_like(x, dtype=torch.float32)
        if self.shared is not None:
            output = self.shared(x[None])[0].float() * self.shared_scale
        if self.shared_gate is not None:
            output = output * torch.sigmoid(self.shared_gate(x).float())
        bias = self.output_bias()
        return output if bias is None else output + bias.float()

    # --- its place in a model ---

    @property
    def follows_inputs(self) -> bool:
        """Whether the block's output depends only on its inputs and the token ids."""
        return all(quirk.follows_inputs for quirk in self.quirks)

    @property
    def summands(self) -> tuple[nn.Module, ...]:
        """The children of the decoder layer that add up to the sum: the block, and a shared expert beside it if any."""
        return (self.module, *(part for quirk in self.quirks for part in quirk.summands()))

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """All children of the decoder layer that belong to the block."""
        return (self.module, *(sparse for quirk in self.quirks for sparse, _ in quirk.beside().values()))

    def places(self, replacement: nn.Module | None) -> dict[str, nn.Module]:
        """Map names of the decoder layer's children to their modules, for the block or for a replacement of it.

        Args:
            replacement (`nn.Module`, *optional*): A condensed MLP or another replacement; None for the block itself.
        """
        beside = {name: pair for quirk in self.quirks for name, pair in quirk.beside().items()}
        own = self.path.rpartition(".")[2]
        if replacement is None:
            return {own: self.module} | {name: sparse for name, (sparse, _) in beside.items()}
        return {own: replacement} | {name: condensed for name, (_, condensed) in beside.items()}

    def check_dropping(self) -> None:
        """Check that dropping the block drops the whole MLP of its decoder layer.

        Raises:
            UnsupportedModelError: if the layer has a dense MLP beside it.
        """
        for quirk in self.quirks:
            quirk.check_dropping(self.layer)

    # --- its condensed form ---

    @property
    def place_spec(self) -> dict[str, Any]:
        """The entries of config.json that locate the block, for every kind of replacement."""
        spec: dict[str, Any] = {"module": self.path, "omitted": []}
        for quirk in self.quirks:
            spec |= quirk.spec
        return spec

    def condensed_spec(self, width: int, bias: bool, gated_neurons: Sequence[int] = ()) -> dict[str, Any]:
        """Describe the block's condensed MLP for config.json, as `CondensedMLP` reads it.

        Args:
            width (`int`): Number of neurons.
            bias (`bool`): Whether all projections have biases.
            gated_neurons (`Sequence[int]`): Numbers of neurons of the routed experts, if these have gates per token.
        """
        spec = {**self.place_spec, **self.beside_spec(width, bias), "shared_expert_gate": self.shared_gate is not None}
        spec |= {"gated_neurons": list(gated_neurons)} if gated_neurons else {}
        return spec | ({"output_bias": True} if self.output_bias() is not None and not bias else {})

    def beside_spec(self, width: int, bias: bool) -> dict[str, Any]:
        """Describe the dense part of the block with experts behind its router, which keeps its gates and biases.

        Args:
            width (`int`), bias (`bool`): As for `condensed_spec`.
        """
        special = {"gated_activation": self.activation, "shared_gated_activation": self._other_activation()}
        return {
            **{name: value for name, value in special.items() if value},
            "intermediate_size": width,
            "shared_intermediate_size": self.shared_intermediate_size,
            "shared_expert_gate": False,
            "bias": bias,
            "hidden_act": self.hidden_act,
        }

    def _other_activation(self) -> dict[str, Any] | None:
        """Return the shared expert's gated activation if it differs from that of the routed experts."""
        if self.shared is None or self.shared_activation == self.activation:
            return None
        return self.shared_activation or {"form": "plain"}

    def complete(self, mlp: CondensedMLP) -> None:
        """Add the other parts of the block to a condensed MLP: the gate of the shared expert, a norm."""
        if mlp.shared_expert_gate is not None and self.shared_gate is not None:
            mlp.shared_expert_gate.weight.copy_(self.shared_gate.weight)
        for quirk in self.quirks:
            quirk.complete(mlp)

    # --- recording and replaying ---

    @contextmanager
    def recording(self) -> Iterator[BlockRecord]:
        """Record the next call of the block inside the context."""
        record = BlockRecord(self.routed_scale)

        def on_block(_module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            record.note_block(args[0], hidden_of(output))

        def on_call(call: RoutedCall | None) -> None:
            assert call is not None  # the probe has checked it
            record.note_routing(call.routing)

        with ExitStack() as stack:
            stack.callback(self.module.register_forward_hook(on_block).remove)
            stack.callback(self.dispatch.watch(on_call).remove)
            for quirk in self.quirks:
                quirk.watch(record, stack)
            yield record

    @contextmanager
    def playing(self, y: Tensor) -> Iterator[None]:
        """Replace the sum of experts by `y` `[B, S, H]` inside the context."""
        with ExitStack() as stack:
            finished = lambda *_, **__: self._through("finish", y)  # noqa: E731
            stack.enter_context(patched_forward(self.module, finished))
            for quirk in self.quirks:
                quirk.play(y, stack)
            yield
