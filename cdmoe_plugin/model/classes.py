"""The condensed classes of this package, made on first use. Pickle and the auto classes look for them here."""

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
        if hasattr(deepseek, name.removeprefix(PREFIX)):  # DeepSeek-V2 and later are transformers' own
            return _classes.by_name(name, deepseek)
    return _classes.by_name(name)
