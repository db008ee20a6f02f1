"""The replacement of sparse blocks in a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel

from ..blocks import SparseBlock
from ..model.layers_cdmoe import Trimmed
from .mixed import MixedLayer


def install(model: PreTrainedModel, block: SparseBlock, replacement: nn.Module) -> None:
    """Replace a sparse block by a condensed MLP, a `MixedLayer` or `Trimmed`."""
    for name, module in _places(block, replacement).items():
        setattr(block.decoder_layer(model), name, module)


@contextmanager
def standing_in(model: PreTrainedModel, block: SparseBlock, replacement: nn.Module | None) -> Iterator[None]:
    """Replace a sparse block inside the context.

    Args:
        model (`PreTrainedModel`): The model, sparse or condensed.
        block (`SparseBlock`): The block. In a condensed model, another module may be in its place.
        replacement (`nn.Module`, *optional*): A condensed MLP, a `MixedLayer` or `Trimmed`; None for the block itself.
    """
    layer = block.decoder_layer(model)
    places = _places(block, replacement)
    before = {name: getattr(layer, name) for name in places}
    try:
        for name, module in places.items():
            setattr(layer, name, module)
        yield
    finally:
        for name, module in before.items():
            setattr(layer, name, module)


def _places(block: SparseBlock, replacement: nn.Module | None) -> dict[str, nn.Module]:
    if isinstance(replacement, MixedLayer):
        return dict(replacement.named_children())
    if isinstance(replacement, Trimmed):
        replacement.returns_tuple = block.place_spec.get("returns_tuple", False)
    return block.places(replacement)
