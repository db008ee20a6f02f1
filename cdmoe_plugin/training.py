"""What a training script needs: only the condensed layers learn."""

from __future__ import annotations

from transformers import PreTrainedModel

from .condensed import condensed_layers


def unfreeze_condensed(model: PreTrainedModel) -> list[str]:
    """Sets `requires_grad` on the condensed layers' MLPs and on nothing else (CD-MoE, section 4.3).

    Returns:
        `list[str]`: Names of the parameters that will be trained, as in `model.named_parameters()`.

    Raises:
        ValueError: if the model is not condensed.
    """
    trained = {id(p) for mlp in condensed_layers(model).values() for p in mlp.parameters()}
    names = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(id(parameter) in trained)
        if parameter.requires_grad:
            names.append(name)
    return names


def condensed_module_names(model: PreTrainedModel) -> list[str]:
    """Names of the condensed layers' three projections, for `LoraConfig(target_modules=...)`.

    Raises:
        ValueError: if the model is not condensed.
    """
    names = {id(module): name for name, module in model.named_modules()}
    projections = ("gate_proj", "up_proj", "down_proj")
    return [f"{names[id(mlp)]}.{part}" for mlp in condensed_layers(model).values() for part in projections]
