"""The entry point `vllm.general_plugins`, which every process of vLLM runs when it starts.

vLLM computes models that it does not know by transformers' own code ("transformers backend"). It opens the config by
`AutoConfig`, which importing this package prepares, asks the module `transformers` for the class that config.json names
in `architectures`, and makes the model by `AutoModel.from_config`. So the module has to answer for `CDMoE<X>`; it does
so in these processes only. vLLM itself is not imported.
"""

from __future__ import annotations

from typing import Any

import transformers

from ..model.registration import DEEPSEEK, MODEL_TYPE_PREFIX, register, register_condensed


def register_for_vllm() -> None:
    """Let the module `transformers` find condensed classes; cheap, and safe to call again."""
    register()
    # A module's own `__getattr__` (PEP 562) is asked before that of its class, by which transformers imports lazily.
    vars(transformers)["__getattr__"] = _condensed_class


def _condensed_class(name: str) -> Any:
    if not name.startswith("CDMoE"):
        raise AttributeError(name)  # transformers' own look-up is next, and names the module
    from ..model import classes

    found = getattr(classes, name)
    if getattr(found, "config_class", found).model_type == MODEL_TYPE_PREFIX + DEEPSEEK:
        register_condensed(DEEPSEEK)  # an architecture that transformers lacks
    return found
