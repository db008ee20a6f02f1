"""The conversion of a model with replaced sparse blocks to its condensed class, and the models that are refused."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel

from ..blocks import SparseBlock
from ..cards.base_model import describe_base
from ..model.classes import condensed_model_class
from ..model.layers_cdmoe import CondensedMLP
from ..model.modeling_cdmoe import CondensedModelMixin, silence_router_loss
from ..model.registration import DEEPSEEK, register_deepseek
from ..plan import CondensePlan

if TYPE_CHECKING:
    from ..config import CondenseConfig
    from .refit import RefitLayer


def layer_spec(block: SparseBlock, mlp: nn.Module) -> dict[str, Any]:
    """Describe a condensed layer for config.json, as `layers_cdmoe` reads it."""
    if not isinstance(mlp, CondensedMLP):
        return {**block.place_spec, "form": "trim_layer"}
    return block.condensed_spec(mlp.intermediate_size, mlp.up_proj.bias is not None)


def own_config(model: PreTrainedModel) -> Any:
    """Give a model, and all of its modules that refer to its config, a copy of the config.

    Models made from the same config object share it.
    """
    before: Any = model.config
    config = copy.copy(before)
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if value is before:
                setattr(module, name, config)
    return config


def become_condensed(
    model: PreTrainedModel,
    plan: CondensePlan,
    specs: Mapping[int, dict[str, Any]],
    all_condensed: bool,
    parameters_before: int,
) -> None:
    """Turn a model with replaced blocks into an instance of its condensed class, including its config."""
    if model.config.model_type == DEEPSEEK:  # the auto classes register it on first look-up
        register_deepseek()
    condensed_class = condensed_model_class(type(model))
    model.__class__ = condensed_class
    config = own_config(model)
    config.__class__ = condensed_class.config_class
    config.condense_config = {
        **(plan.config or {}),
        # Not those of the plan's search; see `note_refit`.
        "refit": None,
        "refit_errors": None,
        "condensed_layers": {str(layer): spec for layer, spec in sorted(specs.items())},
        "all_condensed": all_condensed,
        "parameters": {"before": parameters_before, "after": model.num_parameters()},
        **describe_base(model.name_or_path or ""),
        "plan": plan.to_dict(),
    }
    if all_condensed:
        silence_router_loss(model)
    model.add_model_tags(["cdmoe"])


def note_refit(model: PreTrainedModel, config: CondenseConfig, fits: Mapping[int, RefitLayer]) -> None:
    """Record in a condensed model's config how its layers were fitted, and their errors before and after."""
    done: dict[str, Any] = model.config.condense_config
    done |= {"refit": config.refit, "refit_target": config.refit_target, "refit_steps": config.refit_steps}
    done["refit_errors"] = {str(layer): [fit.before, fit.after] for layer, fit in fits.items()}


def refuse_quantised(*quantisations: Any) -> None:
    """Refuse a quantised model.

    Args:
        *quantisations: Its quantisation configs or quantisers; None without quantisation.

    Raises:
        ValueError: naming the order in which to condense and quantise.
    """
    if any(quantisation is not None for quantisation in quantisations):
        raise ValueError(
            "Quantised weights can't be folded: condense first, save, and open the saved checkpoint with "
            "`quantization_config`."
        )


def refuse_condensed(model: PreTrainedModel) -> None:
    """Refuse a model that is condensed already.

    Raises:
        ValueError: naming its condensed layers.
    """
    if isinstance(model, CondensedModelMixin):
        layers = sorted(map(int, model.config.condense_config["condensed_layers"]))
        raise ValueError(
            f"This model is condensed already (decoder layers {layers}). Start from the sparse model; for a smaller "
            "budget use `plan.truncate`."
        )
