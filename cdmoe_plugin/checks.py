"""Checks of values that may have been edited by hand; every error names the field and the value found."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import MISSING
from typing import Any


def is_int(value: object) -> bool:
    """Return whether `value` is an int and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def read_object(values: Any, where: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Read the values of all `fields`; those with a default in their dataclass may be missing.

    Raises:
        ValueError: if `values` is not an object, or has unknown or missing fields.
    """
    values = read_mapping(values, where)
    unknown = sorted(set(values) - set(fields), key=str)
    if unknown:
        raise ValueError(f"`{where}` has unknown fields {unknown}; known are {sorted(fields)}.")
    found = {}
    for name, spec in fields.items():
        default = MISSING if spec is None else spec.default
        if name not in values and default is MISSING:
            raise ValueError(f"`{where}` lacks the field `{name}`.")
        found[name] = values.get(name, default)
    return found


def read_mapping(values: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(values, Mapping):
        raise ValueError(f"`{where}` should be an object, but is {short(values)}.")
    return values


def read_flat_mapping(values: Any, where: str) -> dict[str, Any] | None:
    """Read an object of plain values (texts, numbers, None, or lists of whole numbers), or None."""
    if values is None:
        return None
    for name, value in read_mapping(values, where).items():
        if isinstance(value, list):
            for item in value:
                read_whole(item, f"{where}.{name}")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            read_real(value, f"{where}.{name}")
        elif value is not None and not isinstance(value, (str, bool)):
            raise ValueError(f"`{where}.{name}` should be a plain value, but is {short(value)}.")
    return dict(values)


def read_list(values: Any, where: str) -> list[Any]:
    if not isinstance(values, list):
        raise ValueError(f"`{where}` should be a list, but is {short(values)}.")
    return values


def read_whole(value: Any, where: str) -> int:
    if not is_int(value) or value < 0:
        raise ValueError(f"`{where}` should be a whole number of at least 0, but is {short(value)}.")
    return value


def read_real(value: Any, where: str) -> float:
    """Read a finite number.

    Raises:
        ValueError: naming `where`, if `value` is not one.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # An int may be too large for a float.
    if not number or abs(value) > sys.float_info.max or math.isnan(value):
        raise ValueError(f"`{where}` should be a finite number, but is {short(value)}.")
    return float(value)


def read_by_layer(values: Any, where: str) -> dict[int, float] | None:
    """Read numbers by decoder layer, or None."""
    if values is None:
        return None
    return {_layer_key(k, where): read_real(v, f"{where}.{k}") for k, v in read_mapping(values, where).items()}


def _layer_key(key: Any, where: str) -> int:
    if not (isinstance(key, str) and key.isascii() and key.isdigit()):
        raise ValueError(f"`{where}` should have layer indices as keys, but has {short(key)}.")
    return int(key)


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error, or one that it was raised from, means that a device is out of memory."""
    import torch  # not needed for checking values

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # The CPU's allocator, CUDA's libraries and the operating system raise general types.
    text = str(error).lower() if isinstance(error, (RuntimeError, OSError)) else ""
    if any(sign in text for sign in ("out of memory", "allocate memory", "not enough memory", "alloc_failed")):
        return True
    return error.__cause__ is not None and is_out_of_memory(error.__cause__)
