"""An expert budget, spread over the condensed layers so that each expert goes where it helps most."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from transformers.utils import logging

from ..knapsack import allocate, estimated_effects
from .budget import LayerBudget
from .experts.data import ExpertOrder
from .layers.order import LayerOrder, scores_alone, scores_along
from .layers.variants import ModelVariants

logger = logging.get_logger(__name__)

# Experts in the order of their selection, and their gates.
ChosenExperts = tuple[ExpertOrder, dict[int, float]]


def uniformly(budget: LayerBudget, experts: Mapping[int, ChosenExperts]) -> dict[int, ChosenExperts]:
    """Keep the same number of experts in each layer, the largest that the budget allows; all if there are fewer."""
    return {layer: keep_first(found, budget.uniform) for layer, found in experts.items()}


def keep_first(found: ChosenExperts, number: int) -> ChosenExperts:
    """Keep the first experts of an order; all if there are fewer."""
    order, gates = found
    experts = order.experts[:number]
    tokens = None if order.tokens is None else order.tokens[:number]
    kept = ExpertOrder(experts, order.scores[: number + 1], order.steps[:number], tokens)
    return kept, {expert: gates[expert] for expert in experts}


def spread_budget(
    variants: Callable[[dict[int, ChosenExperts], str], ModelVariants],
    budget: LayerBudget,
    experts: Mapping[int, ChosenExperts],
    order: LayerOrder,
) -> tuple[dict[int, ChosenExperts], LayerOrder]:
    """Choose a number of experts for each chosen layer, or the same number for all if that gives a better output.

    Both are measured on the calibration data, so the result is never worse there than the same K for all layers.

    Args:
        variants (`Callable`): Returns the model with layers condensed to given experts; its second argument names the
            divergences in the search state.
        budget (`LayerBudget`): The budget.
        experts (`dict[int, ChosenExperts]`): Orders with more experts than the budget allows for every layer.
        order (`LayerOrder`): The chosen layers, with the divergences of the model's output at the uniform K, along
            the order and of each layer alone. Missing divergences are measured.

    Returns:
        The experts that each chosen layer keeps, and the order with their divergences.
    """
    layers = order.layers
    scores, alone = order.scores or None, order.rounds[0] if order.rounds else None
    uniform = uniformly(budget, {layer: experts[layer] for layer in layers})
    if alone is None or scores is None:
        model = variants(uniform, "layers")
        alone = scores_alone(model, layers) if alone is None else alone
        scores = scores_along(model, layers) if scores is None else scores
    numbers = {layer: len(kept.experts) for layer, (kept, _) in uniform.items()}
    own = {layer: experts[layer][0].scores for layer in layers}
    kept = allocate(estimated_effects(alone, own, numbers), budget.costs, budget.amount)
    if kept == numbers:
        return uniform, replace(order, scores=scores)
    chosen = {layer: keep_first(experts[layer], number) for layer, number in kept.items()}
    measured = scores_along(variants(chosen, "spread"), layers)
    better = measured[-1] < scores[-1]
    logger.info(
        f"Experts by layer {kept}: divergence {measured[-1]:.3e}, against {scores[-1]:.3e} with {budget.uniform} in "
        f"each. The {'former' if better else 'latter'} is kept."
    )
    return (chosen, replace(order, scores=measured)) if better else (uniform, replace(order, scores=scores))
