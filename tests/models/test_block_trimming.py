"""Decoder layers dropped whole: what remains is a stock model, in memory and on disk."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from cdmoe_plugin import CondenseConfig, CondensePlan, apply_plan, condense_pretrained, unfreeze_condensed
from cdmoe_plugin.blocks import UnsupportedModelError, find_sparse_blocks
from cdmoe_plugin.estimate import dry_run
from tests.helpers.models import IDS, SEARCHABLE, sparse_model
from tests.helpers.naive import layers_of
from tests.helpers.states import differing, state, state_of
from tests.helpers.tiny_models import random_ids, tiny_model
from tests.helpers.trimming import by_hand, first_output, trim_plan

# Layers of beam and inkling2 read what layers at fixed places leave; jamba's attention comes at fixed places.
REFUSED = {"beam": "residual_add_idx", "inkling2_text": "is_block_boundary"}
REFUSED["jamba"] = "JambaAttentionDecoderLayer instead of JambaMambaDecoderLayer"
REFUSED["gemma4_text"] = "embed_tokens_per_layer would have the weights"  # one embedding for all layers
SAVED = ["qwen2_moe", "mixtral", "glm4_moe", "qwen3_moe", "granitemoeshared", "deepseek_v3"]
SAVED += ["qwen3_next", "granitemoe_swa", "laguna", "dots3_note_text"]


def six(model_type: str) -> PreTrainedModel:
    """Six layers, of several kinds where the architecture has any."""
    return sparse_model(model_type) if model_type == "deepseek" else tiny_model(model_type, num_layers=6)


def dropped_of(model: PreTrainedModel) -> list[int]:
    """The first sparse layer and one from the middle: all that follow move."""
    sparse = [block.layer for block in find_sparse_blocks(model)]
    return [sparse[-2], sparse[0]]


@pytest.mark.parametrize("model_type", [*SEARCHABLE, "deepseek"])
def test_without_blocks(model_type: str) -> None:
    model = six(model_type)
    dropped = dropped_of(model)
    kept = [i for i in range(len(layers_of(model))) if i not in dropped]
    before = state_of(model)
    if model_type in REFUSED:
        with pytest.raises(UnsupportedModelError, match=REFUSED[model_type]):
            apply_plan(model, trim_plan("trim_block", dropped))
        assert not differing(state_of(model)[0], before[0])
        assert state_of(model)[1] == before[1]
        return
    expected, modules, stock = by_hand(model, "trim_block", dropped, IDS), list(layers_of(model)), type(model)
    plan = trim_plan("trim_block", dropped)
    assert apply_plan(model, plan) is model
    assert type(model) is stock
    assert model.config.num_hidden_layers == len(kept)
    assert all(layer is modules[old] for layer, old in zip(layers_of(model), kept, strict=True))
    torch.testing.assert_close(first_output(model, IDS), expected, rtol=1e-5, atol=1e-5)
    assert model.condense_plan.layers == plan.layers
    for value in vars(model.config).values():
        assert not (isinstance(value, list) and len(value) == len(kept) + 2)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("model_type", [*SAVED, "minimax", "deepseek"])
def test_generation(model_type: str, use_cache: bool) -> None:
    model = six(model_type)
    apply_plan(model, trim_plan("trim_block", dropped_of(model)))
    prompt = torch.tensor([random_ids(1, 6)[0]])
    options: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    found = model.generate(prompt, use_cache=use_cache, **options)
    greedy = prompt
    for _ in range(6):
        logits = model(greedy, use_cache=False).logits[:, -1]
        logits[:, 2] = -torch.inf  # no end before its time
        greedy = torch.cat([greedy, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(found, greedy)


STOCK = """
import sys
sys.modules["cdmoe_plugin"] = None  # importing it fails
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
for folder in sorted(Path(sys.argv[1]).iterdir()):
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, trust_remote_code=folder.name.startswith("mlp")
    )
    assert not any(info.values()), (folder.name, info)
    logits = model(load_file(sys.argv[2])["ids"], use_cache=False).logits
    save_file({"logits": logits.detach()}, folder / "logits.safetensors")
"""


def test_stock_checkpoints(tmp_path: Path) -> None:
    """Another process opens block-trimmed models as what they are, and models without MLPs by the copied file."""
    ids, expected = torch.tensor(IDS[:1]), {}
    for model_type, form in [*((name, "trim_block") for name in SAVED), ("qwen2_moe", "trim_layer")]:
        model = six(model_type)
        dropped = dropped_of(model)
        by_hooks = by_hand(model, form, dropped, IDS[:1])[0]
        apply_plan(model, trim_plan(form, dropped))
        folder = tmp_path / "models" / (model_type if form == "trim_block" else f"mlp {model_type}")
        model.save_pretrained(folder)
        expected[folder] = model(ids, use_cache=False).logits, by_hooks[None]
        config = json.loads((folder / "config.json").read_text())
        if form == "trim_block":
            assert config["model_type"] == model_type
            assert not {"auto_map", "condense_config"} & config.keys()
            assert {path.name for path in folder.iterdir()} >= {"config.json", "model.safetensors"}
            again = AutoModelForCausalLM.from_pretrained(folder)
            assert type(again) is type(model)
            assert not differing(state(again), state(model))
    save_file({"ids": ids}, tmp_path / "ids")
    command = [sys.executable, "-c", STOCK, tmp_path / "models", tmp_path / "ids"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    for folder, (own, by_hooks) in expected.items():
        found = load_file(folder / "logits.safetensors")["logits"]
        torch.testing.assert_close(found, own, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found, by_hooks, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", ["granitemoe_swa", "exaone_moe", "mellum"])
def test_each_layer_keeps_its_window(model_type: str) -> None:
    types = ("full_attention", "sliding_attention", "sliding_attention", "full_attention", "sliding_attention")
    model = tiny_model(model_type, num_layers=5, layer_types=types, sliding_window=3)
    dropped = [block.layer for block in find_sparse_blocks(model)][1:3]
    prompts = random_ids(3, 14)
    expected = by_hand(model, "trim_block", dropped, prompts)
    apply_plan(model, trim_plan("trim_block", dropped))
    assert model.config.layer_types == [kind for i, kind in enumerate(types) if i not in dropped]
    torch.testing.assert_close(first_output(model, prompts), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = tiny_model("qwen2_moe", dtype=dtype)
    expected = by_hand(model, "trim_block", [2], IDS)
    apply_plan(model, trim_plan("trim_block", [2]))
    assert model.dtype == dtype
    torch.testing.assert_close(first_output(model, IDS), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("selection", ["similarity", "greedy"])
def test_from_a_checkpoint(selection: str, tmp_path: Path) -> None:
    tiny_model("qwen2_moe", num_layers=6).save_pretrained(tmp_path / "sparse")
    config = CondenseConfig(2, form="trim_block", layer_selection=selection)
    model = condense_pretrained(tmp_path / "sparse", config, calibration=IDS)
    plan = model.condense_plan
    plan.save(tmp_path / "plan.json")
    again = condense_pretrained(tmp_path / "sparse", plan=tmp_path / "plan.json", device_map="cpu")
    assert not differing(state(model), state(again))
    assert again.condense_plan == plan == CondensePlan.load(tmp_path / "plan.json")
    assert f"{model.num_parameters():,}" in dry_run(tmp_path / "sparse", plan)
    assert f"{model.num_parameters():,}" in dry_run(tmp_path / "sparse", config)
    with pytest.raises(ValueError, match="not condensed"):
        unfreeze_condensed(model)
    with pytest.raises(ValueError, match="num_hidden_layers is 6, this model's is 4"):
        apply_plan(model, plan)
    model.save_pretrained(tmp_path / "trimmed")
    both = condense_pretrained(tmp_path / "trimmed", CondenseConfig(1, 1), calibration=IDS)  # a sparse model again
    assert type(both).__name__ == "CDMoEQwen2MoeForCausalLM"
    assert both.condense_plan.form == "condense"


def test_the_device_map_is_renumbered() -> None:
    model = tiny_model("qwen2_moe")
    model.hf_device_map = {"model.embed_tokens": 0, **{f"model.layers.{i}": i for i in range(4)}, "lm_head": 3}
    apply_plan(model, trim_plan("trim_block", [1]))
    layers = {"model.layers.0": 0, "model.layers.1": 2, "model.layers.2": 3}
    assert model.hf_device_map == {"model.embed_tokens": 0, **layers, "lm_head": 3}
