"""Finds the sparse blocks of a model by their structure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..offload import in_memory, is_offloaded
from ..plan import ModelShape
from .activations import experts_activation, shared_activation
from .block import SparseBlock
from .probes import probe_block
from .reasons import why_no_block, why_none, why_weighted
from .weights import (
    UnsupportedModelError,
    activation_name,
    are_parallel,
    has_stacked_weights,
    read_experts,
    read_gated_mlp,
)


def find_sparse_blocks(model: PreTrainedModel) -> list[SparseBlock]:
    """Finds and checks every sparse block of a model, in the order of depth.

    On the meta device, where nothing can be computed, only the structure is checked.

    Raises:
        UnsupportedModelError: if there is none, or if one does not have the shape that condensing needs; the message
            names the model type, the layer, the class and the reason.
    """
    blocks = describe_sparse_blocks(model)
    if blocks[0].device.type != "meta" or is_offloaded(blocks[0].module):
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
        activations = (*block.activation.items(), *block.shared_activation.items())
        modules = (type(block.module), *map(type, block.module.children()))  # routers may differ from layer to layer
        kind = (modules, block.num_experts, block.intermediate_size, activations)
        if kind not in probed:
            with _refusing(model, block.layer, block.module), _weights_of(model, block):
                probe_block(block, router_experts or block.num_experts)
        twin = probed.setdefault(kind, block)
        block.routed_scale, block.shared_scale = twin.routed_scale, twin.shared_scale
        block.returns_tuple = twin.returns_tuple


def _weights_of(model: PreTrainedModel, block: SparseBlock) -> AbstractContextManager[None]:
    """Holds the decoder layer of a block in memory: its shared expert may be the layer's."""
    return in_memory(model.base_model.get_submodule(block.path.rpartition(".")[0]))


def describe_sparse_blocks(model: PreTrainedModel) -> list[SparseBlock]:
    """The sparse blocks by their structure alone, in the order of depth; see `find_sparse_blocks`."""
    found = [(name, module) for name, module in model.base_model.named_modules() if has_stacked_weights(module)]
    if not found:
        raise UnsupportedModelError(why_none(model))
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


def _describe_block(model: PreTrainedModel, experts_name: str, experts: nn.Module) -> SparseBlock:
    router_name = _layer_router(model, experts_name)
    path = experts_name if are_parallel(experts) or router_name else experts_name.rpartition(".")[0]
    match = re.fullmatch(r"(?P<layer>.*?\.\d+)\.[^.]+", path)
    base = model.base_model
    in_layer = re.search(r"\.(\d+)\.", experts_name)
    index = int(in_layer[1]) if in_layer else -1
    with _refusing(model, index, experts):
        if match is None:
            raise UnsupportedModelError(why_no_block(model, experts_name))
        reason = why_weighted(experts)
        if reason is not None:
            raise UnsupportedModelError(reason)
        features = read_experts(experts).gate.shape[-1]
        hidden_size = model.config.get_text_config().hidden_size
        module = base.get_submodule(path)
        children = {name: child for name, child in module.named_children() if child is not experts}
        latent = _latent_maps(children, hidden_size, features)
        if latent is None and features != hidden_size:
            raise UnsupportedModelError(
                f"its experts work on {features} features, not on the hidden size {hidden_size}"
            )
    owner = base.get_submodule(match["layer"])
    shared = next((child for child in children.values() if read_gated_mlp(child) is not None), None)
    shared_name = None
    if shared is None and router_name is None:
        others = {name: child for name, child in owner.named_children() if child is not module}
        shared_name = next((n for n, child in others.items() if read_gated_mlp(child) is not None), None)
        shared = others.get(shared_name) if shared_name else None
    gate = next((c for c in children.values() if isinstance(c, nn.Linear) and c.out_features == 1), None)
    with _refusing(model, index, module):
        if shared is not None and not all(p.is_floating_point() for p in shared.parameters()):
            raise UnsupportedModelError("its shared expert is quantised: search on the model as it was before")
        if gate is not None and gate.bias is not None:
            raise UnsupportedModelError("the gate of its shared expert has a bias")
        config = model.config.get_text_config()
        hidden_act = activation_name(experts, config)
        activation = experts_activation(experts, hidden_act, config)
        of_shared = {} if shared is None else shared_activation(shared, hidden_act)
        if shared is not None and {"form": "ungated"} in (activation, of_shared) and activation != of_shared:
            raise UnsupportedModelError("of its shared expert and the routed ones, only one kind has gates")
        return SparseBlock(
            layer=index,
            path=path,
            module=module,
            experts=experts,
            hidden_act=hidden_act,
            activation=activation,
            shared_activation=of_shared,
            shared=shared,
            shared_name=shared_name,
            shared_gate=gate,
            router=None if router_name is None else owner.get_submodule(router_name),
            router_name=router_name,
            latent=latent,
            norm_name=_norm_name(children, hidden_size),
        )


def _layer_router(model: PreTrainedModel, experts_name: str) -> str | None:
    """Name of the router beside experts that are a decoder layer's own children; None for experts in a block."""
    layer = re.fullmatch(r"(.*?\.\d+)\.[^.]+", experts_name)
    children = dict(model.base_model.get_submodule(layer[1]).named_children()) if layer else {}
    return "router" if "router" in children else None


def _latent_maps(children: dict[str, nn.Module], hidden_size: int, features: int) -> tuple[nn.Linear, nn.Linear] | None:
    """Two children of a block that map to the features of its experts and back; that they do is for the probe."""
    linears = [child for child in children.values() if isinstance(child, nn.Linear)]
    into = (child for child in linears if child.weight.shape == (features, hidden_size))
    pairs = [(one, other) for one in into for other in linears if other.weight.shape == (hidden_size, features)]
    return next((pair for pair in pairs if pair[0] is not pair[1]), None)


def _norm_name(children: dict[str, nn.Module], hidden_size: int) -> str | None:
    """The child of a block that has nothing but weights per feature; whether it norms the sum is for the probe."""
    names = [name for name, child in children.items() if {(hidden_size,)} == {p.shape for p in child.parameters()}]
    return names[0] if len(names) == 1 else None


@contextmanager
def _refusing(model: PreTrainedModel, layer: int, module: nn.Module) -> Iterator[None]:
    try:
        yield
    except UnsupportedModelError as error:
        where = f"decoder layer {layer}" if layer >= 0 else "one of its modules"
        raise UnsupportedModelError(
            f"model type {model.config.model_type!r} can't be condensed: in {where} ({type(module).__name__}), {error}."
        ) from error
