"""Weights of a checkpoint for which the model has no place, such as its layers for multi-token prediction.

transformers does not load them. They are carried over on request, and otherwise the config must not promise them:
servers look for these layers when they are asked for speculative decoding.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

logger = logging.get_logger(__name__)
# num_nextn_predict_layers (DeepSeek, GLM), mtp_num_hidden_layers (Qwen), num_mtp_layers (transformers), mtp_num_layers,
# num_mtp_modules and mtp_transformer_layers (MiniMax), use_mtp; not factors of losses, nor types of layers.
_COUNT = re.compile(r"(?=.*(mtp|nextn))(num_|.*_num_|.*_layers$|.*_modules$|use_)")
_EXTRA = "_extra_weights"


def extra_weights(model: PreTrainedModel) -> dict[str, Any]:
    """Return the weights that a model carries for its checkpoint alone, by their names there."""
    return vars(model).get(_EXTRA, {})


def carry(model: PreTrainedModel, weights: Mapping[str, Any]) -> None:
    """Let a model carry weights that `save_pretrained` writes beside its own.

    Args:
        model (`PreTrainedModel`): The model.
        weights (`Mapping`): Tensors by their names on disk, or what has a `shape` and a `torch_dtype` and is a tensor
            when indexed with `...`.
    """
    vars(model)[_EXTRA] = dict(weights)


def declared_layers(config: Any) -> list[tuple[Any, str, Any]]:
    """List where a config promises layers for multi-token prediction: the object or dict, the field, the value."""
    found = []
    values = vars(config) if isinstance(config, PreTrainedConfig) else config
    for name, value in values.items():
        if isinstance(value, (PreTrainedConfig, dict)):
            found += declared_layers(value)
        elif isinstance(name, str) and isinstance(value, int) and value and _COUNT.match(name):
            found.append((config, name, value))
    return found


def withdraw_layers(model: PreTrainedModel) -> list[tuple[Any, str, Any]]:
    """Declare no layers for multi-token prediction in the config of a model that does not carry them.

    Returns:
        What was declared, as `declared_layers` returns it.
    """
    if _carries_prediction(model):
        return []
    declared = declared_layers(model.config)
    for holder, name, value in declared:
        _set(holder, name, type(value)(0))
    return declared


def settle_layers(model: PreTrainedModel) -> None:
    """Withdraw layers for multi-token prediction that a model does not carry, and say so."""
    names = sorted({name for _, name, _ in withdraw_layers(model)})
    if names:
        logger.warning(
            f"The layers for multi-token prediction are left out, and `{'`, `'.join(names)}` set to 0 in the config. "
            "`keep_extra` carries them over from the checkpoint."
        )


@contextmanager
def layers_withdrawn(model: PreTrainedModel) -> Iterator[None]:
    """Declare none of the layers that a model does not carry while it is saved."""
    declared = withdraw_layers(model)
    try:
        yield
    finally:
        for holder, name, value in declared:
            _set(holder, name, value)


def _set(holder: Any, name: str, value: Any) -> None:
    if isinstance(holder, dict):
        holder[name] = value
    else:
        setattr(holder, name, value)


def _carries_prediction(model: PreTrainedModel) -> bool:
    """Return whether extra weights are of such layers: they have a name of their own, or follow the last layer."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    return any(
        re.search("mtp|nextn", key) or any(int(number) >= count for number in re.findall(r"layers\.(\d+)\.", key))
        for key in extra_weights(model)
    )
