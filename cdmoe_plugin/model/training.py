"""The parameters to train, or the modules for LoRA, so that only the condensed layers are trained."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from .adapters import refuse_adapters
from .layers_cdmoe import CondensedMLP
from .lookup import condensed_layers

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedConfig


def unfreeze_condensed(model: PreTrainedModel, routed: bool = False) -> list[str]:
    """Set `requires_grad` on the condensed layers' MLPs and freeze everything else (CD-MoE, section 4.3).

    transformers' Trainer refuses a model with any quantised layer unless it has adapters. If the condensed layers were
    left out of the quantisation, set `model.is_quantized = False` before making the Trainer.

    Args:
        model (`PreTrainedModel`): The condensed model.
        routed (`bool`, defaults to `False`): Whether to train the experts that stay behind the routers of these layers
            (`num_routed`), and the routers, too.

    Returns:
        `list[str]`: Names of the trainable parameters, as in `model.named_parameters()`.

    Raises:
        ValueError: if the model is not condensed, its condensed layers are quantised, its layers were trimmed, or it
            has adapters: saved as such, it would lose the trained weights.
    """
    refuse_adapters(model)
    experts = _staying_experts(model) if routed else []
    mlps = (condensed_layers(model) if experts else _trainable_layers(model)).values()
    _refuse_quantised_layers(model, mlps)
    trained = {id(p) for p in (*experts, *(p for mlp in mlps for p in mlp.parameters()))}
    names = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(id(parameter) in trained)
        if parameter.requires_grad:
            names.append(name)
    return names


def _staying_experts(model: PreTrainedModel) -> list[nn.Parameter]:
    """List the parameters of experts that stay behind routers, and of these routers."""
    found: list[nn.Parameter] = []
    for spec in (getattr(model.config, "condense_config", None) or {}).get("condensed_layers", {}).values():
        own = dict(model.base_model.get_submodule(spec["module"].rpartition(".")[0]).named_parameters())
        found += [own[name] for name in spec.get("per_expert", {}) if name in own]
    return found


def _trainable_layers(model: PreTrainedModel) -> dict[int, CondensedMLP]:
    mlps = condensed_layers(model)
    if not mlps:
        raise ValueError(
            "The MLPs of the chosen layers were dropped (`trim_layer`), or keep experts and no dense part: there is "
            "nothing to train in them."
        )
    return mlps


def _refuse_quantised_layers(model: PreTrainedModel, mlps: Iterable[nn.Module]) -> None:
    # With `bnb_4bit_quant_storage`, weights in 4 bit may be stored as floating point numbers.
    if any(not p.is_floating_point() or hasattr(p, "quant_state") for mlp in mlps for p in mlp.parameters()):
        names = {id(module): name for name, module in model.named_modules()}
        skipped = [*(names[id(mlp)] for mlp in mlps), "lm_head"]
        raise ValueError(
            "The condensed layers are quantised, and quantised weights can't be trained. Train adapters on them with "
            "`LoraConfig(target_modules=condensed_module_names(model))`, or leave them out when the model is opened: "
            f"`BitsAndBytesConfig(..., llm_int8_skip_modules={skipped})`."
        )


def condensed_module_names(model: PreTrainedModel) -> list[str]:
    """List the condensed layers' projections (three each, two without gates) for `LoraConfig(target_modules=...)`.

    Gates per token are not among them: they are small, and stay as they are or are named in `modules_to_save`.

    Args:
        model (`PreTrainedModel`): The condensed model, or a `PeftModel` around it, for a further adapter.

    Raises:
        ValueError: if the model is not condensed, or its layers were trimmed.
    """
    model = model if isinstance(model, PreTrainedModel) else getattr(model, "get_base_model", lambda: model)()
    names = {id(module): name for name, module in model.named_modules()}
    projections = ("gate_proj", "up_proj", "down_proj")
    mlps = _trainable_layers(model).values()
    return [f"{names[id(mlp)]}.{part}" for mlp in mlps for part in projections if getattr(mlp, part) is not None]


def quantised_around_condensed(quantization_config: BitsAndBytesConfig, config: PreTrainedConfig) -> BitsAndBytesConfig:
    """Exclude a model's condensed layers and its head from quantisation, so that they can be trained.

    Args:
        quantization_config (`BitsAndBytesConfig`): Changed in place and returned.
        config (`PreTrainedConfig`): The config of the condensed checkpoint.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    names = [name for name, module in model.named_modules() if isinstance(module, CondensedMLP)]
    skipped = [*(quantization_config.llm_int8_skip_modules or []), *names, "lm_head"]
    quantization_config.llm_int8_skip_modules = skipped
    return quantization_config
