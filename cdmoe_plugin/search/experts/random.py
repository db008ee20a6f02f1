"""Random expert selection."""

from __future__ import annotations

import random

from ...registry import EXPERT_SELECTIONS
from .data import ExpertOrder, SparseLayerData
from .ranking import ordered


@EXPERT_SELECTIONS.register("random", "drawn from `seed`", "CD-MoE, section 4.4")
def random_experts(data: SparseLayerData, num_experts: int) -> ExpertOrder:
    """Shuffle experts with the seed and the decoder layer ("Random" in CD-MoE, section 4.4).

    All N experts are shuffled, and those that are not candidates are left out. There are no ties.
    """
    shuffled = list(range(data.block.num_experts))
    random.Random(f"{data.seed} {data.block.layer}").shuffle(shuffled)
    candidates = set(data.candidates)
    return ordered(data, [expert for expert in shuffled if expert in candidates][:num_experts])
