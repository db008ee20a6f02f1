"""The entries of `--model_args` beside those of lm-eval's `hf`: a plan, a budget, a quantisation."""

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

# These do not use transformers' `from_pretrained`, or load weights that can't be folded.
_NOT_WITH_PLAN = ("autogptq", "gptqmodel", "gguf_file", "tp_plan")
_BITSANDBYTES = frozenset(signature(BitsAndBytesConfig).parameters) - {"kwargs"}
_UNEXPECTED = re.compile(r"__init__\(\) got an unexpected keyword argument '(\w+)'")


def read_plan(plan: Any, num_layers: int | None, num_experts: int | None) -> CondensePlan | None:
    """Read the arguments `plan`, `num_layers` and `num_experts`: a plan, cut to that budget; None without a plan.

    Raises:
        ValueError: if there is a budget but no plan, if the plan is not valid, or if the budget is larger.
        FileNotFoundError: if there is no plan at that path.
    """
    if plan is None:
        given = {"num_layers": num_layers, "num_experts": num_experts}
        for name, value in given.items():
            if value is not None:
                raise ValueError(
                    f"`{name}={value}` needs a plan to cut: add `plan=` with a condense_plan.json or a condensed "
                    "checkpoint's folder, and set `pretrained` to the sparse base model."
                )
        return None
    if isinstance(plan, (str, os.PathLike)):
        if not os.fspath(plan):
            raise ValueError("`plan` is empty: name a condense_plan.json, or leave `plan` out.")
        try:
            plan = CondensePlan.load(plan)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise FileNotFoundError(
                f"`plan={os.fspath(plan)}`: there is no file {error.filename}. `plan` should be a condense_plan.json "
                "or the folder of a condensed checkpoint with such a file."
            ) from error
    elif not isinstance(plan, CondensePlan):
        raise ValueError(f"`plan` should be a path or a CondensePlan, but is {plan!r}.")
    return plan.truncate(num_layers=num_layers, num_experts=num_experts)


def check_with_plan(pretrained: Any, arguments: Mapping[str, Any]) -> None:
    """Check that the other arguments can be combined with a plan.

    Raises:
        ValueError: naming the argument.
    """
    if not isinstance(pretrained, (str, os.PathLike)):
        raise ValueError(
            f"`plan` is for checkpoints, but `pretrained` is a {type(pretrained).__name__}: call "
            "`cdmoe_plugin.apply_plan` on it and leave `plan` out."
        )
    given = [name for name in _NOT_WITH_PLAN if arguments.get(name)]
    if given:
        raise ValueError(
            f"`{given[0]}={arguments[given[0]]}` can't be combined with `plan`: condense and save the model first "
            "(`condense_pretrained`, or `cdmoe condense`), and evaluate the saved checkpoint."
        )


def pop_quantisation(arguments: dict[str, Any]) -> QuantizationConfigMixin | None:
    """Remove `quantization_config`, or `load_in_4bit` and similar ones, from the arguments and return a config.

    transformers 5 takes `quantization_config` only, which lm-eval 0.4.13 can't pass on.

    Raises:
        ValueError: if both are given, or options of a quantisation that is not switched on.
    """
    config = arguments.pop("quantization_config", None)
    details = {name: arguments.pop(name) for name in sorted(_BITSANDBYTES & arguments.keys())}
    if config is not None and details:
        raise ValueError(f"`quantization_config` and `{next(iter(details))}` were both given: use one of them.")
    if details and not (details.get("load_in_4bit") or details.get("load_in_8bit")):
        # `load_in_4bit=False` alone has no effect
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
    """Make an error for an unknown argument, or return None if the error has another cause.

    transformers accepts every field of the model's config as an argument, so unknown arguments are only found there,
    before weights are read.

    Args:
        error (`TypeError`): The error raised by transformers.
        own (`Mapping[str, Any]`): The arguments that only transformers could know.
        known (`Collection[str]`): Names to suggest.
    """
    match = _UNEXPECTED.search(str(error))
    if match is None or match[1] not in own:
        return None
    name = match[1]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean `{close[0]}`?" if close else ""
    return ValueError(
        f"`--model_args` has the unknown argument `{name}={own[name]}`.{hint} Known are `plan`, `num_layers`, "
        "`num_experts`, the arguments of lm-eval's `hf`, those of `from_pretrained`, and fields of the model's config."
    )
