"""Budgets, and the calibration sequences that they are searched on."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers import PreTrainedModel

from cdmoe_plugin import CondenseConfig
from tests.helpers import naive
from tests.helpers.tiny_models import random_ids, tiny_model

SEQUENCES = [ids[:length] for ids, length in zip(random_ids(5, 16, seed=1), (16, 5, 9, 2, 12), strict=True)]


AUTO = CondenseConfig(num_layers=3, num_experts="auto", expert_budget=6, batch_size=3)


EXPERT = 3 * 32 * 16  # parameters of a tiny model's routed expert


@cache
def helpful(model_type: str, seed: int = 3, **overrides: Any) -> PreTrainedModel:
    """Every token takes every expert, nearly alike: each one kept brings the layer nearer, in some layers much more.

    Not to be changed.
    """
    model = tiny_model(model_type, seed=seed, num_experts=6, top_k=6, **overrides)
    generator = torch.Generator().manual_seed(seed)
    for block in naive.sparse_blocks(model).values():
        router = getattr(block, "gate", None) or block.router
        for weight in router.parameters():
            weight.data *= 0.05
        block.experts.down_proj.data *= 8 ** torch.rand(1, generator=generator)
        block.experts.down_proj.data *= 4 ** torch.rand(6, 1, 1, generator=generator)
    return model
