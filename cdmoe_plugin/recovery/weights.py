"""The weights of the condensed layers, the only ones that stages of training change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from ..model.lookup import condensed_layers


def condensed_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Return the parameters of the condensed layers' MLPs, named as in `model.named_parameters()`.

    Raises:
        ValueError: if the model is not condensed.
    """
    ours = {id(p) for mlp in condensed_layers(model).values() for p in mlp.parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) in ours}


@torch.no_grad()
def load_condensed_weights(model: PreTrainedModel, folder: Path) -> None:
    """Copy the condensed layers' weights from a checkpoint into a model, keeping the model's dtypes.

    All other weights are ignored: recovery never changes them. `Trainer` would read all weights by their names in
    memory instead of those on disk, and only warn if these differ.

    Args:
        model (`PreTrainedModel`): The condensed model.
        folder (`Path`): A checkpoint in safetensors, written by `save_pretrained`.

    Raises:
        ValueError: if a condensed weight is not in the checkpoint or has another shape; the model is then unchanged.
    """
    parameters = condensed_parameters(model)
    handles = [safe_open(file, framework="pt", device="cpu") for file in sorted(folder.glob("model*.safetensors"))]
    places = {key: handle for handle in handles for key in handle.keys()}  # noqa: SIM118  (a handle is not a dict)
    tensors: dict[str, Any] = {}
    for name, parameter in parameters.items():
        key = next(iter(revert_weight_conversion(model, {name: parameter})))
        if key not in places or tuple(places[key].get_slice(key).get_shape()) != tuple(parameter.shape):
            found = list(places[key].get_slice(key).get_shape()) if key in places else "nothing"
            raise ValueError(
                f"The checkpoint {folder} should have {key!r} of shape {list(parameter.shape)}, but has {found}: it is "
                "incomplete, or belongs to another model."
            )
        tensors[name] = places[key].get_tensor(key)
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])
