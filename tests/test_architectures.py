"""Every sparse architecture of transformers: what its block computes, and a table of which can be condensed.

`python -m tests.test_architectures` writes that table, docs/architectures.md. That condensing all experts behind uniform
routers leaves the logits as they were, is in test_condensed.py; folding, saving and opening too.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from cdmoe_plugin.sparse import SparseBlock, UnsupportedModelError, find_sparse_blocks

from .conftest import TYPES
from .naive import naive_expert, naive_shared
from .tiny_models import ARCHITECTURES, REFUSED, available, tiny_model

TABLE = Path(__file__).parent.parent / "docs" / "architectures.md"
TABLE_VERSION = "5.23"
# What a block multiplies its routed sum with, by its config.
FACTORS: dict[str, Callable[[Any], float]] = {
    "beam": lambda c: c.routed_scaling_factor,
    "cohere2_moe": lambda c: 0.5,
    "laguna": lambda c: c.moe_routed_scaling_factor,
}


@pytest.mark.parametrize("model_type", TYPES)
@torch.no_grad()
def test_block_with_its_own_routing(model_type: str) -> None:
    """A block's output, what the package says that it is, and the sum token by token from raw weights in float64."""
    model = tiny_model(model_type)
    double = copy.deepcopy(model).double().base_model
    factor = FACTORS.get(model_type, lambda c: 1.0)(model.config)
    x = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(2))
    for block in find_sparse_blocks(model):
        raw, owner = double.get_submodule(block.path), double.get_submodule(block.path.rpartition(".")[0])
        calls: list[list[Any]] = []
        handle = block.experts.register_forward_pre_hook(
            lambda _, args, kwargs, calls=calls: calls.append([*args, *kwargs.values()]), with_kwargs=True
        )
        with block.recording_routes() as routes:
            output = block.module(x)
        handle.remove()
        output = output.view(7, 32)
        if block.shared_name is not None and block.shared is not None:
            output = output + block.shared(x)[0]

        _, index, weights = calls[0]
        index, weights = (weights, index) if index.is_floating_point() else (index, weights)
        plain = naive_shared(raw, owner, x[0].double())
        for token in range(7):
            for expert, weight in zip(index[token].tolist(), weights[token].tolist(), strict=True):
                plain[token] += factor * weight * naive_expert(raw, expert, x[0, token].double())
        torch.testing.assert_close(output.double(), plain, rtol=1e-4, atol=1e-5)

        outputs = block.expert_outputs(x[0])[routes[0].experts.T, torch.arange(7)]  # [k, T, H]
        seen = block.shared_output(x[0]) + (outputs * routes[0].weights.T[..., None]).sum(0)
        torch.testing.assert_close(seen.double(), plain, rtol=1e-4, atol=1e-5)


# --- the table ---


def shared_expert(block: SparseBlock) -> str:
    if block.shared is None:
        return "no"
    return "with a gate per token" if block.shared_gate is not None else "yes"


def row(model_type: str) -> list[str]:
    """Type, class, shared expert, and why it can't be condensed (or that it can)."""
    arch = ARCHITECTURES.get(model_type) or REFUSED[model_type]
    try:
        block = find_sparse_blocks(tiny_model(model_type))[0]
    except UnsupportedModelError as error:
        reason = re.sub(r" ?\(relative difference [^)]*\)", "", str(error)).partition("can't be condensed: ")[2]
        return [model_type, arch.model, "", f"refused: {(reason or str(error)).rstrip('.')}"]
    return [model_type, arch.model, shared_expert(block), "works"]


def table() -> str:
    """The text of docs/architectures.md."""
    rows = [row(model_type) for model_type in (*ARCHITECTURES, *REFUSED)]
    working = sorted(cells for cells in rows if cells[-1] == "works")
    refused = sorted(cells for cells in rows if cells[-1] != "works")
    lines = [
        "# Architectures",
        "",
        f"Sparse decoders of transformers {TABLE_VERSION}, each tried on a tiny model with random weights:",
        f"{len(working)} can be condensed, {len(refused)} are refused with the reason.",
        "`python -m tests.test_architectures` writes this file; a test fails when it is out of date.",
        "",
        "| model type | class | shared expert | condensed |",
        "| --- | --- | --- | --- |",
        *(f"| {' | '.join(cells)} |" for cells in (*working, *refused)),
    ]
    return "\n".join(lines) + "\n"


def test_the_table_is_up_to_date() -> None:
    if not transformers.__version__.startswith(f"{TABLE_VERSION}."):
        pytest.skip(f"the table is that of transformers {TABLE_VERSION}")
    assert all(available(model_type) for model_type in (*ARCHITECTURES, *REFUSED))
    assert TABLE.read_text(encoding="utf-8") == table(), "run `python -m tests.test_architectures`"


if __name__ == "__main__":
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(table(), encoding="utf-8")
