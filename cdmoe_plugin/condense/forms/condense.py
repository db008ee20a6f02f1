"""The condensed form of a layer: its shared and kept experts are one dense MLP (CD-MoE, arXiv 2412.00069)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from ...blocks import RoutedPart, SparseBlock
from ...offload import in_memory, offload_like
from ...plan import CondensedLayer
from ..apply import refuse_fused_names
from ..fold import fold
from ..mixed import mix
from .form import Replacing


class Condense(Replacing):
    """The paper's form: the kept experts, with constant gates, are folded into one MLP without a router."""

    name = "condense"
    keeps_experts = True

    def check(
        self, model: PreTrainedModel, blocks: Sequence[SparseBlock], layers: Sequence[int] | None, num_layers: int = 1
    ) -> None:
        """Check the names of condensed layers on disk: `find_sparse_blocks` has refused what can't be condensed."""
        refuse_fused_names(model, blocks[:1])

    def check_layers(self, blocks: Sequence[SparseBlock], layers: Sequence[CondensedLayer]) -> None:
        by_layer = {block.layer: block for block in blocks}
        for kept in layers:
            if kept.routed is not None:
                RoutedPart(by_layer[kept.layer]).check(kept.routed)

    def module(self, block: SparseBlock, kept: CondensedLayer) -> nn.Module:
        if kept.width not in (None, len(kept.experts) * block.intermediate_size):
            raise ValueError(
                f"The plan gives decoder layer {kept.layer} {kept.width:,} single neurons, which a refit chooses: set "
                "`refit`, and `refit_neurons` to 'least_squares' or 'energy'."
            )
        if kept.routed is not None:
            return mix(block, kept)
        return fold(block, kept.experts, kept.gates)

    def stored_module(self, model: PreTrainedModel, block: SparseBlock, kept: CondensedLayer) -> nn.Module:
        with in_memory(block.decoder_layer(model)):
            mlp = self.module(block, kept)
        offload_like(mlp, block.module, f"condensed-{block.layer}")
        return mlp
