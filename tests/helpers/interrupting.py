"""Searches that are interrupted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cdmoe_plugin.search.state import SearchState


class Interrupted(Exception):
    """Stands for Ctrl-C, or a machine that goes."""


def interrupting(after: int) -> Callable[..., None]:
    """`SearchState.update` that fails once results have come in `after` times."""
    write, left = SearchState.update, [after]

    def update(self: SearchState, results: dict[str, Any]) -> None:
        if left[0] == 0:
            raise Interrupted
        left[0] -= 1
        write(self, results)

    return update
