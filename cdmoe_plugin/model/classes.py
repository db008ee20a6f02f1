"""The condensed classes of this package, made on first use; pickle and the auto classes find them in this module."""

from __future__ import annotations

import importlib
from typing import Any

from .modeling_cdmoe import PREFIX, ClassFactory
from .saving import CheckpointMixin

_classes = ClassFactory(__name__, CheckpointMixin)
condensed_config_class = _classes.config_class
condensed_model_class = _classes.model_class


def __getattr__(name: str) -> Any:
    """Make `CDMoE<X>` for a config or model class `<X>` of transformers, or of DeepSeekMoE-16B's architecture."""
    if name.startswith(f"{PREFIX}Deepseek"):
        deepseek = importlib.import_module(".modeling_deepseek", __package__)
        base = getattr(deepseek, name.removeprefix(PREFIX), None)
        if base is not None:
            return condensed_config_class(base) if name.endswith("Config") else condensed_model_class(base)
    return _classes.by_name(name)
