"""Training condensed layers, or adapters on them, in models that bitsandbytes quantised; nothing is mocked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from cdmoe_plugin import condensed_module_names, unfreeze_condensed
from tests.helpers.quantized import (
    IDS,
    KINDS,
    checkpoint,
    distance,
    logits,
    open_in,
    quantised,
    skipping,
    with_weights_by_hand,
)
from tests.helpers.states import differing, state


@pytest.mark.parametrize("kind", KINDS)
def test_condensed_layers_learn_where_the_rest_is_quantised(kind: str, tmp_path: Path) -> None:
    checkpoint(tmp_path)
    model = skipping(tmp_path, kind)
    logits(model)  # an evaluation must not keep gradients from passing later
    names = unfreeze_condensed(model)
    assert {name.partition(".mlp.")[0] for name in names} == {"model.layers.1", "model.layers.2"}
    expected = with_weights_by_hand(tmp_path, model)
    unfreeze_condensed(expected)
    for trained in (model, expected):
        trained.train()(input_ids=IDS, labels=IDS).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert sorted(gradients) == sorted(names)
    for name, gradient in gradients.items():
        assert distance(gradient, expected.get_parameter(name).grad) < 1e-4, name
    before = state(model)
    bnb.optim.PagedAdamW8bit([p for p in model.parameters() if p.requires_grad], lr=1e-3).step()
    assert differing(before, state(model)) == sorted(names)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("skip", [True, False])
def test_lora(skip: bool, kind: str, tmp_path: Path) -> None:
    checkpoint(tmp_path)
    model = skipping(tmp_path, kind) if skip else open_in(tmp_path, kind)
    logits(model)
    before, targets = state(model), condensed_module_names(model)
    assert [name in quantised(model) for name in targets] == [not skip] * 6
    model = get_peft_model(model, LoraConfig(target_modules=targets, r=2, init_lora_weights=False)).train()
    adapters = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(adapters) == 2 * len(targets)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        losses.append(model(input_ids=IDS, labels=IDS).loss)
        losses[-1].backward()
        assert {name for name, p in model.named_parameters() if p.grad is not None} == adapters
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]
    after = {name.replace(".base_layer.", "."): tensor for name, tensor in state(model.get_base_model()).items()}
    assert differing(before, {name: tensor for name, tensor in after.items() if ".lora_" not in name}) == []


@pytest.mark.parametrize("optim", ["paged_adamw_8bit", "adamw_bnb_8bit"])
def test_trainer(optim: str, tmp_path: Path) -> None:
    checkpoint(tmp_path)
    model = skipping(tmp_path, "nf4")
    names, before = unfreeze_condensed(model), state(model)
    options: dict[str, Any] = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "learning_rate": 1e-3}
    arguments = TrainingArguments(str(tmp_path), optim=optim, max_steps=2, save_steps=2, **options)
    data = [{"input_ids": IDS[0], "labels": IDS[0]}] * 4
    with pytest.raises(ValueError, match="purely quantized models"):
        Trainer(model, arguments, train_dataset=data)
    model.is_quantized = False  # as the docstring of `unfreeze_condensed` tells
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    assert type(trainer.optimizer.optimizer) is bnb.optim.AdamW
    assert differing(before, state(model)) == sorted(names)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert differing(model.state_dict(), opened.state_dict()) == []


@pytest.mark.parametrize("storage", ["uint8", "bfloat16", None])
def test_quantised_layers_are_not_unfrozen(storage: str | None, tmp_path: Path) -> None:
    checkpoint(tmp_path)
    model = open_in(tmp_path, "nf4", bnb_4bit_quant_storage=storage) if storage else open_in(tmp_path, "int8")
    words = (
        r"can't be trained.*LoraConfig.*llm_int8_skip_modules=\['model.layers.1.mlp', 'model.layers.2.mlp', 'lm_head'\]"
    )
    with pytest.raises(ValueError, match=words):
        unfreeze_condensed(model)
    assert not any(p.requires_grad for p in model.get_submodule("model.layers.1.mlp").parameters())
