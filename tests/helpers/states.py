"""Everything about a model that a call could change, kept and compared."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in (*model.named_parameters(), *model.named_buffers())}


def state_of(model: PreTrainedModel) -> tuple[dict[str, Tensor], Any]:
    """Everything about a model that a search could change: its tensors, and the rest."""
    tensors = {name: (t, t.detach().clone()) for name, t in (*model.named_parameters(), *model.named_buffers())}
    modules = {
        name: (id(m), type(m), m.training, sorted(vars(m)), {k: len(v) for k, v in vars(m).items() if _is_sized(v)})
        for name, m in model.named_modules()
    }
    about = {name: (id(t), t.requires_grad, t.grad) for name, (t, _) in tensors.items()}
    config = copy.deepcopy(model.config.to_dict())
    values = {name: value for name, (_, value) in tensors.items()} | {"random state": torch.get_rng_state()}
    return values, (about, modules, config)


def _is_sized(value: Any) -> bool:
    return isinstance(value, (dict, list, set))


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Names of tensors that are not bitwise equal, or not on both sides."""
    both = [k for k in one if k in other and one[k].dtype == other[k].dtype and torch.equal(one[k], other[k])]
    return sorted((one.keys() | other.keys()) - set(both))
