"""Put modules in the place of sparse blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel

from ..blocks import SparseBlock
from ..model.layers_cdmoe import NoRouter, Omitted, Trimmed


def install(model: PreTrainedModel, block: SparseBlock, mlp: nn.Module) -> None:
    """Puts a condensed MLP (or `Trimmed`) in place of a sparse block for good."""
    for parent, name, module in _places(model, block, mlp):
        setattr(parent, name, module)


@contextmanager
def standing_in(
    model: PreTrainedModel, block: SparseBlock, mlp: nn.Module, shared: nn.Module | None = None
) -> Iterator[None]:
    """Puts a condensed MLP (or `Trimmed`, or the block itself) where a sparse block belongs, for a while.

    Args:
        model (`PreTrainedModel`): The model, sparse or condensed.
        block (`SparseBlock`): The block, by its place.
        mlp (`nn.Module`): What stands there.
        shared (`nn.Module`, *optional*): What stands in the place of a shared expert that the decoder layer owns;
            nothing by default.
    """
    places = _places(model, block, mlp, shared)
    before = [(parent, name, getattr(parent, name)) for parent, name, _ in places]
    try:
        for parent, name, module in places:
            setattr(parent, name, module)
        yield
    finally:
        for parent, name, module in before:
            setattr(parent, name, module)


def _places(
    model: PreTrainedModel, block: SparseBlock, mlp: nn.Module, shared: nn.Module | None = None
) -> list[tuple[nn.Module, str, nn.Module]]:
    parent_path, _, name = block.path.rpartition(".")
    parent = model.base_model.get_submodule(parent_path)
    if isinstance(mlp, Trimmed):
        mlp.returns_tuple = block.returns_tuple
    places: list[tuple[nn.Module, str, nn.Module]] = [(parent, name, mlp)]
    if block.shared_name is not None:
        places.append((parent, block.shared_name, Omitted() if shared is None else shared))
    if block.router_name is not None and block.router is not None:
        places.append((parent, block.router_name, block.router if mlp is block.module else NoRouter()))
    return places
