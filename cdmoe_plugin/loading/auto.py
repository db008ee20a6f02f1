"""The class that opens a sparse checkpoint: that of the published model, or of the text model in a multimodal one."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.utils import logging

from ..blocks import UnsupportedModelError
from ..model.saving import MULTIMODAL

logger = logging.get_logger(__name__)

T = TypeVar("T")

# The names of a text model's weights in a multimodal checkpoint, and in one of its own.
_TEXT_NAMES = {
    # As transformers 5.23 saves kimi_k25, whose vision part alone has "blocks" on disk.
    r"^language_model\.model\.blocks\.": "model.layers.",
    r"^language_model\.(lm_head|backbone)\.": r"\1.",  # "backbone" is nemotron_h's "model"
    r"^(model\.)?language_model\.model\.": "model.",
    r"^model\.language_model\.": "model.",
    r"^lm_head\.": "lm_head.",
    r"^mtp\.": "mtp.",
}


def auto_class(config: PreTrainedConfig, trust_remote_code: bool | None = None) -> Any:
    """Choose the auto class that opens a checkpoint as it was published, by `architectures` in its config.

    Without them, a multimodal model is opened as a whole, and others as causal language models.

    Raises:
        UnsupportedModelError: if no auto class opens a model type for text.
    """
    if trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return AutoModelForCausalLM
    # The truth value of a mapping would import the models of all types.
    mappings = {
        name: auto
        for name, auto in vars(modeling_auto).items()
        if name.startswith("AutoModel") and getattr(auto, "_model_mapping", None) is not None
    }
    found = {name: auto for name, auto in mappings.items() if type(config) in auto._model_mapping}
    published = (config.architectures or [""])[0]
    usual = ("AutoModelForCausalLM", *MULTIMODAL)
    for name in dict.fromkeys([*usual, *found]):
        if name in found and _opened_by(found[name], config) == published:
            return found[name]
    chosen = next((found[name] for name in (*MULTIMODAL, usual[0]) if name in found), None)
    if chosen is None:
        raise UnsupportedModelError(
            f"model type {config.model_type!r} can't be condensed: transformers opens it neither with "
            "AutoModelForCausalLM nor as a multimodal model for text."
        )
    return chosen


def _opened_by(auto: Any, config: PreTrainedConfig) -> str:
    """Return the name of the class with which an auto class opens a model type, without importing it."""
    mapping = auto._model_mapping
    names = getattr(mapping, "_model_mapping", {}).get(config.model_type)
    if names is None:  # registered by its class
        names = mapping[type(config)]
    first = names[0] if isinstance(names, (list, tuple)) else names
    return first if isinstance(first, str) else first.__name__


def text_config(path: str | os.PathLike, whole: PreTrainedConfig) -> Any:
    """Return the config of the text model in a multimodal checkpoint, and say what is left out.

    Args:
        path (`str` or `os.PathLike`): Hub name or folder of the checkpoint.
        whole (`PreTrainedConfig`): Its config.

    Raises:
        ValueError: if the checkpoint is not multimodal.
        UnsupportedModelError: if its architecture has no text model of its own.
    """
    text: Any = copy.deepcopy(whole.get_text_config())
    if type(text) is type(whole):
        raise ValueError(f"`text_only` is for multimodal checkpoints, but {os.fspath(path)!r} is a text model already.")
    if type(text) not in AutoModelForCausalLM._model_mapping:
        raise UnsupportedModelError(
            f"`text_only` does not work for model type {whole.model_type!r}: transformers does not open its text part, "
            f"{text.model_type!r}, as a model of its own. Condense the whole model."
        )
    # That of the whole model decides where it has the head.
    text.tie_word_embeddings = any(getattr(each, "tie_word_embeddings", False) for each in (whole, text))
    text.dtype = text.dtype or whole.dtype
    if getattr(whole, "quantization_config", None) is not None:
        text.quantization_config = whole.quantization_config
    logger.warning_once(
        f"`text_only`: of this multimodal {whole.model_type} checkpoint, only the text model ({text.model_type}) is "
        "condensed and saved. Everything else, such as the vision part, is left out."
    )
    return text


def text_tensors(tensors: Mapping[str, T]) -> dict[str, T]:
    """Select the tensors of the text model in a multimodal checkpoint, under the names of a checkpoint of its own.

    Args:
        tensors (`Mapping[str, T]`): The tensors of the checkpoint by their names on disk.

    Returns:
        `dict[str, T]`: Those of the text model; all of them if transformers converts their names by itself.
    """
    found = {}
    for key, tensor in tensors.items():
        for pattern, own in _TEXT_NAMES.items():
            if re.match(pattern, key):
                found[re.sub(pattern, own, key)] = tensor
                break
    return found if any(key.startswith(("model.", "backbone.")) for key in found) else dict(tensors)
