"""The check whether a condensed model can be exported, from a checkpoint's config alone, before any search."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from ..blocks import SparseBlock, UnsupportedModelError
from ..condense.forms import FORMS, Replacing
from ..condense.forms.patterns import ENGINES, broken_patterns
from ..config import CondenseConfig
from ..loading.load import sketch_model
from ..plan import CondensePlan
from ..search.budget import experts_per_layer
from ..search.check import check_request
from ..search.staying import staying_per_layer
from .checkpoint import refuse_token_gates
from .fewer_experts import stock_form_of


def check_export(
    model_name_or_path: str | os.PathLike,
    request: CondensePlan | CondenseConfig,
    approximate: bool = False,
    **hub: Any,
) -> None:
    """Check that the result of a plan or a search can be exported by `export_stock`.

    If a search will choose the layers, any of them must be able to be dense: the first, the middle and the last sparse
    layer are tried. A search for a size needs `exportable="stock"`. The function of the architecture's dense layers
    is checked by `export_stock` only.

    Args:
        model_name_or_path (`str` or `os.PathLike`): Hub name or folder of a sparse checkpoint; no weight is read.
        request (`CondensePlan` or `CondenseConfig`): The plan, or the config of the search.
        approximate (`bool`, defaults to `False`): As in `export_stock`.
        **hub: `revision`, `trust_remote_code` and the like, and `text_only`, as in `condense_pretrained`.

    Raises:
        UnsupportedModelError: naming the field of the base architecture's config, the layers and what to do.
        ValueError: if the request does not fit the model.
    """
    refuse_gated_request(request)
    sketch, blocks = sketch_model(model_name_or_path, hub)
    check_request(request, sketch, blocks)
    if isinstance(request, CondenseConfig) and request.target_size is not None:
        if request.exportable != "stock":
            raise UnsupportedModelError(
                f"`target_size` is {request.target_size!r}: the search gives layers different numbers of experts, for "
                "which the base architecture has no place. Set `exportable='stock'`, which gives all the same."
            )
        return  # `exportable` is checked when the checkpoint is opened
    form = FORMS[request.form]
    layers = _known_layers(request, blocks)
    if not isinstance(form, Replacing):  # the model keeps its architecture
        total = sketch.config.get_text_config().num_hidden_layers
        if layers is not None:
            refuse_broken_patterns(broken_patterns(sketch.config, total, layers), sketch.config.model_type)
        return
    if form.keeps_experts and not approximate:
        among = [block for block in blocks if layers is None or block.layer in layers]
        refuse_gates([b.layer for b in among if b.shared_gate is not None], sketch.config.model_type)
    opening = {**hub, "config": sketch.config}
    if layers is not None:
        stock_form_of(_condensed_sketch(model_name_or_path, opening, request, layers))
        return
    if isinstance(request, CondenseConfig) and request.exportable in ("stock", "gguf"):
        return  # the search will choose only layers that can be dense
    for layer in dict.fromkeys((blocks[0].layer, blocks[len(blocks) // 2].layer, blocks[-1].layer)):
        try:
            stock_form_of(_condensed_sketch(model_name_or_path, opening, request, [layer]))
        except UnsupportedModelError as error:
            raise UnsupportedModelError(
                f"{error} A search may choose such layers: choose others with `layers`, if the config can describe "
                "them, or let the search choose among those with `exportable='stock'`."
            ) from error


def sketch_fully(
    model_name_or_path: str | os.PathLike,
    request: CondensePlan | CondenseConfig,
    approximate: bool,
    hub: dict[str, Any],
) -> PreTrainedModel:
    """Build the result of a request on the meta device, for targets that need all sparse layers condensed.

    Args:
        model_name_or_path (`str` or `os.PathLike`): Hub name or folder of a sparse checkpoint; no weight is read.
        request (`CondensePlan` or `CondenseConfig`): The plan, or the config of the search.
        approximate (`bool`): Whether per-token gates of shared experts may be replaced.
        hub (`dict[str, Any]`): `revision`, `trust_remote_code` and the like.

    Raises:
        UnsupportedModelError: if layers would be sparse still, or have per-token gates that may not be replaced.
        ValueError: if the request does not fit the model.
    """
    refuse_gated_request(request)
    sketch, blocks = sketch_model(model_name_or_path, hub)
    check_request(request, sketch, blocks)
    form = FORMS[request.form]
    every = [block.layer for block in blocks]
    layers = _known_layers(request, blocks)
    if not isinstance(form, Replacing) or layers is None or set(layers) != set(every):
        count = f"`num_layers` is {request.num_layers}" if isinstance(request, CondenseConfig) else "the plan has fewer"
        raise UnsupportedModelError(
            f"A dense model needs all {len(every)} sparse layers condensed ({every}), but {count}, with "
            f"`form={request.form!r}`."
        )
    if form.keeps_experts and not approximate:
        refuse_gates([block.layer for block in blocks if block.shared_gate is not None], sketch.config.model_type)
    return _condensed_sketch(model_name_or_path, {**hub, "config": sketch.config}, request, layers)


def refuse_broken_patterns(broken: Mapping[str, int], model_type: str) -> None:
    """Refuse to export a block-trimmed model that other engines would misread.

    Args:
        broken (`Mapping[str, int]`): Config fields whose pattern over the layers is broken, with its length.
        model_type (`str`): The architecture.

    Raises:
        UnsupportedModelError: naming the fields and what to do.
    """
    if broken:
        named = " and ".join(f"`{name}` (a pattern of {period} layers)" for name, period in broken.items())
        raise UnsupportedModelError(
            f"The dropped decoder layers break the pattern of {named} of model type {model_type!r}. {ENGINES} may take "
            "the kind of a layer from its number and would then misread the checkpoint silently. Drop whole periods of "
            "neighbouring layers (`exportable='stock'` lets the search choose them), or write the checkpoint with "
            "`save_pretrained`, for programs that read the field layer by layer."
        )


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


def refuse_gated_request(request: CondensePlan | CondenseConfig) -> None:
    """Refuse a config with gates per token, before anything expensive; a plan has none.

    Raises:
        UnsupportedModelError: naming what to do.
    """
    if isinstance(request, CondenseConfig) and request.gates_tokens:
        refuse_token_gates(None)


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
    FORMS[request.form].sketch(
        sketch, blocks, experts_per_layer(request, layers, blocks), staying_per_layer(request, layers, blocks)
    )
    return sketch
