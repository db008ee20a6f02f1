"""Layer selection among sets of layers that an export can describe, beside the free choice of any method."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from transformers.utils import logging

from .order import LayerOrder, scores_along
from .race import variants_of
from .variants import LayerSearchData

logger = logging.get_logger(__name__)

# From the layers chosen so far to the groups of layers that may be added next, one at a time.
Groups = Callable[[tuple[int, ...]], list[tuple[int, ...]]]


def whole_sets(sets: Sequence[tuple[int, ...]]) -> Groups:
    """Return the groups of a search that chooses one of several sets at once."""
    return lambda chosen: [] if chosen else list(sets)


def runs(each: Sequence[tuple[int, ...]]) -> Groups:
    """Return the groups of a search that adds one run of layers after the other; runs do not overlap."""
    return lambda chosen: [run for run in each if not set(run) & set(chosen)]


def restricted_layers(data: LayerSearchData, num_layers: int, groups: Groups, free: LayerOrder) -> LayerOrder:
    """Add, one after the other, the group of layers that changes the model's output least, and log what that costs.

    Args:
        data (`LayerSearchData`): The model and its candidates.
        num_layers (`int`): Number of layers to choose.
        groups (`Groups`): The groups that may be added.
        free (`LayerOrder`): The free choice of the same number of layers.

    Raises:
        ValueError: if the groups do not add up to `num_layers` layers.
    """
    model = variants_of(data)
    chosen: tuple[int, ...] = ()
    while len(chosen) < num_layers:
        left = {group: frozenset((*chosen, *group)) for group in groups(chosen) if len(chosen + group) <= num_layers}
        if not left:
            raise ValueError(
                f"`num_layers` is {num_layers}, but only {len(chosen)} layers can be chosen with `exportable`."
            )
        best, _ = model.least(left)
        chosen += best
    scores = scores_along(model, chosen)
    least = (free.scores or scores_along(model, free.layers))[-1]
    logger.warning(
        f"`exportable` restricts the choice to decoder layers {sorted(chosen)}: the divergence of the model's output "
        f"is {scores[-1]:.3e}, against {least:.3e} for the free choice, {sorted(free.layers)}."
    )
    cost = {"divergence": scores[-1], "free_divergence": least, "free_layers": sorted(free.layers)}
    return LayerOrder(list(chosen), scores, free.rounds[:1], similarities=free.similarities, restricted=cost)
