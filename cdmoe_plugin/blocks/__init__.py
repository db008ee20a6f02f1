"""The one place that understands the sparse blocks of transformers.

A block is found by its structure, not by its class: a direct child of a decoder layer that holds stacked expert
weights. What can be condensed computes

    y = d · [sigmoid(w·x) ·] S(x) + c · sum_i g_i(x) E_i(x)

with gated MLPs `E_i` and `S` of one activation, clamped or not, with or without biases. There may be `E_i(g_i(x) x)` in
place of `g_i(x) E_i(x)`, linear maps around the experts, and a norm of the sum or a bias behind it. Every part of that
claim is probed on the block itself before it is relied on, so that an architecture which does something else is refused
with the reason and never condensed wrongly. `calls` has the forms in which blocks call their experts.
"""

from .block import SparseBlock
from .calls import Routing, hidden_of, patched_forward
from .find import describe_sparse_blocks, find_sparse_blocks, model_shape, probe_blocks
from .weights import GatedWeights, UnsupportedModelError, has_stacked_weights, shrink_experts

__all__ = [
    "GatedWeights",
    "Routing",
    "SparseBlock",
    "UnsupportedModelError",
    "describe_sparse_blocks",
    "find_sparse_blocks",
    "has_stacked_weights",
    "hidden_of",
    "model_shape",
    "patched_forward",
    "probe_blocks",
    "shrink_experts",
]
