"""Export of partly condensed models for llama.cpp, whose converter knows dense layers only as the first ones."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from ..blocks import UnsupportedModelError
from ..config import CondenseConfig
from ..loading.load import sketch_model
from ..model.lookup import condensed_layers
from ..plan import CondensePlan
from ..registry import EXPORT_TARGETS, ExportTarget
from ..shapes import ModelShape
from .check import check_export
from .checkpoint import ExportReport, check_model
from .stock import export_stock

# Model types whose stock exports with dense first layers were converted and run (tests/system/test_llama_cpp.py), and
# those whose converter writes the number of dense first layers according to its source code.
TESTED = frozenset({"deepseek", "deepseek_v2", "deepseek_v3", "glm4_moe", "lfm2_moe"})
BY_SOURCE = frozenset({"afmoe", "dots1", "ernie4_5_moe", "exaone_moe", "glm4_moe_lite", "laguna"})
ARCHITECTURES = TESTED | BY_SOURCE


def check_gguf(
    model_name_or_path: str | os.PathLike,
    request: CondensePlan | CondenseConfig,
    approximate: bool = False,
    **hub: Any,
) -> None:
    """Check that the result of a plan or a search can be exported by `export_gguf`; see `check_export`.

    Raises:
        UnsupportedModelError: naming the architecture, or the layers and what to do.
        ValueError: if the request does not fit the model.
    """
    check_export(model_name_or_path, request, approximate, **hub)
    sketch, blocks = sketch_model(model_name_or_path, hub)
    sparse = [block.layer for block in blocks]
    if isinstance(request, CondensePlan):
        layers: Sequence[int] = [row.layer for row in request.layers]
    elif request.layers is None and request.exportable != "gguf" and request.num_layers < len(sparse):
        raise UnsupportedModelError("The search may choose other layers than the first ones: set `exportable='gguf'`.")
    else:
        layers = request.layers or sparse[: request.num_layers]
    check_first_layers(sketch.config.model_type, sparse, layers)


def check_first_layers(model_type: str, sparse: Sequence[int], layers: Sequence[int]) -> None:
    """Check that llama.cpp's converter reads a model whose condensed layers are these.

    Args:
        model_type (`str`): The base architecture.
        sparse (`Sequence[int]`): All of its sparse layers.
        layers (`Sequence[int]`): The condensed ones.

    Raises:
        UnsupportedModelError: naming the architecture, or the layers and what to do.
    """
    if model_type not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"llama.cpp's converter does not read partly condensed models of type {model_type!r}, only those of "
            f"{', '.join(sorted(ARCHITECTURES))}. Condense all layers and export to 'dense' or 'top_k'."
        )
    first = sorted(sparse)[: len(layers)]
    if sorted(layers) != first:
        raise UnsupportedModelError(
            f"llama.cpp knows dense layers only as the first ones, {first}, but the condensed layers are "
            f"{sorted(layers)}. `exportable='gguf'` lets the search choose them."
        )


def export_gguf(
    model: PreTrainedModel, folder: str | os.PathLike, approximate: bool = False, **options: Any
) -> ExportReport:
    """Write a checkpoint as `export_stock`, if llama.cpp's `convert_hf_to_gguf.py` reads it.

    Args:
        model (`PreTrainedModel`): As in `export_stock`.
        folder (`str` or `os.PathLike`): As in `export_stock`.
        approximate (`bool`, defaults to `False`): As in `export_stock`.
        **options: Further arguments of `export_stock`.

    Returns:
        `ExportReport`: The description of the checkpoint.

    Raises:
        UnsupportedModelError: as `export_stock`, and if condensed layers are not the first ones.
        ValueError: as `export_stock`, and if the model is not condensed.
    """
    check_model(model, folder)
    condensed = getattr(model.config, "condense_config", None)
    if condensed is None:
        raise ValueError(f"The model, a {type(model).__name__}, is not condensed.")
    shape = ModelShape.from_dict(condensed["plan"]["model"])
    sparse = [layer.layer for layer in shape.sparse_layers]
    base: Any = type(model)
    check_first_layers(base._base_class.config_class.model_type, sparse, list(condensed_layers(model)))
    return export_stock(model, folder, approximate, **options)


EXPORT_TARGETS.register(
    "gguf", "a stock checkpoint that llama.cpp's converter reads, if the first sparse layers are condensed"
)(ExportTarget(check_gguf, export_gguf))
