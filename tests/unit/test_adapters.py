"""Adapters that are not merged into the weights: refused before anything expensive, and never lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    IA3Config,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.functional import delete_adapter
from transformers import AutoModelForCausalLM, PreTrainedModel

from cdmoe_plugin import (
    CondenseConfig,
    apply_plan,
    condense_pretrained,
    export_stock,
    search_plan,
    unfreeze_condensed,
)
from cdmoe_plugin.scripts.main import main
from tests.helpers.models import IDS, sparse_model
from tests.helpers.plans import some_plan
from tests.helpers.states import differing, state

PLAN = some_plan([1])
SEARCH = CondenseConfig(num_layers=1, num_experts=2)
LORA: dict[str, Any] = {"target_modules": ["q_proj"], "init_lora_weights": False}
KINDS: dict[str, Callable[[], Any]] = {
    "lora": lambda: LoraConfig(**LORA),
    "dora": lambda: LoraConfig(**LORA, use_dora=True),
    "of experts": lambda: LoraConfig(target_parameters=["mlp.experts.down_proj"]),
    "whole head": lambda: LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "ia3": lambda: IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
}


def refused(model: Any, match: str = "`model = peft_model.merge_and_unload") -> None:
    for call in (
        lambda: condense_pretrained(model, SEARCH, calibration=IDS),
        lambda: condense_pretrained(model, plan=PLAN),
        lambda: search_plan(model, SEARCH, calibration=IDS),
        lambda: apply_plan(model, PLAN),
    ):
        with pytest.raises(ValueError, match=match):
            call()


@pytest.mark.parametrize("kind", KINDS)
def test_loaded_models(kind: str) -> None:
    wrapper = get_peft_model(sparse_model("qwen2_moe"), KINDS[kind](), adapter_name="mine")
    before = state(wrapper)
    for model in (wrapper, wrapper.get_base_model(), wrapper.base_model.model):
        refused(model, match="adapters \\('mine'")
    with wrapper.disable_adapter():
        refused(wrapper.get_base_model())
    assert not differing(before, state(wrapper))
    merged = wrapper.merge_and_unload()  # the message's advice
    assert apply_plan(merged, PLAN).condense_plan.layers == PLAN.layers


def with_adapter(model: PreTrainedModel) -> PreTrainedModel:
    """What `model.add_adapter` does. transformers 5.24 refuses to do it with a peft before 0.22."""
    inject_adapter_in_model(LoraConfig(**LORA), model, "mine")
    model._hf_peft_config_loaded = True
    return model


def test_adapters_of_transformers() -> None:
    model = with_adapter(sparse_model("qwen2_moe"))
    refused(model, match="adapters \\('mine', as in model.layers.0.self_attn.q_proj")
    delete_adapter(model, "mine", prefix="lora_")
    del model.peft_config
    model._hf_peft_config_loaded = False
    refused(model, match="deleted")


def test_prompts() -> None:
    wrapper = get_peft_model(sparse_model("qwen2_moe"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    refused(wrapper, match="`peft_model.get_base_model\\(\\)`")
    assert apply_plan(wrapper.get_base_model(), PLAN).condense_plan.layers == PLAN.layers


def test_export_and_training() -> None:
    model = apply_plan(sparse_model("qwen3_moe"), some_plan([1, 2, 3]))
    with_adapter(model)
    for call in (lambda: export_stock(model, "nowhere"), lambda: unfreeze_condensed(model)):
        with pytest.raises(ValueError, match="not merged"):
            call()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an adapter of it, and the base with the adapter's files beside it."""
    place = tmp_path_factory.mktemp("adapters")
    sparse_model("qwen2_moe").save_pretrained(place / "base")
    base = AutoModelForCausalLM.from_pretrained(place / "base")
    get_peft_model(base, LoraConfig(**LORA, task_type="CAUSAL_LM")).save_pretrained(place / "adapter")
    shutil.copytree(place / "base", place / "beside")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(place / "adapter" / name, place / "beside")
    return place


@pytest.mark.parametrize("name", ["adapter", "beside"])
def test_checkpoints(
    folders: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    match = f"{folders / 'base'}.* merge" if name == "beside" else f"adapter for {folders / 'base'}. Merge"
    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", None)  # no weight is read
    for kwargs in ({"plan": PLAN}, {"config": SEARCH, "calibration": IDS}, {"plan": PLAN, "offload_folder": "nowhere"}):
        with pytest.raises(ValueError, match=match):
            condense_pretrained(folders / name, **kwargs)
    for command in ("estimate", "condense"):
        options = ["--output_dir", str(tmp_path / "out")] if command == "condense" else []
        assert main([command, "--model_name_or_path", str(folders / name), "--num_layers", "1", *options])
        assert "adapter" in capsys.readouterr().err


def test_the_advice_for_checkpoints_works(folders: Path, tmp_path: Path) -> None:
    ids = torch.tensor([IDS[0]]) if not torch.is_tensor(IDS[0]) else IDS[0][None]
    base: Any = AutoModelForCausalLM.from_pretrained(folders / "base")
    expected = PeftModel.from_pretrained(base, folders / "adapter")(ids).logits
    auto: Any = AutoPeftModelForCausalLM.from_pretrained(folders / "adapter")
    auto.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(ids).logits, expected)
    assert condense_pretrained(tmp_path / "merged", plan=PLAN).condense_plan.layers == PLAN.layers


def test_hub_name_in_the_cache(folders: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--someone--lora" / "snapshots" / ("0" * 40)
    shutil.copytree(folders / "adapter", snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    with pytest.raises(ValueError, match="someone/lora is not a model, but a LORA adapter"):
        condense_pretrained("someone/lora", plan=PLAN, cache_dir=tmp_path)


def test_unreadable_adapter_config(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "adapter", tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config\.json that can't be read"):
        condense_pretrained(tmp_path / "a", plan=PLAN)
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({"num_virtual_tokens": 3}))
    with pytest.raises(ValueError, match="a prompt, which can't be merged"):
        condense_pretrained(tmp_path / "a", plan=PLAN)
    with pytest.raises(ValueError, match="`adapter_kwargs` is not supported"):
        condense_pretrained(folders / "base", plan=PLAN, adapter_kwargs={"subfolder": "x"})


def test_an_adapter_left_in_the_target(folders: Path, tmp_path: Path) -> None:
    """It would be put on the saved model, or the sparse base would be opened instead of it."""
    target = shutil.copytree(folders / "beside", tmp_path / "target")
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    model = apply_plan(sparse_model("qwen3_moe"), some_plan([1, 2, 3]))
    for save in (model.save_pretrained, lambda folder: export_stock(model, folder)):
        with pytest.raises(ValueError, match="has an adapter in it"):
            save(target)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
