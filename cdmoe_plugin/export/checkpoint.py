"""The parts that all export targets share: the check of the model, the files, and the report on them."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..atomic import replacing_files
from ..blocks import UnsupportedModelError
from ..cards.card import is_someones_card, write_stock_card
from ..model.adapters import refuse_adapters, refuse_left_adapter
from ..model.lookup import condensed_layers
from ..model.modeling_cdmoe import CondensedModelMixin
from ..model.saving import MODELING_FILE
from ..offload import is_offloaded, refuse_replacing
from .spellings import write_older_spellings

_WEIGHT_FILES = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


@dataclass(frozen=True)
class ExportReport:
    """The description of an exported checkpoint.

    Args:
        model_type (`str`): Model type of the checkpoint.
        fields (`dict[str, Any]`): Fields of the checkpoint's config that differ from the sparse model's.
        dense_width (`int`, *optional*): Width of all dense MLPs; None if no layer was condensed.
        parameters (`int`): Parameters of the checkpoint, including zeros that pad narrower layers.
        parameters_before (`int`): Parameters of the condensed model.
        shared_gates (`dict[int, float]`): The constants that replace per-token gates of shared experts, by decoder
            layer; empty if the checkpoint is exact.
        divergence (`float`, *optional*): Jensen-Shannon divergence between the outputs of the condensed model and of
            the checkpoint, mean over the calibration tokens, in nats; None if the checkpoint is exact.
    """

    model_type: str
    fields: dict[str, Any] = field(default_factory=dict)
    dense_width: int | None = None
    parameters: int = 0
    parameters_before: int = 0
    shared_gates: dict[int, float] = field(default_factory=dict)
    divergence: float | None = None


def write_checkpoint(
    model: PreTrainedModel,
    exported: PreTrainedModel,
    written: ExportReport,
    folder: str | os.PathLike,
    max_shard_size: int | str,
) -> None:
    """Write an exported model with its model card: all files at once, or none.

    Args:
        model (`PreTrainedModel`): The condensed or trimmed model.
        exported (`PreTrainedModel`): The model to write.
        written (`ExportReport`): Its description.
        folder (`str` or `os.PathLike`): Output folder.
        max_shard_size (`int` or `str`): As in `save_pretrained`.
    """
    with replacing_files(folder, _WEIGHT_FILES, keep=is_someones_card) as staging:
        exported.save_pretrained(staging, max_shard_size=max_shard_size)
        write_older_spellings(Path(staging), exported.config)
        write_stock_card(
            model,
            staging,
            model_type=written.model_type,
            parameters=written.parameters,
            fields=written.fields,
            dense_width=written.dense_width,
            shared_gates=written.shared_gates,
            divergence=written.divergence,
        )


def refuse_token_gates(layers: Sequence[int] | None) -> None:
    """Refuse to export layers with gates per token for their routed experts.

    Args:
        layers (`Sequence[int]`, *optional*): The decoder layers with such gates; None for all that will be condensed.

    Raises:
        UnsupportedModelError: naming the layers and what to do.
    """
    if layers is None or layers:
        which = "Condensed layers" if layers is None else f"The decoder layers {list(layers)}"
        raise UnsupportedModelError(
            f"{which} with `gates='sigmoid'` scale each routed expert by a gate per token, for which no other "
            "architecture has a place: condense with `gates='mean'`, or use the condensed checkpoint."
        )


def check_model(model: PreTrainedModel, folder: str | os.PathLike) -> None:
    """Check that a model can be exported in the form in which it is loaded, and to this folder.

    Raises:
        UnsupportedModelError: if layers have gates per token for their routed experts.
        ValueError: naming the reason and what to do.
    """
    refuse_adapters(model)
    refuse_left_adapter(folder)
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"`model` should be a loaded PreTrainedModel, but is a {type(model).__name__}. If it wraps a model (PEFT, "
            "DDP), pass the model inside, with its adapters merged."
        )
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            "The model is quantised: export it without quantisation, and quantise the exported checkpoint on loading."
        )
    devices = {parameter.device for parameter in model.parameters()}
    if isinstance(model, CondensedModelMixin) and (is_offloaded(model) or len(devices) > 1):
        raise ValueError(
            f"The model's weights are on {sorted(map(str, devices))}: load it on one device, such as "
            "`device_map='cpu'`."
        )
    if isinstance(model, CondensedModelMixin):
        refuse_token_gates([layer for layer, mlp in condensed_layers(model).items() if mlp.gated_neurons])
    refuse_replacing(model, folder, _WEIGHT_FILES)
    for name in (MODELING_FILE, "condense_plan.json"):
        if (Path(folder) / name).exists():
            raise ValueError(f"`folder` {folder} has a {name}: it is a condensed checkpoint. Choose another folder.")
