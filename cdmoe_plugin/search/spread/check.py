"""Checks of a `target_size` before a search, and the smallest size that can be reached."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from ...blocks import SparseBlock
from ...config import CondenseConfig
from ...plan import CondensedLayer
from ...sizes import read_target
from .forms import block_parameters, condensed_parameters
from .mixed import mixed_parameters


def smallest_size(model: PreTrainedModel, blocks: Sequence[SparseBlock]) -> int:
    """Count the parameters of a model that keeps no routed neuron."""
    saved = sum(block_parameters(block) - condensed_parameters(block)[0] for block in blocks)
    return model.num_parameters() - saved


def check_target(config: CondenseConfig, model: PreTrainedModel, blocks: Sequence[SparseBlock]) -> int:
    """Check that a `target_size` can be reached, and return it as a number of parameters.

    Args:
        config (`CondenseConfig`): A config with a `target_size`.
        model (`PreTrainedModel`): The sparse model, which may be on the meta device.
        blocks (`Sequence[SparseBlock]`): Its sparse blocks.

    Raises:
        ValueError: naming the size and the possible ones.
    """
    whole, itemsize = model.num_parameters(), model.dtype.itemsize
    parameters = read_target(config.target_size, whole, itemsize)
    least = smallest_size(model, blocks)
    if not least <= parameters < whole:
        raise ValueError(
            f"`target_size` is {config.target_size!r}, which is {parameters:,} parameters, but the sparse model has "
            f"{whole:,}, and the smallest size, without any routed neuron, is {least:,} ({least / whole:.3f} of it, "
            f"{least * itemsize:,} bytes): choose a size between them."
        )
    return parameters


def planned_parameters(model: PreTrainedModel, blocks: Sequence[SparseBlock], layers: Sequence[CondensedLayer]) -> int:
    """Count the parameters of a model by a plan with numbers of neurons.

    Args:
        model (`PreTrainedModel`): The sparse model, which may be on the meta device.
        blocks (`Sequence[SparseBlock]`): Its sparse blocks.
        layers (`Sequence[CondensedLayer]`): The layers of the plan.
    """
    by_layer, total = {block.layer: block for block in blocks}, model.num_parameters()
    for layer in layers:
        block = by_layer[layer.layer]
        base, neuron = condensed_parameters(block)
        if layer.routed is not None:
            base = mixed_parameters(block, len(layer.routed), dense=bool(layer.width))
        total += base + layer.dense_neurons(block.intermediate_size) * neuron - block_parameters(block)
    return total
