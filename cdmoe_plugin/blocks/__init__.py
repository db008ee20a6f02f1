"""The sparse blocks of transformers, in one normal form.

A block is found by its structure, not by its class: a direct child of a decoder layer with stacked expert weights. The
blocks that can be condensed compute

    y = d · [sigmoid(w·x) ·] S(x) + c · sum_i g_i(x) E_i(x)

where `E_i` and `S` are gated MLPs, with or without clamped activations and biases. Departures from this form (a norm of
the sum, maps around the experts, a router in the decoder layer, ...) are quirks, one file each in `quirks/`. A probe
verifies all of this on the block itself before anything relies on it, so an architecture that computes something else
is refused with the reason and never condensed wrongly. `SparseBlock` is the normal form, and the rest of the package
uses nothing else.
"""

from .block import DensePiece, SparseBlock
from .dispatch import Routing, hidden_of, patched_forward
from .find import describe_sparse_blocks, find_sparse_blocks, layers_path, model_shape, probe_blocks
from .mixed import RoutedPart
from .record import BlockRecord
from .text_decoder import body_of, decoder_layers, decoder_of, head_of
from .weights import GatedWeights, UnsupportedModelError, has_stacked_weights, shrink_experts

__all__ = [
    "BlockRecord",
    "DensePiece",
    "GatedWeights",
    "RoutedPart",
    "Routing",
    "SparseBlock",
    "UnsupportedModelError",
    "body_of",
    "decoder_layers",
    "decoder_of",
    "describe_sparse_blocks",
    "find_sparse_blocks",
    "has_stacked_weights",
    "head_of",
    "hidden_of",
    "layers_path",
    "model_shape",
    "patched_forward",
    "probe_blocks",
    "shrink_experts",
]
