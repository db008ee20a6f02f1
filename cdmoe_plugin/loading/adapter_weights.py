"""The weights of a saved condense adapter, put into a condensed model without PEFT."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from ..atomic import read_json
from ..condense.apply import note_refit
from ..config import CondenseConfig
from ..model.lookup import condensed_layers
from ..offload import in_memory_copy, offload_like
from ..plan import CondensePlan
from ..plan_files import ADAPTER_FILE, PLAN_FILE

# The module of a condensed layer's MLPs in an adapter, and so a part of the names of saved weights.
MLPS = "cdmoe_mlp"
_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."


def saved_adapter(plan: Any, config: CondenseConfig | None = None) -> Path | None:
    """Return the folder of a saved condense adapter if `plan` is one, otherwise None.

    Args:
        plan: A plan or a path, as for `CondensePlan.load`.
        config (`CondenseConfig`, *optional*): The config beside the plan.

    Raises:
        ValueError: if the adapter has no weights in safetensors, or if a `refit` would overwrite them.
    """
    if not isinstance(plan, (str, os.PathLike)):
        return None
    folder = Path(plan)
    others = (PLAN_FILE, "config.json")  # read before the adapter's
    if not (folder / ADAPTER_FILE).exists() or any((folder / name).exists() for name in others):
        return None
    if not (folder / _WEIGHTS).exists():
        raise ValueError(f"The adapter {folder} has no weights: there is no {_WEIGHTS}.")
    if config is not None and config.refit is not None:
        raise ValueError(
            f"`refit` is {config.refit!r}, but the condensed layers get the weights of the adapter {folder}: use "
            "`refit=None`, or pass only its plan, `CondensePlan.load(adapter_folder)`."
        )
    return folder


def plan_or_adapter(path: Any, plan: CondensePlan | None) -> Any:
    """Return the path of a saved condense adapter, so that its weights are used as well, or else the plan.

    Args:
        path: A plan or a path, as for `CondensePlan.load`.
        plan (`CondensePlan`, *optional*): The plan that was read from it, maybe cut.

    Raises:
        ValueError: if the plan of an adapter was cut: its weights are for the whole plan.
    """
    if saved_adapter(path) is None:
        return plan
    if plan != CondensePlan.load(path):
        raise ValueError(
            f"The condense adapter {path} has weights for its whole plan, which `num_layers` and `num_experts` can't "
            "cut: leave them out, or save the plan alone (`CondensePlan.load(adapter_folder).save(...)`)."
        )
    return path


@torch.no_grad()
def load_adapter_weights(model: PreTrainedModel, folder: Path) -> None:
    """Copy the weights of a condense adapter into the model that its plan makes, keeping the model's dtypes.

    Args:
        model (`PreTrainedModel`): The condensed model, which may be offloaded.
        folder (`Path`): The saved adapter.

    Raises:
        ValueError: if weights are missing, have another shape, or have no place in the model.
    """
    weights = load_file(folder / _WEIGHTS)
    others = {key.removeprefix(_PREFIX): weights.pop(key) for key in list(weights) if f".{MLPS}." not in key}
    names = {id(module): name for name, module in model.named_modules()}
    for layer, mlp in condensed_layers(model).items():
        name = names[id(mlp)]
        start = f"{_PREFIX}{name}.{MLPS}."
        own = {key.removeprefix(start): weights.pop(key) for key in list(weights) if key.startswith(start)}
        _check_weights(folder, name, own, mlp.state_dict())
        new: Any = in_memory_copy(mlp)
        new.load_state_dict(own)
        offload_like(new, mlp, f"adapter-{layer}")
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
    state = model.state_dict()
    places = {key: state[key] for key in others if key in state and not state[key].is_meta}
    _check_weights(folder, "the model", weights | others, places)
    for key, tensor in others.items():
        places[key].copy_(tensor)
    note_refit(model, read_json(folder / ADAPTER_FILE).get("refit") or {})


def _check_weights(folder: Path, where: str, found: dict[str, Tensor], places: dict[str, Tensor]) -> None:
    wrong = sorted(found.keys() ^ places.keys())
    wrong += [key for key in found.keys() & places.keys() if found[key].shape != places[key].shape]
    if wrong:
        raise ValueError(
            f"The weights of the adapter {folder} do not fit {where}: {len(wrong)} are missing, have no place or have "
            f"another shape, such as {wrong[:3]}."
        )
