"""The estimate of a condensed model's size, from a checkpoint's config alone."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .blocks import SparseBlock
from .cards.tables import FORM_TEXTS, format_table
from .condense.forms import FORMS
from .config import CondenseConfig
from .loading.load import sketch_model
from .plan import CondensePlan
from .search.budget import experts_per_layer
from .search.check import check_request
from .search.spread.check import check_target, planned_parameters, smallest_size
from .search.staying import staying_per_layer
from .sizes import format_bytes, format_count


class Sizes(NamedTuple):
    """A model's parameters before and after condensing, the bytes of one, and the number of changed layers.

    For a `target_size`, `after` is that size, and `least` the smallest possible one.
    """

    before: int
    after: int
    width: int
    layers: int
    least: int | None = None


def estimate(
    model_name_or_path: str | os.PathLike, request: CondensePlan | CondenseConfig, dtype: str = "auto", **hub: Any
) -> Sizes:
    """Estimate a model's size before and after condensing, from a checkpoint's config alone.

    Args:
        model_name_or_path (`str` or `os.PathLike`): Hub name or folder of a sparse checkpoint; no weight is read.
        request (`CondensePlan` or `CondenseConfig`): The plan, or the config of a search. If a search chooses the
            layers, the first sparse ones are counted: all have the same size in nearly every architecture. An expert
            budget and a target size are assumed to be spent in full; a search may leave some of them.
        dtype (`str`, defaults to `"auto"`): Dtype for the size in bytes; "auto" is the checkpoint's own.
        **hub: `revision`, `trust_remote_code` and the like, and `text_only`, as in `condense_pretrained`.

    Raises:
        UnsupportedModelError: if the model is dense or has sparse layers that can't be condensed.
        ValueError: if the request does not fit the model.
    """
    sketch, blocks = sketch_model(model_name_or_path, {**hub, "dtype": dtype})  # a budget may be in bytes
    check_request(request, sketch, blocks)
    before, width = sketch.num_parameters(), sketch.dtype.itemsize
    if isinstance(request, CondenseConfig) and request.target_size is not None:
        least = smallest_size(sketch, blocks)
        return Sizes(before, check_target(request, sketch, blocks), width, len(blocks), least)
    if isinstance(request, CondensePlan):
        layers = [layer.layer for layer in request.layers]
        if any(layer.width is not None for layer in request.layers):
            return Sizes(before, planned_parameters(sketch, blocks, request.layers), width, len(layers))
    else:
        layers = request.layers or [block.layer for block in blocks[: request.num_layers]]
    kept = experts_per_layer(request, layers, blocks)
    FORMS[request.form].sketch(sketch, blocks, kept, staying_per_layer(request, layers, blocks))
    after = sketch.num_parameters() + _gates(request, kept, blocks)
    return Sizes(before, after, width, len(layers))


def _gates(request: CondensePlan | CondenseConfig, kept: Mapping[int, int], blocks: Sequence[SparseBlock]) -> int:
    """Count the parameters of gates per token. If a refit chooses neurons, assume that it takes some of all experts."""
    if not isinstance(request, CondenseConfig) or not request.gates_tokens:
        return 0
    own = [b for b in blocks if kept.get(b.layer)]
    return sum((kept[b.layer] if request.searches_experts else b.num_experts) * (b.hidden_size + 1) for b in own)


def dry_run(
    model_name_or_path: str | os.PathLike, request: CondensePlan | CondenseConfig, dtype: str = "auto", **hub: Any
) -> str:
    """Format the estimate of `estimate` as a Markdown table."""
    sizes = estimate(model_name_or_path, request, dtype, **hub)
    named = {"sparse": sizes.before, f"{sizes.layers} layers {FORM_TEXTS[request.form].done}": sizes.after}
    if sizes.least is not None:
        named = {"sparse": sizes.before, "target, at most": sizes.after, "no routed neuron, least": sizes.least}
    rows = [
        (name, f"{count:,}", format_count(count), format_bytes(count * sizes.width), f"{1 - count / sizes.before:.1%}")
        for name, count in named.items()
    ]
    return format_table(["model", "parameters", "", "weights", "saved"], rows)
