"""A block that returns its router's scores beside its output (ernie4_5_moe and others)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..dispatch import RoutedCall
from ..quirk import Quirk


class RouterScores(Quirk):
    """A block that returns a tuple. Decoder layers do not use the scores; users may ask for them."""

    spec = {"returns_tuple": True}

    @classmethod
    def of_output(cls, output: Any, call: RoutedCall) -> Quirk | None:
        return cls() if isinstance(output, tuple) and len(output) == 2 and output[1] is call.scores else None

    def finish(self, y: Tensor) -> Any:
        return y, None
