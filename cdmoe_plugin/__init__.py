"""Condense sparse Mixture-of-Experts layers into small dense ones (CD-MoE, arXiv 2412.00069).

Importing this package makes transformers' auto classes open condensed checkpoints, now or as soon as they are
imported themselves; everything else is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .after_import import call_after_import as _call_after_import

__version__ = "0.2.0.dev0"

if TYPE_CHECKING:  # a type checker does not follow `__getattr__`
    from .adapter.config import CondenseAdapterConfig  # noqa: F401
    from .api import apply_plan, condense_pretrained, search_plan  # noqa: F401
    from .config import CondenseConfig  # noqa: F401
    from .export.dense import export_dense  # noqa: F401
    from .export.stock import export_stock  # noqa: F401
    from .model.training import condensed_module_names, unfreeze_condensed  # noqa: F401
    from .plan import CondensedLayer, CondensePlan  # noqa: F401

_MODULES = {
    "CondenseAdapterConfig": "adapter.config",
    "CondenseConfig": "config",
    "CondensePlan": "plan",
    "CondensedLayer": "plan",
    "apply_plan": "api",
    "condense_pretrained": "api",
    "condensed_module_names": "model.training",
    "export_dense": "export.dense",
    "export_stock": "export.stock",
    "search_plan": "api",
    "unfreeze_condensed": "model.training",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(list(globals()) + __all__)


def _register() -> None:
    importlib.import_module(".model.registration", __name__)


def _register_adapter() -> None:
    importlib.import_module(".adapter.model", __name__).register()


_call_after_import("transformers.models.auto.configuration_auto", _register)
_call_after_import("peft", _register_adapter)
