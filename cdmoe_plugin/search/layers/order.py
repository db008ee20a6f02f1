"""The order of layers that a selection returns, and divergences along it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers.utils import logging

from .variants import ModelVariants

# Only percentage and time: the unit would be runs of single layers.
BAR = "{l_bar}{bar}| {elapsed}<{remaining}"


@dataclass(frozen=True)
class LayerOrder:
    """Layers in the order of their selection.

    Args:
        layers (`list[int]`): The chosen decoder layers.
        scores (`list[float]`): Divergence of the model's output with the first, the first two, ... layers condensed.
        rounds (`list[dict[int, float]]`): Divergence of the model's output for every candidate in every round; the
            first round is each layer alone (Figure 1). Empty if the method does not use the model's output.
        similarities (`dict[int, float]`, *optional*): Cosine similarities by candidate, if layers were ranked by them.
            Nothing else is measured then.
        restricted (`dict`, *optional*): See `CondensePlan.restricted`.
    """

    layers: list[int]
    scores: list[float]
    rounds: list[dict[int, float]] = field(default_factory=list)
    similarities: dict[int, float] | None = None
    restricted: dict[str, Any] | None = None


def scores_alone(model: ModelVariants, layers: Sequence[int]) -> dict[int, float]:
    """Measure the divergence of the model's output when each of these layers is condensed alone."""
    variants = {layer: frozenset({layer}) for layer in layers}
    with logging.tqdm(total=model.steps, desc="Layers alone", bar_format=BAR) as progress:
        found = model.divergences(variants.values(), progress.update)
    return {layer: found[variant] for layer, variant in variants.items()}


def scores_along(model: ModelVariants, layers: Sequence[int]) -> list[float]:
    """Measure the divergences of the model's output along a given order."""
    variants = [frozenset(layers[: number + 1]) for number in range(len(layers))]
    with logging.tqdm(total=model.steps, desc="Layers in order", bar_format=BAR) as progress:
        found = model.divergences(variants, progress.update)
    return [found[variant] for variant in variants]
