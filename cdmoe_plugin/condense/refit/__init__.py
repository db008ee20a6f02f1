"""Fits condensed layers to the sparse model after their experts are chosen, with no labels and no back-propagation.

Layers are fitted in the order of depth, each on inputs from the already condensed model below it. A method is a
function in `methods.REFITS`.
"""

from .driver import TARGETS, check_calibration, check_refit, refit_layers
from .examples import LayerExamples, RefitLayer
from .methods import REFITS, Refit

__all__ = [
    "REFITS",
    "TARGETS",
    "LayerExamples",
    "Refit",
    "RefitLayer",
    "check_calibration",
    "check_refit",
    "refit_layers",
]
