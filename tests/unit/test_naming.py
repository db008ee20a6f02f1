"""The names of models condensed in memory, by which PEFT and TRL open them again."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from cdmoe_plugin import apply_plan, condense_pretrained, export_stock
from cdmoe_plugin.atomic import replacing_files
from cdmoe_plugin.calibration import calibration_for
from cdmoe_plugin.config import CondenseConfig
from cdmoe_plugin.naming import base_checkpoint
from cdmoe_plugin.recovery import CondensedSFTTrainer
from tests.helpers.models import sparse_model
from tests.helpers.plans import some_plan
from tests.helpers.recovery import lm_rows, word_tokenizer

PLAN = some_plan([1, 2, 3])
QUIET: dict[str, Any] = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "max_steps": 1}
PREFERENCES = Dataset.from_list([{"prompt": "w1 w2", "chosen": " w3", "rejected": " w5 w6"}] * 2)
UNSAVED = "in-memory--save-and-open-it-first"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("naming") / "base"
    sparse_model("qwen2_moe").save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(4, 20)[None]).logits


def lora(model: PreTrainedModel, folder: Path) -> Any:
    """LoRA on the attention of a model, saved by PEFT."""
    wrapped = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    )
    wrapped.save_pretrained(folder)
    return wrapped


@pytest.mark.parametrize("form", ["condense", "trim_layer", "trim_block"])
def test_adapters_do_not_go_on_the_sparse_base(base: Path, tmp_path: Path, form: str) -> None:
    plan = PLAN if form == "condense" else some_plan([1]).as_trimming(form)
    model = condense_pretrained(base, plan=plan)
    lora(model, tmp_path / "adapter")
    named = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert str(base) not in (tmp_path / "adapter" / "adapter_config.json").read_text()
    assert named.endswith(UNSAVED)
    with pytest.raises(OSError, match="save-and-open-it-first"):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize("how", ["loaded", "opened in part", "offloaded"])
def test_every_way_of_condensing(base: Path, tmp_path: Path, how: str) -> None:
    if how == "loaded":
        sparse = AutoModelForCausalLM.from_pretrained(base)
        config = sparse.config
        model = apply_plan(sparse, PLAN)
        assert config.name_or_path == str(base)  # other models may share it
    else:
        model = condense_pretrained(base, plan=PLAN, **({"offload_folder": tmp_path} if how == "offloaded" else {}))
    assert isinstance(model.base_model, PreTrainedModel)
    for part in (model, model.base_model):
        assert part.name_or_path == part.config.name_or_path == f"base--condensed-{UNSAVED}"
    assert base_checkpoint(model) == base_checkpoint(copy.deepcopy(model)) == str(base)


def test_a_saved_model_has_the_name_of_its_folder(base: Path, tmp_path: Path) -> None:
    model = condense_pretrained(base, plan=PLAN)
    with replacing_files(tmp_path / "later") as folder:  # `cdmoe condense` saves so
        model.save_pretrained(folder)
    assert model.name_or_path.endswith(UNSAVED)
    model.save_pretrained(tmp_path / "saved")
    expected = logits(lora(model, tmp_path / "adapter"))
    again: Any = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(again), expected)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    opened.save_pretrained(tmp_path / "copy")
    assert opened.name_or_path == str(tmp_path / "saved")  # as in transformers


def test_a_model_of_no_checkpoint_has_a_name_too() -> None:
    model = apply_plan(sparse_model("qwen2_moe"), PLAN)
    assert model.name_or_path == f"CDMoEQwen2MoeForCausalLM--condensed-{UNSAVED}"
    assert base_checkpoint(model) == ""


@pytest.mark.parametrize("saved", [False, True])
def test_dpo(base: Path, tmp_path: Path, saved: bool) -> None:
    """The reference is the condensed model, so that the margin is 0 and the loss ln 2; or it is refused."""
    model = condense_pretrained(base, plan=PLAN)
    args = DPOConfig(str(tmp_path / "run"), beta=1.0, logging_steps=1, save_strategy="no", **QUIET)
    arguments: Any = {"args": args, "train_dataset": PREFERENCES, "processing_class": word_tokenizer()}
    if not saved:
        with pytest.raises(OSError, match="save-and-open-it-first"):
            DPOTrainer(model, **arguments)
        return
    model.save_pretrained(tmp_path / "saved")
    trainer: Any = DPOTrainer(model, **arguments)
    assert type(trainer.ref_model) is type(model)
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["rewards/margins"] == 0
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5)


def test_the_tokenizer_is_still_found(base: Path, tmp_path: Path) -> None:
    model = condense_pretrained(base, plan=PLAN)
    config = CondenseConfig(num_samples=2, max_length=8)
    assert calibration_for(model, ["w1 w2 w3", "w4 w5"], config).num_tokens == 5
    rows = Dataset.from_list(lm_rows()[:4])
    args = SFTConfig(str(tmp_path / "run"), max_length=32, router_aux_loss_coef=0.0, **QUIET)
    with pytest.raises(OSError, match="save-and-open-it-first"):
        SFTTrainer(model, args, train_dataset=rows)
    trainer: Any = CondensedSFTTrainer(model, args, train_dataset=rows)
    assert trainer.processing_class.get_vocab() == word_tokenizer().get_vocab()


def test_export_names_nothing(base: Path, tmp_path: Path) -> None:
    sparse_model("qwen3_moe").save_pretrained(tmp_path / "qwen3")
    model = condense_pretrained(tmp_path / "qwen3", plan=some_plan([1]))
    export_stock(model, tmp_path / "stock")
    text = (tmp_path / "stock" / "config.json").read_text()
    assert "in-memory" not in text
    assert str(tmp_path) not in text
