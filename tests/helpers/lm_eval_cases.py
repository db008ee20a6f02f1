"""Checkpoints, local tasks and calls that the tests of `lm_eval --model cdmoe` share."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cdmoe_plugin import CondenseConfig, CondensePlan, apply_plan, search_plan
from tests.helpers.tiny_models import random_ids, tiny_model

ROOT = Path(__file__).parents[2]
WORDS = [f"w{i}" for i in range(100)]
TASKS = ("tiny_choice", "tiny_words")
ROWS = 7  # odd, so that two processes get different numbers of them
_CHOICE = """output_type: multiple_choice
doc_to_text: '{{question}}'
doc_to_choice: '{{choices}}'
doc_to_target: '{{label}}'
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
_WORDS = """output_type: generate_until
generation_kwargs: {max_gen_toks: 6, until: ['w99']}
doc_to_text: '{{question}}'
doc_to_target: '{{answer}}'
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""


@dataclass(frozen=True)
class Case:
    """What there is to evaluate."""

    base: Path  # a sparse checkpoint
    plan: CondensePlan  # for it, of three layers with three experts each
    plan_file: Path
    condensed: Path  # the checkpoint that the plan makes of it
    tasks: Path  # a folder for `--include_path`


def make_case(folder: Path, **sizes: int) -> Case:
    """A tiny Qwen2Moe model with a tokenizer of 100 words, its plan, its condensed form, and two tasks."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    case = Case(folder / "base", _plan(sizes), folder / "plan.json", folder / "condensed", folder / "tasks")
    case.plan.save(case.plan_file)
    tiny_model("qwen2_moe", **sizes).save_pretrained(case.base)
    apply_plan(tiny_model("qwen2_moe", **sizes), case.plan).save_pretrained(case.condensed)
    for checkpoint in (case.base, case.condensed):
        tokenizer.save_pretrained(checkpoint)
    _write_tasks(case.tasks)
    return case


def _plan(sizes: dict[str, int]) -> CondensePlan:
    return search_plan(tiny_model("qwen2_moe", **sizes), CondenseConfig(3, 3, batch_size=2), calibration=random_ids(8))


def _write_tasks(folder: Path) -> None:
    folder.mkdir()
    rng = random.Random(0)

    def words(count: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(count))

    choices = [
        {"question": words(5 + i % 3), "choices": [words(1 + j) for j in range(3)], "label": i % 3} for i in range(ROWS)
    ]
    answers = [{"question": words(4 + i % 3), "answer": words(1)} for i in range(ROWS)]
    for name, rows, text in zip(TASKS, (choices, answers), (_CHOICE, _WORDS), strict=True):
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = (
            f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files: {{test: {data}}}\ntest_split: test\n"
        )
        (folder / f"{name}.yaml").write_text(source + text)


def evaluate(case: Case, model: str, **model_args: Any) -> dict[str, Any]:
    """Results of lm-eval in this process, on the CPU."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(case.tasks), include_defaults=False)
    model_args = {name: str(value) if isinstance(value, Path) else value for name, value in model_args.items()}
    return lm_eval.simple_evaluate(
        model, model_args=model_args, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0
    )


def answers(results: dict[str, Any]) -> dict[str, Any]:
    """Scores, and log-likelihoods or texts of every sample."""
    # In several processes, lm-eval has some repeat a request to keep in step: the first answer to each counts.
    samples = {
        task: [[resps[0] for resps in row["resps"]] for row in sorted(rows, key=lambda row: row["doc_id"])]
        for task, rows in results["samples"].items()
    }
    scores = {
        task: {name: value for name, value in row.items() if name.split(",")[0] in ("acc", "acc_norm", "exact_match")}
        for task, row in results["results"].items()
    }
    return {"samples": _texts(samples), "scores": _texts(scores)}


def _texts(value: Any) -> Any:
    """All values within as texts, as lm-eval writes those of samples to files."""
    if isinstance(value, dict):
        return {name: _texts(item) for name, item in value.items()}
    return [_texts(item) for item in value] if isinstance(value, (list, tuple)) else str(value)


def run(
    command: Sequence[object], env: dict[str, str] | None = None, **kwargs: Any
) -> subprocess.CompletedProcess[str]:
    """Runs a program that must succeed, on one thread and without the network."""
    settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **(env or {})}
    done = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=120,
        **kwargs,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def evaluate_from_shell(
    case: Case, launcher: Sequence[object], folder: Path, arguments: str, model: str = "cdmoe", **env: str
) -> tuple[dict[str, Any], str]:
    """Results that `lm_eval` writes to files, and what it says; `launcher` is how it is called."""
    done = run([*launcher, *options(case, folder, arguments, model)], env)
    return read_results(folder), done.stdout + done.stderr


def options(case: Case, folder: Path, arguments: str, model: str = "cdmoe") -> list[str]:
    """Those of lm-eval's command line."""
    tasks = ["--tasks", ",".join(TASKS), "--include_path", str(case.tasks)]
    return ["--model", model, "--model_args", arguments, *tasks, "--log_samples", "--output_path", str(folder)]


def read_results(folder: Path) -> dict[str, Any]:
    """What lm-eval has written, as `simple_evaluate` returns it."""
    (file,) = folder.rglob("results_*.json")  # one process writes, however many there are
    results = json.loads(file.read_text())
    results["samples"] = {}
    for task in TASKS:
        (file,) = folder.rglob(f"samples_{task}_*.jsonl")
        results["samples"][task] = [json.loads(line) for line in file.read_text().splitlines()]
    return results


def script(name: str) -> Path:
    """A program of this environment, such as `lm_eval`."""
    return Path(sys.executable).parent / name
