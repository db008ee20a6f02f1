"""Greedy layer selection (Algorithm 2)."""

from __future__ import annotations

from transformers.utils import logging

from ...registry import LAYER_SELECTIONS
from .order import BAR, LayerOrder
from .race import variants_of
from .variants import LayerSearchData

logger = logging.get_logger(__name__)


@LAYER_SELECTIONS.register(
    "greedy",
    "adds the layer whose condensation changes the model's output least, one after the other",
    "CD-MoE, Algorithm 2",
)
def greedy_layers(data: LayerSearchData, num_layers: int) -> LayerOrder:
    """Add, one after the other, the layer whose condensation changes the model's output least (CD-MoE, Algorithm 2).

    Outputs are compared with the unmodified model's. Ties go to the lower index. From the second round on, candidates
    may race (see `race.Race`); the first is complete, for the divergence of each layer alone (Figure 1).
    """
    order = LayerOrder([], [])
    model = variants_of(data)
    with logging.tqdm(total=num_layers * model.steps, desc="Layer search", bar_format=BAR) as progress:
        for _ in range(num_layers):
            chosen = frozenset(order.layers)
            left = {layer: chosen | {layer} for layer in data.candidates if layer not in chosen}
            best, scores = model.least(left, progress.update, complete=not chosen)
            order.layers.append(best)
            order.scores.append(scores[best])
            order.rounds.append(scores)
            logger.info(f"Layer search: decoder layer {best} is condensed next, divergence {scores[best]:.3e}.")
    return order
