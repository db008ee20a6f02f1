"""What `--model_args` may hold beside the arguments of lm-eval's `hf`: a plan, a budget, a quantisation."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection, Mapping
from inspect import signature
from typing import Any

from transformers import BitsAndBytesConfig
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..plan import CondensePlan

# These open a checkpoint by other means than transformers' `from_pretrained`, or in a form that can't be folded.
_NOT_WITH_PLAN = ("autogptq", "gptqmodel", "gguf_file", "tp_plan")
_BITSANDBYTES = frozenset(signature(BitsAndBytesConfig).parameters) - {"kwargs"}
_UNEXPECTED = re.compile(r"__init__\(\) got an unexpected keyword argument '(\w+)'")


def read_plan(plan: Any, num_layers: int | None, num_experts: int | None) -> CondensePlan | None:
    """The plan of the arguments `plan`, `num_layers` and `num_experts`, cut to that budget; None without one.

    Raises:
        ValueError: if there is a budget but no plan, if the plan is none, or if it holds less than the budget.
        FileNotFoundError: if there is no plan at that path.
    """
    if plan is None:
        given = {"num_layers": num_layers, "num_experts": num_experts}
        for name, value in given.items():
            if value is not None:
                raise ValueError(
                    f"`{name}={value}` needs a plan to cut: add `plan=` with a condense_plan.json or a condensed "
                    "checkpoint's folder, and let `pretrained` be the sparse base model."
                )
        return None
    if isinstance(plan, (str, os.PathLike)):
        if not os.fspath(plan):
            raise ValueError("`plan` is empty: name a condense_plan.json, or leave it out.")
        try:
            plan = CondensePlan.load(plan)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise FileNotFoundError(
                f"`plan={os.fspath(plan)}`: there is no file {error.filename}. `plan` should be a condense_plan.json "
                "or the folder of a condensed checkpoint, which holds one."
            ) from error
    elif not isinstance(plan, CondensePlan):
        raise ValueError(f"`plan` should be a path or a CondensePlan, but is {plan!r}.")
    return plan.truncate(num_layers=num_layers, num_experts=num_experts)


def check_with_plan(pretrained: Any, arguments: Mapping[str, Any]) -> None:
    """Refuses what does not go with a plan.

    Raises:
        ValueError: naming the argument.
    """
    if not isinstance(pretrained, (str, os.PathLike)):
        raise ValueError(
            f"`plan` is for checkpoints, but `pretrained` is a {type(pretrained).__name__}: call "
            "`cdmoe_plugin.apply_plan` on it, and leave `plan` out."
        )
    given = [name for name in _NOT_WITH_PLAN if arguments.get(name)]
    if given:
        raise ValueError(
            f"`{given[0]}={arguments[given[0]]}` does not go with `plan`: condense and save first "
            "(`condense_pretrained`, or recipes/condense.py), and evaluate the saved checkpoint."
        )


def pop_quantisation(arguments: dict[str, Any]) -> QuantizationConfigMixin | None:
    """Takes `quantization_config`, or `load_in_4bit` and its kind, out of the arguments, as a config.

    transformers 5 knows `quantization_config` alone, and lm-eval 0.4.13 can't pass that on.

    Raises:
        ValueError: if both are given, or details of a quantisation that is not asked for.
    """
    config = arguments.pop("quantization_config", None)
    details = {name: arguments.pop(name) for name in sorted(_BITSANDBYTES & arguments.keys())}
    if config is not None and details:
        raise ValueError(f"`quantization_config` and `{next(iter(details))}` were both given: say it in one of them.")
    if details and not (details.get("load_in_4bit") or details.get("load_in_8bit")):
        # `load_in_4bit=False` alone asks for nothing
        names = [name for name, value in details.items() if value not in (None, False)]
        if names:
            raise ValueError(f"`{names[0]}` does nothing without `load_in_4bit=True` or `load_in_8bit=True`.")
        return None
    if details:
        return BitsAndBytesConfig(**details)
    if isinstance(config, Mapping):
        return AutoQuantizationConfig.from_dict(dict(config))
    return config


def explain_unexpected(error: TypeError, own: Mapping[str, Any], known: Collection[str]) -> ValueError | None:
    """What to tell about an argument that nobody knew, if that is what went wrong.

    transformers takes any argument that is a field of the model's config as one, so only it can tell, and does before
    it reads weights.

    Args:
        error (`TypeError`): What transformers raised.
        own (`Mapping[str, Any]`): The arguments that it was given for want of anybody else.
        known (`Collection[str]`): Names that may have been meant.
    """
    match = _UNEXPECTED.search(str(error))
    if match is None or match[1] not in own:
        return None
    name = match[1]
    close = difflib.get_close_matches(name, known, n=1)
    meant = f" Was `{close[0]}` meant?" if close else ""
    return ValueError(
        f"`--model_args` has the unknown argument `{name}={own[name]}`.{meant} Known are `plan`, `num_layers`, "
        "`num_experts`, the arguments of lm-eval's `hf`, those of `from_pretrained`, and fields of the model's config."
    )
