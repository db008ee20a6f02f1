"""The entry points `vllm.general_plugins` and `sglang.srt.plugins`, which every process of these engines runs first.

vLLM runs models that it does not implement with transformers' code ("transformers backend"). It opens the config with
`AutoConfig`, which importing this package prepares, takes the class named by `architectures` in config.json from the
module `transformers`, and makes the model with `AutoModel.from_config`. That module must therefore have an attribute
`CDMoE<X>`, in these processes only. vLLM itself is not imported. SGLang looks for classes in the same places, according
to its source code; it was not run.
"""

from __future__ import annotations

from typing import Any

import transformers

from ..model.registration import DEEPSEEK, MODEL_TYPE_PREFIX, register, register_condensed


def register_for_vllm() -> None:
    """Make condensed classes available in the module `transformers`. Cheap, and safe to call again."""
    register()
    # A module's own `__getattr__` (PEP 562) comes before that of its class, with which transformers imports lazily.
    vars(transformers)["__getattr__"] = _condensed_class


def _condensed_class(name: str) -> Any:
    if not name.startswith("CDMoE"):
        raise AttributeError(name)  # transformers' own look-up is next
    from ..model import classes

    found = getattr(classes, name)
    if getattr(found, "config_class", found).model_type == MODEL_TYPE_PREFIX + DEEPSEEK:
        register_condensed(DEEPSEEK)  # an architecture that transformers lacks
    return found
