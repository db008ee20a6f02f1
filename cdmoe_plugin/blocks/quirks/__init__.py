"""The quirks of sparse blocks, one module each. All modules in this folder are discovered automatically."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from ..quirk import Quirk


@cache
def known_quirks() -> tuple[type[Quirk], ...]:
    """Import the modules of this folder and return their quirks, in the order of their names."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    classes = [value for module in modules for value in vars(module).values() if isinstance(value, type)]
    return tuple(cls for cls in dict.fromkeys(classes) if issubclass(cls, Quirk) and cls is not Quirk)
