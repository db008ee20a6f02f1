"""CondensedSFTTrainer: what learns and what does not, what is measured, and what is resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils import logging

from cdmoe_plugin import apply_plan, condensed_module_names, search_plan
from cdmoe_plugin.blocks import find_sparse_blocks
from cdmoe_plugin.config import CondenseConfig
from cdmoe_plugin.model.training import quantised_around_condensed
from cdmoe_plugin.recovery import condensed_parameters, load_condensed_weights
from cdmoe_plugin.recovery.trainer import fill_up
from tests.helpers.models import FROM_DISK, IDS, build, sparse_model
from tests.helpers.plans import some_plan
from tests.helpers.recovery import condensed_model, lm_rows, make_trainer, sft_rows, word_tokenizer
from tests.helpers.states import differing, state
from tests.helpers.tiny_models import tiny_model


@pytest.mark.parametrize("model_type", ["qwen2_moe", "mixtral", "deepseek", "granitemoeshared"])
def test_exactly_the_condensed_layers_change(model_type: str, tmp_path: Path) -> None:
    model = condensed_model(model_type)
    before = state(model)
    trainer = make_trainer(model, tmp_path, weight_decay=0.1, save_strategy="steps", save_steps=3)
    trainer.train()
    changed = differing(before, state(trainer.model))
    assert changed == sorted(condensed_parameters(model))
    assert changed == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3")
    assert differing(state(model), state(saved)) == []


def test_lora_goes_on_the_condensed_projections_alone(tmp_path: Path) -> None:
    model = condensed_model()
    expected = condensed_module_names(model)
    before = state(model)
    trainer = make_trainer(model, tmp_path, peft_config=LoraConfig(r=2, task_type="CAUSAL_LM"))
    trainer.train()
    assert isinstance(trainer.model, PeftModel)
    after = {name.removeprefix("base_model.model."): t for name, t in state(trainer.model).items()}
    adapters = {name for name in after if "lora_" in name}
    assert {name.partition(".lora_")[0] for name in adapters} == set(expected)
    frozen = {name.replace(".base_layer.", "."): t for name, t in after.items() if name not in adapters}
    assert differing(before, frozen) == []
    assert all(t.abs().max() > 0 for name, t in after.items() if "lora_B" in name)


def test_half_precision_is_trained_in_float32(tmp_path: Path) -> None:
    model = condensed_model().to(torch.bfloat16)
    before = state(model)
    # Steps as small as these are lost in bfloat16, which has 8 bits.
    trainer = make_trainer(model, tmp_path, learning_rate=1e-6, bf16=True)
    trainer.train()
    ours = condensed_parameters(model)
    assert {p.dtype for p in ours.values()} == {torch.float32}
    assert {t.dtype for name, t in state(model).items() if name not in ours} <= {torch.bfloat16, torch.float32}
    assert differing({k: v for k, v in before.items() if k not in ours}, state_without(model, ours)) == []
    assert all(not torch.equal(p, before[name].float()) for name, p in ours.items())


def state_without(model: Any, names: Any) -> dict[str, torch.Tensor]:
    return {name: t for name, t in state(model).items() if name not in names}


@pytest.mark.parametrize("packing", [False, True])
def test_rows_that_are_too_long_are_counted(packing: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": row["instruction"], "completion": " " + row["output"]} for row in sft_rows()]
    logging.enable_propagation()
    trainer = make_trainer(condensed_model(), tmp_path, rows, packing=packing)
    logging.disable_propagation()
    assert trainer.dropped_rows == {"train": 8, "eval": 8}
    assert "8 of 40 rows of the train data are dropped" in caplog.text


def test_whole_documents_are_packed_and_none_is_dropped(tmp_path: Path) -> None:
    trainer = make_trainer(condensed_model(), tmp_path, packing=True, packing_strategy="bfd_split", max_length=16)
    tokenizer = word_tokenizer()
    words = sum(len(tokenizer(row["text"])["input_ids"]) + 1 for row in lm_rows())  # and one EOS each
    assert sum(sum(label != -100 for label in row["labels"]) for row in trainer.train_dataset) == words
    assert trainer.dropped_rows == {"train": 0, "eval": 0}


def test_held_out_loss_is_the_mean_over_tokens(tmp_path: Path) -> None:
    model = condensed_model()
    rows = [{"prompt": row["instruction"], "completion": " " + row["output"]} for row in sft_rows(7)]
    trainer = make_trainer(model, tmp_path, rows, max_length=64, per_device_eval_batch_size=3)
    loss = trainer.evaluate()["eval_loss"]
    tokenizer, total, count = word_tokenizer(), 0.0, 0
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = torch.tensor([prompt + tokenizer(row["completion"])["input_ids"] + [tokenizer.eos_token_id]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0].double()
        scores = torch.log_softmax(logits, -1)[torch.arange(ids.shape[1] - 1), ids[0, 1:]][len(prompt) - 1 :]
        total, count = total - float(scores.sum()), count + len(scores)
    assert loss == pytest.approx(total / count, rel=1e-5)


def test_added_rows_have_nothing_to_learn() -> None:
    rows = Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [5, 6, 7], "seq_lengths": [3]}] * 5)
    filled = fill_up(rows, 4)
    assert len(filled) == 8
    assert filled[:5] == rows[:]
    assert filled[5:] == {"input_ids": [[5]] * 3, "labels": [[-100]] * 3, "seq_lengths": [[1]] * 3}
    assert fill_up(filled, 4) is filled


@pytest.mark.parametrize("model_type", FROM_DISK)
def test_condensed_weights_are_found_under_their_names_on_disk(model_type: str, tmp_path: Path) -> None:
    model = sparse_model(model_type)
    block = find_sparse_blocks(model)[-1]
    apply_plan(model, some_plan([block.layer], block.num_experts)).save_pretrained(tmp_path)
    before = state(model)
    for parameter in condensed_parameters(model).values():
        parameter.data = torch.full_like(parameter, 9.0)
    load_condensed_weights(model, tmp_path)
    assert differing(before, state(model)) == []


def test_weights_of_another_model_are_refused_and_nothing_changes(tmp_path: Path) -> None:
    condensed_model(layers=(1, 2)).save_pretrained(tmp_path)
    model = condensed_model()
    before = state(model)
    with pytest.raises(ValueError, match=r"layers\.3\.mlp"):
        load_condensed_weights(model, tmp_path)
    assert differing(before, state(model)) == []


def test_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    # mixtral's condensed layers have other names on disk than in memory, where `Trainer` would only warn.
    steps = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    model = condensed_model("mixtral")
    trainer = make_trainer(model, tmp_path, **steps, **best)
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-1")
    assert differing(state(saved), state(model)) == []


def test_nothing_to_train_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not condensed"):
        make_trainer(tiny_model("qwen2_moe"), tmp_path)
    model = tiny_model("mixtral")
    plan = search_plan(model, CondenseConfig(num_layers=1, num_experts=0), calibration=IDS)
    with pytest.raises(ValueError, match="nothing to train"):
        make_trainer(apply_plan(model, plan), tmp_path)
    rows = [{"prompt": "w1 w2 w3", "completion": " w4"}] * 4
    with pytest.raises(ValueError, match="No row of the train data is left"):
        make_trainer(condensed_model(), tmp_path, rows, max_length=2)


def test_routers_that_are_gone_can_not_be_balanced(tmp_path: Path) -> None:
    model = condensed_model(layers=(1, 2, 3))
    with pytest.raises(ValueError, match="no router is left"):
        make_trainer(model, tmp_path, router_aux_loss_coef=0.1)


# --- 4 and 8 bit ---


@pytest.fixture(scope="module")
def wide_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough for bitsandbytes' blocks of 64."""
    folder = tmp_path_factory.mktemp("wide")
    model = build(
        "deepseek", num_experts=8, hidden_size=64, num_heads=4, num_kv_heads=4, expert_width=32, shared_width=64
    )
    apply_plan(model, some_plan([1, 3])).save_pretrained(folder)
    return folder


def open_quantised(folder: Path, bits: int) -> Any:
    config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_compute_dtype=torch.float32)
    config = quantised_around_condensed(config, AutoConfig.from_pretrained(folder))
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map={"": "cpu"})


@pytest.mark.parametrize("model_type", ["qwen2_moe", "llama4_text", "gemma4_text"])
def test_names_of_what_is_not_quantised(model_type: str, tmp_path: Path) -> None:
    model = apply_plan(tiny_model(model_type), some_plan([1, 3]))
    model.save_pretrained(tmp_path)
    config = quantised_around_condensed(BitsAndBytesConfig(load_in_4bit=True), AutoConfig.from_pretrained(tmp_path))
    expected = sorted({name.rpartition(".")[0] for name in condensed_module_names(model)})
    assert sorted(config.llm_int8_skip_modules) == sorted(["lm_head", *expected])


@pytest.mark.parametrize("bits", [4, 8])
def test_all_but_the_condensed_layers_is_quantised_and_frozen(bits: int, wide_checkpoint: Path, tmp_path: Path) -> None:
    model = open_quantised(wide_checkpoint, bits)
    packed = {name for name, p in model.named_parameters() if not p.is_floating_point()}
    assert packed
    assert not packed & set(condensed_parameters(model))
    assert {f"model.layers.{i}.self_attn.o_proj.weight" for i in range(4)} <= packed
    before = state(model)
    trainer = make_trainer(model, tmp_path, eval_on_start=True)
    trainer.train()
    assert differing(before, state(model)) == sorted(condensed_parameters(model))
