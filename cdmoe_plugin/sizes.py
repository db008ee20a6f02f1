"""Sizes as people write them: reading and formatting numbers of experts, parameters and bytes."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Literal

Unit = Literal["experts", "parameters", "bytes"]

_PARAMETERS = re.compile(r"(\d+(?:\.\d+)?)\s*([KMB]?)\s*param(?:eter)?s", re.IGNORECASE)
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
    text = value.strip() if isinstance(value, str) else ""
    with suppress(OverflowError):  # too many digits for a float
        if found := _PARAMETERS.fullmatch(text):
            return round(float(found[1]) * _DECIMAL[found[2].upper()]), "parameters"
        found = _BYTES.fullmatch(text)
        if found and not (found[3] and not found[2]):
            return round(float(found[1]) * (_BINARY if found[3] else _DECIMAL)[found[2]]), "bytes"
    raise ValueError(
        "`expert_budget` should be a number of experts, or text such as '300M params', '2GB' or '500MiB', but is "
        f"{value!r}."
    )


def format_bytes(count: int) -> str:
    """Format a number of bytes in GiB, or in MiB below one GiB."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"


def format_count(count: int) -> str:
    """Format a number of parameters in billions (B), or in millions (M) below one billion."""
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"
