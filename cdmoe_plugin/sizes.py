"""Sizes as people write them: reading and formatting numbers of experts, parameters and bytes."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Literal

Unit = Literal["experts", "parameters", "bytes"]

_PARAMETERS = re.compile(r"(\d+(?:\.\d+)?)\s*([KMB]?)\s*param(?:eter)?s", re.IGNORECASE)
_SHARE = re.compile(r"0?\.\d+")
# B is a byte; b would be a bit.
_BYTES = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B")
_DECIMAL = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}
_BINARY = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def read_budget(value: object) -> tuple[int, Unit]:
    """Read an `expert_budget` as an amount and its unit: 54, "300M params" (K, M or B), "2GB" or "500MiB".

    Raises:
        ValueError: naming the field, if it has none of these formats.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value, "experts"
    found = _read_size(value)
    if found is None:
        raise ValueError(
            "`expert_budget` should be a number of experts, or text such as '300M params', '2GB' or '500MiB', but is "
            f"{value!r}."
        )
    return found


def read_target(value: object, parameters: int, itemsize: int) -> int:
    """Read a `target_size` as a number of parameters: 0.64 of a model's, "11B params", "24GB" or "500MiB".

    Args:
        value: The field's value.
        parameters (`int`): Parameters of the sparse model.
        itemsize (`int`): Bytes of each.

    Raises:
        ValueError: naming the field, if it has none of these formats.
    """
    if isinstance(value, float) and 0 < value < 1:
        return int(value * parameters)
    found = _read_size(value)
    if found is None or found[0] == 0:
        raise ValueError(
            "`target_size` should be a share of the sparse model's parameters between 0 and 1, or text such as '11B "
            f"params', '24GB' or '500MiB', but is {value!r}."
        )
    amount, unit = found
    return amount if unit == "parameters" else amount // itemsize


def read_share(text: str) -> float | str:
    """Read a share such as ".64" in text as a number; return other text as it is."""
    return float(text) if _SHARE.fullmatch(text.strip()) else text


def _read_size(value: object) -> tuple[int, Unit] | None:
    """Read a number of parameters or of bytes in text; return None if it is neither."""
    text = value.strip() if isinstance(value, str) else ""
    with suppress(OverflowError):  # too many digits for a float
        if found := _PARAMETERS.fullmatch(text):
            return round(float(found[1]) * _DECIMAL[found[2].upper()]), "parameters"
        found = _BYTES.fullmatch(text)
        if found and not (found[3] and not found[2]):
            return round(float(found[1]) * (_BINARY if found[3] else _DECIMAL)[found[2]]), "bytes"
    return None


def format_bytes(count: int) -> str:
    """Format a number of bytes in GiB, or in MiB below one GiB."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"


def format_count(count: int) -> str:
    """Format a number of parameters in billions (B), or in millions (M) below one billion."""
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"
