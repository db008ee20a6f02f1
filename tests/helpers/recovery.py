"""Tokenizer, data, condensed models and trainers for the tests of recovery."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from trl import SFTConfig

from cdmoe_plugin import apply_plan
from cdmoe_plugin.recovery import CondensedSFTTrainer
from cdmoe_plugin.scripts import recover_stages
from tests.helpers.models import sparse_model
from tests.helpers.plans import some_plan

disable_progress_bars()

WORDS = [f"w{i}" for i in range(100)]
RECIPES = Path(__file__).parents[2] / "recipes"


def word_tokenizer() -> PreTrainedTokenizerFast:
    """100 words and a few special tokens."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def sentence(rng: random.Random, words: int) -> str:
    """Words that follow each other by a rule, so that there is something to learn."""
    start = rng.randrange(100)
    return " ".join(WORDS[(start + 3 * i + rng.randrange(2)) % 100] for i in range(words))


@cache
def lm_rows(count: int = 40) -> list[dict[str, str]]:
    rng = random.Random(0)
    return [{"text": sentence(rng, rng.randrange(5, 60))} for _ in range(count)]


@cache
def sft_rows(count: int = 40) -> list[dict[str, str]]:
    """In the format of commonsense170k; of every fifth row, the question alone is longer than 32 tokens."""
    rng = random.Random(1)
    questions = [sentence(rng, 40 if i % 5 == 0 else rng.randrange(3, 15)) for i in range(count)]
    answers = [sentence(rng, rng.randrange(1, 6)) for _ in range(count)]
    return [{"instruction": q, "input": "", "output": a, "answer": a} for q, a in zip(questions, answers, strict=True)]


def write_data(folder: Path) -> None:
    (folder / "lm.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lm_rows()))
    (folder / "sft.json").write_text(json.dumps(sft_rows()))


def condensed_model(model_type: str = "qwen2_moe", layers: tuple[int, ...] = (1, 3), **kwargs: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return apply_plan(sparse_model(model_type), some_plan(list(layers), **kwargs))


def make_trainer(model: Any, folder: Path, rows: Any = None, **arguments: Any) -> CondensedSFTTrainer:
    """A trainer on few rows, with a learning rate that moves every weight."""
    keywords = {name: arguments.pop(name) for name in ("peft_config", "distillation") if name in arguments}
    defaults = {"max_length": 32, "max_steps": 3, "learning_rate": 1e-2, "per_device_train_batch_size": 4}
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    cpu = {"use_cpu": True, "bf16": False, "router_aux_loss_coef": 0.0}
    args = SFTConfig(str(folder), **{**defaults, **quiet, **cpu, **arguments})
    rows = Dataset.from_list(lm_rows() if rows is None else rows)
    return CondensedSFTTrainer(
        model, args=args, train_dataset=rows, eval_dataset=rows, processing_class=word_tokenizer(), **keywords
    )


def load_recipe(name: str) -> ModuleType:
    """A recipe as a module."""
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", RECIPES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def lm_then_sft() -> ModuleType:
    return recover_stages


def run(recipe: ModuleType, args: list[Any]) -> None:
    """The recipe, as its command line runs it."""
    *parsed, search = recipe.make_parser().parse_args_and_config(args=[str(each) for each in args])
    given = {name.removeprefix("condense_"): value for name, value in vars(search).items() if value is not None}
    recipe.run(*parsed, given)
