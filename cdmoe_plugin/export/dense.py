"""Export of a fully condensed model to its dense sibling, a plain architecture that most engines read."""

from __future__ import annotations

import os
from typing import Any

from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ..autocast import without_autocast
from ..blocks.weights import UnsupportedModelError
from ..config import CondenseConfig
from ..model.lookup import condensed_layers
from ..model.modeling_cdmoe import CondensedModelMixin
from ..plan import CondensePlan
from ..registry import EXPORT_TARGETS, ExportTarget
from .build import GateData, write_plain
from .check import refuse_gates, sketch_fully
from .checkpoint import ExportReport, check_model
from .compare import OtherFunctionError, check_dense_sibling
from .siblings import ADVICE, siblings_of


@without_autocast
def export_dense(
    model: PreTrainedModel,
    folder: str | os.PathLike,
    approximate: bool = False,
    *,
    config: CondenseConfig | None = None,
    calibration: Any = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_shard_size: int | str = "5GB",
) -> ExportReport:
    """Write a fully condensed model as a checkpoint of a dense architecture (llama, mistral, qwen3, ...).

    With all sparse layers condensed, many architectures compute the same as a dense one with the same weights. It is
    found by building dense architectures with the model's sizes and comparing the weights, and the logits before
    anything is written. All MLPs get the width of the widest; narrower ones are padded with zeros, which changes only
    the order of rounding. With equal widths the logits are the same.

    Args:
        model (`PreTrainedModel`): A condensed model in memory, on one device. It is not changed.
        folder (`str` or `os.PathLike`): Output folder, which must not have a condensed checkpoint in it. It is
            unchanged if the export is refused or fails.
        approximate (`bool`, defaults to `False`): As in `export_stock`: whether the per-token gate of a shared expert
            (Qwen1.5-MoE) may be replaced by its mean over the calibration tokens.
        config (`CondenseConfig`, *optional*): As in `export_stock`.
        calibration (*optional*): As in `export_stock`.
        tokenizer (*optional*): As in `export_stock`.
        max_shard_size (`int` or `str`, defaults to `"5GB"`): As in `save_pretrained`.

    Returns:
        `ExportReport`: The description of the checkpoint.

    Raises:
        UnsupportedModelError: if layers are sparse still, or if no dense architecture computes the same. The message
            names the layers, or the nearest architecture and the difference.
        ValueError: if the model is not condensed or can't be exported in the form in which it is loaded, if it has
            per-token gates and `approximate` is not set, or if the folder has a condensed checkpoint in it.
    """
    check_model(model, folder)
    if not isinstance(model, CondensedModelMixin):
        raise ValueError(f"The model, a {type(model).__name__}, is not condensed: only condensed models have siblings.")
    if not approximate:
        gated = [layer for layer, mlp in condensed_layers(model).items() if mlp.shared_expert_gate is not None]
        refuse_gates(gated, type(model)._base_class.config_class.model_type)
    data = GateData(approximate, config, calibration, tokenizer)
    reasons = []
    for sibling in siblings_of(model):
        try:
            return write_plain(
                model, folder, sibling.model_class, sibling.described, data, max_shard_size, check_dense_sibling
            )
        except OtherFunctionError as error:
            reasons.append(str(error))
    raise UnsupportedModelError(f"The model has no dense sibling: {'; '.join(reasons)}. {ADVICE}")


def check_dense(
    model_name_or_path: str | os.PathLike,
    request: CondensePlan | CondenseConfig,
    approximate: bool = False,
    **hub: Any,
) -> None:
    """Check that the result of a plan or a search can be exported by `export_dense`; see `check_export`.

    Raises:
        UnsupportedModelError: naming the layers that would be sparse still, or the difference to the nearest dense
            architecture.
        ValueError: if the request does not fit the model.
    """
    sketch = sketch_fully(model_name_or_path, request, approximate, hub)
    next(siblings_of(sketch))


EXPORT_TARGETS.register(
    "dense", "a dense architecture with the same weights, such as llama or qwen3, if all sparse layers are condensed"
)(ExportTarget(check_dense, export_dense))
