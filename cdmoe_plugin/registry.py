"""Methods by their names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


def lookup(registry: Mapping[str, T], name: str, field: str) -> T:
    """The method registered under a name.

    Raises:
        ValueError: naming the config field and the methods that exist, if there is none of that name.
    """
    if name not in registry:
        raise ValueError(f"`{field}` is {name!r}, but only {', '.join(map(repr, registry))} exist.")
    return registry[name]
