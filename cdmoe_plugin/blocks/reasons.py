"""The reasons why other sparse layers can't be condensed, found from their modules."""

from __future__ import annotations

import re
from collections.abc import Sequence
from inspect import signature
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .weights import has_stacked_weights

# Config fields with the number of experts.
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def arguments_of(module: nn.Module) -> list[str]:
    """Return the names of the arguments of a module's `forward`."""
    return list(signature(type(module).forward).parameters)[1:]


def why_no_block(model: PreTrainedModel, experts_name: str) -> str:
    """Explain why experts are not in a block of their own, a child of a decoder layer."""
    base: nn.Module = model.base_model
    in_layer = re.match(r"(?P<block>.*?\.\d+\.[^.]+)\.", experts_name)
    if in_layer is None:
        return "its experts are not in a block of their own, a child of a decoder layer"
    block = base.get_submodule(in_layer["block"])
    sets = [name for name, module in block.named_modules() if has_stacked_weights(module)]
    types = [name for name in arguments_of(block) if "token_type" in name]
    if len(sets) > 1 and types:
        return f"its block has several sets of experts ({', '.join(sets)}), and `{types[0]}` chooses one for each token"
    return "its experts are not in a block of their own, a child of a decoder layer"


def why_weighted(experts: nn.Module) -> str | None:
    """Explain why stacked experts are not routed experts; return None if they are."""
    arguments = arguments_of(experts)
    if len(arguments) != 2:
        return None
    return f"its shared experts are weighted per token by the router (`{arguments[1]}`)"


def why_shared(model: PreTrainedModel, experts: Sequence[nn.Module]) -> str | None:
    """Explain in a whole sentence that a second decoder has the same experts; return None if there is none."""
    ours = {id(module) for each in experts for module in each.modules()}
    weights = {id(weight) for each in experts for weight in each.parameters()}
    for name, module in model.named_modules():
        if id(module) not in ours and any(id(weight) in weights for weight in module.parameters(recurse=False)):
            return (
                f"model type {model.config.model_type!r} can't be condensed: its experts belong to a second decoder, "
                f"too ({name}), which would not be condensed."
            )
    return None


def why_none(model: PreTrainedModel) -> str:
    """Explain in a whole sentence why a model has no sparse block."""
    config: Any = model.config.get_text_config()
    who = f"model type {model.config.model_type!r} ({type(model).__name__})"
    counts = {name: getattr(config, name) for name in _EXPERT_COUNTS if getattr(config, name, None)}
    if not counts:
        return f"{who} is dense: there is no sparse layer with routed experts to condense."
    for module in model.modules():
        tables = [n for n, child in module.named_children() if _is_table(child, set(counts.values()))]
        if len(tables) > 1:
            return (
                f"{who} can't be condensed: the experts of {type(module).__name__} are not MLPs but single neurons, "
                f"looked up in tables ({', '.join(tables)})."
            )
    return (
        f"{who} has experts ({counts}), but not as stacked weights in a block of their own: this form of sparse layer "
        "is not supported."
    )


def _is_table(module: nn.Module, sizes: set[int]) -> bool:
    return isinstance(module, nn.Embedding) and module.num_embeddings in sizes
