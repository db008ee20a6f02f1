"""
A small fine-grained Mixture-of-Experts model, trained without downloading anything.

The training text comes with Python: the topics of `help()` and the docstrings of the standard library. The architecture
is that of DeepSeekMoE: many small experts, a shared one, softmax routing. A second model has that of Qwen1.5-MoE: a
shared expert as large as four others, with a gate per token.
"""

from __future__ import annotations

import ast
import hashlib
import json
import random
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers import get_cosine_schedule_with_warmup as cosine_schedule

import cdmoe_plugin  # noqa: F401  (makes transformers know the architecture "deepseek")

VOCABULARY = 2048
_SIZES = {
    "hidden_size": 128,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
MODELS = {
    "deepseek": {**_SIZES, "n_routed_experts": 32, "n_shared_experts": 2, "first_k_dense_replace": 0},
    "qwen2_moe": {**_SIZES, "num_experts": 32, "shared_expert_intermediate_size": 128},
}
TRAINING = {"steps": 650, "batch_size": 8, "length": 128, "learning_rate": 3e-3, "beta2": 0.99, "aux_loss": 0.01}


def corpus() -> tuple[list[str], list[str]]:
    """Return documents for training and, from other files and topics, held-out documents."""
    train, held_out = split_documents()
    return [text for text, _ in train], [text for text, _ in held_out]


def questions() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return rows in the format of commonsense170k, about the files of the training and held-out documents."""
    rows = [[row for _, file in part if file for row in questions_about(file)] for part in split_documents()]
    return rows[0], rows[1]


@cache
def split_documents(
    held_out_share: float = 0.06,
) -> tuple[list[tuple[str, Path | None]], list[tuple[str, Path | None]]]:
    """Return documents and their source files, for training and held out."""
    sources: list[tuple[list[str], Path | None]] = [([topics[name]], None) for name in sorted(topics)]
    sources += [(docstrings(file), file) for file in library_files()]
    seen: set[str] = set()
    documents = []
    for pieces, file in sources:
        new = [piece for piece in pieces if (key := " ".join(piece.lower().split())) and key not in seen]
        seen.update(" ".join(piece.lower().split()) for piece in new)
        document = "\n\n".join(new)
        if len(document) >= 200:
            documents.append((document, file))
    random.Random(0).shuffle(documents)
    total, share = sum(len(text) for text, _ in documents), 0
    held_out = []
    while share < held_out_share * total:
        held_out.append(documents.pop())
        share += len(held_out[-1][0])
    return documents, held_out


def library_files() -> Iterator[Path]:
    """Yield the modules of the standard library, without its tests and other installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).parts
        ours = parts[0].removesuffix(".py") in sys.stdlib_module_names
        if ours and not {"test", "tests", "idle_test"} & set(parts):
            yield file


def docstrings(file: Path) -> list[str]:
    """Return all docstrings of a module."""
    return [text for _, text in documented(file)]


def documented(file: Path) -> list[tuple[str, str]]:
    """Return the names and docstrings of everything documented in a module ("" names the module itself)."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [(getattr(node, "name", ""), ast.get_docstring(node)) for node in ast.walk(tree) if isinstance(node, kinds)]
    return [(name, text) for name, text in found if text]


def questions_about(file: Path) -> list[dict[str, str]]:
    """Ask what the functions and classes of a module do; the answers are the first sentences of their docstrings."""
    rows = []
    for name, text in documented(file):
        answer = " ".join(text.split("\n\n")[0].split())
        if name and 20 <= len(answer) <= 200:
            question = f"What does `{name}` of the Python module `{file.stem}` do?"
            rows.append({"instruction": question, "input": "", "output": answer, "answer": answer})
    return rows


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<bos>", "<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", model_max_length=512
    )


def train_model(tokenizer: PreTrainedTokenizerFast, texts: list[str], architecture: str = "deepseek") -> Any:
    """Train a model on packed text, in one to three minutes on two cores. `architecture` is one of `MODELS`."""
    torch.manual_seed(0)
    ids = [i for row in tokenizer(texts)["input_ids"] for i in [tokenizer.bos_token_id, *row, tokenizer.eos_token_id]]
    config = AutoConfig.for_model(
        architecture,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        output_router_logits=True,
        router_aux_loss_coef=TRAINING["aux_loss"],
        **MODELS[architecture],
    )
    # On a CPU the loop over experts is many times slower than grouped products.
    model = AutoModelForCausalLM.from_config(config, experts_implementation="grouped_mm").train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=TRAINING["learning_rate"], betas=(0.9, TRAINING["beta2"]), weight_decay=0.1, fused=True
    )
    steps = int(TRAINING["steps"])
    schedule = cosine_schedule(optimizer, num_warmup_steps=50, num_training_steps=steps)
    progress = tqdm(batches(torch.tensor(ids), steps), total=steps, desc="Training a small MoE", unit="step")
    for batch in progress:
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.2f}")
    model.config.output_router_logits = False
    return model.eval()


def batches(ids: torch.Tensor, steps: int) -> Iterator[torch.Tensor]:
    """Yield random windows of the text, `[batch, length]`."""
    length, size = int(TRAINING["length"]), int(TRAINING["batch_size"])
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        starts = torch.randint(len(ids) - length, (size,), generator=generator)
        yield torch.stack([ids[start : start + length] for start in starts.tolist()])


def train_or_load(
    cache_dir: Path, architecture: str = "deepseek"
) -> tuple[Any, PreTrainedTokenizerFast, list[str], list[str]]:
    """Train a model and its tokenizer, or load them from the cache if the same recipe was run on the same text.

    Args:
        cache_dir (`Path`): The cache.
        architecture (`str`, defaults to "deepseek"): One of `MODELS`.

    Returns:
        Model, tokenizer, training documents, held-out documents.
    """
    texts, held_out = corpus()
    # An architecture is identified by the names of its sizes.
    recipe = json.dumps([VOCABULARY, MODELS[architecture], TRAINING, texts], sort_keys=True)
    folder = cache_dir / hashlib.sha256(recipe.encode()).hexdigest()[:16]
    if not folder.exists():
        tokenizer = train_tokenizer(texts)
        model = train_model(tokenizer, texts, architecture)
        cache_dir.mkdir(parents=True, exist_ok=True)
        # Written to a temporary folder and moved, so that an interrupted run leaves no partial model.
        unfinished = Path(tempfile.mkdtemp(dir=cache_dir))
        try:
            model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="grouped_mm")
    return model, AutoTokenizer.from_pretrained(folder), texts, held_out


def write_training_data(folder: Path) -> None:
    """Write lm.jsonl, sft.json and the same with "_held_out", in the formats that `cdmoe recover` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, texts, rows in zip(("", "_held_out"), corpus(), questions(), strict=True):
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (folder / f"lm{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        (folder / f"sft{name}.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
