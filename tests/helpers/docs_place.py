"""The folder in which commands of the documentation run: tiny models, texts and tasks under the names of the hub.

transformers and datasets open a local folder of a repository's name before they ask the hub, so a command runs as it
stands in the documentation where there are such folders.
"""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval

from cdmoe_plugin import apply_plan
from tests.helpers.lm_eval_cases import ROOT, WORDS
from tests.helpers.models import build
from tests.helpers.plans import some_plan
from tests.helpers.recovery import lm_rows, sft_rows, word_tokenizer
from tests.helpers.tiny_models import tiny_model

# Ten sparse layers, of which the documentation condenses nine. Widths that 4 bit on a CPU can do.
_WIDTHS = {"hidden": 64, "expert_width": 64, "shared_width": 64, "dense_width": 64, "max_positions": 512}
MODELS: dict[str, Callable[[], Any]] = {
    "Qwen/Qwen1.5-MoE-A2.7B": lambda: tiny_model("qwen2_moe", num_layers=10, **_WIDTHS),
    "Qwen/Qwen3-30B-A3B": lambda: tiny_model("qwen3_moe", num_layers=10, **_WIDTHS),
    "deepseek-ai/deepseek-moe-16b-base": lambda: build("deepseek", num_layers=11, num_experts=8),
}
_LETTERS = list("ABCD")


def make_place(folder: Path) -> None:
    """Fills a folder with all that the pages start from."""
    for name, model in MODELS.items():
        model().save_pretrained(folder / name)
        word_tokenizer().save_pretrained(folder / name)
    texts = "".join(json.dumps(row) + "\n" for row in lm_rows(24))
    for name in ("my_texts.jsonl", "texts.jsonl"):
        (folder / name).write_text(texts)
    pairs = [{"prompt": row["text"][:12], "chosen": "w1 w2", "rejected": "w3"} for row in lm_rows(8)]
    (folder / "preferences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    (folder / "commonsense_170k.json").write_text(json.dumps(sft_rows(24)))
    (folder / "allenai" / "c4" / "en").mkdir(parents=True)
    with gzip.open(folder / "allenai" / "c4" / "en" / "c4-train.00000-of-01024.json.gz", "wt") as c4:
        c4.write(texts)
    write_tasks(folder)


def write_condensed(folder: Path) -> None:
    """`qwen-cd9`, which the script on the start page writes and the other pages use."""
    model = apply_plan(MODELS["Qwen/Qwen1.5-MoE-A2.7B"](), some_plan(list(range(9, 0, -1))))
    model.save_pretrained(folder / "qwen-cd9")
    word_tokenizer().save_pretrained(folder / "qwen-cd9")


def write_tasks(folder: Path) -> None:
    """The data sets of the paper's eight tasks, of four rows each, under the names that lm-eval's tasks have."""
    rng = random.Random(0)

    def words(count: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(count))

    def choices() -> dict[str, list[str]]:
        return {"text": [words(2) for _ in _LETTERS], "label": _LETTERS}

    two, three = ["train", "validation"], ["train", "validation", "test"]
    subjects = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default"
    mmlu = [re.findall(r'"dataset_name": "(\w+)"', file.read_text()) for file in sorted(subjects.glob("mmlu_*.yaml"))]
    tables: list[tuple[str, list[str], list[str], Callable[[int], dict[str, Any]]]] = [
        (
            "baber/piqa",
            ["default"],
            two,
            lambda i: {"goal": words(5), "sol1": words(3), "sol2": words(3), "label": i % 2},
        ),
        (
            "allenai/winogrande",
            ["winogrande_xl"],
            two,
            lambda i: {
                "sentence": f"{words(3)} _ {words(3)}",
                "option1": words(1),
                "option2": words(1),
                "answer": str(1 + i % 2),
            },
        ),
        (
            "allenai/ai2_arc",
            ["ARC-Challenge"],
            three,
            lambda i: {"question": words(5), "choices": choices(), "answerKey": _LETTERS[i]},
        ),
        (
            "allenai/openbookqa",
            ["main"],
            three,
            lambda i: {"question_stem": words(5), "choices": choices(), "answerKey": _LETTERS[i]},
        ),
        (
            "Rowan/hellaswag",
            ["default"],
            two,
            lambda i: {
                "activity_label": words(1),
                "ctx_a": words(3),
                "ctx_b": words(2),
                "endings": choices()["text"],
                "label": str(i),
            },
        ),
        ("aps/super_glue", ["boolq"], two, lambda i: {"passage": words(8), "question": words(4), "label": i % 2}),
        ("nyu-mll/glue", ["rte"], two, lambda i: {"sentence1": words(5), "sentence2": words(3), "label": i % 2}),
        (
            "cais/mmlu",
            [name for names in mmlu for name in names],
            ["test", "dev"],
            lambda i: {"question": words(5), "choices": choices()["text"], "answer": i},
        ),
    ]
    for name, configs, splits, row in tables:
        data = folder / name
        data.mkdir(parents=True)
        (data / "rows.jsonl").write_text("".join(json.dumps(row(i)) + "\n" for i in range(4)))
        files = [{"split": split, "path": "rows.jsonl"} for split in splits]
        header = {"configs": [{"config_name": config, "data_files": files} for config in configs]}
        (data / "README.md").write_text(f"---\n{json.dumps(header)}\n---\n")


def link_checkout(folder: Path) -> None:
    """Put a checkout's `recipes` and `examples` beside the data."""
    for part in ("recipes", "examples"):
        (folder / part).symlink_to(ROOT / part, target_is_directory=True)
