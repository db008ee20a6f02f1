"""The plan of a search for a size: what becomes of every sparse layer."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel
from transformers.utils import logging

from ...blocks import SparseBlock
from ...calibration import Calibration
from ...config import BESIDE_TARGET, CondenseConfig
from ...plan import CondensePlan
from ...plan_layer import layers_of
from ...shapes import ModelShape
from ...sizes import format_count, read_target
from ...spread import LayerCurves, Spread
from .forms import condensed_parameters, dense_widths
from .measure import Family
from .mixed import mixed_forms

logger = logging.get_logger(__name__)


def all_forms(block: SparseBlock, order: Sequence[int]) -> list[Family]:
    """List the forms that a layer may take in a search for a size, other than staying as it is.

    Args:
        block (`SparseBlock`): Its sparse block.
        order (`Sequence[int]`): Its experts in the order in which they stay.
    """
    condensed = Family([], dense_widths(block, 0), condensed_parameters(block)[0])
    return [condensed, *mixed_forms(block, order)]


def plan_by_size(
    model: PreTrainedModel,
    curves: Sequence[LayerCurves],
    config: CondenseConfig,
    shape: ModelShape,
    calibration: Calibration,
) -> CondensePlan:
    """Make the plan with which the model's output changes least at the `target_size` of a config.

    Args:
        model (`PreTrainedModel`): The sparse model.
        curves (`list[LayerCurves]`): The errors of its layers.
        config (`CondenseConfig`): The settings of the search.
        shape (`ModelShape`): The sizes of the model.
        calibration (`Calibration`): The calibration data.
    """
    spread = Spread(model.num_parameters(), model.dtype.itemsize, list(curves))
    parameters = read_target(config.target_size, spread.parameters, spread.itemsize)
    chosen = spread.solve(parameters)
    if config.exportable is not None:
        free, chosen = chosen, spread.solve(parameters, alike=True, beside=shape.has_shared)
        routed, width = next(iter(chosen.values()))
        logger.warning(
            f"`exportable` restricts the spread to {routed} experts and {width:,} dense neurons in every layer: the "
            f"estimated change of the model's output is {spread.effect(chosen):.3e}, against {spread.effect(free):.3e} "
            f"for the free choice; {format_count(spread.size(chosen))} parameters against "
            f"{format_count(spread.size(free))}."
        )
    return CondensePlan(
        layers=layers_of(spread, chosen),
        model=shape,
        config={name: value for name, value in config.to_dict().items() if name not in BESIDE_TARGET},
        calibration=calibration.to_dict(),
        spread=spread,
    )
