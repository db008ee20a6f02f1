"""Layer selection: which sparse layers are condensed and in which order, by Algorithm 2 or one of its alternatives.

Every order is nested, and comes with the divergence of the model's output along it: the same quantity for all methods,
so that their plans can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch.nn.functional import cosine_similarity
from transformers.utils import logging

from ...decoder.stream import LayerOutput
from ..order import ascending, least
from .variants import LayerSearchData, ModelVariants

logger = logging.get_logger(__name__)

# Shares of the work and the time left: what is counted are layers run, which tells a reader nothing.
_BAR = "{l_bar}{bar}| {elapsed}<{remaining}"


@dataclass(frozen=True)
class LayerOrder:
    """Layers in the order of their selection.

    Args:
        layers (`list[int]`): The chosen decoder layers.
        scores (`list[float]`): Divergence of the model's output once the first, the first two, ... are condensed.
        rounds (`list[dict[int, float]]`): Divergence of the model's output for every candidate in every round; the
            first round is each layer on its own (Figure 1). Empty where the method does not look at the model's output.
        similarities (`dict[int, float]`, *optional*): Cosine similarities by candidate, where they were ranked by them;
            nothing else was measured then.
    """

    layers: list[int]
    scores: list[float]
    rounds: list[dict[int, float]] = field(default_factory=list)
    similarities: dict[int, float] | None = None


def greedy_layers(data: LayerSearchData, num_layers: int) -> LayerOrder:
    """Adds, one after the other, the layer whose condensation changes the model's output least (CD-MoE, Algorithm 2).

    Outputs are compared with the unmodified model's. Ties go to the lower index.
    """
    order = LayerOrder([], [])
    model = ModelVariants(data)
    with logging.tqdm(total=num_layers * model.steps, desc="Layer search", bar_format=_BAR) as progress:
        for _ in range(num_layers):
            chosen = frozenset(order.layers)
            left = {layer: chosen | {layer} for layer in data.candidates if layer not in chosen}
            found = model.divergences(left.values(), progress.update)
            scores = {layer: found[variant] for layer, variant in left.items()}
            best = least(scores)
            order.layers.append(best)
            order.scores.append(scores[best])
            order.rounds.append(scores)
            logger.info(f"Layer search: decoder layer {best} is condensed next, divergence {scores[best]:.3e}.")
    return order


def global_layers(data: LayerSearchData, num_layers: int) -> LayerOrder:
    """Layers whose condensation alone changes the model's output least first.

    "Global Layer Comparison" in CD-MoE, section 4.4. Ranked once, ties to the lower index.
    """
    model = ModelVariants(data)
    alone = scores_alone(model, data.candidates)
    layers = ascending(alone)[:num_layers]
    return LayerOrder(layers, scores_along(model, layers), [alone])


def similar_layers(data: LayerSearchData, num_layers: int) -> LayerOrder:
    """Ranks layers once, those first whose output is most like their input (He et al. 2024, arXiv 2406.15786).

    A layer's similarity is the mean over sequences of the mean over tokens of the cosine between what enters it and
    what leaves it (the residual included) in the unmodified model, computed in float64. Ties go to the lower index.
    """
    similarities: dict[int, float] = {}
    states = list(data.stream.embeddings)
    for layer in logging.tqdm(range(max(data.candidates) + 1), desc="Layer similarities", unit="layer"):
        with data.stream.in_memory(layer):
            outputs = [data.stream.run_layer(layer, state, batch) for batch, state in enumerate(states)]
            data.stream.check_finite()
            if layer in data.candidates:
                name = f"similarity {layer}"
                if name not in data.known:
                    data.known[name] = _similarity(data, layer, states, outputs)
                similarities[layer] = data.known[name]
        states = outputs
    order = ascending({layer: -similarity for layer, similarity in similarities.items()})[:num_layers]
    return LayerOrder(order, [], similarities=similarities)


def _similarity(data: LayerSearchData, layer: int, states: list[LayerOutput], outputs: list[LayerOutput]) -> float:
    parts = []
    for batch, (state, output) in enumerate(zip(states, outputs, strict=True)):
        leaving = output[0].flatten(2)  # a few architectures have several residual streams
        entering = data.entering(layer, state, batch).flatten(2)
        valid = data.stream.valid(batch).to(leaving.device)
        cosines = cosine_similarity(entering[valid].double(), leaving[valid].double(), dim=-1)
        parts.append(cosines @ data.token_weights[batch].to(cosines))
    return float(data.processes.total(parts))


def local_layers(data: LayerSearchData, num_layers: int) -> LayerOrder:
    """Layers whose own output changes least first ("Local Layer Comparison" in CD-MoE, section 4.4).

    A layer's own divergence is the last one that the expert search measured for it, with all K experts kept; what
    `compare` says does not matter for it. Ranked once, ties to the lower index.
    """
    layers = ascending({layer: data.own_divergences[layer] for layer in data.candidates})[:num_layers]
    return LayerOrder(layers, scores_along(ModelVariants(data), layers))


LAYER_SELECTIONS: dict[str, Callable[[LayerSearchData, int], LayerOrder]] = {
    "greedy": greedy_layers,
    "local": local_layers,
    "global": global_layers,
    "similarity": similar_layers,
}


def scores_alone(model: ModelVariants, layers: Sequence[int]) -> dict[int, float]:
    """Divergence of the model's output when each of these layers is condensed alone."""
    variants = {layer: frozenset({layer}) for layer in layers}
    with logging.tqdm(total=model.steps, desc="Layers alone", bar_format=_BAR) as progress:
        found = model.divergences(variants.values(), progress.update)
    return {layer: found[variant] for layer, variant in variants.items()}


def scores_along(model: ModelVariants, layers: Sequence[int]) -> list[float]:
    """Divergences of the model's output along an order that is known."""
    variants = [frozenset(layers[: number + 1]) for number in range(len(layers))]
    with logging.tqdm(total=model.steps, desc="Layers in order", bar_format=_BAR) as progress:
        found = model.divergences(variants, progress.update)
    return [found[variant] for variant in variants]
