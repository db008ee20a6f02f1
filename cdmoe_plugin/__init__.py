"""Condense sparse Mixture-of-Experts layers into small dense ones (CD-MoE, arXiv 2412.00069).

Importing this package makes transformers' auto classes open condensed checkpoints; everything else is loaded
when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .model.registration import register as _register

__version__ = "0.1.0.dev0"

if TYPE_CHECKING:
    from .api import apply_plan, condense_pretrained, search_plan
    from .config import CondenseConfig
    from .export.stock import export_stock
    from .model.training import condensed_module_names, unfreeze_condensed
    from .plan import CondensedLayer, CondensePlan

_ROOMS = {
    "CondenseConfig": "config",
    "CondensePlan": "plan",
    "CondensedLayer": "plan",
    "apply_plan": "api",
    "condense_pretrained": "api",
    "condensed_module_names": "model.training",
    "export_stock": "export.stock",
    "search_plan": "api",
    "unfreeze_condensed": "model.training",
}

__all__ = [
    "CondenseConfig",
    "CondensePlan",
    "CondensedLayer",
    "apply_plan",
    "condense_pretrained",
    "condensed_module_names",
    "export_stock",
    "search_plan",
    "unfreeze_condensed",
]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return getattr(importlib.import_module(f".{_ROOMS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(list(globals()) + __all__)


_register()
