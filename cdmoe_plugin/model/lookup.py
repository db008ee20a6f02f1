"""The condensed layers of a model."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from .layers_cdmoe import CondensedMLP, Trimmed


def condensed_layers(model: PreTrainedModel) -> dict[int, CondensedMLP]:
    """Map decoder layers to the MLPs of a condensed model, by depth. Empty if the MLPs were trimmed.

    Raises:
        ValueError: if the model is not condensed.
    """
    config = getattr(model.config, "condense_config", None)
    if not config:
        raise ValueError(f"{type(model).__name__} is not condensed: use `condense_pretrained` or `apply_plan` first.")
    specs = sorted(config["condensed_layers"].items(), key=lambda item: int(item[0]))
    mlps: dict[int, Any] = {int(layer): model.base_model.get_submodule(spec["module"]) for layer, spec in specs}
    return {layer: mlp for layer, mlp in mlps.items() if not isinstance(mlp, Trimmed)}
