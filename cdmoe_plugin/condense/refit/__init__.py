"""The refit of condensed layers to the sparse model after their experts are chosen, layer by layer, without labels.

Layers are fitted by depth, each on inputs from the already condensed layers before it. A method takes the folded layer,
its examples and the options that it registers, and returns a `RefitLayer`.
"""

from .driver import TARGETS, check_calibration, check_refit, enough_tokens, refit_layers, trains_experts
from .examples import LayerExamples, RefitLayer

__all__ = [
    "TARGETS",
    "LayerExamples",
    "RefitLayer",
    "check_calibration",
    "check_refit",
    "enough_tokens",
    "refit_layers",
    "trains_experts",
]
