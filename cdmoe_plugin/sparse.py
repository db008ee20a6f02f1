"""The one place that understands the sparse blocks of transformers.

A block is found by its structure, not by its class: a direct child of a decoder layer that holds stacked expert
weights. What can be condensed computes

    y = d · [sigmoid(w·x) ·] S(x) + c · sum_i g_i(x) E_i(x)

with gated MLPs `E_i` and `S` of one activation. Every part of that claim is probed on the block itself before it is
relied on, so that an architecture which does something else is refused with the reason and never condensed wrongly.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from .plan import ModelShape, SparseLayerShape

# How the field says "this model has experts", for a better message where they are not recognised.
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# Names of the three projections of a gated MLP, as architectures have them; a fused pair holds [gate; up].
_MLP_LAYOUTS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_FUSED_MLP_LAYOUTS = (("gate_up_proj", "down_proj"), ("input_linear", "output_linear"))


class UnsupportedModelError(ValueError):
    """The model has no sparse layers, or sparse layers that no dense gated MLP can stand for."""


class GatedWeights(NamedTuple):
    """Weights of one gated MLP, or of N stacked ones (leading dimension N); biases are None where there are none."""

    gate: Tensor  # [(N,) I, H]
    up: Tensor  # [(N,) I, H]
    down: Tensor  # [(N,) H, I]
    gate_bias: Tensor | None = None  # [I]
    up_bias: Tensor | None = None  # [I]
    down_bias: Tensor | None = None  # [H]

    def __call__(self, x: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
        """Output `[(N,) T, H]` for `x` of shape `[T, H]`."""
        gate = _affine(x, self.gate, self.gate_bias)
        up = _affine(x, self.up, self.up_bias)
        return _affine(act(gate).mul_(up), self.down, self.down_bias)


class Routing(NamedTuple):
    """What a router decided for T tokens: the experts, `[T, k]` int64, and what they are multiplied with, `[T, k]`."""

    experts: Tensor
    weights: Tensor


@dataclass
class SparseBlock:
    """One sparse block of a model, seen as shared expert plus routed experts.

    Args:
        layer (`int`): Decoder layer index.
        path (`str`): Name of the block in the base model, such as "layers.3.mlp".
        module (`nn.Module`): The block.
        experts (`nn.Module`): Its child with the stacked expert weights, called with routed indices and weights.
        hidden_act (`str`): Name of the activation in `ACT2FN`.
        shared (`nn.Module`, *optional*): The shared expert, wherever it lives.
        shared_name (`str`, *optional*): Name of the shared expert where the decoder layer owns it, not the block.
        shared_gate (`nn.Linear`, *optional*): Per-token gate of the shared expert, before the sigmoid.
        routed_scale (`float`): Constant c that the block multiplies the routed sum with.
        shared_scale (`float`): Constant d that the block multiplies the shared output with.
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

    def __post_init__(self) -> None:
        self.act_fn = ACT2FN[self.hidden_act]
        weights = self.expert_weights()
        self.num_experts, self.intermediate_size, self.hidden_size = weights.gate.shape
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

    def expert_weights(self) -> GatedWeights:
        """Views of all routed experts' weights, stacked."""
        weights = _read_experts(self.experts)
        assert weights is not None  # _describe_block has read them before
        return weights

    def shared_weights(self) -> GatedWeights | None:
        """Views of the shared expert's weights; None without one."""
        return None if self.shared is None else _read_gated_mlp(self.shared)

    @torch.no_grad()
    def expert_outputs(self, x: Tensor) -> Tensor:
        """`E_i(x)` of every routed expert, ungated: `[N, T, H]` for `x` of shape `[T, H]`, in the dtype of `x`."""
        return self.expert_weights()(x, self.act_fn)

    @torch.no_grad()
    def shared_output(self, x: Tensor) -> Tensor:
        """`d · [sigmoid(w·x) ·] S(x)`, float32 `[T, H]` for `x` of shape `[T, H]`; zeros without a shared expert."""
        if self.shared is None:
            return torch.zeros_like(x, dtype=torch.float32)
        output = self.shared(x[None])[0].float() * self.shared_scale
        if self.shared_gate is not None:
            output = output * torch.sigmoid(self.shared_gate(x).float())
        return output

    @contextmanager
    def recording_routes(self) -> Iterator[list[Routing]]:
        """Collects a `Routing` per call of the block; weights include the block's own scale."""
        routes: list[Routing] = []

        def record(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            routing = _routing_of_call(args, kwargs)
            assert routing is not None  # _probe_routing has seen such a call before
            routes.append(Routing(routing.experts, routing.weights.float() * self.routed_scale))

        handle = self.experts.register_forward_pre_hook(record, with_kwargs=True)
        try:
            yield routes
        finally:
            handle.remove()


def find_sparse_blocks(model: PreTrainedModel) -> list[SparseBlock]:
    """Finds and checks every sparse block of a model, in the order of depth.

    On the meta device, where nothing can be computed, only the structure is checked.

    Raises:
        UnsupportedModelError: if there is none, or if one does not have the shape that condensing needs; the message
            names the model type, the layer, the class and the reason.
    """
    blocks = describe_sparse_blocks(model)
    if blocks[0].device.type != "meta":
        probe_blocks(model, blocks)
    return blocks


def probe_blocks(model: PreTrainedModel, blocks: list[SparseBlock], router_experts: int | None = None) -> None:
    """Checks that blocks compute what `SparseBlock` says, one of each kind, and measures their constant factors.

    Args:
        router_experts (`int`, *optional*): Number of experts that the routers choose from, where weights of fewer are
            loaded.

    Raises:
        UnsupportedModelError: with the layer, the class and the reason.
    """
    probed: dict[Any, SparseBlock] = {}
    for block in blocks:
        kind = (type(block.module), type(block.experts), block.num_experts, block.intermediate_size)
        if kind not in probed:
            with _refusing(model, block.layer, block.module):
                _probe_block(block, router_experts or block.num_experts)
        twin = probed.setdefault(kind, block)
        block.routed_scale, block.shared_scale = twin.routed_scale, twin.shared_scale


def describe_sparse_blocks(model: PreTrainedModel) -> list[SparseBlock]:
    """The sparse blocks by their structure alone, in the order of depth; see `find_sparse_blocks`."""
    found = [(name, module) for name, module in model.base_model.named_modules() if _has_stacked_weights(module)]
    if not found:
        raise UnsupportedModelError(_why_none(model))
    return sorted((_describe_block(model, *each) for each in found), key=lambda block: block.layer)


def model_shape(model: PreTrainedModel, blocks: list[SparseBlock]) -> ModelShape:
    """The sizes by which plans recognise the model."""
    config = model.config.get_text_config()
    return ModelShape(
        model_type=model.config.model_type,
        num_hidden_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        sparse_layers=[block.shape for block in blocks],
    )


# --- structure -------------------------------------------------------------------------------------------------------


def _has_stacked_weights(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.conv._ConvNd):
        return False
    stacked = any(parameter.ndim == 3 for parameter in module.parameters(recurse=False))
    return stacked or _is_dbrx_like(module)


def _is_dbrx_like(experts: nn.Module) -> bool:
    inner = getattr(experts, "mlp", None)
    return isinstance(inner, nn.Module) and all(
        isinstance(getattr(inner, name, None), nn.Parameter) for name in ("w1", "v1", "w2")
    )


def _describe_block(model: PreTrainedModel, experts_name: str, experts: nn.Module) -> SparseBlock:
    path = experts_name.rpartition(".")[0]
    match = re.fullmatch(r"(?P<layer>.*?\.(?P<index>\d+))\.[^.]+", path)
    base = model.base_model
    index = int(match["index"]) if match else -1
    with _refusing(model, index, experts):
        if match is None:
            raise UnsupportedModelError("its experts are not in a block of their own, a child of a decoder layer")
        weights = _read_experts(experts)
        hidden_size = model.config.get_text_config().hidden_size
        if weights.gate.shape[-1] != hidden_size:
            raise UnsupportedModelError(
                f"its experts work on {weights.gate.shape[-1]} features, not on the hidden size {hidden_size}"
            )
    module = base.get_submodule(path)
    owner = base.get_submodule(match["layer"])
    children = {name: child for name, child in module.named_children() if child is not experts}
    shared = next((child for child in children.values() if _read_gated_mlp(child) is not None), None)
    shared_name = None
    if shared is None:
        others = {name: child for name, child in owner.named_children() if child is not module}
        shared_name = next((n for n, child in others.items() if _read_gated_mlp(child) is not None), None)
        shared = others.get(shared_name) if shared_name else None
    gate = next((c for c in children.values() if isinstance(c, nn.Linear) and c.out_features == 1), None)
    with _refusing(model, index, module):
        if gate is not None and gate.bias is not None:
            raise UnsupportedModelError("the gate of its shared expert has a bias")
        return SparseBlock(
            layer=index,
            path=path,
            module=module,
            experts=experts,
            hidden_act=_activation_name(experts, model.config.get_text_config()),
            shared=shared,
            shared_name=shared_name,
            shared_gate=gate,
        )


def _read_experts(experts: nn.Module) -> GatedWeights:
    """Views of stacked expert weights as gate, up `[N, I, H]` and down `[N, H, I]`.

    Raises:
        UnsupportedModelError: if they are not those of bias-free gated MLPs.
    """
    if _is_dbrx_like(experts):
        mlp, num = experts.mlp, experts.num_experts
        gate, up, down = (getattr(mlp, name).unflatten(0, (num, -1)) for name in ("w1", "v1", "w2"))
        return GatedWeights(gate, up, down.transpose(1, 2))
    gate_up, down = getattr(experts, "gate_up_proj", None), getattr(experts, "down_proj", None)
    if not isinstance(gate_up, Tensor) or not isinstance(down, Tensor):
        raise UnsupportedModelError("its experts are not gated MLPs with stacked weights gate_up_proj and down_proj")
    if getattr(experts, "has_bias", False) or getattr(experts, "gate_up_proj_bias", None) is not None:
        raise UnsupportedModelError("its experts have biases")
    if getattr(experts, "has_post_expert_norm", False):
        raise UnsupportedModelError("it normalises the output of every expert")
    if getattr(experts, "is_transposed", False):
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    if not getattr(experts, "is_concatenated", True):
        gate, up = gate_up[:, ::2], gate_up[:, 1::2]
    else:
        gate, up = gate_up.chunk(2, dim=1)
    if gate.shape != (down.shape[0], down.shape[2], down.shape[1]):
        raise UnsupportedModelError(
            f"the shapes of its expert weights, {tuple(gate_up.shape)} and {tuple(down.shape)}, do not belong together"
        )
    return GatedWeights(gate, up, down)


def _read_gated_mlp(module: nn.Module) -> GatedWeights | None:
    """Views of a gated MLP's weights, or None if the module is no gated MLP made of `nn.Linear`s."""
    for names in _MLP_LAYOUTS:
        parts = [getattr(module, name, None) for name in names]
        if all(isinstance(part, nn.Linear) for part in parts):
            return GatedWeights(*(p.weight for p in parts), *(p.bias for p in parts))
    for names in _FUSED_MLP_LAYOUTS:
        fused, down = (getattr(module, name, None) for name in names)
        if isinstance(fused, nn.Linear) and isinstance(down, nn.Linear):
            biases = (None, None) if fused.bias is None else fused.bias.chunk(2)
            return GatedWeights(*fused.weight.chunk(2), down.weight, *biases, down.bias)
    return None


def _activation_name(experts: nn.Module, config: Any) -> str:
    """The name of the experts' activation: the config's where it fits the module, else found by the module's type."""
    holders = (experts, getattr(experts, "mlp", None))
    names = ("act_fn", "activation_fn", "activation", "act")
    modules = [getattr(holder, name, None) for holder in holders for name in names]
    act = next((module for module in modules if isinstance(module, nn.Module)), None)
    named = [getattr(config, name, None) for name in ("hidden_act", "hidden_activation")]
    candidates = [name for name in (*named, "silu", *ACT2FN) if isinstance(name, str) and name in ACT2FN]
    if act is None:
        return candidates[0]
    return next((name for name in candidates if type(ACT2FN[name]) is type(act)), candidates[0])


def _why_none(model: PreTrainedModel) -> str:
    config = model.config.get_text_config()
    counts = {name: getattr(config, name) for name in _EXPERT_COUNTS if getattr(config, name, None)}
    if counts:
        return (
            f"model type {model.config.model_type!r} ({type(model).__name__}) has experts ({counts}), but not as stacked "
            "weights in a block of their own: this form of sparse layer is not supported."
        )
    return (
        f"model type {model.config.model_type!r} ({type(model).__name__}) is dense: there is no sparse layer with routed "
        "experts to condense."
    )


# --- probes ----------------------------------------------------------------------------------------------------------


def _probe_block(block: SparseBlock, router_experts: int) -> None:
    """Checks on a few random tokens that the block computes what `SparseBlock` says, and measures its two scales."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device=block.device, dtype=dtype)

    x = random(1, 4, block.hidden_size, dtype=block.dtype)
    with torch.no_grad():
        _probe_routing(block, x, router_experts)
        _probe_sum(block, x, random)
        _probe_experts(block, x[0], random)
        if block.shared is not None:
            _compare(
                block.shared(x)[0],
                block.shared_weights()(x[0], block.act_fn),
                "its shared expert is not act(gate) * up",
            )


def _probe_routing(block: SparseBlock, x: Tensor, router_experts: int) -> None:
    calls: list[Routing | None] = []

    def record(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(_routing_of_call((hidden, *args), kwargs))
        return torch.zeros_like(hidden)

    with patched_forward(block.experts, record):
        try:
            output = block.module(x)
        except (TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise UnsupportedModelError(f"its block needs more than hidden states ({error})") from error
    if not isinstance(output, Tensor):
        raise UnsupportedModelError("its block returns more than hidden states")
    if len(calls) != 1 or calls[0] is None:
        raise UnsupportedModelError("its experts are not called with the routed indices and weights of each token")
    if int(calls[0].experts.max()) >= router_experts:
        raise UnsupportedModelError("its router can choose experts that have no weights (identity or empty experts)")


def _probe_sum(block: SparseBlock, x: Tensor, random: Callable[..., Tensor]) -> None:
    """With outputs of experts and shared expert put in by hand, the block must add them, up to constant factors."""
    in_block = block.shared is not None and block.shared_name is None
    shape = (1, x.shape[1], block.hidden_size)

    def run(routed: Tensor, shared: Tensor, gate: Tensor) -> Tensor:
        with patched_forward(block.experts, lambda h, *_, **__: routed.reshape(h.shape)):
            if not in_block:
                return block.module(x).float()
            with patched_forward(block.shared, lambda h, *_, **__: shared.reshape(h.shape)):
                if block.shared_gate is None:
                    return block.module(x).float()
                with patched_forward(block.shared_gate, lambda h, *_, **__: gate.reshape(*h.shape[:-1], 1)):
                    return block.module(x).float()

    one, zero = torch.ones(shape, device=x.device), torch.zeros(shape, device=x.device)
    open_gate = torch.full((1, x.shape[1], 1), 50.0, device=x.device)
    block.routed_scale = run(one, zero, open_gate).mean().item()
    block.shared_scale = run(zero, one, open_gate).mean().item() if in_block else 1.0
    routed, shared, gate = random(*shape), random(*shape), random(1, x.shape[1], 1)
    factor = torch.sigmoid(gate) if block.shared_gate is not None else 1.0
    expected = block.routed_scale * routed + (block.shared_scale * factor * shared if in_block else 0.0)
    _compare(run(routed, shared, gate), expected, "its block does more than add shared and routed experts")


def _probe_experts(block: SparseBlock, x: Tensor, random: Callable[..., Tensor]) -> None:
    weights = block.expert_weights()
    apply_gate = getattr(block.experts, "_apply_gate", None)
    if apply_gate is not None:
        # Far from zero, where a clamp would show.
        z = random(8, 2 * block.intermediate_size, dtype=block.dtype) * 50
        gate, up = z.chunk(2, -1) if getattr(block.experts, "is_concatenated", True) else (z[:, ::2], z[:, 1::2])
        _compare(apply_gate(z), block.act_fn(gate) * up, f"its experts are not {block.hidden_act}(gate) * up")
    index = torch.stack([torch.arange(len(x)), torch.arange(len(x)) + 1], dim=1) % block.num_experts
    index = index.to(x.device)
    gates = random(*index.shape).abs().to(x.dtype)
    chosen = GatedWeights(*(part[index.flatten()] for part in weights[:3]))
    outputs = chosen(x.repeat_interleave(2, 0)[:, None], block.act_fn)[:, 0].unflatten(0, index.shape)
    expected = (outputs.float() * gates.float()[..., None]).sum(1)
    _compare(block.experts(x, index, gates), expected, f"its experts are not {block.hidden_act}(gate) * up")


def _compare(actual: Tensor, expected: Tensor, reason: str) -> None:
    half = min(torch.finfo(actual.dtype).bits, torch.finfo(expected.dtype).bits) < 32
    tolerance = 5e-2 if half else 1e-4
    actual, expected = actual.float().reshape(expected.shape), expected.float()
    error = (actual - expected).norm() / expected.norm().clamp_min(1e-12)
    if not error <= tolerance:
        raise UnsupportedModelError(f"{reason} (relative difference {error:.1e})")


def _routing_of_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Routing | None:
    """Routed indices and weights among the arguments of an experts module: told apart by being whole numbers or not."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    if len(tensors) != 3 or len(args) + len(kwargs) != 3:
        return None
    index = [t for t in tensors[1:] if not t.is_floating_point()]
    weights = [t for t in tensors[1:] if t.is_floating_point()]
    if len(index) != 1 or len(weights) != 1 or index[0].shape != weights[0].shape:
        return None
    return Routing(index[0].long(), weights[0])


@contextmanager
def patched_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replaces a module's `forward` for a while, and puts back what was there (accelerate's hooks included)."""
    before = module.__dict__.get("forward")
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before  # type: ignore[method-assign]


@contextmanager
def _refusing(model: PreTrainedModel, layer: int, module: nn.Module) -> Iterator[None]:
    try:
        yield
    except UnsupportedModelError as error:
        where = f"decoder layer {layer}" if layer >= 0 else "one of its modules"
        raise UnsupportedModelError(
            f"model type {model.config.model_type!r} can't be condensed: in {where} ({type(module).__name__}), {error}."
        ) from error


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product = x @ weight.mT
    return product if bias is None else product + bias
