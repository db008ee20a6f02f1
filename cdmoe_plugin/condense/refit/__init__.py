"""Fits condensed layers to the sparse model after their experts are chosen, with no labels and no back-propagation.

Layers are fitted in the order of depth, each on inputs from the already condensed model below it. A method takes
the folded layer, its examples and the options that it registers with, and returns a `RefitLayer`.
"""

from .driver import TARGETS, check_calibration, check_refit, refit_layers
from .examples import LayerExamples, RefitLayer

__all__ = [
    "TARGETS",
    "LayerExamples",
    "RefitLayer",
    "check_calibration",
    "check_refit",
    "refit_layers",
]
