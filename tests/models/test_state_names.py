"""`load_state_dict` with the names of checkpoints, as transformers' Trainer and `load_sharded_checkpoint` call it."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments, trainer_utils
from transformers.trainer_utils import load_sharded_checkpoint

from cdmoe_plugin import apply_plan
from tests.helpers.checkpoints import keys_on_disk
from tests.helpers.models import TYPES, sparse_model
from tests.helpers.plans import some_plan
from tests.helpers.states import differing, state
from tests.helpers.tiny_models import ARCHITECTURES

ROWS = [{"input_ids": list(range(12)), "labels": list(range(12))}] * 4
# Renamed on disk: mixers, norms and heads as well, by patterns, groups and offsets.
RENAMED = ["mixtral", "kimi_linear", "minimax", "phimoe", "nemotron_h", "deepseek_v4", "inkling2_text", "axk2", "hy_v4"]


def condensed(model_type: str, partly: bool = False) -> PreTrainedModel:
    layers = [1, 2, 3] if model_type == "deepseek" else list(ARCHITECTURES[model_type].sparse_layers)
    return apply_plan(sparse_model(model_type), some_plan(layers[:1] if partly else layers))


def zeroed(model: Any) -> Any:
    for tensor in (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())):
        tensor.data.zero_()
    return model


def saved_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("partly", [False, True])
@pytest.mark.parametrize("model_type", ["deepseek", "qwen2_moe", "dbrx", *(name for name in RENAMED if name in TYPES)])
def test_a_checkpoint_is_restored(
    model_type: str, partly: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one file and in shards that cut the experts of a layer, with the sparse layers that are left."""
    monkeypatch.setattr(trainer_utils, "gc", SimpleNamespace(collect=lambda: None))  # most of the time, for each shard
    model = condensed(model_type, partly)
    expected = saved_state(model)
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "shards", max_shard_size=(tmp_path / "model.safetensors").stat().st_size // 4)
    if model_type in RENAMED:
        assert keys_on_disk(tmp_path) - model.state_dict().keys()
    opened = type(model).from_pretrained(tmp_path)
    for each in (model, opened):
        zeroed(each).load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
        assert not differing(saved_state(each), expected)
        load_sharded_checkpoint(zeroed(each), tmp_path / "shards", strict=False)
        assert not differing(saved_state(each), expected)


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize("partly", [False, True])
def test_wrapped_models(partly: bool, tmp_path: Path) -> None:
    model = condensed("mixtral", partly)
    expected = saved_state(model)
    model.save_pretrained(tmp_path)
    disk = load_file(tmp_path / "model.safetensors")

    wrapper = Wrapper(zeroed(copy.deepcopy(model)))
    wrapper.load_state_dict({f"module.{name}": tensor for name, tensor in disk.items()}, strict=False)
    assert not differing(saved_state(wrapper.module), expected)

    checkpointing = zeroed(copy.deepcopy(model))
    layer_class = type(model.base_model.layers[0])
    apply_activation_checkpointing(checkpointing, check_fn=lambda module: isinstance(module, layer_class))
    for given in (disk, expected):
        zeroed(checkpointing).load_state_dict(given)
        assert not differing(saved_state(checkpointing), expected)

    with_lora = zeroed(copy.deepcopy(model))
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj", "down_proj"]), with_lora)
    with_lora.load_state_dict(disk, strict=False)
    found = {name.replace(".base_layer", ""): tensor for name, tensor in saved_state(with_lora).items()}
    assert not differing({name: found[name] for name in expected}, expected)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_names_of_another_wrapper_are_refused(prefix: str) -> None:
    model = condensed("mixtral")
    before = state(model)
    others = {prefix + name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"such as '{prefix}model.layers.0"):
        model.load_state_dict(others, strict=False)
    assert not differing(state(model), before)


def test_parts_of_a_state_dict_are_loaded_as_by_torch() -> None:
    model = condensed("qwen2_moe")
    one = {"lm_head.weight": torch.zeros_like(model.lm_head.weight)}
    result = model.load_state_dict({**one, "value_head.weight": torch.zeros(1)}, strict=False)
    assert result.unexpected_keys == ["value_head.weight"]
    assert not model.lm_head.weight.any()
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(one)


def trainer(model: Any, folder: Path, **arguments: Any) -> Trainer:
    quiet: dict[str, Any] = {"use_cpu": True, "report_to": [], "disable_tqdm": True}
    usual = {"learning_rate": 1e-2, "max_steps": 2, "save_steps": 2}
    args = TrainingArguments(str(folder), **quiet, **{**usual, **arguments})
    return Trainer(model, args, train_dataset=ROWS, eval_dataset=ROWS)


def test_trainer_resumes(tmp_path: Path) -> None:
    model = condensed("mixtral")
    model.save_pretrained(tmp_path / "start")
    trainer(model, tmp_path / "run").train()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "start")
    trainer(again, tmp_path / "again").train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert not differing(saved_state(again), saved_state(model))


def test_trainer_loads_the_best_model(tmp_path: Path) -> None:
    """The loss rises with a learning rate that is far too large, so the best model is the first."""
    model = condensed("mixtral")
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 3}
    run = trainer(model, tmp_path / "run", **best, learning_rate=10.0)
    run.train()
    assert run.state.best_model_checkpoint is not None
    assert run.state.best_model_checkpoint.endswith("checkpoint-1")
    saved = AutoModelForCausalLM.from_pretrained(run.state.best_model_checkpoint)
    assert not differing(saved_state(model), saved_state(saved))
