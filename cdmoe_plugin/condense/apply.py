"""The conversion of a model with replaced sparse blocks to its condensed class, and the models that are refused."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from ..blocks import SparseBlock, UnsupportedModelError
from ..cards.base_model import recall_base
from ..model.classes import condensed_model_class
from ..model.dequantized import forget_quantiser
from ..model.extra import settle_layers
from ..model.layers_cdmoe import CondensedMLP
from ..model.modeling_cdmoe import CondensedModelMixin, silence_router_loss
from ..model.registration import MODEL_TYPE_PREFIX, is_ours, register_condensed
from ..model.router_requests import answer_router_requests
from ..naming import leave_base
from ..plan import CondensePlan
from .mixed import MixedLayer

if TYPE_CHECKING:
    from ..config import CondenseConfig
    from .refit import RefitLayer


def layer_spec(block: SparseBlock, mlp: nn.Module) -> dict[str, Any]:
    """Describe a condensed layer for config.json, as `layers_cdmoe` reads it."""
    if isinstance(mlp, MixedLayer):
        return mlp.part.spec(len(mlp.routed), mlp.dense)
    if not isinstance(mlp, CondensedMLP):
        return {**block.place_spec, "form": "trim_layer"}
    return block.condensed_spec(mlp.intermediate_size, mlp.up_proj.bias is not None, mlp.gated_neurons)


def own_config(model: PreTrainedModel) -> Any:
    """Give a model, and all of its modules that refer to its config or to a part of it, a copy of the config.

    Models made from the same config object share it.
    """
    copies: dict[int, PreTrainedConfig] = {}
    config = _copied(model.config, copies)
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, PreTrainedConfig) and id(value) in copies:
                setattr(module, name, copies[id(value)])
    return config


def _copied(config: PreTrainedConfig, copies: dict[int, PreTrainedConfig]) -> PreTrainedConfig:
    copied = copies[id(config)] = copy.copy(config)
    for name, part in list(vars(copied).items()):
        if isinstance(part, PreTrainedConfig):
            vars(copied)[name] = _copied(part, copies)
    return copied


def become_condensed(
    model: PreTrainedModel,
    plan: CondensePlan,
    specs: Mapping[int, dict[str, Any]],
    all_condensed: bool,
    parameters_before: int,
) -> None:
    """Turn a model with replaced blocks into an instance of its condensed class, including its config."""
    if is_ours(f"{MODEL_TYPE_PREFIX}{model.config.model_type}"):  # `from_config` looks it up by the config's class
        register_condensed(model.config.model_type)
    condensed_class = condensed_model_class(type(model))
    model.__class__ = condensed_class
    config = own_config(model)
    config.__class__ = condensed_class.config_class
    config.condense_config = {
        **(plan.config or {}),
        # Not those of the plan's search; see `note_refit`.
        "refit": None,
        "refit_neurons": "experts",
        "refit_errors": None,
        "condensed_layers": {str(layer): spec for layer, spec in sorted(specs.items())},
        "all_condensed": all_condensed,
        # The loss needs routers over the same number of experts in all layers.
        "no_router_loss": all_condensed or any("num_routed" in spec for spec in specs.values()),
        "parameters": {"before": parameters_before, "after": model.num_parameters()},
        **recall_base(model),
        "plan": plan.to_dict(),
    }
    forget_quantiser(model)
    settle_layers(model)
    if config.condense_config["no_router_loss"]:
        silence_router_loss(model)
        answer_router_requests(model)
    leave_base(model, "condensed")
    model.add_model_tags(["cdmoe"])


def note_refit(model: PreTrainedModel, record: Mapping[str, Any]) -> None:
    """Record in a condensed model's config how its layers were fitted; see `refit_record`."""
    model.config.condense_config |= record


def refit_record(config: CondenseConfig, fits: Mapping[int, RefitLayer], num_tokens: int) -> dict[str, Any]:
    """Describe how layers were fitted, with their errors, tokens and neurons, for the config of a condensed model."""
    done: dict[str, Any] = {
        name: getattr(config, name) for name in ("refit", "refit_neurons", "refit_target", "refit_steps")
    }
    done["refit_tokens"] = num_tokens
    done |= {"gates": config.gates} if any(fit.gated for fit in fits.values()) else {}
    done["refit_errors"] = {str(layer): [fit.before, fit.after] for layer, fit in fits.items()}
    neurons = {str(layer): fit.neurons for layer, fit in fits.items() if fit.neurons is not None}
    if neurons:  # by expert
        done["neurons"] = {layer: {str(expert): n for expert, n in own.items()} for layer, own in neurons.items()}
    return done


def refuse_quantised(model: PreTrainedModel) -> None:
    """Refuse a model that is loaded with quantised weights.

    Raises:
        ValueError: naming the order in which to condense and quantise, or how to get plain weights.
    """
    quantiser: Any = getattr(model, "hf_quantizer", None)
    if quantiser is None:
        return
    if not quantiser.pre_quantized:
        raise ValueError(
            "Quantised weights can't be folded: condense first, save, and open the saved checkpoint with "
            "`quantization_config`."
        )
    config = quantiser.quantization_config
    name, way = type(config).__name__, "`model.dequantize()`, if its library can"
    if hasattr(config, "dequantize"):
        way = f"`from_pretrained(..., quantization_config={name}(dequantize=True))`"
    raise ValueError(
        f"This model was loaded with the quantised weights of its checkpoint ({name}), which can't be folded. Give the "
        "checkpoint's path to `condense_pretrained`, which dequantises weights while it reads them, or dequantise the "
        f"model with {way}."
    )


def refuse_condensed(model: PreTrainedModel) -> None:
    """Refuse a model that is condensed already.

    Raises:
        ValueError: naming its condensed layers.
    """
    # Opened as remote code, its class is one of a copy of `modeling_cdmoe`.
    if isinstance(model, CondensedModelMixin) or getattr(model.config, "condense_config", None):
        layers = sorted(map(int, model.config.condense_config["condensed_layers"]))
        raise ValueError(
            f"This model is condensed already (decoder layers {layers}). Start from the sparse model; for a smaller "
            "budget use `plan.truncate`."
        )


def refuse_fused_names(model: PreTrainedModel, blocks: Sequence[SparseBlock]) -> None:
    """Refuse a model whose checkpoints hold the projections of condensed layers under names that it would fuse.

    transformers fuses gate and up of all MLPs of some architectures while it reads them (minimax_m3_vl).

    Raises:
        UnsupportedModelError: naming the model type.
    """
    fusing = [each for each in get_model_conversion_mapping(model) if isinstance(each, WeightConverter)]
    names = {id(module): name for name, module in model.named_modules()}
    for block in blocks:
        name = f"{names[id(block.module)]}.gate_proj.weight"
        if any(each.rename_source_key(name)[1] is not None for each in fusing):
            raise UnsupportedModelError(
                f"model type {model.config.model_type!r} can't be condensed: transformers fuses gate and up of every "
                "MLP of its checkpoints, so that a condensed layer could not be opened again. Condense the text model "
                "in it (`text_only=True`)."
            )
