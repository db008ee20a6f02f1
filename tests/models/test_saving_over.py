"""An offloaded model saved where the files are that it reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from cdmoe_plugin import apply_plan, condense_pretrained, export_stock
from tests.helpers.models import sparse_model
from tests.helpers.plans import some_plan

IDS = torch.arange(12)[None]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


@pytest.mark.parametrize("size", ["40KB", "5GB"])
def test_the_base_is_not_replaced(size: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    sparse_model("qwen2_moe").save_pretrained(base, max_shard_size=size)
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    model = condense_pretrained(base, plan=some_plan([1, 3]), offload_folder=tmp_path / "offload")
    expected = logits(model)
    link = tmp_path / "link"
    link.symlink_to(base)
    for folder in (base, link):
        with pytest.raises(ValueError, match="from which the model's offloaded weights are read"):
            model.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before
    # Into and around the offload folder, the model goes on.
    for folder in (tmp_path / "offload", tmp_path, base / "inside"):
        model.save_pretrained(folder)
        assert torch.equal(logits(model), expected)
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), expected)


def test_export_over_the_base(tmp_path: Path) -> None:
    sparse_model("qwen2_moe").save_pretrained(tmp_path / "base")
    model = condense_pretrained(
        tmp_path / "base", plan=some_plan([1]).as_trimming("trim_block"), offload_folder=tmp_path / "offload"
    )
    expected = logits(model)
    with pytest.raises(ValueError, match="from which the model's offloaded weights are read"):
        export_stock(model, tmp_path / "base")
    assert torch.equal(logits(model), expected)


def test_a_model_in_memory_may_replace_its_base(tmp_path: Path) -> None:
    sparse_model("qwen2_moe").save_pretrained(tmp_path)
    model = apply_plan(AutoModelForCausalLM.from_pretrained(tmp_path), some_plan([1, 3]))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)
