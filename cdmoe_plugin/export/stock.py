"""Export of a condensed model to a checkpoint of its base architecture, which opens without this package."""

from __future__ import annotations

import os
from typing import Any

from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ..autocast import without_autocast
from ..config import CondenseConfig
from ..model.lookup import has_mixed_layers
from ..model.modeling_cdmoe import CondensedModelMixin
from ..registry import EXPORT_TARGETS, ExportTarget
from .build import GateData, write_plain
from .check import check_export, refuse_broken_patterns
from .checkpoint import ExportReport, check_model, write_checkpoint
from .fewer_experts import stock_form_of
from .readers import warn_of_other_readers

# The name that `ExportReport` had when there was one target.
StockExport = ExportReport


@without_autocast
def export_stock(
    model: PreTrainedModel,
    folder: str | os.PathLike,
    approximate: bool = False,
    *,
    config: CondenseConfig | None = None,
    calibration: Any = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_shard_size: int | str = "5GB",
) -> ExportReport:
    """Write a model as a checkpoint of its base architecture, in which condensed layers are plain dense ones.

    If all sparse layers keep the same number of experts behind their routers, with as many dense neurons beside them,
    the config has that number instead, and a wider shared expert.

    transformers opens the checkpoint without this package, and so do other programs that read the same config fields.
    All dense layers of an architecture share one width there; narrower ones, and trimmed ones, are padded with neurons
    of weight zero, which changes only the order of rounding. A model with trimmed blocks has its base architecture
    already and is written unchanged. The model card names the base model and its license.

    Args:
        model (`PreTrainedModel`): A condensed or trimmed model in memory, on one device. It is not changed.
        folder (`str` or `os.PathLike`): Output folder, which must not have a condensed checkpoint in it. It is
            unchanged if the export is refused or fails.
        approximate (`bool`, defaults to `False`): Whether the per-token gate of a shared expert (Qwen1.5-MoE), which a
            dense layer does not have, may be replaced by its mean over the calibration tokens. The error is measured,
            logged and returned.
        config (`CondenseConfig`, *optional*): Number and length of the samples, batch size and seed; used for such
            gates only.
        calibration (*optional*): As in `search_plan`; used for such gates only.
        tokenizer (*optional*): As in `search_plan`; used for such gates only.
        max_shard_size (`int` or `str`, defaults to `"5GB"`): As in `save_pretrained`.

    Returns:
        `ExportReport`: The description of the checkpoint.

    Raises:
        UnsupportedModelError: if a config of the base architecture can't mark exactly these layers as dense, if the
            architecture's dense layers compute something else, or if the layers left after block trimming have another
            pattern than the whole model's. The message names the field, the layers and what to do.
        ValueError: if the model can't be exported in the form in which it is loaded, if an exact export is not
            possible without `approximate`, or if the folder has a condensed checkpoint in it.
    """
    check_model(model, folder)
    if not isinstance(model, CondensedModelMixin):
        refuse_broken_patterns(getattr(model, "broken_patterns", None) or {}, model.config.model_type)
        count = model.num_parameters()
        written = ExportReport(model.config.model_type, parameters=count, parameters_before=count)
        write_checkpoint(model, model, written, folder, max_shard_size)
        return written
    described = stock_form_of(model)
    data = GateData(approximate, config, calibration, tokenizer)
    written = write_plain(model, folder, type(model)._base_class, described, data, max_shard_size)
    if not has_mixed_layers(model):  # others mark no layer as dense
        warn_of_other_readers(described)
    return written


EXPORT_TARGETS.register(
    "stock", "a checkpoint of the base architecture, in which condensed layers are plain dense ones"
)(ExportTarget(check_export, export_stock))
