"""Sets of layers that an export can describe, to which `CondenseConfig.exportable` restricts the layer search."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from ..blocks import RoutedPart, SparseBlock, UnsupportedModelError, describe_sparse_blocks, layers_path
from ..condense.forms import FORMS, Replacing
from ..condense.forms.patterns import broken_patterns, layer_kinds, period_of
from ..config import CondenseConfig
from ..search.budget import experts_per_layer
from ..search.layers.restricted import Groups, runs, whole_sets
from ..search.staying import staying_per_layer
from .dense_markers import markers_of
from .fewer_experts import stock_form_of
from .gguf import check_first_layers
from .siblings import siblings_of
from .top_k import fits_top_k

# Configs repeat every few layers.
_LONGEST_PERIOD = 8


def exportable_groups(model: PreTrainedModel, blocks: Sequence[SparseBlock], config: CondenseConfig) -> Groups | None:
    """Find the layers that a search may choose together so that the result can be exported as `config.exportable`.

    Args:
        model (`PreTrainedModel`): The sparse model; it may be on the meta device.
        blocks (`Sequence[SparseBlock]`): Its sparse blocks.
        config (`CondenseConfig`): The config of the search.

    Returns:
        `Groups`, *optional*: The groups of layers that may be added to those chosen so far; None if any layer may be.

    Raises:
        UnsupportedModelError: if no set of layers can be exported, with the reason.
        ValueError: if none of `num_layers` layers can, naming the numbers that are possible.
    """
    sparse, number = [block.layer for block in blocks], config.num_layers
    if config.num_routed or config.target_size is not None:
        _check_alike(model, blocks, config)
        return None
    whole = config.layers or (sparse if number == len(sparse) else None)
    if not isinstance(FORMS[config.form], Replacing):
        return _periods(model, blocks, config)
    if config.exportable == "gguf":
        first = config.layers or sparse[:number]
        check_first_layers(model.config.model_type, sparse, first)
        stock_form_of(_condensed(model, config, first))
        return None if whole else whole_sets([tuple(first)])
    if config.exportable != "stock":
        if whole is None or set(whole) != set(sparse):
            raise ValueError(
                f"`exportable={config.exportable!r}` needs all {len(sparse)} sparse layers condensed, but `num_layers` "
                f"is {number}. Set it to {len(sparse)}."
            )
        condensed = _condensed(model, config, sparse)
        if config.exportable == "dense":
            next(siblings_of(condensed))
        else:
            fits_top_k(condensed)
        return None
    if whole is not None:
        stock_form_of(_condensed(model, config, whole))
        return None
    total = model.config.num_hidden_layers
    some = set(range(total)) - set(sparse[number:])  # the first ones, and those that are dense already
    if any(marker.marks_any and marker.update(model.config, some, total) for marker in markers_of(model.config)):
        stock_form_of(_condensed(model, config, sparse[:number]))
        return None
    fitting = _describable(model, sparse, number)
    if not fitting:
        possible = [count for count in range(1, len(sparse) + 1) if _describable(model, sparse, count)]
        stock_form_of(_condensed(model, config, sparse))  # gives the reason if nothing is possible
        raise ValueError(
            f"`num_layers` is {number}, but with `exportable='stock'` the config of model type "
            f"{model.config.model_type!r} can only describe {', '.join(map(str, possible))} condensed layers."
        )
    stock_form_of(_condensed(model, config, fitting[0]))
    return whole_sets(fitting)


def _check_alike(model: PreTrainedModel, blocks: Sequence[SparseBlock], config: CondenseConfig) -> None:
    """Check that the base architecture can have fewer experts and dense neurons, in all layers alike."""
    sparse = [block.layer for block in blocks]
    if config.exportable != "stock":
        raise ValueError(
            f"`exportable={config.exportable!r}` needs layers without a router: use 'stock', or leave out `num_routed`."
        )
    if config.target_size is not None:  # the search will decide on the numbers
        few = next(n for n in range(1, blocks[0].num_experts + 1) if all(RoutedPart(b).allows(n) for b in blocks))
        beside = int(all(block.shared is not None for block in blocks))
        config = replace(config, target_size=None, num_routed=few, num_experts=beside, layers=sparse)
    elif set(config.layers or sparse[: config.num_layers]) != set(sparse):
        raise ValueError(
            f"`exportable='stock'` needs the same number of experts in all {len(sparse)} sparse layers, but "
            f"`num_routed` is for {config.num_layers} of them. Set `num_layers` to {len(sparse)}."
        )
    stock_form_of(_condensed(model, config, sparse))


def _describable(model: Any, sparse: list[int], number: int) -> list[tuple[int, ...]]:
    """List the sets of `number` sparse layers that a config field may mark: first and last ones, and periods."""
    config, total = model.config, model.config.num_hidden_layers
    dense = set(range(total)) - set(sparse)
    markers = markers_of(config)
    candidates = {
        frozenset(layer for layer in sparse if not start <= layer <= end or (layer + 1 - offset) % period)
        for period in range(1, min(total, _LONGEST_PERIOD) + 1)
        for offset in range(period)
        for start in range(total + 1)
        for end in ((total - 1,) if period > 1 else range(start - 1, total))
    }
    fitting = (layers for layers in candidates if len(layers) == number)
    found = (layers for layers in fitting if any(m.update(config, dense | layers, total) for m in markers))
    return sorted(tuple(sorted(layers)) for layers in found)


def _condensed(model: PreTrainedModel, config: CondenseConfig, layers: Sequence[int]) -> PreTrainedModel:
    """Build the model on the meta device with these layers in the form of a config."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        sketch = type(model)(copy.deepcopy(model.config))
    blocks = describe_sparse_blocks(sketch)
    FORMS[config.form].sketch(
        sketch, blocks, experts_per_layer(config, layers, blocks), staying_per_layer(config, layers, blocks)
    )
    return sketch


def _periods(model: PreTrainedModel, blocks: Sequence[SparseBlock], config: CondenseConfig) -> Groups | None:
    """Find the whole periods of decoder layers that block trimming may drop; None if there is no pattern."""
    if config.exportable != "stock":
        raise ValueError(f"`exportable={config.exportable!r}` needs `form='condense'`, but it is {config.form!r}.")
    total = len(model.base_model.get_submodule(layers_path(blocks)))  # type: ignore[arg-type]
    kinds, sparse = layer_kinds(model.config, total), [block.layer for block in blocks]
    if config.layers is not None:
        broken = broken_patterns(model.config, total, config.layers)
        if broken:
            raise ValueError(f"`layers` {config.layers} break the pattern of {sorted(broken)} over the layers.")
        return None
    if not any(broken_patterns(model.config, total, [layer]) for layer in sparse):
        return None
    period = math.lcm(*(period_of(each) for each in kinds.values()))
    starts = range(total - period + 1)
    whole = [tuple(range(start, start + period)) for start in starts]
    whole = [run for run in whole if set(run) <= set(sparse) and not broken_patterns(model.config, total, run)]
    if not whole:
        raise UnsupportedModelError(
            f"Model type {model.config.model_type!r} has no whole period of {period} sparse layers that block trimming "
            f"could drop without breaking the pattern of {sorted(kinds)} over the layers."
        )
    if config.num_layers % period:
        raise ValueError(
            f"`num_layers` is {config.num_layers}, but with `exportable='stock'` whole periods of {period} layers are "
            f"dropped: choose a multiple of {period}."
        )
    return runs(whole)
