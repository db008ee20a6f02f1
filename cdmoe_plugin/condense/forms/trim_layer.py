"""Layer Trimming (He et al. 2024, arXiv 2406.15786): whole MLP sub-layers are dropped, only the residual remains."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from ...blocks import SparseBlock
from ...model.layers_cdmoe import Trimmed
from ...plan import CondensedLayer
from .form import Replacing


class TrimLayer(Replacing):
    """A baseline of the paper: zeros replace the output of the sparse block."""

    name = "trim_layer"

    def check(
        self, model: PreTrainedModel, blocks: Sequence[SparseBlock], layers: Sequence[int] | None, num_layers: int = 1
    ) -> None:
        for block in blocks:
            if layers is None or block.layer in layers:
                block.check_dropping()

    def module(self, block: SparseBlock, kept: CondensedLayer) -> nn.Module:
        return Trimmed()
