"""The refusal of condense adapters beside other methods of PEFT in one model."""

from __future__ import annotations

from typing import Any

from peft import PeftModel, mixed_model

from .config import CondenseAdapterConfig, add_peft_type

ORDER = (
    "Condense adapters can't be combined with other methods of PEFT in one model. Merge the condense adapter first, "
    "`model = peft_model.merge_and_unload()`, and put the other adapter on the condensed model "
    "(`LoraConfig(target_modules=condensed_module_names(model))`)."
)


def explain_refusals() -> None:
    """Let PEFT say in which order to use both, where it would only say that it can't mix them.

    Its list of methods for `mixed=True` is closed.
    """
    add: Any = PeftModel.add_adapter
    check: Any = mixed_model._check_config_compatible
    condense = add_peft_type()

    def add_adapter(self: Any, adapter_name: str, peft_config: Any, *args: Any, **kwargs: Any) -> Any:
        types = {self.peft_type, peft_config.peft_type}
        if len(types) > 1 and condense in types:
            raise ValueError(ORDER)
        return add(self, adapter_name, peft_config, *args, **kwargs)

    def check_config_compatible(peft_config: Any) -> None:
        if isinstance(peft_config, CondenseAdapterConfig):
            raise ValueError(ORDER)
        check(peft_config)

    add_adapter.__doc__ = add.__doc__
    PeftModel.add_adapter = add_adapter  # type: ignore[method-assign]
    mixed_model._check_config_compatible = check_config_compatible
