"""An expert budget, spread over the condensed layers where it gains most, if the model's output agrees."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from transformers.utils import logging

from .budget import LayerBudget
from .experts.data import ExpertOrder
from .knapsack import estimated_effects, spread
from .layers.methods import scores_alone, scores_along

if TYPE_CHECKING:
    from .search import ChosenExperts, PlanSearch

logger = logging.get_logger(__name__)


class Spread(NamedTuple):
    """What is kept in each layer, and how far the model's output is away as one layer after the other is condensed."""

    experts: dict[int, ChosenExperts]
    scores: list[float]


def uniformly(budget: LayerBudget, experts: Mapping[int, ChosenExperts]) -> dict[int, ChosenExperts]:
    """The budget's K of the experts of each layer, or all where there are fewer."""
    return {layer: keep_first(found, budget.uniform) for layer, found in experts.items()}


def keep_first(found: ChosenExperts, number: int) -> ChosenExperts:
    """The first experts of an order, or all where there are fewer."""
    order, gates = found
    experts = order.experts[:number]
    kept = ExpertOrder(experts, order.scores[: number + 1], order.steps[:number])
    return kept, {expert: gates[expert] for expert in experts}


def spread_budget(
    search: PlanSearch,
    budget: LayerBudget,
    experts: Mapping[int, ChosenExperts],
    layers: list[int],
    scores: list[float] | None,
    alone: Mapping[int, float] | None,
) -> Spread:
    """Gives each chosen layer its own number of experts, or all the same where that brings the model's output nearer.

    Both are measured on the calibration data, so the result is never worse there than the same K for all.

    Args:
        search (`PlanSearch`): The search, for the divergence of the model's output.
        budget (`LayerBudget`): What may be kept.
        experts (`dict[int, ChosenExperts]`): Longer orders of experts than the budget pays for in every layer.
        layers (`list[int]`): The chosen layers in their order.
        scores (`list[float]`, *optional*): Divergence of the model's output along it, at the uniform K.
        alone (`dict[int, float]`, *optional*): The same with each layer condensed alone. What is None is measured.
    """
    uniform = uniformly(budget, {layer: experts[layer] for layer in layers})
    if alone is None or scores is None:
        model = search.variants(uniform)
        alone = scores_alone(model, layers) if alone is None else alone
        scores = scores_along(model, layers) if scores is None else scores
    numbers = {layer: len(order.experts) for layer, (order, _) in uniform.items()}
    own = {layer: experts[layer][0].scores for layer in layers}
    kept = spread(estimated_effects(alone, own, numbers), budget.costs, budget.amount)
    if kept == numbers:
        return Spread(uniform, scores)
    chosen = {layer: keep_first(experts[layer], number) for layer, number in kept.items()}
    measured = scores_along(search.variants(chosen, "spread"), layers)
    better = measured[-1] < scores[-1]
    logger.info(
        f"Experts by layer {kept}: divergence {measured[-1]:.3e}, against {scores[-1]:.3e} with {budget.uniform} in "
        f"each; {'the former' if better else 'the latter'} is kept."
    )
    return Spread(chosen, measured) if better else Spread(uniform, scores)
