"""The registry of methods by which a condensed layer is fitted."""

from __future__ import annotations

from collections.abc import Callable

from ...model.layers_cdmoe import CondensedMLP
from .distill import distill
from .examples import LayerExamples, RefitLayer
from .ridge import refit_down_proj

Refit = Callable[[CondensedMLP, LayerExamples, int], RefitLayer]

REFITS: dict[str, Refit] = {"down_proj": refit_down_proj, "distill": distill}
