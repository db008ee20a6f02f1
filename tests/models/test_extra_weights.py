"""Checkpoints with weights beside the decoder, such as layers for multi-token prediction."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from cdmoe_plugin import CondenseConfig, CondensePlan, apply_plan, condense_pretrained
from tests.helpers import published
from tests.helpers.plans import some_plan
from tests.helpers.states import differing, state
from tests.helpers.tiny_models import random_ids, tiny_model

IDS = random_ids(5)
CONFIG = CondenseConfig(num_layers=1, num_experts=2, batch_size=2)


@pytest.fixture(scope="module")
def surrounded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published.beside(tmp_path_factory.mktemp("beside") / "checkpoint")


def ways(folder: Path, plan: CondensePlan, offload: Path) -> dict[str, dict[str, Any]]:
    return {
        "in memory": {"config": CONFIG, "calibration": IDS},
        "in part": {"plan": plan},
        "from disk": {"config": CONFIG, "calibration": IDS, "offload_folder": str(offload / "one")},
        "in part, from disk": {"plan": plan, "offload_folder": str(offload / "other")},
    }


@pytest.mark.parametrize("keep", [False, True])
def test_layers_that_are_called_like_decoder_layers(keep: bool, surrounded: Path, tmp_path: Path) -> None:
    plain = published.plain(tmp_path / "plain", tiny_model("qwen2_moe"))
    expected = condense_pretrained(plain, CONFIG, calibration=IDS)
    expected.save_pretrained(tmp_path / "expected")
    weights, before = published.read(tmp_path / "expected"), published.read(surrounded)
    extra = {key: before[key] for key in before if not key.startswith(("model.", "lm_head")) or ".layers.4." in key}
    assert len(extra) > 100
    for name, kwargs in ways(surrounded, expected.condense_plan, tmp_path).items():
        folder = tmp_path / name
        condense_pretrained(surrounded, keep_extra=keep, **kwargs).save_pretrained(folder)
        assert not differing(published.read(folder), weights | (extra if keep else {})), name
        config = published.config_of(folder)
        assert [config["num_nextn_predict_layers"], config["mtp_num_hidden_layers"]] == [int(keep)] * 2
        opened = AutoModelForCausalLM.from_pretrained(folder)
        assert not differing(state(opened), state(expected))
    # What a model that was opened again does not carry, its config does not promise.
    opened.save_pretrained(tmp_path / "again")
    assert published.config_of(tmp_path / "again")["num_nextn_predict_layers"] == 0
    assert opened.config.num_nextn_predict_layers == int(keep)


def test_extra_weights_in_files_of_a_size(surrounded: Path, tmp_path: Path) -> None:
    model = condense_pretrained(surrounded, plan=some_plan([1]), keep_extra=True)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="60KB")
    model.save_pretrained(tmp_path / "one", max_shard_size="60KB", variant="small")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = {path.name: path.stat().st_size for path in (tmp_path / "many").glob("*.safetensors")}
    assert set(index["weight_map"].values()) == files.keys()
    assert len(files) > 5
    assert max(files.values()) < 80_000
    for folder, kwargs in ((tmp_path / "one", {}), (tmp_path / "many", {}), (tmp_path / "one", {"variant": "small"})):
        assert not differing(state(AutoModelForCausalLM.from_pretrained(folder, **kwargs)), state(model))


def test_extra_weights_of_a_loaded_model_or_of_fewer_layers(surrounded: Path) -> None:
    with pytest.raises(ValueError, match="`keep_extra` reads weights from a checkpoint"):
        condense_pretrained(AutoModelForCausalLM.from_pretrained(surrounded), plan=some_plan([1]), keep_extra=True)
    config = CondenseConfig(num_layers=1, form="trim_block", layer_selection="similarity")
    with pytest.raises(ValueError, match="`keep_extra` is not supported for `form` 'trim_block'"):
        condense_pretrained(surrounded, config, calibration=IDS, keep_extra=True)


def test_a_loaded_model_declares_no_layers_that_it_lacks(surrounded: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(surrounded)
    assert model.config.num_nextn_predict_layers == 1
    assert apply_plan(model, some_plan([1])).config.num_nextn_predict_layers == 0


def test_speculative_decoding_with_the_layer_that_was_carried_over(tmp_path: Path) -> None:
    quantised, _ = published.deepseek_v3(tmp_path / "checkpoint", block=16)
    condense_pretrained(quantised, CONFIG, calibration=IDS, keep_extra=True).save_pretrained(tmp_path / "saved")
    saved, before = published.read(tmp_path / "saved"), published.read(quantised)
    key = "model.layers.4.mlp.experts.5.up_proj.weight"
    assert torch.equal(saved[key], published.from_fp8(before[key], before[f"{key}_scale_inv"], (16, 16)).bfloat16())
    assert torch.equal(saved["model.layers.4.eh_proj.weight"], before["model.layers.4.eh_proj.weight"])
    assert not any("scale" in key for key in saved)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    model._keys_to_ignore_on_load_unexpected = [r"model\.layers\.4\."]  # 61 in the class
    ids = torch.tensor(IDS[:1])
    drafted = model.generate(ids, max_new_tokens=10, do_sample=False, use_mtp=True)
    assert torch.equal(drafted, model.generate(ids, max_new_tokens=10, do_sample=False))
