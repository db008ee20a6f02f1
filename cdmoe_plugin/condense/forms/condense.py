"""The condensed form of a layer: its shared and kept experts are one dense MLP (CD-MoE, arXiv 2412.00069)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from ...blocks import SparseBlock
from ...offload import in_memory, offload_like
from ...plan import CondensedLayer
from ..fold import fold
from .form import Replacing


class Condense(Replacing):
    """The paper's form: the kept experts, with constant gates, are folded into one MLP without a router."""

    name = "condense"
    keeps_experts = True

    def check(
        self, model: PreTrainedModel, blocks: Sequence[SparseBlock], layers: Sequence[int] | None, num_layers: int = 1
    ) -> None:
        """Accept every layer: `find_sparse_blocks` has refused blocks that can't be condensed."""

    def module(self, block: SparseBlock, kept: CondensedLayer) -> nn.Module:
        return fold(block, kept.experts, kept.gates)

    def stored_module(self, model: PreTrainedModel, block: SparseBlock, kept: CondensedLayer) -> nn.Module:
        with in_memory(block.decoder_layer(model)):
            mlp = self.module(block, kept)
        offload_like(mlp, block.module, f"condensed-{block.layer}")
        return mlp
