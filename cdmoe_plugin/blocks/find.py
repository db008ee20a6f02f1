"""Discovery of the sparse blocks of a model by their structure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..offload import in_memory, is_offloaded
from ..shapes import ModelShape
from .activations import experts_activation, shared_activation
from .block import SparseBlock
from .probes import probe_block
from .quirk import Quirk
from .quirks import known_quirks
from .reasons import why_no_block, why_none, why_shared, why_weighted
from .site import Site
from .text_decoder import decoder_layers
from .weights import (
    UnsupportedModelError,
    activation_name,
    has_stacked_weights,
    read_experts,
)


def find_sparse_blocks(model: PreTrainedModel) -> list[SparseBlock]:
    """Find and check every sparse block of a model, by depth.

    On the meta device, where nothing can be computed, only the structure is checked.

    Raises:
        UnsupportedModelError: if there is none, or if one can't be condensed; the message names the model type, the
            layer, the class and the reason.
    """
    blocks = describe_sparse_blocks(model)
    if blocks[0].device.type != "meta" or is_offloaded(blocks[0].module):
        probe_blocks(model, blocks)
    return blocks


def probe_blocks(model: PreTrainedModel, blocks: list[SparseBlock]) -> None:
    """Check that blocks compute the formula of `SparseBlock`, one of each kind, and measure their constant factors.

    Args:
        model (`PreTrainedModel`): The model.
        blocks (`list[SparseBlock]`): Its blocks.

    Raises:
        UnsupportedModelError: with the layer, the class and the reason.
    """
    probed: dict[Any, SparseBlock] = {}
    for block in blocks:
        activations = (*block.activation.items(), *block.shared_activation.items())
        modules = (type(block.module), *map(type, block.module.children()))  # routers may differ from layer to layer
        kind = (modules, block.num_experts, block.intermediate_size, activations)
        if kind not in probed:
            # The whole decoder layer, as it may own the shared expert.
            with _refusing(model, block.layer, block.module), in_memory(block.decoder_layer(model)):
                probe_block(block)
        twin = probed.setdefault(kind, block)
        block.routed_scale, block.shared_scale = twin.routed_scale, twin.shared_scale
        block.quirks = (*block.quirks, *(q for q in twin.quirks if type(q) not in map(type, block.quirks)))


def describe_sparse_blocks(model: PreTrainedModel) -> list[SparseBlock]:
    """Find the sparse blocks of the text decoder by their structure alone, by depth; see `find_sparse_blocks`."""
    layers = decoder_layers(model)
    inside = model.base_model.get_submodule(layers).named_modules(prefix=layers)
    found = [(name, module) for name, module in inside if has_stacked_weights(module)]
    if not found:
        raise UnsupportedModelError(why_none(model))
    reason = why_shared(model, [module for _, module in found])
    if reason is not None:
        raise UnsupportedModelError(reason)
    return sorted((_describe_block(model, *each) for each in found), key=lambda block: block.layer)


def layers_path(blocks: Sequence[SparseBlock]) -> str:
    """Return the name of the list of decoder layers in the base model, such as "layers"."""
    return blocks[0].path.rsplit(".", 2)[0]


def model_shape(model: PreTrainedModel, blocks: list[SparseBlock]) -> ModelShape:
    """Return the sizes of a model's text decoder, for plans: a plan for it fits it inside a multimodal model, too."""
    config = model.config.get_text_config()
    return ModelShape(
        model_type=config.model_type,
        num_hidden_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        sparse_layers=[block.shape for block in blocks],
    )


def _describe_block(model: PreTrainedModel, experts_name: str, experts: nn.Module) -> SparseBlock:
    site = Site(model, experts_name, experts)
    if any(quirk.experts_are_block(site) for quirk in known_quirks()):
        site.path = experts_name
    with _refusing(model, site.layer, experts):
        if site.owner_name is None:
            raise UnsupportedModelError(why_no_block(model, experts_name))
        reason = why_weighted(experts)
        if reason is not None:
            raise UnsupportedModelError(reason)
        read_experts(experts)
    with _refusing(model, site.layer, site.module):
        quirks = tuple(quirk for cls in known_quirks() if (quirk := cls.find(site)) is not None)
        shared = site.shared or next((part for quirk in quirks for part in quirk.summands()), None)
        block = _block_of(site, shared, quirks)
    with _refusing(model, site.layer, experts):
        if block.hidden_size != site.hidden_size:
            raise UnsupportedModelError(
                f"its experts work on {block.hidden_size} features, not on the hidden size {site.hidden_size}"
            )
    return block


def _block_of(site: Site, shared: nn.Module | None, quirks: tuple[Quirk, ...]) -> SparseBlock:
    gate = next((child for child in site.linears if child.out_features == 1), None)
    if shared is not None and not all(p.is_floating_point() for p in shared.parameters()):
        raise UnsupportedModelError("its shared expert is quantised: use the model without quantisation")
    if gate is not None and gate.bias is not None:
        raise UnsupportedModelError("the gate of its shared expert has a bias")
    hidden_act = activation_name(site.experts, site.config)
    activation = experts_activation(site.experts, hidden_act, site.config)
    of_shared = {} if shared is None else shared_activation(shared, hidden_act)
    if shared is not None and {"form": "ungated"} in (activation, of_shared) and activation != of_shared:
        raise UnsupportedModelError("either its shared expert or its routed experts have gates, but not both")
    return SparseBlock(
        layer=site.layer,
        path=site.path,
        module=site.module,
        experts=site.experts,
        hidden_act=hidden_act,
        activation=activation,
        shared_activation=of_shared,
        shared=shared,
        shared_gate=gate,
        quirks=quirks,
    )


@contextmanager
def _refusing(model: PreTrainedModel, layer: int, module: nn.Module) -> Iterator[None]:
    try:
        yield
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"model type {model.config.model_type!r} can't be condensed: in decoder layer {layer} "
            f"({type(module).__name__}), {error}."
        ) from error
