"""The condensed classes of this package, made on first use. Pickle and the auto classes look for them here."""

from __future__ import annotations

import importlib
from typing import Any

from transformers import PreTrainedConfig

from .modeling_cdmoe import PREFIX, ClassFactory
from .own_code import has_own_code, is_remote
from .saving import CheckpointMixin

_classes = ClassFactory(__name__, CheckpointMixin)


def condensed_config_class(base: type[PreTrainedConfig]) -> Any:
    """Make the config class of condensed models on `base`; see `ClassFactory.config_class`."""
    if is_remote(base):  # transformers does so with one of the two copies of the class that it may make
        base.register_for_auto_class()
    made: Any = _factory(base).config_class(base)
    # With the base's, transformers would copy the file of this class beside the weights, instead of the right ones.
    made._auto_class = None
    return made


def condensed_model_class(base: Any) -> Any:
    """Make the condensed subclass of a model class; see `ClassFactory.model_class`."""
    condensed_config_class(base.config_class)
    return _factory(base.config_class).model_class(base)


def _factory(config_class: type[PreTrainedConfig]) -> ClassFactory:
    # Two checkpoints with code of their own may have classes of the same name: the module is that of the base.
    return ClassFactory(config_class.__module__, CheckpointMixin) if has_own_code(config_class) else _classes


def __getattr__(name: str) -> Any:
    """Make `CDMoE<X>` for a config or model class `<X>` of transformers, or of DeepSeekMoE-16B's architecture."""
    if name.startswith(f"{PREFIX}Deepseek"):
        deepseek = importlib.import_module(".modeling_deepseek", __package__)
        if hasattr(deepseek, name.removeprefix(PREFIX)):  # DeepSeek-V2 and later are transformers' own
            return _classes.by_name(name, deepseek)
    return _classes.by_name(name)
