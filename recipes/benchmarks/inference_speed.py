"""
Tokens per second and memory of a sparse model and its condensed forms in prefill and decoding, beside what their shapes
predict:

python recipes/benchmarks/inference_speed.py

On an accelerator, the model has DeepSeekMoE-16B's real sizes and random weights (bfloat16; 33 GB, and 8 GB for the
condensed forms, which share all other weights with it); on a CPU, it is an eighth as wide. All take turns, so that all
see the same machine. Experts implementations that transformers offers are tried on the sparse model first, and the
fastest one is used for each case, also in those layers of condensed models that are still sparse. Condensed are the
first sparse layers; all have the same sizes. `--counts_only` prints what the shapes predict, with no device or weights.
"""

from __future__ import annotations

import argparse
import datetime
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from inference_counts import ModelCounts, Work, count_model, expected_experts
from inference_timing import Experts, Inference, Peaks, Seconds, Trial, condensed_twin
from speed_models import DEEPSEEK_MOE_16B, build_model, default_device, memory_of, random_ids, where
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.utils import logging

from cdmoe_plugin.cards.tables import format_table

CPU_HIDDEN_SIZE = DEEPSEEK_MOE_16B.hidden_size // 8
SPARSE = "sparse"


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", help="a sparse checkpoint instead of random weights")
    parser.add_argument("--hidden_size", type=int, help="of the random model; its other widths are in proportion")
    parser.add_argument("--num_layers", type=int, help="decoder layers of the random model; the first is dense")
    parser.add_argument("--experts", type=int, help="routed experts per layer of the random model")
    parser.add_argument("--layers", type=numbers, default=[3, 6, 9, 12, 15], help="numbers of condensed layers")
    parser.add_argument("--kept", type=numbers, default=[0, 6], help="numbers K of routed experts kept, of E(shared+K)")
    parser.add_argument("--batch_sizes", type=numbers, default=[1, 8, 32])
    parser.add_argument("--prompt_tokens", type=int, help="per sequence; by default 512, on a CPU 64")
    parser.add_argument("--new_tokens", type=int, help="per sequence; by default 32, on a CPU 16")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each model; medians are given")
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--dtype", help="by default bfloat16, on a CPU float32")
    parser.add_argument("--attn_implementation", default="sdpa", help="of all models alike")
    parser.add_argument(
        "--experts_implementations",
        type=lambda text: text.split(","),
        default=["eager", *sorted(ALL_EXPERTS_FUNCTIONS.valid_keys())],
        help="those to try; by default all that transformers offers",
    )
    parser.add_argument(
        "--compile",
        nargs="?",
        const="inductor",
        metavar="BACKEND",
        help="compile the decoding steps of all models, with a static cache; takes a minute per model and batch size",
    )
    parser.add_argument("--counts_only", action="store_true", help="only what the shapes predict")
    parser.add_argument("--output", type=Path, help="Markdown file to write what is printed to, as it comes")
    args = parser.parse_args(given)
    args.command = shlex.join([Path(sys.argv[0]).name, *(sys.argv[1:] if given is None else given)])
    small = args.device.type == "cpu" and not args.counts_only
    if args.model_name_or_path and any((args.hidden_size, args.num_layers, args.experts)):
        parser.error("--hidden_size, --num_layers and --experts are of the random model: a checkpoint has its own")
    if small and not args.model_name_or_path:
        args.hidden_size = args.hidden_size or CPU_HIDDEN_SIZE
    args.prompt_tokens = args.prompt_tokens or (64 if small else 512)
    args.new_tokens = args.new_tokens or (16 if small else 32)
    args.dtype = getattr(torch, args.dtype or ("float32" if small else "bfloat16"))
    counted = (*args.layers, *args.batch_sizes, args.prompt_tokens, args.new_tokens, args.repeats)
    if min(counted) < 1 or min(args.kept) < 0:
        parser.error("--layers, --batch_sizes, --prompt_tokens, --new_tokens and --repeats are from 1, --kept from 0")
    return args


def model_config(args: argparse.Namespace) -> Any:
    if args.model_name_or_path:
        return AutoConfig.from_pretrained(args.model_name_or_path)
    return DEEPSEEK_MOE_16B.changed(args.hidden_size, args.num_layers, args.experts).config()


def open_model(args: argparse.Namespace, config: Any) -> Any:
    options = {"attn_implementation": args.attn_implementation}
    if not args.model_name_or_path:
        return build_model(config, args.device, args.dtype, **options)
    options |= {"dtype": args.dtype, "device_map": str(args.device)}
    return AutoModelForCausalLM.from_pretrained(args.model_name_or_path, **options).eval()


def budgets(args: argparse.Namespace, config: Any) -> dict[str, tuple[int, int]]:
    """Condensed layers and kept experts of every model that is measured, by its name."""
    shared = getattr(config, "n_shared_experts", None) or "shared"
    return {f"E({shared}+{kept}) L{n}": (n, kept) for kept in args.kept for n in args.layers}


def count_all(args: argparse.Namespace, config: Any) -> dict[str, ModelCounts]:
    """What the shapes predict of every model.

    Raises:
        ValueError: if the model has too few sparse layers or experts.
    """
    sparse = count_model(build_model(config, torch.device("meta"), args.dtype))
    if max(args.layers) > len(sparse.sparse):
        raise ValueError(f"`layers` asks for {max(args.layers)}, but the model has {len(sparse.sparse)} sparse layers.")
    plans = {name: (sorted(sparse.sparse)[:n], kept) for name, (n, kept) in budgets(args, config).items()}
    return {SPARSE: sparse, **{name: sparse.condensed(*plan) for name, plan in plans.items()}}


def gigabytes(number: float) -> str:
    return f"{number / 1e9:#.3g} GB" if number < 99.95e9 else f"{number / 1e9:.0f} GB"


def context(args: argparse.Namespace) -> float:
    """How many tokens a decoding step sees in the mean, its own included."""
    return args.prompt_tokens + (args.new_tokens + 1) / 2


def counts_table(args: argparse.Namespace, counts: Mapping[str, ModelCounts]) -> str:
    width = args.dtype.itemsize
    rows = []
    for name, count in counts.items():
        steps = [count.step(batch, context(args)) for batch in args.batch_sizes]
        rows.append(
            (
                name,
                f"{count.total:,}",
                gigabytes(count.total * width),
                f"{count.active:,}",
                f"{count.prefill(1, args.prompt_tokens).flops / args.prompt_tokens / 1e9:#.3g}",
                *(gigabytes(step.bytes_read(width)) for step in steps),
            )
        )
    reads = [f"read per step, batch {batch}" for batch in args.batch_sizes]
    return format_table(["model", "parameters", "weights", "active per token", "prefill GFLOP per token", *reads], rows)


def work(args: argparse.Namespace, count: ModelCounts, phase: str, batch: int) -> Work:
    return count.prefill(batch, args.prompt_tokens) if phase == "prefill" else count.step(batch, context(args))


def speed_table(
    args: argparse.Namespace,
    counts: Mapping[str, ModelCounts],
    phase: str,
    inference: Inference,
    seconds: Mapping[str, Sequence[Seconds]],
    peaks: Mapping[str, Peaks | None],
) -> str:
    """One phase of one batch size: "prefill" or "decoding"."""
    batch = inference.ids.shape[0]
    tokens = inference.prompt_tokens if phase == "prefill" else inference.new_tokens
    base = [getattr(s, phase) for s in seconds[SPARSE]]
    wanted = work(args, counts[SPARSE], phase, batch)
    width = args.dtype.itemsize
    rows = []
    for name, runs in seconds.items():
        times = [getattr(s, phase) for s in runs]
        ratios = [sparse / time for sparse, time in zip(base, times, strict=True)]
        needed = work(args, counts[name], phase, batch)
        peak = peaks[name]
        rows.append(
            (
                name,
                f"{tokens / statistics.median(times):,.1f}",
                f"{statistics.median(ratios):.2f}x",
                f"{min(ratios):.2f}-{max(ratios):.2f}",
                f"{wanted.flops / needed.flops:.2f}x",
                f"{wanted.bytes_read(width) / needed.bytes_read(width):.2f}x",
                gigabytes(counts[name].total * width),
                "" if peak is None else gigabytes(getattr(peak, phase)),
            )
        )
    header = ["model", "tokens/s", "speed", "of single turns", "by operations", "by bytes", "weights", "peak memory"]
    return format_table(header, rows)


def trial_table(inference: Inference, trial: Trial) -> str:
    rows = []
    for name, s in trial.seconds.items():
        prefill = "" if s.prefill == float("inf") else f"{inference.prompt_tokens / s.prefill:,.1f}"
        rows.append((name, prefill, f"{inference.new_tokens / s.decoding:,.1f}"))
    return format_table(["experts of the sparse model", "prefill tokens/s", "decoding tokens/s"], rows)


def routes(counts: ModelCounts, chosen: Mapping[int, int], batch: int) -> str:
    """How many experts a decoding step reads, expected and counted."""
    shape = next(iter(counts.sparse.values()))
    expected = expected_experts(shape.num_experts, shape.top_k, batch)
    counted = statistics.mean(chosen.values())
    return (
        f"By uniform routing, a decoding step chooses {expected:.1f} of {shape.num_experts} experts per layer; the "
        f"last one chose {counted:.1f}."
    )


class Page:
    """Markdown that is printed, and written to a file if there is one, as it comes."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.parts: list[str] = []

    def add(self, text: str) -> None:
        print(text, end="\n\n", flush=True)
        self.parts.append(text)
        if self.path is not None:
            self.path.write_text("\n\n".join(self.parts) + "\n", encoding="utf-8")


def headline(args: argparse.Namespace, config: Any, counts: ModelCounts) -> str:
    """What the figures must be read with, in one line."""
    shape = next(iter(counts.sparse.values()))
    measured = [f"attention {args.attn_implementation}", f"medians of {args.repeats}"]
    measured += [f"decoding steps compiled by {args.compile}"] if args.compile else []
    parts = [
        str(datetime.date.today()),
        "no device: counted from shapes" if args.counts_only else where(args.device),
        str(args.dtype).removeprefix("torch."),
        f"{args.model_name_or_path or 'random weights'} ({config.model_type}): {config.num_hidden_layers} layers, of "
        f"them {len(counts.sparse)} sparse, hidden size {config.hidden_size}, {shape.num_experts} experts, "
        f"{shape.top_k} per token",
        f"{args.prompt_tokens} prompt tokens and {args.new_tokens} new ones per sequence",
        *([] if args.counts_only else measured),
        f"`{args.command}`",
    ]
    return "; ".join(parts)


def measure_batch(
    args: argparse.Namespace, page: Page, models: Mapping[str, Any], counts: Mapping[str, ModelCounts], batch: int
) -> None:
    sparse = models[SPARSE]
    ids = random_ids(sparse.config.vocab_size, batch, args.prompt_tokens + args.new_tokens)
    inference = Inference(sparse, ids, args.prompt_tokens, args.compile)
    trial = inference.try_experts(sparse, args.experts_implementations, args.repeats)
    page.add(f"### Batch {batch}\n\n{trial_table(inference, trial)}")
    if trial.failed:
        page.add("Not available: " + "; ".join(f"{name} ({why})" for name, why in trial.failed.items()) + ".")
    experts: Experts = trial.fastest()
    page.add(routes(counts[SPARSE], inference.chosen_experts(sparse), batch))
    peaks = {name: inference.peaks(model, experts) for name, model in models.items()}
    seconds = inference.take_turns(models, experts, args.repeats)
    for phase in ("prefill", "decoding"):
        table = speed_table(args, counts, phase, inference, seconds, peaks)
        page.add(f"{phase.capitalize()}, batch {batch}, experts by {getattr(experts, phase)}:\n\n{table}")
    if args.compile:
        torch.compiler.reset()


def main(given: Sequence[str] | None = None) -> None:
    args = parse_arguments(given)
    logging.set_verbosity_error()
    config = model_config(args)
    counts = count_all(args, config)
    page = Page(args.output)
    page.add(headline(args, config, counts[SPARSE]))
    page.add(f"### Counted from the shapes\n\n{counts_table(args, counts)}")
    if args.counts_only:
        return
    models = {SPARSE: open_model(args, config)}
    for name, (n, kept) in tqdm(budgets(args, config).items(), desc="Condensing", unit="model"):
        models[name] = condensed_twin(models[SPARSE], sorted(counts[SPARSE].sparse)[:n], kept)
    for name, model in models.items():
        assert model.num_parameters() == counts[name].total, f"{name} has not the parameters that its shapes predict"
    if memory_of(args.device) is None:
        page.add("Peak memory is left out: torch does not count what is allocated on this device.")
    for batch in tqdm(args.batch_sizes, desc="Measuring", unit="batch size"):
        measure_batch(args, page, models, counts, batch)


if __name__ == "__main__":
    main()
