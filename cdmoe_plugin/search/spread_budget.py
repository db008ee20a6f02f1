"""An expert budget, spread over the condensed layers where it gains most, if the model's output agrees."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from transformers.utils import logging

from .budget import LayerBudget
from .experts.data import ExpertOrder
from .knapsack import allocate, estimated_effects
from .layers.order import LayerOrder, scores_alone, scores_along
from .layers.variants import ModelVariants

logger = logging.get_logger(__name__)

# Experts in the order of their selection, and their gates.
ChosenExperts = tuple[ExpertOrder, dict[int, float]]


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
    variants: Callable[[dict[int, ChosenExperts], str], ModelVariants],
    budget: LayerBudget,
    experts: Mapping[int, ChosenExperts],
    order: LayerOrder,
) -> tuple[dict[int, ChosenExperts], LayerOrder]:
    """Give each chosen layer its own number of experts, or all the same where that brings the model's output nearer.

    Both are measured on the calibration data, so the result is never worse there than the same K for all.

    Args:
        variants (`Callable`): Gives the model with layers condensed to some experts, and takes the name under which
            its divergences are kept.
        budget (`LayerBudget`): What may be kept.
        experts (`dict[int, ChosenExperts]`): Longer orders of experts than the budget pays for in every layer.
        order (`LayerOrder`): The chosen layers, with the divergences of the model's output at the uniform K, along
            the order and of each layer alone. Those that it lacks are measured.

    Returns:
        The experts that each chosen layer keeps, and the order with the divergences that belong to them.
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
        f"each; {'the former' if better else 'the latter'} is kept."
    )
    return (chosen, replace(order, scores=measured)) if better else (uniform, replace(order, scores=scores))
