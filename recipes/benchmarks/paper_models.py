"""Opens the models that paper_tables.py measures, and measures them: accuracy, loss, bytes, speed."""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import random
import statistics
import time
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from cdmoe_plugin import CondenseConfig, CondensePlan, condense_pretrained
from cdmoe_plugin.integrations.measure import weight_bytes

PASSAGE_TASK = "next_passage"
_PASSAGE, _CONTINUATION = 24, 12  # words
_YAML = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: '{{{{passage}}}}'
doc_to_choice: '{{{{choices}}}}'
doc_to_target: '{{{{label}}}}'
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


def write_passage_task(folder: Path, texts: Sequence[str], questions: int = 200, seed: int = 0) -> None:
    """A local task of lm-eval: which of four continuations follows a passage.

    The wrong ones are the right one with two words in each other's place: a small model that is asked to tell it from
    the continuations of other passages only says which has the more frequent words.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / f"{PASSAGE_TASK}.jsonl"
    write_rows(data, passage_questions(texts, questions, seed))
    text = _YAML.format(name=PASSAGE_TASK, data=json.dumps(str(data.resolve())))
    (folder / f"{PASSAGE_TASK}.yaml").write_text(text, encoding="utf-8")


def passage_questions(texts: Sequence[str], count: int, seed: int) -> list[dict[str, Any]]:
    """Rows with a "passage", four "choices", and as "label" which of them is right."""
    rng = random.Random(seed)
    documents = [words for text in texts if len(words := text.split()) >= 2 * _PASSAGE]
    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        document = rng.choice(documents)
        start = rng.randrange(len(document) - _PASSAGE - _CONTINUATION + 1)
        passage = document[start : start + _PASSAGE]
        right = document[start + _PASSAGE :][:_CONTINUATION]
        wrong = {swapped(right, *pair) for pair in combinations(range(_CONTINUATION), 2)} - {tuple(right)}
        if len(wrong) < 3:
            continue
        choices = [" " + " ".join(words) for words in (right, *rng.sample(sorted(wrong), 3))]
        label = rng.randrange(4)
        choices[0], choices[label] = choices[label], choices[0]
        rows.append({"passage": " ".join(passage), "choices": choices, "label": label})
    return rows


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes a .jsonl file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def swapped(words: Sequence[str], i: int, j: int) -> tuple[str, ...]:
    """The words with two in each other's place."""
    changed = list(words)
    changed[i], changed[j] = changed[j], changed[i]
    return tuple(changed)


class _QuietLM(HFLM):
    """lm-eval's `hf` without a progress bar of its own: there is one for all measurements."""

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
        return super().loglikelihood(requests, disable_tqdm=True)


class Tasks:
    """Accuracy by lm-eval.

    Args:
        names (`list[str]`): Tasks or groups.
        include (`Path`, *optional*): Folder with tasks of one's own, the only ones then.
        limit (`int`, *optional*): Questions per task, at most.
    """

    def __init__(self, names: list[str], include: Path | None, limit: int | None, batch_size: int) -> None:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        path = None if include is None else str(include)
        self.manager = TaskManager(include_path=path, include_defaults=include is None)
        self.names, self.limit, self.batch_size = names, limit, batch_size

    @cached_property
    def _loaded(self) -> Any:
        """The tasks, zero-shot, opened when they are first needed."""
        loaded = self.manager.load(list(self.names))
        for task in loaded["tasks"].values():
            task.set_config(key="num_fewshot", value=0)
        return loaded

    def accuracy(self, model: Any, tokenizer: Any) -> dict[str, float]:
        """`accuracy:TASK` and `accuracy_error:TASK`, the standard error over questions."""
        if not self.names:
            return {}
        wrapped = _QuietLM(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=self.batch_size,
            device=str(model.device),
            backend="causal",
        )
        # `simple_evaluate` would build the tasks anew for every model, and ask the machine for its packages each time.
        found: Any = lm_eval.evaluate(
            wrapped,
            self._loaded,
            limit=self.limit,
            bootstrap_iters=100,  # none would give no standard error; that of a mean needs no draws
            log_samples=False,
        )
        values = {}
        for name in self.names:
            scores = found["results"][name]
            values[f"accuracy:{name}"] = float(scores["acc,none"])
            error = scores.get("acc_stderr,none")
            values[f"accuracy_error:{name}"] = float(error) if isinstance(error, (int, float)) else 0.0
        return values

    def questions(self, count: int, seed: int) -> list[str]:
        """Questions of all tasks, the same number of each, drawn by `seed`, as calibration texts (Figure 5)."""
        tasks = list(self._loaded["tasks"].values())
        rng = random.Random(seed)
        texts = []
        for task in tasks:
            docs = list(task.eval_docs)
            for doc in rng.sample(docs, min(len(docs), max(1, count // len(tasks)))):
                text = task.doc_to_text(doc)
                # winogrande's "text" is the index of the choice
                texts.append(text if isinstance(text, str) else str(task.doc_to_choice(doc)[0]))
        return texts


class Opener:
    """Opens models of one sparse checkpoint.

    Args:
        path (`str`): The checkpoint, a folder or a hub name.
        **kwargs: For `from_pretrained`.
    """

    def __init__(self, path: str, **kwargs: Any) -> None:
        self.path, self.kwargs = path, kwargs
        self.tokenizer = AutoTokenizer.from_pretrained(path)

    def sparse(self, path: str | None = None) -> Any:
        """The sparse model, or another checkpoint opened in the same way."""
        return AutoModelForCausalLM.from_pretrained(path or self.path, **self.kwargs).eval()

    def condensed(self, plan: CondensePlan, config: CondenseConfig | None = None, calibration: Any = None) -> Any:
        """The model of a plan, refitted where the config says so."""
        given = {} if config is None else {"calibration": calibration, "tokenizer": self.tokenizer}
        return condense_pretrained(self.path, config, plan=plan, **given, **self.kwargs)

    def identity(self) -> str:
        """Tells models apart in the CSV, wherever a folder lies."""
        folder = Path(self.path)
        if not folder.is_dir():
            return self.path
        digest = hashlib.sha256((folder / "config.json").read_bytes())
        for file in sorted(folder.glob("*.safetensors")):
            digest.update(f"{file.name} {file.stat().st_size}".encode())
            with file.open("rb") as weights:
                digest.update(weights.read(1 << 24))  # of a large file, enough to tell another training by
        return f"{folder.name} {digest.hexdigest()[:12]}"


def rows_of_tokens(tokenizer: Any, texts: Sequence[str], length: int, count: int) -> torch.Tensor:
    """Documents one after the other in full rows, evenly spaced ones where there are too many."""
    ids = [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id or 0]]
    rows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    return rows[:: max(1, len(rows) // count)][:count]


@torch.inference_mode()
def held_out_loss(model: Any, rows: torch.Tensor, batch_size: int) -> float:
    """Mean loss per token, in nats."""
    total = 0.0
    for ids in rows.to(model.device).split(batch_size):
        total += model(input_ids=ids, labels=ids).loss.item() * len(ids)
    return total / len(rows)


@torch.inference_mode()
def speed(models: dict[str, Any], ids: torch.Tensor, repeats: int = 7) -> dict[str, float]:
    """Tokens per second of the forward pass: the median, models taking turns, so that all see the same machine."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(repeats + 1):
        for name, model in models.items():
            given = ids.to(model.device)
            start = time.perf_counter()
            model(input_ids=given, use_cache=False).logits[0, -1, 0].item()  # waits for the device
            seconds[name].append(time.perf_counter() - start)
    return {name: ids.numel() / statistics.median(times[1:]) for name, times in seconds.items()}


def costs(model: Any, sparse: Any, ids: torch.Tensor | None) -> dict[str, float]:
    """Bytes of weights and, where `ids` are given, speed, alone and as a multiple of the sparse model's."""
    found = {"weight_bytes": float(weight_bytes(model))}
    if ids is not None:
        measured = speed({"sparse": sparse, "this": model}, ids)
        found["tokens_per_second"] = measured["this"]
        found["speedup"] = measured["this"] / measured["sparse"]
    return found


def free() -> None:
    """Gives memory back before the next model is opened."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
