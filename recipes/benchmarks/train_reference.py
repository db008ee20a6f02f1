"""
Train the reference model of the benchmarks: a DeepSeekMoE of 16.7 million parameters, within a given time.

python recipes/benchmarks/train_reference.py --output_dir reference --minutes 75

The text is what every machine has: the sources, tests and documentation of the running Python, then of the installed
packages until `--megabytes` are found. Whole files are held apart for evaluation and for calibration. The learning rate
follows the time, so that the training is finished when the minutes are over, whatever the machine; an interrupted run
goes on from its last checkpoint with the same command. The folder then has the model, its tokenizer, `report.json`,
`progress.jsonl` with a line for every few steps, and `held_out.jsonl`, `calibration.jsonl` and `train.jsonl` with rows
of token ids.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import site
import sysconfig
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before torch is imported, as in examples/quickstart.py.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import common
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

VOCABULARY, LENGTH = 4096, 256
SIZES = {
    **{"hidden_size": 192, "num_hidden_layers": 8, "num_attention_heads": 3, "num_key_value_heads": 3},
    **{"n_routed_experts": 48, "n_shared_experts": 2, "num_experts_per_tok": 4, "moe_intermediate_size": 64},
    **{"norm_topk_prob": True, "first_k_dense_replace": 0, "tie_word_embeddings": True},
    **{"vocab_size": VOCABULARY, "max_position_embeddings": LENGTH},
}
HELD_APART = {"held_out": 0.03, "calibration": 0.1}  # shares of the text
SPECIAL = ("<bos>", "<eos>", "<pad>")
SUFFIXES = (".py", ".rst", ".md")
BALANCE = 0.01  # weight of the load-balancing loss of each layer
WARM_UP = 200  # steps
CHECKPOINT = "training.safetensors"


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output_dir", type=Path, required=True, help="folder of the model, and of the training until it is done")
    add("--minutes", type=float, default=75, help="time of the training (%(default)s)")
    add("--rows", type=int, default=4, help=f"rows of {LENGTH} tokens in a step (%(default)s)")
    add("--learning_rate", type=float, default=3e-3, help="highest learning rate (%(default)s)")
    add("--megabytes", type=float, default=24, help="text to find at least, in MB (%(default)s)")
    add("--checkpoint_minutes", type=float, default=3, help="time between checkpoints (%(default)s)")
    add("--threads", type=int, help="threads of torch")
    return parser.parse_args(given)


def documents(megabytes: float) -> dict[str, list[str]]:
    """Read the files, and split them into those for training, held out and for calibration."""
    library, *packages = dict.fromkeys([sysconfig.get_path("stdlib"), *site.getsitepackages()])
    found = dict.fromkeys(texts_below(Path(library)))  # an ordered set: there are copies of files
    size = sum(map(len, found))
    for text in (text for folder in packages for text in texts_below(Path(folder))):
        if size >= megabytes * 1e6:
            break
        size += 0 if text in found else len(text)
        found[text] = None
    texts = list(found)
    random.Random(0).shuffle(texts)
    parts: dict[str, list[str]] = {}
    for name, share in HELD_APART.items():
        parts[name], taken = [], 0
        while taken < share * size:
            parts[name].append(texts.pop())
            taken += len(parts[name][-1])
    return {**parts, "train": texts}


def texts_below(folder: Path) -> Iterator[str]:
    """Yield the texts of a folder's files, without tables of characters and packages installed in it."""
    for file in sorted(folder.rglob("*")):
        skipped = {"site-packages", "dist-packages", "encodings", "__pycache__"} & set(file.relative_to(folder).parts)
        if file.suffix in SUFFIXES and not skipped and file.is_file():
            try:
                text = file.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue
            if len(text) >= 200:
                yield text


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that begins each text with <bos>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos, eos, pad = SPECIAL
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad, model_max_length=LENGTH
    )


def pack(tokenizer: Any, texts: Sequence[str]) -> torch.Tensor:
    """Join texts and cut them into rows `[rows, LENGTH]` int16; each row begins with <bos>."""
    stream: list[torch.Tensor] = []
    for start in range(0, len(texts), 64):
        for ids in tokenizer(texts[start : start + 64], add_special_tokens=False, verbose=False)["input_ids"]:
            stream.append(torch.tensor([*ids, tokenizer.eos_token_id], dtype=torch.int16))
    ids = torch.cat(stream)
    rows = ids[: len(ids) // (LENGTH - 1) * (LENGTH - 1)].view(-1, LENGTH - 1)
    return torch.cat([torch.full_like(rows[:, :1], tokenizer.bos_token_id), rows], 1)


def prepare(folder: Path, megabytes: float) -> tuple[Any, dict[str, torch.Tensor]]:
    """Make the tokenizer and the rows of each part, or open those of an interrupted run."""
    if not (folder / "train.jsonl").exists():
        parts = documents(megabytes)
        tokenizer = train_tokenizer(parts["train"])
        tokenizer.save_pretrained(folder)
        for name, texts in parts.items():  # "train" is the last
            lines = [json.dumps({"input_ids": row}) + "\n" for row in pack(tokenizer, texts).tolist()]
            (folder / "unfinished").write_text("".join(lines), encoding="utf-8")
            os.replace(folder / "unfinished", folder / f"{name}.jsonl")
    names = (*HELD_APART, "train")
    return AutoTokenizer.from_pretrained(folder), {name: read_rows(folder / f"{name}.jsonl") for name in names}


def read_rows(path: Path) -> torch.Tensor:
    """Read rows of token ids `[rows, LENGTH]` int16."""
    with open(path, encoding="utf-8") as file:
        return torch.tensor([json.loads(line)["input_ids"] for line in file], dtype=torch.int16)


@dataclass
class Progress:
    """The steps, tokens and seconds of a training so far."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0


class Training:
    """A model and its optimizer, with checkpoints in one file."""

    def __init__(self, args: argparse.Namespace, tokenizer: Any) -> None:
        self.args, self.progress, self.path = args, Progress(), args.output_dir / CHECKPOINT
        torch.manual_seed(0)
        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        # The loss has a load-balancing term for each layer instead of transformers' own, which is 0 here.
        config = AutoConfig.for_model("deepseek", **SIZES, **ids, aux_loss_alpha=0.0)
        # On a CPU, the loop over experts is many times slower than grouped products.
        self.model = AutoModelForCausalLM.from_config(config, experts_implementation="grouped_mm").train()
        device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        self.model.to(device)
        named = dict(self.model.named_parameters())
        groups = [
            {"params": [p for p in named.values() if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in named.values() if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.99), fused=True)
        self.named = named

    def learning_rate(self) -> float:
        """A warm-up by steps, then a cosine to 0 by time."""
        done = min(1.0, self.progress.seconds / (60 * self.args.minutes))
        warm = min(1.0, (self.progress.steps + 1) / WARM_UP)
        return self.args.learning_rate * warm * (1 + math.cos(math.pi * done)) / 2

    def step(self, rows: torch.Tensor) -> dict[str, float]:
        """Train on rows `[B, S]`; return the loss and the load-balancing loss (1 if all experts do the same)."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        ids = rows.to(self.model.device, torch.int64)
        output = self.model(input_ids=ids, labels=ids, output_router_logits=True, use_cache=False)
        balance = torch.stack([balance_loss(logits, SIZES["num_experts_per_tok"]) for logits in output.router_logits])
        (output.loss + BALANCE * balance.sum()).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"loss": output.loss.item(), "balance": balance.mean().item()}

    def save(self) -> None:
        """Write a checkpoint."""
        tensors = {f"weight.{name}": p.detach() for name, p in self.named.items()}
        for name, p in self.named.items():
            for key, value in self.optimizer.state[p].items():
                tensors[f"{key}.{name}"] = value
        unfinished = self.path.with_suffix(".unfinished")
        about = {"progress": json.dumps(vars(self.progress))}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished, about)
        os.replace(unfinished, self.path)

    def resume(self) -> None:
        """Go on from a checkpoint, if there is one."""
        if self.path.exists():
            with safe_open(self.path, "pt") as file:
                self.progress = Progress(**json.loads(file.metadata()["progress"]))
                stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            for name, p in self.named.items():
                p.data.copy_(stored[f"weight.{name}"])
                keys = ("step", "exp_avg", "exp_avg_sq")
                self.optimizer.state[p] = {key: stored[f"{key}.{name}"].to(p.device) for key in keys}

    def run(self, rows: torch.Tensor) -> None:
        """Train until the time is over."""
        saved = time.perf_counter()
        self.args.output_dir.joinpath("progress.jsonl").touch()
        with open(self.args.output_dir / "progress.jsonl", "a", encoding="utf-8", buffering=1) as log:
            while self.progress.seconds < 60 * self.args.minutes:
                start = time.perf_counter()
                found = self.step(batch(rows, self.progress.steps, self.args.rows))
                self.progress.steps += 1
                self.progress.tokens += self.args.rows * LENGTH
                if start - saved > 60 * self.args.checkpoint_minutes:
                    self.save()
                    saved = start
                self.progress.seconds += time.perf_counter() - start
                if self.progress.steps % 20 == 0:
                    log.write(json.dumps({**vars(self.progress), "rate": self.learning_rate(), **found}) + "\n")


def balance_loss(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """Compute the load-balancing loss of one layer (Switch Transformer, Eq. 4) from its router's logits `[T, E]`.

    transformers' own is over all layers together, which unbalanced layers can satisfy.
    """
    probabilities = logits.float().softmax(-1)
    chosen = F.one_hot(probabilities.topk(top_k).indices, logits.shape[-1]).sum(1).float().mean(0) / top_k
    return logits.shape[-1] * (chosen * probabilities.mean(0)).sum()


def batch(rows: torch.Tensor, step: int, size: int) -> torch.Tensor:
    """Return the rows of a step: each pass over the text has another order."""
    steps = len(rows) // size
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(step // steps))
    return rows[order[step % steps * size :][:size]]


@torch.inference_mode()
def report(model: Any, rows: torch.Tensor, progress: Progress) -> dict[str, Any]:
    """Measure the held-out loss per token, and each layer's share of assignments of its busiest and idlest expert."""
    experts, top_k = SIZES["n_routed_experts"], SIZES["num_experts_per_tok"]
    losses, counts = [], torch.zeros(SIZES["num_hidden_layers"], experts)
    for ids in rows.split(16):
        ids = ids.to(model.device, torch.int64)
        output = model(input_ids=ids, labels=ids, output_router_logits=True)
        losses += [output.loss.item()] * len(ids)
        for layer, logits in enumerate(output.router_logits):
            counts[layer] += logits.topk(top_k).indices.flatten().bincount(minlength=experts).cpu()
    shares = experts * counts / counts.sum(1, keepdim=True)  # 1 is the mean
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        **vars(progress),
        "held_out_tokens": rows.numel(),
        "held_out_loss": sum(losses) / len(losses),
        "busiest expert, by layer": [round(share, 2) for share in shares.amax(1).tolist()],
        "idlest expert, by layer": [round(share, 2) for share in shares.amin(1).tolist()],
        "where": common.where(model.device),
    }


def main(given: Sequence[str] | None = None) -> None:
    args = parse_arguments(given)
    if args.threads:
        torch.set_num_threads(args.threads)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if (args.output_dir / "report.json").exists():
        raise SystemExit(f"{args.output_dir} has a finished model: choose another folder.")
    tokenizer, rows = prepare(args.output_dir, args.megabytes)
    training = Training(args, tokenizer)
    training.resume()
    training.run(rows["train"])
    model = training.model.eval()
    model.save_pretrained(args.output_dir)
    found = {**report(model, rows["held_out"], training.progress), "training_tokens": rows["train"].numel()}
    common.write_json(args.output_dir / "report.json", found)
    training.path.unlink(missing_ok=True)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
