"""
Condense a small Mixture-of-Experts model from beginning to end, without downloading anything:

python examples/quickstart.py

The script trains a tokenizer and a small DeepSeekMoE model on text that comes with Python (minutes the first time, then
cached). It condenses half of the sparse layers as the paper does, then makes the best model of the same size, saves and
reopens both, and compares them with the sparse model. It ends with a table and a figure like Figure 1 of the paper.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before torch is imported: threads that spin for long while they wait for each other slow training down many times when
# another program runs beside it, and threads that never spin use little more than one core.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
from tiny_moe import train_or_load, write_training_data
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from cdmoe_plugin import CondenseConfig, condense_pretrained, search_plan
from cdmoe_plugin.cards.plots import plot_layer_divergences
from cdmoe_plugin.cards.tables import format_table, plan_table

DATA = {"num_samples": 48, "max_length": 256}
PAPER = CondenseConfig.paper(num_layers=4, num_experts=4, **DATA)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache_dir", type=Path, default=Path(".cache/quickstart"), help="keeps the trained model")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/quickstart"), help="models, plan and figure")
    return parser.parse_args()


def held_out_batches(tokenizer: Any, texts: list[str], length: int = 256, size: int = 16) -> list[torch.Tensor]:
    """Split the concatenated held-out documents into batches of full sequences."""
    ids = [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    rows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    return list(rows.split(size))


@torch.inference_mode()
def losses(model: Any, batches: list[torch.Tensor]) -> Iterator[tuple[float, int]]:
    """Yield the mean loss and the number of predicted tokens of each batch."""
    for ids in batches:
        yield model(input_ids=ids, labels=ids).loss.item(), ids[:, 1:].numel()


def perplexity(model: Any, batches: list[torch.Tensor]) -> float:
    """Compute the perplexity over all tokens of the batches."""
    total, tokens = 0.0, 0
    for loss, count in losses(model, batches):
        total, tokens = total + loss * count, tokens + count
    return math.exp(total / tokens)


@torch.inference_mode()
def tokens_per_second(models: dict[str, Any], ids: torch.Tensor, repeats: int = 5) -> dict[str, float]:
    """Measure the speed of a forward pass (median); models take turns, so that all see the same machine."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(repeats + 1):
        for name, model in models.items():
            start = time.perf_counter()
            model(input_ids=ids, use_cache=False)
            seconds[name].append(time.perf_counter() - start)
    return {name: ids.numel() / statistics.median(times[1:]) for name, times in seconds.items()}


def main() -> None:
    args = parse_arguments()
    logging.set_verbosity_error()
    sparse, tokenizer, texts, held_out = train_or_load(args.cache_dir)

    print("Choosing experts and layers on calibration text ...")
    plan = search_plan(sparse, PAPER, calibration=texts, tokenizer=tokenizer)
    folders = {
        "sparse": args.output_dir / "sparse",
        "condensed as in the paper": args.output_dir / "condensed",
        "best of that size": args.output_dir / "best",
    }
    for folder in folders.values():
        tokenizer.save_pretrained(folder)
    sparse.save_pretrained(folders["sparse"])
    # With a plan, condensing needs no search and does not read the dropped experts.
    condensed = condense_pretrained(folders["sparse"], plan=plan)
    condensed.save_pretrained(folders["condensed as in the paper"])

    print("Choosing what becomes of every layer at the same size, and fitting the layers that change ...")
    size = CondenseConfig.best(target_size=f"{condensed.num_parameters()} params", refit_steps=200, **DATA)
    best = condense_pretrained(folders["sparse"], size, calibration=texts)
    best.save_pretrained(folders["best of that size"])
    write_training_data(args.output_dir / "data")  # for `cdmoe recover`

    models = {
        name: AutoModelForCausalLM.from_pretrained(folder, experts_implementation="grouped_mm")
        for name, folder in folders.items()
    }
    batches = held_out_batches(tokenizer, held_out)
    speed = tokens_per_second(models, batches[0])
    rows = []
    for name, model in models.items():
        size = sum(file.stat().st_size for file in folders[name].glob("*.safetensors"))
        cells = (f"{model.num_parameters():,}", f"{size / 2**20:.1f} MiB", f"{perplexity(model, batches):.2f}")
        rows.append((name, *cells, f"{speed[name]:,.0f}"))
    figure = args.output_dir / "divergence_per_layer.png"
    plot_layer_divergences(plan, figure)

    print(f"\nThe paper's plan, in the order of selection:\n\n{plan_table(plan)}\n")
    print(f"What became of the layers of the best model:\n\n{plan_table(best.condense_plan)}\n")
    print(format_table(["model", "parameters", "file size", "held-out perplexity", "tokens/s"], rows))
    print(f"\nModels, plan, figure ({figure.name}) and data to recover with are in {args.output_dir}.")


if __name__ == "__main__":
    main()
