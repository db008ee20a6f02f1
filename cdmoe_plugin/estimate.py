"""What people look at: tables, and the figure of divergence per layer."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch

from .blocks import model_shape
from .cards.tables import DONE, format_table
from .condense.apply import apply_layers
from .condense.trimming.blocks import check_trimming, parameters_without
from .config import CondenseConfig
from .loading.load import sketch_model
from .plan import CondensedLayer, CondensePlan
from .search.budget import experts_per_layer
from .search.check import check_config

if TYPE_CHECKING:
    pass


def dry_run(
    model_name_or_path: str | os.PathLike, request: CondensePlan | CondenseConfig, dtype: str = "auto", **hub: Any
) -> str:
    """What condensing would save, from a checkpoint's config alone: a Markdown table.

    Args:
        model_name_or_path (`str` or `os.PathLike`): Hub name or folder of a sparse checkpoint; no weight is read.
        request (`CondensePlan` or `CondenseConfig`): What would be condensed. Where a config leaves the layers to a
            search, the first sparse ones are counted; they all have the same size in nearly every architecture. An
            expert budget counts as spent in full; a search may leave some of it.
        dtype (`str`, defaults to `"auto"`): Dtype to count bytes in; "auto" is the checkpoint's own.
        **hub: `revision`, `trust_remote_code` and the like.

    Raises:
        UnsupportedModelError: if the model is dense or has sparse layers that can't be condensed.
        ValueError: if the request does not fit the model.
    """
    sketch, blocks = sketch_model(model_name_or_path, hub)
    width = (sketch.dtype if dtype == "auto" else getattr(torch, dtype)).itemsize
    if dtype != "auto":
        sketch.to(getattr(torch, dtype))  # a budget may be in bytes
    if isinstance(request, CondensePlan):
        request.check_fits(model_shape(sketch, blocks))
        experts = {layer.layer: len(layer.experts) for layer in request.layers}
        check_trimming(sketch, blocks, request.form, list(experts))
    else:
        check_config(request, blocks)
        check_trimming(sketch, blocks, request.form, request.layers, request.num_layers)
        layers = request.layers or [block.layer for block in blocks[: request.num_layers]]
        experts = experts_per_layer(request, layers, blocks)
    before = sketch.num_parameters()
    if request.form == "trim_block":
        after = parameters_without(sketch, blocks, list(experts))
    else:
        kept = [CondensedLayer(layer, list(range(number)), [1.0] * number) for layer, number in experts.items()]
        apply_layers(sketch, blocks, kept, request.form)
        after = sketch.num_parameters()
    rows = [
        (name, f"{count:,}", f"{count / 1e9:.2f} B", f"{count * width / 2**30:.2f} GiB", f"{1 - count / before:.1%}")
        for name, count in (("sparse", before), (f"{len(experts)} layers {DONE[request.form]}", after))
    ]
    return format_table(["model", "parameters", "", "weights", "saved"], rows)
