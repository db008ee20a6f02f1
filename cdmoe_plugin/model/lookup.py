"""The condensed layers of a model."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from .layers_cdmoe import CondensedMLP, Trimmed


def condensed_layers(model: PreTrainedModel) -> dict[int, CondensedMLP]:
    """Map decoder layers to the MLPs of a condensed model, or to the dense parts beside their experts, by depth.

    Layers without one, whose MLPs were trimmed or whose experts were only pruned, are left out.

    Raises:
        ValueError: if the model is not condensed.
    """
    config = getattr(model.config, "condense_config", None)
    if not config:
        raise ValueError(f"{type(model).__name__} is not condensed: use `condense_pretrained` or `apply_plan` first.")
    specs = sorted(config["condensed_layers"].items(), key=lambda item: int(item[0]))
    dense = ((int(layer), spec["dense"] if spec.get("form") == "mixed" else spec) for layer, spec in specs)
    mlps: dict[int, Any] = {i: model.base_model.get_submodule(spec["module"]) for i, spec in dense if spec is not None}
    return {layer: mlp for layer, mlp in mlps.items() if not isinstance(mlp, Trimmed)}


def has_mixed_layers(model: PreTrainedModel) -> bool:
    """Return whether layers of a model keep some of their experts behind the router."""
    specs = (getattr(model.config, "condense_config", None) or {}).get("condensed_layers", {})
    return any(spec.get("form") == "mixed" for spec in specs.values())
