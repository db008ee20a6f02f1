"""Auto classes, TRL's trainers and requests for router logits, on sparse and condensed models."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from trl.trainer.utils import create_model_from_path

from cdmoe_plugin import apply_plan, condense_pretrained
from cdmoe_plugin.recovery import CondensedSFTTrainer
from tests.helpers.models import SEARCHABLE, sparse_model
from tests.helpers.plans import some_plan
from tests.helpers.recovery import lm_rows, word_tokenizer
from tests.helpers.tiny_models import ARCHITECTURES

IDS = torch.arange(12)[None]
QUIET: dict[str, Any] = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "max_steps": 1}
PREFERENCES = Dataset.from_list([{"prompt": "w1 w2", "chosen": " w3", "rejected": " w5 w6"}] * 2)


def sparse_layers(model_type: str) -> list[int]:
    return [1, 2, 3] if model_type == "deepseek" else list(ARCHITECTURES[model_type].sparse_layers)


def condensed(model_type: str, number: int | None = None) -> PreTrainedModel:
    return apply_plan(sparse_model(model_type), some_plan(sparse_layers(model_type)[:number]))


@pytest.fixture(scope="module", params=["deepseek", "deepseek condensed", "mixtral condensed"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    name = request.param.split()[0]
    folder = tmp_path_factory.mktemp("trained") / "checkpoint"
    model = condensed(name) if "condensed" in request.param else sparse_model(name)
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def test_trl_trains_by_path(folder: Path, tmp_path: Path) -> None:
    """TRL reads `config.auto_map` of classes that transformers lacks. DPO opens the reference by its path too."""
    expected = AutoModelForCausalLM.from_pretrained(folder)
    assert type(create_model_from_path(str(folder))) is type(expected)
    rows = Dataset.from_list(lm_rows()[:4])
    common: dict[str, Any] = {"output_dir": str(tmp_path), "save_strategy": "no", **QUIET}
    trainers: list[Any] = [
        SFTTrainer(str(folder), SFTConfig(max_length=32, **common), train_dataset=rows),
        DPOTrainer(str(folder), args=DPOConfig(**common), train_dataset=PREFERENCES),
        RewardTrainer(str(folder), args=RewardConfig(**common), train_dataset=PREFERENCES),
    ]
    for trainer in trainers:
        trainer.train()
    assert type(trainers[0].model) is type(trainers[1].ref_model) is type(expected)
    assert "ForSequenceClassification" in type(trainers[2].model).__name__


def test_our_trainer_opens_names(tmp_path: Path) -> None:
    condensed("qwen2_moe").save_pretrained(tmp_path / "checkpoint")
    word_tokenizer().save_pretrained(tmp_path / "checkpoint")
    rows = Dataset.from_list(lm_rows()[:4])
    more: dict[str, Any] = {"model_init_kwargs": {"dtype": "bfloat16"}, "router_aux_loss_coef": 0.0}
    args = SFTConfig(str(tmp_path / "run"), max_length=32, **more, **QUIET)
    trainer: Any = CondensedSFTTrainer(str(tmp_path / "checkpoint"), args, train_dataset=rows)
    assert {p.dtype for p in trainer.model.parameters() if not p.requires_grad} == {torch.bfloat16}
    with pytest.raises(ValueError, match=r"`model` should be a condensed checkpoint, .* but is a int"):
        CondensedSFTTrainer(3, args, train_dataset=rows)  # type: ignore[arg-type]
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="has an adapter in it"):  # before training
        CondensedSFTTrainer(tmp_path / "checkpoint", args, train_dataset=rows)


@pytest.mark.parametrize("model_type", ["deepseek", "mixtral", "flex_olmo"])
def test_from_config_after_condensing(model_type: str) -> None:
    model = condensed(model_type)
    assert type(AutoModelForCausalLM.from_config(model.config)) is type(model)


@pytest.mark.parametrize("number", [None, 0])
def test_heads_of_deepseek(number: int | None, tmp_path: Path) -> None:
    model = sparse_model("deepseek") if number == 0 else condensed("deepseek")
    model.save_pretrained(tmp_path)
    for auto, shape in ((AutoModelForTokenClassification, (1, 12, 3)), (AutoModelForSequenceClassification, (1, 3))):
        headed: Any = auto.from_pretrained(tmp_path, num_labels=3, pad_token_id=0)
        assert headed(IDS).logits.shape == shape
        torch.testing.assert_close(headed.model(IDS).last_hidden_state, model.base_model(IDS).last_hidden_state)
        headed.save_pretrained(tmp_path / "headed")
        again = auto.from_pretrained(tmp_path / "headed")
        torch.testing.assert_close(again(IDS).logits, headed(IDS).logits)


@pytest.mark.parametrize("size", [60, 200])
def test_another_vocabulary(size: int, tmp_path: Path) -> None:
    condensed("qwen2_moe").save_pretrained(tmp_path)
    match = rf"lm_head.weight \[128, 32\] for \[{size}, 32\].*`resize_token_embeddings`"
    with pytest.raises(ValueError, match=match):
        AutoModelForCausalLM.from_pretrained(tmp_path, vocab_size=size, ignore_mismatched_sizes=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    model.resize_token_embeddings(size)
    assert model(IDS).logits.shape[-1] == size


WITH_FLAG = [name for name in SEARCHABLE if ARCHITECTURES[name].causal_lm]


@pytest.mark.parametrize("model_type", ["deepseek", *WITH_FLAG])
def test_no_router_is_left(model_type: str) -> None:
    """Asking for router logits, in the call or by the config, changes nothing but the loss of 0 that is returned."""
    if model_type != "deepseek" and not hasattr(ARCHITECTURES[model_type].config_class(), "output_router_logits"):
        return
    model = condensed(model_type)
    plain = model(IDS, labels=IDS)
    asked = model(IDS, labels=IDS, output_router_logits=True)
    assert torch.equal(plain.loss, asked.loss)
    assert getattr(plain, "aux_loss", None) is None
    assert getattr(asked, "aux_loss", 0) == 0
    model.config.get_text_config().output_router_logits = True
    flagged = copy.deepcopy(model)(IDS, labels=IDS)
    assert torch.equal(plain.loss, flagged.loss)


@pytest.mark.parametrize("model_type", ["qwen2_moe", "mixtral", "gpt_oss", "deepseek"])
def test_routers_that_are_left_have_their_loss(model_type: str) -> None:
    """It is that of the sparse model with the condensed layer's router logits left out."""
    model = condensed(model_type, 1)
    model.config.router_aux_loss_coef = model.router_aux_loss_coef = 0.1
    output = model(IDS, labels=IDS, output_router_logits=True)
    assert len(output.router_logits) == len(sparse_layers(model_type)) - 1
    logits = torch.cat([each.reshape(-1, each.shape[-1]) for each in output.router_logits]).double()
    number, chosen = logits.shape[-1], model.config.num_experts_per_tok
    share = torch.zeros_like(logits).scatter(1, logits.topk(chosen).indices, 1.0).mean(0)
    expected = number * (share * logits.softmax(-1).mean(0)).sum()
    torch.testing.assert_close(output.aux_loss.double(), expected, rtol=1e-5, atol=1e-6)
    plain = model(IDS, labels=IDS, output_router_logits=False).loss
    torch.testing.assert_close(output.loss, plain + 0.1 * output.aux_loss)


def test_a_coefficient_without_a_router(tmp_path: Path) -> None:
    args = SFTConfig(str(tmp_path), max_length=32, router_aux_loss_coef=0.01, logging_steps=1, **QUIET)
    rows = Dataset.from_list(lm_rows()[:4])
    trainer: Any = SFTTrainer(condensed("qwen2_moe"), args, train_dataset=rows, processing_class=word_tokenizer())
    trainer.train()
    assert trainer.state.log_history[0]["aux_loss"] == 0


def test_trimmed_blocks_name_no_code_that_is_not_there(tmp_path: Path) -> None:
    sparse_model("qwen2_moe").save_pretrained(tmp_path / "base")
    config = AutoConfig.from_pretrained(tmp_path / "base")
    config.auto_map = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.XForCausalLM"}
    config.save_pretrained(tmp_path / "base")
    for form in ("trim_block", "trim_layer", "condense"):
        plan = some_plan([1]) if form == "condense" else some_plan([1]).as_trimming(form)
        condense_pretrained(tmp_path / "base", plan=plan).save_pretrained(tmp_path / form)
        opened = AutoModelForCausalLM.from_pretrained(tmp_path / form)
        trusted = AutoModelForCausalLM.from_pretrained(tmp_path / form, trust_remote_code=True)
        assert torch.equal(opened(IDS).logits, trusted(IDS).logits)
