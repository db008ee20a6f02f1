"""Config fields whose pattern over the layers is broken when decoder layers are dropped.

transformers reads such a field layer by layer. Engines with an implementation of their own often take the kind of a
layer from its number instead, by the architecture's rule ("every second layer has a sliding window"). They read a model
with fewer layers correctly if its layers have the kinds that the whole model has at these numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

# Lists of the layers of one kind, rather than of one kind per layer. Engines read a number beside them.
_INDICES = ("moe_layers",)
ENGINES = "vLLM, SGLang, llama.cpp and mlx-lm"


def layer_kinds(config: Any, total: int) -> dict[str, list[Any]]:
    """Return the config fields that give each of the `total` decoder layers a kind, as one kind per layer."""
    found = {}
    for name, value in vars(config).items():
        if not isinstance(value, (list, tuple)) or name.startswith("_"):
            continue
        if name in _INDICES:
            found[name] = [layer in value for layer in range(total)]
        elif len(value) == total and all(isinstance(kind, (str, bool)) or kind in (0, 1) for kind in value):
            found[name] = list(value)
    return found


def period_of(kinds: Sequence[Any]) -> int:
    """Return the length of the shortest pattern that, repeated, gives these kinds; their number if none repeats."""
    return next(n for n in range(1, len(kinds) + 1) if all(kinds[i] == kinds[i % n] for i in range(len(kinds))))


def broken_patterns(config: Any, total: int, dropped: Iterable[int]) -> dict[str, int]:
    """Find the config fields whose pattern is broken if layers are dropped.

    Args:
        config (`PreTrainedConfig`): The config of the whole model.
        total (`int`): Number of its decoder layers.
        dropped (`Iterable[int]`): Decoder layers to drop.

    Returns:
        `dict[str, int]`: The length of each field's pattern in the whole model.
    """
    gone = set(dropped)
    return {
        name: period_of(kinds)
        for name, kinds in layer_kinds(config, total).items()
        if (left := [kind for layer, kind in enumerate(kinds) if layer not in gone]) != kinds[: len(left)]
    }


def describe_broken(broken: dict[str, int], dropped: Iterable[int], total: int) -> str:
    """Describe broken patterns, the programs that misread them, and the sets of layers that keep them."""
    named = " and ".join(f"`{name}`" for name in broken)
    periods = [period for period in broken.values() if period < total]
    advice = (
        f"Whole periods of {max(periods)} neighbouring layers keep the pattern: choose `layers` so, or let the search "
        "choose them with `exportable='stock'`"
        if periods
        else "Dropping the last layers keeps it"
    )
    return (
        f"Without the decoder layers {sorted(dropped)}, the pattern of {named} over the layers is broken. transformers "
        f"reads {named} layer by layer, but engines that take the kind of a layer from its number ({ENGINES} for some "
        f"architectures, such as sliding-window attention in every second layer of gpt_oss) misread the checkpoint "
        f"silently. {advice}."
    )
