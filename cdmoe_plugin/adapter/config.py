"""The configuration of a condense adapter."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner

from ..plan import CondensePlan

NAME = "cdmoe"
PREFIX = "cdmoe_"
_README = """

## How to load

This is a condense adapter (CD-MoE, arXiv 2412.00069), a method that the package `cdmoe_plugin` adds to PEFT. Without
`import cdmoe_plugin`, PEFT stops with `KeyError: 'CDMOE'`.

```python
import cdmoe_plugin
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("...")  # the name or folder of this adapter
```
"""


def add_peft_type() -> PeftType:
    """Add this method to the enum `PeftType`, if it is not there, and return the member.

    `register_peft_method` refuses names outside of that enum, and PEFT has no function that adds one.
    """
    value = NAME.upper()
    if value not in PeftType.__members__:
        member = str.__new__(PeftType, value)
        member._name_ = member._value_ = value
        type.__setattr__(PeftType, value, member)  # since Python 3.12, members are attributes of the class
        PeftType._member_map_[value] = PeftType._value2member_map_[value] = member
        PeftType._member_names_.append(value)
    return PeftType(value)


@dataclass
class CondenseAdapterConfig(PeftConfig):
    """The configuration of an adapter that condenses sparse layers of a Mixture-of-Experts model (CD-MoE).

    `get_peft_model(base, CondenseAdapterConfig(plan=plan))` gives each layer of the plan a condensed MLP beside its
    sparse block, folded as by `apply_plan`. For a smaller budget, use `plan.truncate`.

    Args:
        plan (`CondensePlan`, `dict`, `str` or `os.PathLike`): The layers to condense. A path may be that of a plan, a
            condensed checkpoint or a saved adapter. Kept as a `dict`.
        modules_to_save (`list[str]`, *optional*): Names of other modules to train and save with the condensed MLPs.
        layers (`dict`, *optional*): The sizes of the condensed MLPs. Written by the adapter: a config that has them is
            that of a saved adapter, whose weights are loaded and not folded.
        target_modules (`str`, *optional*): Written by the adapter from the plan.
        refit (`dict`, *optional*): Written by `CondenseModel.refit`: the method and the errors of its fits.
        requires (`str`): What is needed to load a saved adapter.

    Raises:
        ValueError: if the plan is missing or not valid, trims layers, or keeps experts behind their router.
        ImportError: if PEFT is too old.
    """

    plan: Any = field(default=None, metadata={"help": "A CondensePlan, its dict, or a path to one."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Other modules to train and save."})
    layers: dict[str, Any] | None = field(default=None, metadata={"help": "Sizes of the MLPs, from the adapter."})
    target_modules: str | None = field(default=None, metadata={"help": "Names of the blocks, from the adapter."})
    refit: dict[str, Any] | None = field(default=None, metadata={"help": "The refit of the MLPs, from the adapter."})
    requires: str = field(default="cdmoe_plugin: import it before loading", metadata={"help": "The package needed."})

    def __post_init__(self) -> None:
        if not hasattr(BaseTuner, "_remove_adapter_name_from_key"):
            raise ImportError(f"Condense adapters need peft 0.21 or later, but peft is {peft.__version__}.")
        super().__post_init__()
        self.peft_type = add_peft_type()
        if self.plan is None:
            raise ValueError("`plan` is missing: pass the result of `cdmoe_plugin.search_plan`, or its file.")
        if isinstance(self.plan, dict):
            plan = CondensePlan.from_dict(self.plan)
        else:
            plan = self.plan if isinstance(self.plan, CondensePlan) else CondensePlan.load(self.plan)
        if plan.form != "condense":
            raise ValueError(f"The plan's `form` is {plan.form!r}: use `apply_plan`. An adapter holds condensed MLPs.")
        mixed = [layer.layer for layer in plan.layers if layer.routed]
        if mixed:
            raise ValueError(
                f"The plan keeps experts behind the router in decoder layers {mixed}: use `apply_plan`. An "
                "adapter holds condensed MLPs, and none of the base model's experts."
            )
        self.plan = plan.to_dict()
        self._is_saved = self.layers is not None

    @property
    def condense_plan(self) -> CondensePlan:
        """The plan as a `CondensePlan`."""
        return CondensePlan.from_dict(self.plan)

    @property
    def is_saved(self) -> bool:
        """Whether the config was read from a saved adapter, so that weights are loaded and not folded."""
        return self._is_saved

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save the config, and add to a README.md beside it how to load the adapter."""
        super().save_pretrained(os.fspath(save_directory), **kwargs)
        readme = Path(save_directory, "README.md")
        text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
        if "import cdmoe_plugin" not in text:
            readme.write_text((text + _README).lstrip(), encoding="utf-8")
