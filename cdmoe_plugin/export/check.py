"""The check whether a condensed model can be exported, from a checkpoint's config alone, before any search."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from ..blocks import SparseBlock, UnsupportedModelError
from ..condense.forms import FORMS, Replacing
from ..config import CondenseConfig
from ..loading.load import sketch_model
from ..plan import CondensePlan
from ..search.budget import experts_per_layer
from ..search.check import check_request
from .stock_config import stock_model_of


def check_export(
    model_name_or_path: str | os.PathLike,
    request: CondensePlan | CondenseConfig,
    approximate: bool = False,
    **hub: Any,
) -> None:
    """Check that the result of a plan or a search can be exported by `export_stock`.

    If a search will choose the layers, any of them must be able to be dense: the first, the middle and the last sparse
    layer are tried. The function of the base architecture's dense layers is checked by `export_stock` only.

    Args:
        model_name_or_path (`str` or `os.PathLike`): Hub name or folder of a sparse checkpoint; no weight is read.
        request (`CondensePlan` or `CondenseConfig`): The plan, or the config of the search.
        approximate (`bool`, defaults to `False`): As in `export_stock`.
        **hub: `revision`, `trust_remote_code` and the like.

    Raises:
        UnsupportedModelError: naming the field of the base architecture's config, the layers and what to do.
        ValueError: if the request does not fit the model.
    """
    sketch, blocks = sketch_model(model_name_or_path, hub)
    check_request(request, sketch, blocks)
    form = FORMS[request.form]
    if not isinstance(form, Replacing):  # the model keeps its architecture
        return
    layers = _known_layers(request, blocks)
    if form.keeps_experts and not approximate:
        among = [block for block in blocks if layers is None or block.layer in layers]
        refuse_gates([b.layer for b in among if b.shared_gate is not None], sketch.config.model_type)
    opening = {**hub, "config": sketch.config}
    if layers is not None:
        stock_model_of(_condensed_sketch(model_name_or_path, opening, request, layers))
        return
    for layer in dict.fromkeys((blocks[0].layer, blocks[len(blocks) // 2].layer, blocks[-1].layer)):
        try:
            stock_model_of(_condensed_sketch(model_name_or_path, opening, request, [layer]))
        except UnsupportedModelError as error:
            raise UnsupportedModelError(
                f"{error} A search may choose such layers: choose others with `layers` if the config can describe them."
            ) from error


def refuse_gates(layers: Sequence[int], model_type: str) -> None:
    """Refuse an exact export of layers whose shared experts have a gate per token.

    Args:
        layers (`Sequence[int]`): The decoder layers with such a gate.
        model_type (`str`): The base architecture.

    Raises:
        UnsupportedModelError: naming the layers and what to do.
    """
    if layers:
        raise UnsupportedModelError(
            f"The decoder layers {list(layers)} scale their shared expert by a gate per token, which dense layers of "
            f"model type {model_type!r} do not have. `approximate=True` (`--export_approximate` of `cdmoe condense`, "
            "`--approximate` of `cdmoe export`) replaces it by its mean over calibration tokens, and measures what "
            "that costs; the condensed checkpoint keeps it."
        )


def _known_layers(request: CondensePlan | CondenseConfig, blocks: Sequence[SparseBlock]) -> list[int] | None:
    """List the layers that will be condensed; None if a search chooses them."""
    if isinstance(request, CondensePlan):
        return [row.layer for row in request.layers]
    if request.layers is None and request.num_layers >= len(blocks):
        return [block.layer for block in blocks]
    return request.layers


def _condensed_sketch(
    path: str | os.PathLike, opening: dict[str, Any], request: CondensePlan | CondenseConfig, layers: Sequence[int]
) -> PreTrainedModel:
    """Build the model on the meta device with these layers condensed."""
    sketch, blocks = sketch_model(path, copy.deepcopy(opening))  # a copy: condensing changes the config
    FORMS[request.form].sketch(sketch, blocks, experts_per_layer(request, layers, blocks))
    return sketch
