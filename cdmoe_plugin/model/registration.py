"""Lazy registration of condensed models, and of DeepSeekMoE-16B's architecture, with transformers' auto classes.

About a hundred architectures can be condensed. Registering a class for each would import every modeling file of
transformers, so a model type is registered when an auto class first looks it up.
"""

from __future__ import annotations

import importlib
from typing import Any

from transformers import AutoConfig
from transformers.models.auto import configuration_auto, modeling_auto

DEEPSEEK = "deepseek"
MODEL_TYPE_PREFIX = "cdmoe_"
_MAPPING = configuration_auto.CONFIG_MAPPING


# transformers can't register a model type whose classes are imported later: `AutoConfig.register` takes a class. So
# the private dict behind it is replaced by one that registers on look-up (tested with transformers 5.15 to 5.24). It
# can go once transformers registers names lazily.
class _OnDemand(dict):
    """The user-registered part of transformers' `CONFIG_MAPPING`, which registers condensed model types on look-up."""

    def __contains__(self, model_type: object) -> bool:
        return super().__contains__(model_type) or is_ours(model_type)

    def __missing__(self, model_type: str) -> Any:
        if not is_ours(model_type):
            raise KeyError(model_type)
        if model_type == DEEPSEEK:
            register_deepseek()
        else:
            register_condensed(model_type.removeprefix(MODEL_TYPE_PREFIX))
        return self[model_type]


def is_ours(model_type: object) -> bool:
    """Return whether a model type is "cdmoe_" and a type of transformers, or "deepseek" if transformers lacks it."""
    if not isinstance(model_type, str):
        return False
    base = model_type.removeprefix(MODEL_TYPE_PREFIX)
    if base == model_type:
        return model_type == DEEPSEEK and DEEPSEEK not in _MAPPING._mapping
    return base in _MAPPING and not base.startswith(MODEL_TYPE_PREFIX)


def register() -> None:
    """Add the model types of this package to `AutoConfig`. Called when this module is imported; safe to call again."""
    if not isinstance(_MAPPING._extra_content, _OnDemand):
        _MAPPING._extra_content = _OnDemand(_MAPPING._extra_content)


def register_deepseek() -> None:
    """Register DeepSeekMoE-16B's own architecture (`model_type` "deepseek") with the auto classes."""
    deepseek = importlib.import_module(".modeling_deepseek", __package__)
    AutoConfig.register(DEEPSEEK, deepseek.DeepseekConfig, exist_ok=True)
    for auto_name, model_class in (
        ("AutoModel", deepseek.DeepseekModel),
        ("AutoModelForCausalLM", deepseek.DeepseekForCausalLM),
        ("AutoModelForSequenceClassification", deepseek.DeepseekForSequenceClassification),
        ("AutoModelForTokenClassification", deepseek.DeepseekForTokenClassification),
    ):
        getattr(modeling_auto, auto_name).register(deepseek.DeepseekConfig, model_class, exist_ok=True)


def register_condensed(base_model_type: str) -> None:
    """Register "cdmoe_<base>" with AutoConfig and with every auto class that opens the base model type."""
    # Not at the top: `import cdmoe_plugin` stays light.
    from .classes import condensed_config_class, condensed_model_class
    from .saving import auto_classes

    base = _MAPPING[base_model_type]
    config_class = condensed_config_class(base)
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    for auto_name, model_class in auto_classes(base).items():
        getattr(modeling_auto, auto_name).register(config_class, condensed_model_class(model_class), exist_ok=True)


register()
