"""The verbs inside `torch.autocast`: the same plan and the same weights as outside."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

from cdmoe_plugin import (
    CondenseAdapterConfig,
    CondenseConfig,
    apply_plan,
    condense_pretrained,
    export_dense,
    export_stock,
    search_plan,
)
from cdmoe_plugin.blocks import find_sparse_blocks
from cdmoe_plugin.export.top_k import export_top_k
from tests.helpers.models import sparse_model
from tests.helpers.plans import some_plan
from tests.helpers.states import differing, state
from tests.helpers.tiny_models import tiny_model

TOKENS = [[(7 * i + 3 * j) % 120 + 4 for j in range(32)] for i in range(12)]
CONFIG = CondenseConfig(num_layers=2, num_experts=2, num_samples=12, max_length=32)


def condensed(model_type: str, **kwargs: Any) -> Any:
    return condense_pretrained(sparse_model(model_type), replace(CONFIG, **kwargs), calibration=TOKENS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("refit", [None, "down_proj"])
def test_search_and_condensing(dtype: torch.dtype, refit: str | None) -> None:
    expected = condensed("qwen2_moe", refit=refit)
    with torch.autocast("cpu", dtype=dtype):
        found = condensed("qwen2_moe", refit=refit)
        assert torch.is_autocast_enabled("cpu")
    assert found.condense_plan == expected.condense_plan
    assert not differing(state(found), state(expected))


def test_search_and_plan_alone(tmp_path: Any) -> None:
    expected = search_plan(sparse_model("qwen3_moe"), CONFIG, calibration=TOKENS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert search_plan(sparse_model("qwen3_moe"), CONFIG, calibration=TOKENS) == expected
        model = apply_plan(sparse_model("qwen3_moe"), some_plan([1]))
        export_stock(model, tmp_path / "stock")
    assert not differing(state(model), state(apply_plan(sparse_model("qwen3_moe"), some_plan([1]))))


@pytest.mark.parametrize("export", [export_dense, export_top_k])
def test_exports_to_other_forms(export: Any, tmp_path: Path) -> None:
    """Logits are compared before anything is written, and in half precision other functions would look alike."""
    model = sparse_model("qwen3_moe")
    apply_plan(model, some_plan([block.layer for block in find_sparse_blocks(model)]))
    seen = []
    model.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    export(model, tmp_path / "outside")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        export(model, tmp_path / "inside")
    assert seen
    assert not any(seen)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("outside", "inside")]
    assert files[0] == files[1]


def test_adapters() -> None:
    # A latent map is multiplied into the experts' weights when they are folded.
    expected = apply_plan(tiny_model("nemotron_h", moe_latent_size=24), some_plan([1]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model = get_peft_model(
            tiny_model("nemotron_h", moe_latent_size=24), CondenseAdapterConfig(plan=some_plan([1]))
        ).merge_and_unload()
    assert not differing(state(model), state(expected))
