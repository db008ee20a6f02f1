"""Make a model whose sparse blocks have been replaced a condensed one, and refuse models that can't be."""

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
    """The entry of config.json by which a condensed layer is built again (see `layers_cdmoe`)."""
    if not isinstance(mlp, CondensedMLP):
        return {**block.place_spec, "form": "trim_layer"}
    return block.condensed_spec(mlp.intermediate_size, mlp.up_proj.bias is not None)


def own_config(model: PreTrainedModel) -> Any:
    """Gives a model, and all of its modules that refer to its config, a config that no other model shares.

    Models that are made from the same config object have that as theirs.
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
    """Turns a model whose blocks have been replaced into an instance of its condensed class, config included."""
    if model.config.model_type == DEEPSEEK:  # the auto classes know it only once they were asked
        register_deepseek()
    condensed_class = condensed_model_class(type(model))
    model.__class__ = condensed_class
    config = own_config(model)
    config.__class__ = condensed_class.config_class
    config.condense_config = {
        **(plan.config or {}),
        # What was done, whatever the plan's search had in mind; see `note_refit`.
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
    """Writes into a condensed model's config how its layers were fitted, and their errors before and after."""
    done: dict[str, Any] = model.config.condense_config
    done |= {"refit": config.refit, "refit_target": config.refit_target, "refit_steps": config.refit_steps}
    done["refit_errors"] = {str(layer): [fit.before, fit.after] for layer, fit in fits.items()}


def refuse_quantised(*quantisations: Any) -> None:
    """Raises where any of a model's quantisation configs (or quantisers) is not None.

    Raises:
        ValueError: saying in which order to condense and quantise.
    """
    if any(quantisation is not None for quantisation in quantisations):
        raise ValueError(
            "Quantised weights can't be folded: condense first, save, and open the saved checkpoint with "
            "`quantization_config`."
        )


def refuse_condensed(model: PreTrainedModel) -> None:
    """Raises where a model is condensed already.

    Raises:
        ValueError: naming its condensed layers.
    """
    if isinstance(model, CondensedModelMixin):
        layers = sorted(map(int, model.config.condense_config["condensed_layers"]))
        raise ValueError(
            f"This model is condensed already (decoder layers {layers}). Start from the sparse model; for a smaller "
            "budget use `plan.truncate`."
        )
