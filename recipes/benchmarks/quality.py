"""
Condensed models beside the sparse model and beside what a user would make instead, on held-out text: loss above the
sparse model's, KL divergence from it, share of tokens for which both find the same token most likely, parameters, and
the speed of prefill and decoding.

python recipes/benchmarks/train_reference.py --output_dir reference
python recipes/benchmarks/quality.py --model_name_or_path reference --calibration reference/calibration.jsonl \
    --held_out reference/held_out.jsonl --layers 2,4,6,8 --num_experts 8 --num_samples 128 --max_length 256

Without a checkpoint: the quickstart's small model, trained for minutes. A seed draws the calibration samples and random
experts; numbers are means over seeds ± their standard deviation. `--only` names other comparisons: those of the paper
(CD-MoE, arXiv 2412.00069), and of all registered methods. DeepSeekMoE-16B with the paper's tasks by lm-eval:

python recipes/benchmarks/quality.py --model_name_or_path deepseek-ai/deepseek-moe-16b-base --dtype bfloat16 \
    --tasks arc_challenge,boolq,hellaswag,openbookqa,piqa,rte,winogrande,mmlu --held_out text.jsonl --seeds 0
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import common
import torch
from inference_speed import Counts, count
from measures import HeldOut, Speed
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from cdmoe_plugin import CondenseConfig, CondensePlan, condense_pretrained, search_plan
from cdmoe_plugin.blocks import find_sparse_blocks
from cdmoe_plugin.cards.tables import format_table
from cdmoe_plugin.data import TEXTS, open_file
from cdmoe_plugin.presets import PRESETS
from cdmoe_plugin.registry import EXPERT_SELECTIONS, LAYER_SELECTIONS, METRICS, REFIT_NEURONS, REFITS, ROUTED_SELECTIONS

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Size:
    """A size that all methods of a table are brought to: that of `layers` condensed layers with `experts` experts."""

    layers: int
    experts: int
    sparse: Counts

    @property
    def parameters(self) -> int:
        """The parameters of the whole model."""
        return self.sparse.condensed(self.layers, self.experts).total

    @property
    def kept(self) -> int:
        """The experts that pruning may keep in every sparse layer, so that there are at most as many parameters."""
        gone = self.sparse.total - self.parameters
        each = self.sparse.sparse * (self.sparse.expert + self.sparse.router / self.sparse.num_experts)
        return self.sparse.num_experts - math.ceil(gone / each)


# The rows of each comparison: fields of CondenseConfig beside those of a preset. `experts` is not a field; neither is
# `spread`, which decides on every layer by the number of parameters.
TRIMMED = {"layer_selection": "similarity"}
COMPARISONS: dict[str, dict[str, dict[str, Any]]] = {
    "methods": {
        "pruned by REAP": {"form": "prune_experts", "routed_selection": "reap"},
        "pruned by frequency": {"form": "prune_experts", "routed_selection": "frequency"},
        "pruned by REAP and distilled": {"form": "prune_experts", "routed_selection": "reap", "refit": "distill"},
        "pruned by frequency and distilled": {
            **{"form": "prune_experts", "routed_selection": "frequency"},
            **{"refit": "distill"},
        },
        "condensed and folded": {},
        "condensed fast": {"preset": "fast"},
        "condensed in closed form": {"preset": "best", "refit": "down_proj"},
        "condensed best": {"preset": "best"},
        "condensed best with gates": {"preset": "best", "gates": "sigmoid"},
        "spread in closed form": {"preset": "best", "refit": "down_proj", "spread": True},
        "spread best": {"preset": "best", "spread": True},
    },
    "paper": {
        "E(shared+0)": {"experts": 0},
        "E(shared+K)": {},
        "trim_layer": {"form": "trim_layer", **TRIMMED},
        "trim_block": {"form": "trim_block", **TRIMMED},
    },
    "expert_selection": {name: {"expert_selection": name} for name in EXPERT_SELECTIONS},
    "layer_selection": {name: {"layer_selection": name} for name in LAYER_SELECTIONS},
    "metric": {name: {"metric": name} for name in METRICS.methods()},
    "refit": {name: {"refit": name} for name in REFITS},
    "routed_selection": {name: {"form": "prune_experts", "routed_selection": name} for name in ROUTED_SELECTIONS},
    "refit_neurons": {name: {"preset": "fast", "refit_neurons": name} for name in REFIT_NEURONS},
}
WITH_SPEED = ("methods", "paper")
REFITTING = ("refit", "refit_steps", "refit_target")  # fields that no search reads
STYLES = {"parameters": "{:.1%}", "above": "{:.4f}", "KL": "{:.4f}", "prefill": "{:.2f}x", "decoding": "{:.2f}x"}
NAMES = {"above": "loss above sparse"}
SMALL = {"layers": [2, 4, 6, 8], "num_experts": 4, "num_samples": 128, "max_length": 256}
LARGE = {"layers": [3, 6, 9, 12, 15], "num_experts": 6, "num_samples": 100, "max_length": 512}


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model_name_or_path", help="sparse checkpoint; without it, a small model is trained")
    add("--architecture", choices=["deepseek", "qwen2_moe"], default="deepseek", help="of the small model")
    add("--cache_dir", type=Path, default=Path(".cache/quickstart"), help="folder that keeps the small model")
    add("--only", type=common.words, default=["methods"], help=f"some of {','.join(COMPARISONS)} (methods)")
    add("--methods", type=common.words, help="some rows of them (all)")
    add("--layers", type=common.numbers, help="numbers of condensed layers (3,6,9,12,15; small model: 2,4,6,8)")
    add("--num_experts", type=int, help="experts K kept in each (6; small model: 4)")
    add("--num_samples", type=int, help="calibration samples (100; small model: 128)")
    add("--max_length", type=int, help="tokens of each (512; small model: 256)")
    add("--seeds", type=common.numbers, default=[0, 1, 2], help="seeds of calibration texts and random experts")
    add("--calibration", help="hub dataset or local file (C4; small model: its training texts)")
    add(
        "--held_out",
        type=Path,
        help="file of texts or token ids, .txt with a text per line (small model: its held-out ones)",
    )
    add("--held_out_rows", type=int, default=64, help="rows of --max_length tokens of them, at most")
    add("--tasks", type=common.words, default=[], help="tasks of lm-eval whose accuracy is measured, zero-shot")
    add("--include_path", help="folder of your own tasks for lm-eval, then the only ones")
    add("--limit", type=int, help="questions per task, at most")
    add("--batch_size", type=int, default=16, help="rows or questions per forward pass")
    add("--speed", type=common.numbers, default=[8, 128, 16], help="sequences, tokens of the prompt and new ones")
    add("--repeats", type=int, default=5, help="turns of the speed; 0 does not measure it")
    add("--dtype", default="auto", help="dtype of the weights")
    add("--device_map", help="device map of the models (auto with an accelerator)")
    add("--json", type=Path, help="file to write every measurement to as JSON")
    args = parser.parse_args(given)
    for name, value in (LARGE if args.model_name_or_path else SMALL).items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    if unknown := set(args.only) - set(COMPARISONS):
        parser.error(f"--only has {', '.join(sorted(unknown))}, but only {', '.join(COMPARISONS)} exist")
    rows = {method for name in args.only for method in COMPARISONS[name]}
    if unknown := set(args.methods or ()) - rows:
        parser.error(f"--methods has {', '.join(sorted(unknown))}, but only {', '.join(rows)} exist")
    if args.model_name_or_path and not args.tasks and not args.held_out:
        parser.error("nothing would be measured: give --tasks, --held_out or both")
    return args


def held_out_rows(samples: Sequence[Any], tokenizer: Any, length: int, count: int) -> torch.Tensor:
    """Cut samples into rows `[at most count, length]`, int64, evenly spaced where there are more.

    Texts are joined, with the end-of-sequence token between them; token ids are rows of their own.
    """
    if isinstance(samples[0], str):
        ids = [i for text in samples for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id or 0]]
        samples = [ids[start : start + length] for start in range(0, len(ids), length)]
    rows = torch.tensor([sample[:length] for sample in samples if len(sample) >= length])
    return rows[:: max(1, len(rows) // count)][:count]


def read_held_out(path: Path) -> list[Any]:
    """Read the texts or the token ids of a file."""
    found = open_file(path, "held-out", TEXTS)
    column = "input_ids" if "input_ids" in found.column_names else "text"
    return [sample for sample in found[column] if sample]


def accuracies(model: Any, tokenizer: Any, args: argparse.Namespace) -> dict[str, float]:
    """Measure the accuracy of each task by lm-eval."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    wrapped = HFLM(model, tokenizer=tokenizer, batch_size=args.batch_size, device=str(model.device), backend="causal")
    manager = TaskManager(include_path=args.include_path, include_defaults=args.include_path is None)
    options = {"num_fewshot": 0, "limit": args.limit, "bootstrap_iters": 0, "log_samples": False}
    found: Any = lm_eval.simple_evaluate(wrapped, tasks=args.tasks, task_manager=manager, **options)
    return {task: found["results"][task]["acc,none"] for task in args.tasks}


class Bench:
    """One sparse model and its condensed forms, measured on the same rows and tasks."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.plans = args, dict[str, CondensePlan]()
        calibration, texts = args.calibration, []
        device_map = args.device_map or ("auto" if torch.accelerator.is_available() else None)
        # On a CPU, the loop over experts is many times slower than grouped products.
        own = {"device_map": device_map} if device_map else {"experts_implementation": "grouped_mm"}
        self.kwargs: dict[str, Any] = {"dtype": args.dtype, **own}
        self.path = args.model_name_or_path
        if self.path is None:
            sys.path.insert(0, str(ROOT / "examples"))
            from tiny_moe import train_or_load

            model, _, train, texts = train_or_load(args.cache_dir, args.architecture)
            self.path, calibration = model.name_or_path, args.calibration or train
        self.sparse = AutoModelForCausalLM.from_pretrained(self.path, **self.kwargs).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(self.path)
        self.given = {"calibration": calibration, "tokenizer": self.tokenizer}
        if args.held_out:
            texts = read_held_out(args.held_out)
        self.counts = count(self.sparse)
        self.sparse_layers = [block.layer for block in find_sparse_blocks(self.sparse)]
        self.held_out, self.speed = None, None
        if texts:
            rows = held_out_rows(texts, self.tokenizer, args.max_length, args.held_out_rows)
            self.held_out = HeldOut(self.sparse, rows, args.batch_size)
        if args.repeats:
            batch, prompt, new = args.speed
            self.speed = Speed(self.sparse, prompt, new, batch, args.repeats)

    def config(self, seed: int, num_layers: int, **fields: Any) -> CondenseConfig:
        """Make the config of a search."""
        if fields.get("form") == "trim_block":  # a decoder layer has to remain
            num_layers = min(num_layers, self.sparse.config.get_text_config().num_hidden_layers - 1)
        own = {name: getattr(self.args, name) for name in ("num_samples", "max_length")}
        if "target_size" not in fields:
            own |= {"num_layers": num_layers, "num_experts": self.args.num_experts}
        preset = PRESETS[fields.pop("preset", "paper")]
        return CondenseConfig(**{**preset, "seed": seed, **own, **fields})

    def search(self, config: CondenseConfig) -> CondensePlan:
        """Search a plan, once per config."""
        key = str({name: value for name, value in config.to_dict().items() if name not in REFITTING})
        if key not in self.plans:
            self.plans[key] = search_plan(self.sparse, config, **self.given)
        return self.plans[key]

    def record(self, comparison: str, method: str, seed: int, layers: int) -> dict[str, Any] | None:
        """Measure one model of a comparison; None where it would have no decoder layer, or too few experts."""
        fields = dict(COMPARISONS[comparison][method])
        size = Size(layers, fields.pop("experts", self.args.num_experts), self.counts)
        # One search of the smallest model is cut to every size, but what is pruned has one for each.
        smallest = replace(size, layers=max(self.args.layers))
        prune, spread = fields.get("form") == "prune_experts", fields.pop("spread", False)
        if prune:
            fields |= {"num_routed": size.kept, "layers": self.sparse_layers}
        if spread:
            fields["target_size"] = f"{smallest.parameters} params"
        if prune and size.kept < self.counts.top_k:
            return None
        config = self.config(seed, smallest.layers, **fields)
        plan = self.search(config)
        if layers > len(plan.layers) and not spread:
            return None
        if spread:
            config = replace(config, target_size=f"{size.parameters} params")
            plan = plan.truncate(target_size=config.target_size)
        elif not prune:
            plan = plan.truncate(layers, size.experts if plan.form == "condense" else None)
            config = replace(config, num_layers=layers)
        refitted = (config, self.given) if config.refit else (None, {})
        model = condense_pretrained(self.path, refitted[0], plan=plan, **refitted[1], **self.kwargs)
        found = {"comparison": comparison, "method": method, "layers": layers, "seed": seed}
        found |= self.measure(model, speed=comparison in WITH_SPEED)
        del model
        gc.collect()  # before the next model is opened
        return found

    def measure(self, model: Any, speed: bool = False) -> dict[str, float]:
        """Measure a model's parameters as a share of the sparse model's, and whatever was asked for."""
        found = {"parameters": model.num_parameters() / self.sparse.num_parameters()}
        if self.held_out is not None:
            found |= self.held_out.measure(model.eval())
        if self.args.tasks:
            found |= accuracies(model, self.tokenizer, self.args)
        if speed and self.speed is not None:
            found |= self.speed.measure(model)
        return found


def table(records: Sequence[dict[str, Any]]) -> str:
    """Format the rows of a comparison: methods by numbers of layers, over seeds."""
    cells: dict[tuple[int, str], dict[str, list[float]]] = {}
    for record in records:
        row = cells.setdefault((record["layers"], record["method"]), {})
        for name in record.keys() - {"comparison", "method", "layers", "seed", "loss"}:
            row.setdefault(name, []).append(record[name])
    columns = [name for name in records[0] if any(name in row for row in cells.values())]
    rows = []
    for layers, method in sorted(cells, key=lambda cell: cell[0]):
        row = cells[layers, method]
        rows.append((method, f"L{layers}", *(cell(name, row.get(name, [])) for name in columns)))
    return format_table(["method", "layers", *(NAMES.get(name, name) for name in columns)], rows)


def cell(measure: str, values: Sequence[float]) -> str:
    """Format a measure over seeds, with its spread unless it does not depend on the seed."""
    values = values[:1] if len(set(values)) == 1 else values
    return common.mean_and_spread(values, STYLES.get(measure, "{:.1%}")) if values else ""


def main(given: Sequence[str] | None = None) -> None:
    args = parse_arguments(given)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    bench = Bench(args)
    sparse = bench.measure(bench.sparse)
    cells = [
        (comparison, method, seed, layers)
        for seed in args.seeds
        for comparison in args.only
        for method in COMPARISONS[comparison]
        if not args.methods or method in args.methods
        for layers in args.layers
    ]
    found = [bench.record(*cell) for cell in tqdm(cells, desc="Measuring", unit="model")]
    records = [record for record in found if record is not None]
    measured = ", ".join(f"{name} {value:.4f}" for name, value in sparse.items() if name in ("loss", *args.tasks))
    parameters = f"{bench.sparse.num_parameters():,} parameters"
    print(f"{bench.path}: {parameters}, {measured}; K = {args.num_experts}, seeds {args.seeds}")
    print(f"{common.where(bench.sparse.device)}\n")
    for comparison in args.only:
        print(f"### {comparison}\n\n{table([r for r in records if r['comparison'] == comparison])}\n")
    common.write_json(args.json, {"arguments": vars(args), "sparse": sparse, "records": records})


if __name__ == "__main__":
    main()
