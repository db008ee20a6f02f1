"""Which architectures have which quirk; one row for each quirk."""

from __future__ import annotations

import pkgutil
from functools import cache

import pytest

from cdmoe_plugin.blocks import find_sparse_blocks, quirks
from tests.helpers.models import TYPES
from tests.helpers.tiny_models import tiny_model

# The quirk's file, and the model types that have it.
ROWS = {
    "latent_experts": {"nemotron_h"},
    "layer_router": {"gemma4_text", "diffusion_gemma_text"},
    "layer_shared": {"granitemoe_swa", "granitemoehybrid", "granitemoeshared"},
    "output_bias": {"jetmoe"},
    "parallel_experts": {"jetmoe"},
    "router_scores": {"gpt_oss", "llama4_text", "openai_privacy_filter"},
    "scaled_inputs": {"llama4_text"},
    "sum_norm": {"axk1"},
    "token_ids": {"deepseek_v4"},
}
SIZES = {"latent_experts": {"moe_latent_size": 24}}


@cache
def quirks_of(model_type: str, **sizes: int) -> set[str]:
    blocks = find_sparse_blocks(tiny_model(model_type, **sizes))
    return {type(quirk).__module__.rpartition(".")[2] for block in blocks for quirk in block.quirks}


def test_every_quirk_has_a_row() -> None:
    assert {module.name for module in pkgutil.iter_modules(quirks.__path__)} == set(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_who_has_it(name: str) -> None:
    sizes = SIZES.get(name, {})
    types = ROWS[name] if sizes else TYPES
    assert {each for each in types if name in quirks_of(each, **sizes)} == ROWS[name]
