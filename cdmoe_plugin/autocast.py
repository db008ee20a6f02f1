"""Functions that compute in the dtypes of their tensors, also when they are called inside `torch.autocast`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def without_autocast(function: Callable[P, T]) -> Callable[P, T]:
    """Switch `torch.autocast` off inside a function: half precision would change plans, weights and checks."""

    @wraps(function)
    def computed(*args: P.args, **kwargs: P.kwargs) -> T:
        accelerator = torch.accelerator.current_accelerator()
        devices = {"cpu"} if accelerator is None else {"cpu", accelerator.type}
        with ExitStack() as stack:
            for device in devices:
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            return function(*args, **kwargs)

    return computed
