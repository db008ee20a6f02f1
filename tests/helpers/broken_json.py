"""JSON that somebody has edited, broken, or made up: what Hypothesis feeds to everything that reads a file."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

# Values that JSON can hold and no field should trip over; "@" stands for text that json.dumps would not write.
RAW = {"@huge": "1e999"} | {f"@deep{n}": "[" * n + "]" * n for n in (100, 700, 3000)}
ODD = [None, True, -1, 0, 1, 2**63, 10**400, -0.5, 1e308, float("nan"), float("-inf"), "", "1", "\ud800", [], [1], {}]
VALUES = st.recursive(
    st.sampled_from([*ODD, *RAW]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of everything inside a JSON value."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [path, *(place for key in keys for place in places(value[key], (*path, key)))]


@st.composite
def edited(draw: st.DrawFn, values: Any) -> Any:
    """A JSON value after a few random changes; to be `written`."""
    top = {"value": json.loads(json.dumps(values))}
    for _ in range(draw(st.integers(1, 4))):
        *path, key = draw(st.sampled_from(places(top)[1:]))
        holder: Any = top
        for step in path:
            holder = holder[step]
        action = draw(st.sampled_from(["delete", "replace", "add", "wrap", "repeat"]))
        if action == "delete" and path:
            del holder[key]
        elif action == "add" and isinstance(holder, dict):
            holder[draw(st.sampled_from(sorted(holder)) | st.text(max_size=5))] = copy.deepcopy(draw(VALUES))
        elif action == "repeat" and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
        elif action == "wrap":
            holder[key] = [holder[key]]
        else:
            holder[key] = copy.deepcopy(draw(VALUES))  # a later change must not reach the strategy's own lists
    return top["value"]


def written(value: Any) -> str:
    """The text of a JSON value, with what "@" stands for."""
    text = json.dumps(value)
    for name, raw in RAW.items():
        text = text.replace(f'"{name}"', raw)
    return text
