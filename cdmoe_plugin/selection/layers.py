"""Layer selection: which sparse layers are condensed and in which order, by Algorithm 2 or one of its alternatives.

Every order is nested, and comes with the divergence of the model's output along it: the same quantity for all methods,
so that their plans can be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from transformers.utils import logging

from . import ascending, least
from .path import LayerSearchData, ModelPath


@dataclass(frozen=True)
class LayerOrder:
    """Layers in the order of their selection.

    Args:
        layers (`list[int]`): The chosen decoder layers.
        scores (`list[float]`): Divergence of the model's output once the first, the first two, ... are condensed.
        rounds (`list[dict[int, float]]`): Divergence of the model's output for every candidate in every round; the
            first round is each layer on its own (Figure 1). Empty where the method does not look at the model's output.
    """

    layers: list[int]
    scores: list[float]
    rounds: list[dict[int, float]] = field(default_factory=list)


def greedy_layers(data: LayerSearchData, num_layers: int) -> LayerOrder:
    """Adds, one after the other, the layer whose condensation changes the model's output least (CD-MoE, Algorithm 2).

    Outputs are compared with the unmodified model's. Ties go to the lower index.
    """
    order = LayerOrder([], [])
    path = ModelPath(data)
    steps = sum(len(data.candidates) - i for i in range(num_layers))
    with logging.tqdm(total=steps, desc="Layer search", unit="candidate") as progress:
        for _ in range(num_layers):
            scores = {}
            for layer in data.candidates:
                if layer in order.layers:
                    continue
                scores[layer] = path.score(layer)
                progress.update()
            best = least(scores)
            order.layers.append(best)
            order.scores.append(scores[best])
            order.rounds.append(scores)
            if len(order.layers) < num_layers:
                path.choose(best)
    return order


def global_layers(data: LayerSearchData, num_layers: int) -> LayerOrder:
    """Layers whose condensation alone changes the model's output least first.

    "Global Layer Comparison" in CD-MoE, section 4.4. Ranked once, ties to the lower index.
    """
    path = ModelPath(data)
    with logging.tqdm(data.candidates, desc="Layer search", unit="candidate") as candidates:
        alone = {layer: path.score(layer) for layer in candidates}
    layers = ascending(alone)[:num_layers]
    return LayerOrder(layers, scores_along(path, layers), [alone])


def local_layers(data: LayerSearchData, num_layers: int) -> LayerOrder:
    """Layers whose own output changes least first ("Local Layer Comparison" in CD-MoE, section 4.4).

    A layer's own divergence is the last one that the expert search measured for it, with all K experts kept; what
    `compare` says does not matter for it. Ranked once, ties to the lower index.
    """
    layers = ascending({layer: data.own_divergences[layer] for layer in data.candidates})[:num_layers]
    return LayerOrder(layers, scores_along(ModelPath(data), layers))


LAYER_SELECTIONS: dict[str, Callable[[LayerSearchData, int], LayerOrder]] = {
    "greedy": greedy_layers,
    "local": local_layers,
    "global": global_layers,
}


def scores_along(path: ModelPath, layers: list[int]) -> list[float]:
    """Divergences of the model's output along an order that is known."""
    scores = []
    for layer in layers:
        scores.append(path.score(layer))
        if len(scores) < len(layers):
            path.choose(layer)
    return scores
