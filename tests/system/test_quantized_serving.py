"""Condensed checkpoints quantised for servers by llm-compressor and torchao, where these are installed.

llm-compressor 0.14 needs transformers 5.17 or older, so that it is run in an environment of its own.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, TorchAoConfig

from cdmoe_plugin import apply_plan
from cdmoe_plugin.model.lookup import condensed_layers
from tests.helpers.plans import some_plan
from tests.helpers.served import record
from tests.helpers.tiny_models import tiny_model

ROWS = torch.randint(3, 128, (16, 32), generator=torch.Generator().manual_seed(0)).tolist()
IDS = torch.tensor(ROWS[:2])
# Multiples of the groups of 128 weights that W4A16 scales together.
WIDE = {"hidden": 128, "heads": 2, "kv_heads": 1, "head_width": 64, "expert_width": 128, "dense_width": 256}
LAYERS = {"partly condensed": [1, 2], "condensed": [1, 2, 3]}


def checkpoint(form: str, folder: Path) -> PreTrainedModel:
    """A qwen3_moe model with some sparse layers condensed, or all, saved in a folder."""
    model = apply_plan(tiny_model("qwen3_moe", **WIDE), some_plan(LAYERS[form]))
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits.float()


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def projections(model: PreTrainedModel) -> list[nn.Module]:
    """All projections of the condensed layers."""
    return [getattr(mlp, f"{name}_proj") for mlp in condensed_layers(model).values() for name in ("gate", "up", "down")]


@pytest.mark.slow
@pytest.mark.parametrize("form", LAYERS)
@pytest.mark.parametrize(("scheme", "limit"), [("FP8_DYNAMIC", 0.3), ("W4A16", 0.5)])
def test_llm_compressor(scheme: str, limit: float, form: str, tmp_path: Path) -> None:
    compressor = pytest.importorskip("llmcompressor")
    from datasets import Dataset
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier

    full = checkpoint(form, tmp_path / "full")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    if scheme == "W4A16":
        recipe = GPTQModifier(targets="Linear", scheme=scheme, ignore=["lm_head"])
        rows = Dataset.from_list([{"input_ids": row, "attention_mask": [1] * len(row)} for row in ROWS])
        words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<pad>": 0})), pad_token="<pad>")
        calibration = {"dataset": rows, "max_seq_length": 32, "num_calibration_samples": 16}
        compressor.oneshot(model=model, recipe=recipe, processor=words, **calibration)
    else:
        recipe = QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head"])
        compressor.oneshot(model=model, recipe=recipe)
    found = logits(model)
    model.save_pretrained(tmp_path / "quantised", save_compressed=True)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantised")
    assert json.loads((tmp_path / "quantised" / "config.json").read_text())["model_type"] == "cdmoe_qwen3_moe"
    assert all(hasattr(linear, "quantization_scheme") for linear in projections(again))
    # transformers opens experts of sparse layers dequantised to bfloat16, so that their inputs are not rounded to FP8.
    assert difference(logits(again), found) < (1e-5 if form == "condensed" else 0.03)
    error = difference(found, logits(full))
    engine = f"llm-compressor {version('llmcompressor')}, transformers {version('transformers')}"
    record(engine, f"{form}, {'GPTQ W4A16' if scheme == 'W4A16' else 'FP8'}", "qwen3_moe", error)
    assert 0 < error < limit


@pytest.mark.slow
@pytest.mark.parametrize("form", LAYERS)
def test_torchao(form: str, tmp_path: Path) -> None:
    torchao = pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig

    full = checkpoint(form, tmp_path / "full")
    wanted = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=["lm_head"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "full", quantization_config=wanted, dtype="float32")
    assert all(type(linear.weight).__module__.startswith("torchao") for linear in projections(model))
    error = difference(logits(model), logits(full))
    record(
        f"torchao {torchao.__version__}, transformers {version('transformers')}", f"{form}, int8", "qwen3_moe", error
    )
    assert 0 < error < 0.05
    model.save_pretrained(tmp_path / "quantised")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantised", dtype="float32")
    assert difference(logits(again), logits(model)) < 1e-6
