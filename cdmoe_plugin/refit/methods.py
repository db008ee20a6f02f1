"""The registry of methods by which a condensed layer is fitted."""

from __future__ import annotations

from collections.abc import Callable

from ..layers_cdmoe import CondensedMLP
from .distill import distill
from .down_proj import refit_down_proj
from .examples import LayerExamples, RefitLayer

Refit = Callable[[CondensedMLP, LayerExamples, int], RefitLayer]

REFITS: dict[str, Refit] = {"down_proj": refit_down_proj, "distill": distill}
