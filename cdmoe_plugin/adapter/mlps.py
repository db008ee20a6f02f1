"""The condensed MLPs of an adapter: folded, refitted, or empty ones whose weights will be loaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..blocks import describe_sparse_blocks, find_sparse_blocks, model_shape
from ..calibration import Calibration
from ..condense.apply import layer_spec, refit_record
from ..condense.forms import FORMS, Replacing
from ..condense.refit import refit_layers
from ..config import CondenseConfig
from ..model.bitsandbytes import repacked_layers, settle_bitsandbytes
from ..model.layers_cdmoe import CondensedMLP
from ..offload import in_memory, in_memory_copy, offloading_hooks, unreachable
from .config import CondenseAdapterConfig
from .layer import unwrapped


def folded_mlps(model: PreTrainedModel, config: CondenseAdapterConfig) -> dict[str, nn.Module]:
    """Fold the layers of an adapter's plan as `apply_plan`, and note their sizes and the model's in its config.

    Args:
        model (`PreTrainedModel`): The sparse model, without the layers of adapters.
        config (`CondenseAdapterConfig`): The config of a new adapter.

    Returns:
        The MLPs by the names of their blocks in the base model, without those whose neurons a refit chooses.

    Raises:
        ValueError: if the model is quantised, has weights on the meta device, or does not fit the plan.
    """
    refuse_quantised(model)
    blocks = find_sparse_blocks(model)
    missing = unreachable(model)
    if missing:
        raise ValueError(f"{len(missing)} weights of the model are on the meta device, such as {missing[0]}.")
    plan = config.condense_plan.for_model(model_shape(model, blocks))
    form = FORMS[plan.form]
    assert isinstance(form, Replacing)  # the config has checked it
    form.check(model, blocks, [kept.layer for kept in plan.layers])
    by_layer = {block.layer: block for block in blocks}
    made, specs = {}, {}
    for kept in plan.layers:
        block = by_layer[kept.layer]
        with in_memory(block.decoder_layer(model)):
            if kept.width not in (None, len(kept.experts) * block.intermediate_size):
                width = block.shared_intermediate_size + kept.dense_neurons(block.intermediate_size)
                specs[str(kept.layer)] = block.condensed_spec(width, block.expert_weights().biased)
                continue
            mlp = form.module(block, kept)
        specs[str(kept.layer)] = layer_spec(block, mlp)
        made[block.path] = mlp
    config.layers, config.plan = specs, plan.to_dict()
    return made


def refit_mlps(
    model: PreTrainedModel, name: str, own: CondenseAdapterConfig, config: CondenseConfig, calibration: Calibration
) -> None:
    """Replace the MLPs of an adapter by those that `apply_plan` makes with a `refit`.

    Args:
        model (`PreTrainedModel`): The model with the adapter's layers.
        name (`str`): The adapter.
        own (`CondenseAdapterConfig`): Its config.
        config (`CondenseConfig`): As for `apply_plan`.
        calibration (`Calibration`): Tokens to fit on.
    """
    with unwrapped(model):
        blocks = find_sparse_blocks(model)
        mlps, fits = refit_layers(model, blocks, own.condense_plan.layers, config, calibration)
    base: nn.Module = model.base_model
    for block in blocks:
        if block.layer in mlps:
            mlp: Any = in_memory_copy(mlps[block.layer])
            own.layers = {**(own.layers or {}), str(block.layer): layer_spec(block, mlp)}
            layer: Any = base.get_submodule(block.path)
            layer.replace(name, mlp)
    own.refit = refit_record(config, fits, calibration.num_tokens)


def check_saved(model: PreTrainedModel, config: CondenseAdapterConfig) -> None:
    """Check that a saved adapter fits a model.

    Raises:
        ValueError: naming what differs, or what the model can't do.
    """
    layers, plan = config.layers or {}, config.condense_plan
    if {str(kept.layer) for kept in plan.layers} != layers.keys():
        raise ValueError(f"`layers` of the adapter's config has {sorted(layers)}, which are not those of its plan.")
    if getattr(model, "hf_quantizer", None) is None:
        plan.check_fits(model_shape(model, describe_sparse_blocks(model)))
    settle_bitsandbytes(model)
    repacked = repacked_layers(model)
    if repacked and not config.inference_mode:
        raise ValueError(
            f"{len(repacked)} layers of the base model in 4 bit, such as {repacked[0]}, pass no gradient: bitsandbytes "
            "has repacked them for inference on this CPU in a forward pass before the adapter was loaded. Open the "
            "base model again and load the adapter first."
        )
    # PEFT and transformers dispatch such a model again, but only know wrappers around modules without children.
    if "disk" in (getattr(model, "hf_device_map", None) or {}).values() or unreachable(model):
        raise ValueError(
            "A saved condense adapter can't be loaded on a model with weights on the disk: use a `device_map` "
            "without the disk, or `condense_pretrained(base, plan=adapter_folder)`, which reads only the weights "
            "of the condensed model."
        )


def empty_mlp(model: PreTrainedModel, block: nn.Module, spec: dict[str, Any]) -> CondensedMLP:
    """Make an MLP without weights, in the model's dtype.

    Args:
        model (`PreTrainedModel`): The model.
        block (`nn.Module`): The sparse block beside it.
        spec (`dict[str, Any]`): The sizes of the MLP, from the config of a saved adapter.

    Raises:
        ValueError: if the sizes can't be understood.
    """
    try:
        with torch.device("meta"):
            mlp = CondensedMLP(model.config.get_text_config().hidden_size, spec)
        mlp = mlp.to(model.dtype).to_empty(device=_device_of(block))
        if spec.get("norm") is not None:
            mlp.keep_norm(spec["norm"], in_memory_copy(getattr(block, spec["norm"])))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"`layers` of the adapter's config can't be understood: {spec!r} ({error!r}). The file was edited or "
            "comes from another version."
        ) from error
    return mlp.train(block.training)


def refuse_quantised(model: nn.Module) -> None:
    """Refuse to fold the weights of a quantised model.

    Raises:
        ValueError: naming the order in which to do both.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            "Quantised weights can't be folded: make the adapter on the model without quantisation, save it, and "
            "load it on the quantised model with `PeftModel.from_pretrained`."
        )


def _device_of(module: nn.Module) -> torch.device:
    """Return the device on which a module computes."""
    hooks = [hook for part in module.modules() for hook in offloading_hooks(part)]
    if hooks:
        return torch.device(hooks[0].execution_device or "cpu")
    return next(module.parameters()).device
