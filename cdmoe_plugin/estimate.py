"""The estimate of a condensed model's size, from a checkpoint's config alone."""

from __future__ import annotations

import os
from typing import Any

from .cards.tables import FORM_TEXTS, format_table
from .condense.forms import FORMS
from .config import CondenseConfig
from .loading.load import sketch_model
from .plan import CondensePlan
from .search.budget import experts_per_layer
from .search.check import check_request
from .sizes import format_bytes, format_count


def dry_run(
    model_name_or_path: str | os.PathLike, request: CondensePlan | CondenseConfig, dtype: str = "auto", **hub: Any
) -> str:
    """Estimate a model's size before and after condensing, from a checkpoint's config alone, as a Markdown table.

    Args:
        model_name_or_path (`str` or `os.PathLike`): Hub name or folder of a sparse checkpoint; no weight is read.
        request (`CondensePlan` or `CondenseConfig`): The plan, or the config of a search. If a search chooses the
            layers, the first sparse ones are counted: all have the same size in nearly every architecture. An expert
            budget is assumed to be spent in full; a search may leave some of it.
        dtype (`str`, defaults to `"auto"`): Dtype for the size in bytes; "auto" is the checkpoint's own.
        **hub: `revision`, `trust_remote_code` and the like.

    Raises:
        UnsupportedModelError: if the model is dense or has sparse layers that can't be condensed.
        ValueError: if the request does not fit the model.
    """
    sketch, blocks = sketch_model(model_name_or_path, {**hub, "dtype": dtype})  # a budget may be in bytes
    check_request(request, sketch, blocks)
    if isinstance(request, CondensePlan):
        layers = [layer.layer for layer in request.layers]
    else:
        layers = request.layers or [block.layer for block in blocks[: request.num_layers]]
    before, width = sketch.num_parameters(), sketch.dtype.itemsize
    FORMS[request.form].sketch(sketch, blocks, experts_per_layer(request, layers, blocks))
    after = sketch.num_parameters()
    rows = [
        (name, f"{count:,}", format_count(count), format_bytes(count * width), f"{1 - count / before:.1%}")
        for name, count in (("sparse", before), (f"{len(layers)} layers {FORM_TEXTS[request.form].done}", after))
    ]
    return format_table(["model", "parameters", "", "weights", "saved"], rows)
