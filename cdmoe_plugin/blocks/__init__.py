"""The one place that understands the sparse blocks of transformers.

A block is found by its structure, not by its class: a direct child of a decoder layer that holds stacked expert
weights. What can be condensed computes

    y = d · [sigmoid(w·x) ·] S(x) + c · sum_i g_i(x) E_i(x)

with gated MLPs `E_i` and `S` of one activation, clamped or not, with or without biases. The ways in which blocks
depart from this form (a norm of the sum, maps around the experts, a router in the decoder layer, ...) are quirks, one
file each in `quirks/`. Every part of that claim is probed on the block itself before anything relies on it, so that an
architecture which does something else is refused with the reason and never condensed wrongly. `SparseBlock` is the
normal form, and all that the rest of the package uses.
"""

from .block import DensePiece, SparseBlock
from .dispatch import Routing, hidden_of, patched_forward
from .find import describe_sparse_blocks, find_sparse_blocks, layers_path, model_shape, probe_blocks
from .record import BlockRecord
from .weights import GatedWeights, UnsupportedModelError, has_stacked_weights, shrink_experts

__all__ = [
    "BlockRecord",
    "DensePiece",
    "GatedWeights",
    "Routing",
    "SparseBlock",
    "UnsupportedModelError",
    "describe_sparse_blocks",
    "find_sparse_blocks",
    "has_stacked_weights",
    "hidden_of",
    "layers_path",
    "model_shape",
    "patched_forward",
    "probe_blocks",
    "shrink_experts",
]
