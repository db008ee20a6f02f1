"""What every process of vLLM runs when it starts, by the entry point `vllm.general_plugins`.

vLLM computes models that it does not know by transformers' own code ("transformers backend"). It opens the config by
`AutoConfig`, which importing this package settles, asks the module `transformers` for the class that config.json names
in `architectures`, and makes the model by `AutoModel.from_config`. So `transformers.CDMoE<X>` has to exist; here it
does, and only in these processes, made when it is asked for. vLLM itself is not imported.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import transformers

from .registration import DEEPSEEK, MODEL_TYPE_PREFIX, register, register_condensed

_PREFIX = "CDMoE"


def register_for_vllm() -> None:
    """Makes condensed classes attributes of the module `transformers`; cheap, and safe to call again."""
    register()
    module = sys.modules[transformers.__name__]
    if not isinstance(module, _KnowsCondensed):
        kind = type(module)
        module.__class__ = type(kind.__name__, (_KnowsCondensed, kind), {"__module__": kind.__module__})


class _KnowsCondensed(ModuleType):
    """Put before the class of the module `transformers`, whose names are looked up there when first used."""

    def __getattr__(self, name: str) -> Any:
        if not name.startswith(_PREFIX):
            return super().__getattr__(name)
        from . import modeling_cdmoe

        found = getattr(modeling_cdmoe, name)
        if getattr(found, "config_class", found).model_type == MODEL_TYPE_PREFIX + DEEPSEEK:
            register_condensed(DEEPSEEK)  # an architecture that transformers lacks
        return found
