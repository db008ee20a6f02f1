"""
The paper's comparisons (CD-MoE, arXiv 2412.00069): held-out loss of condensed models by expert selection, layer
selection, metric and refit, and beside the trimming baselines, their memory and speed.

python recipes/benchmarks/quality.py

Without a checkpoint: a small model that is trained for minutes on documentation (examples/tiny_moe.py), and three
seeds; `--only refit --seeds 0` is a small part of it. Numbers are means over seeds ± their standard deviation; a seed
draws the calibration texts and the random experts. DeepSeekMoE-16B with the paper's tasks by lm-eval:

python recipes/benchmarks/quality.py --model_name_or_path deepseek-ai/deepseek-moe-16b-base --dtype bfloat16 \
    --tasks arc_challenge,boolq,hellaswag,openbookqa,piqa,rte,winogrande,mmlu --held_out text.jsonl \
    --layers 3,6,9,12,15 --num_experts 6 --num_samples 100 --max_length 512 --seeds 0

Recovery by recipes/lm_then_sft.py, two trainings for each number of layers and of experts:

python recipes/benchmarks/quality.py --only recovery --layers 4 --seeds 0 \
    --recovery_config cdmoe_plugin/scripts/configs/recover-quickstart-briefly.yaml
"""

from __future__ import annotations

import argparse
import gc
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from cdmoe_plugin import CondenseConfig, CondensePlan, condense_pretrained, search_plan
from cdmoe_plugin.cards.tables import format_table
from cdmoe_plugin.data import TEXTS, open_file
from cdmoe_plugin.integrations.measure import weight_bytes
from cdmoe_plugin.registry import EXPERT_SELECTIONS, LAYER_SELECTIONS, METRICS, REFITS

ROOT = Path(__file__).parents[2]
# What the rows of a comparison change of the default settings; `experts` and `stages` are not fields of CondenseConfig.
TRIMMED = {"layer_selection": "similarity"}
COMPARISONS: dict[str, dict[str, dict[str, Any]]] = {
    "baselines": {
        "E(shared+0)": {"experts": 0},
        "E(shared+K)": {},
        "trim_layer": {"form": "trim_layer", **TRIMMED},
        "trim_block": {"form": "trim_block", **TRIMMED},
    },
    "expert_selection": {name: {"expert_selection": name} for name in EXPERT_SELECTIONS},
    "layer_selection": {name: {"layer_selection": name} for name in LAYER_SELECTIONS},
    "metric": {name: {"metric": name} for name in METRICS.methods()},
    "refit": {"none": {}, **{name: {"refit": name} for name in REFITS}},
    "recovery": {
        f"E(shared+{kept}) {stages or 'as it is'}": {**({"experts": 0} if kept == "0" else {}), "stages": stages}
        for kept in ("0", "K")
        for stages in ("", "sft", "lm,sft")
    },
}
STYLES = {"loss": "{:.4f}", "memory": "{:.1%}", "speed": "{:.2f}x", "gap closed": "{:.0%}"}  # others are accuracies
SMALL = {"layers": [2, 4, 6, 8], "num_experts": 4, "num_samples": 32, "max_length": 256}
LARGE = {"layers": [3, 6, 9, 12, 15], "num_experts": 6, "num_samples": 100, "max_length": 512}


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model_name_or_path", help="sparse checkpoint; without it, a small model is trained")
    add("--architecture", choices=["deepseek", "qwen2_moe"], default="deepseek", help="of the small model")
    add("--cache_dir", type=Path, default=Path(".cache/quickstart"), help="folder that keeps the small model")
    add("--only", type=common.words, help=f"some of {','.join(COMPARISONS)} (all; recovery with --recovery_config)")
    add("--layers", type=common.numbers, help="numbers of condensed layers (3,6,9,12,15; small model: 2,4,6,8)")
    add("--num_experts", type=int, help="experts K kept in each (6; small model: 4)")
    add("--num_samples", type=int, help="calibration samples (100; small model: 32)")
    add("--max_length", type=int, help="tokens of each (512; small model: 256)")
    add("--seeds", type=common.numbers, default=[0, 1, 2], help="seeds of calibration texts and random experts")
    add("--calibration", help="hub dataset or local file (C4; small model: its training texts)")
    add(
        "--held_out",
        type=Path,
        help="file of texts for the loss, .txt with one per line (small model: its held-out ones)",
    )
    add("--held_out_rows", type=int, default=64, help="rows of --max_length tokens of them, at most")
    add("--tasks", type=common.words, default=[], help="tasks of lm-eval whose accuracy is measured, zero-shot")
    add("--include_path", help="folder of your own tasks for lm-eval, then the only ones")
    add("--limit", type=int, help="questions per task, at most")
    add("--batch_size", type=int, default=16, help="rows or questions per forward pass")
    add("--speed_tokens", type=int, default=2048, help="tokens of the forward pass whose speed is measured")
    add("--dtype", default="auto", help="dtype of the weights")
    add("--device_map", help="device map of the models (auto with an accelerator)")
    add("--recovery_config", type=Path, help="options of recipes/lm_then_sft.py as YAML, for the comparison recovery")
    add("--json", type=Path, help="file to write every measurement to as JSON")
    args = parser.parse_args(given)
    for name, value in (LARGE if args.model_name_or_path else SMALL).items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    args.only = args.only or [name for name in COMPARISONS if name != "recovery" or args.recovery_config]
    if unknown := set(args.only) - set(COMPARISONS):
        parser.error(f"--only has {', '.join(sorted(unknown))}, but only {', '.join(COMPARISONS)} exist")
    if "recovery" in args.only and args.recovery_config is None:
        parser.error("--only recovery needs --recovery_config")
    if args.model_name_or_path and not args.tasks and not args.held_out:
        parser.error("nothing would be measured: give --tasks, --held_out or both")
    return args


def held_out_rows(tokenizer: Any, texts: Sequence[str], length: int, count: int) -> torch.Tensor:
    """Join documents and cut them into rows `[at most count, length]`, int64, evenly spaced where there are more."""
    ids = [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id or 0]]
    rows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    return rows[:: max(1, len(rows) // count)][:count]


@torch.inference_mode()
def held_out_loss(model: Any, rows: torch.Tensor, batch_size: int) -> float:
    """Return the mean loss per token, in nats."""
    batches = rows.to(model.device).split(batch_size)
    return sum(model(input_ids=ids, labels=ids).loss.item() * len(ids) for ids in batches) / len(rows)


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


@torch.inference_mode()
def forward(model: Any, ids: torch.Tensor) -> float:
    """Return the seconds of a forward pass."""
    return common.timed(model.device, lambda: model(input_ids=ids.to(model.device), use_cache=False))[1]


class Bench:
    """One sparse model and its condensed forms, measured on the same rows and tasks."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.plans = args, dict[str, CondensePlan]()
        self.calibration, texts = args.calibration, []
        device_map = args.device_map or ("auto" if torch.accelerator.is_available() else None)
        # On a CPU, the loop over experts is many times slower than grouped products.
        own = {"device_map": device_map} if device_map else {"experts_implementation": "grouped_mm"}
        self.kwargs: dict[str, Any] = {"dtype": args.dtype, **own}
        self.path = args.model_name_or_path
        if self.path is None:
            sys.path.insert(0, str(ROOT / "examples"))
            from tiny_moe import train_or_load

            model, _, train, texts = train_or_load(args.cache_dir, args.architecture)
            self.path, self.calibration = model.name_or_path, args.calibration or train
        self.sparse = AutoModelForCausalLM.from_pretrained(self.path, **self.kwargs).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(self.path)
        if args.held_out:
            texts = [text for text in open_file(args.held_out, "held-out", TEXTS)["text"] if text]
        self.rows = held_out_rows(self.tokenizer, texts, args.max_length, args.held_out_rows) if texts else None
        shape = (max(1, args.speed_tokens // args.max_length), args.max_length)
        self.speed_ids = common.random_ids(len(self.tokenizer), *shape)

    def config(self, seed: int, **fields: Any) -> CondenseConfig:
        """Make the config of the search for the largest number of layers, which smaller numbers are cut from."""
        layers = max(self.args.layers)
        if fields.get("form") == "trim_block":  # a decoder layer has to remain
            layers = min(layers, self.sparse.config.get_text_config().num_hidden_layers - 1)
        fields = {"num_layers": layers, "num_experts": self.args.num_experts, "seed": seed, **fields}
        return CondenseConfig(num_samples=self.args.num_samples, max_length=self.args.max_length, **fields)

    def plan(self, config: CondenseConfig, layers: int, experts: int) -> CondensePlan | None:
        """Cut a plan from the search of all layers and experts, which runs once per config; None if it is too short."""
        if (key := str(config)) not in self.plans:
            given = {"calibration": self.calibration, "tokenizer": self.tokenizer}
            self.plans[key] = search_plan(self.sparse, config, **given)
        plan = self.plans[key]
        if layers > len(plan.layers):
            return None
        return plan.truncate(layers, experts if plan.form == "condense" else None)

    def record(self, comparison: str, method: str, seed: int, layers: int) -> dict[str, Any] | None:
        """Measure one model of a comparison; None where it would have no decoder layer."""
        fields = dict(COMPARISONS[comparison][method])
        stages, refit = fields.pop("stages", None), fields.pop("refit", None)
        experts = fields.pop("experts", self.args.num_experts)
        config = self.config(seed, **fields)
        plan = self.plan(config, layers, experts)
        if plan is None:
            return None
        if stages:
            model = self.recovered(plan, stages)
        else:
            refitted = replace(config, refit=refit, num_layers=layers) if refit else None
            given = {"calibration": self.calibration, "tokenizer": self.tokenizer} if refit else {}
            model = condense_pretrained(self.path, refitted, plan=plan, **given, **self.kwargs)
        costs = comparison == "baselines" and seed == self.args.seeds[0]  # they do not depend on the seed
        about = {"comparison": comparison, "method": method, "layers": layers, "seed": seed}
        found = {**about, **self.measure(model, costs)}
        del model
        gc.collect()  # before the next model is opened
        return found

    def measure(self, model: Any, costs: bool = False) -> dict[str, float]:
        """Measure loss and accuracies, and with `costs` memory and speed as multiples of the sparse model's."""
        found = {} if self.rows is None else {"loss": held_out_loss(model.eval(), self.rows, self.args.batch_size)}
        if self.args.tasks:
            found |= accuracies(model, self.tokenizer, self.args)
        if costs:
            runs = {name: partial(forward, m, self.speed_ids) for name, m in (("sparse", self.sparse), ("own", model))}
            turns = common.take_turns(runs, repeats=7)
            found["speed"] = statistics.median(common.paired_ratios(turns["sparse"], turns["own"]))
            found["memory"] = weight_bytes(model) / weight_bytes(self.sparse)
        return found

    def recovered(self, plan: CondensePlan, stages: str) -> Any:
        """Train a condensed model by the recipe, in a process and a folder of its own."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            plan.save(folder / "plan.json")
            options = {"model_name_or_path": self.path, "plan": folder / "plan.json", "stages": stages}
            options |= {"output_dir": folder / "out", "condense_num_layers": len(plan.layers)}
            options["condense_num_experts"] = len(plan.layers[0].experts)
            if self.args.model_name_or_path is None:
                from tiny_moe import write_training_data

                write_training_data(folder)
                options |= {"lm_dataset": folder / "lm.jsonl", "sft_dataset": folder / "sft.json"}
            recipe = ROOT / "recipes" / "lm_then_sft.py"
            command = [sys.executable, str(recipe), "--config", str(self.args.recovery_config)]
            subprocess.run([*command, *(f"--{key}={value}" for key, value in options.items())], check=True)
            return AutoModelForCausalLM.from_pretrained(folder / "out", **self.kwargs)


def add_gap_closed(records: Sequence[dict[str, Any]], sparse_loss: float) -> None:
    """Add the share of the loss between folded and sparse that a refit wins back, against the same seed and layers."""
    folded = {
        (r["layers"], r["seed"]): r["loss"] for r in records if (r["comparison"], r["method"]) == ("refit", "none")
    }
    for record in records:
        if record["comparison"] == "refit" and record["method"] != "none":
            before = folded[record["layers"], record["seed"]]
            record["gap closed"] = (before - record["loss"]) / (before - sparse_loss)


def tables(records: Sequence[dict[str, Any]], sparse: dict[str, float]) -> str:
    """Format a table for each comparison and measure: methods by numbers of layers, over seeds."""
    found = []
    for comparison in dict.fromkeys(record["comparison"] for record in records):
        mine = [record for record in records if record["comparison"] == comparison]
        layers = sorted({record["layers"] for record in mine})
        about = ("comparison", "method", "layers", "seed")
        for measure in dict.fromkeys(key for record in mine for key in record if key not in about):
            values: dict[str, dict[int, list[float]]] = {}
            for r in mine:
                if measure in r:
                    values.setdefault(r["method"], {}).setdefault(r["layers"], []).append(r[measure])
            style = STYLES.get(measure, "{:.1%}")
            cells = [
                (method, *(common.mean_and_spread(by_layers[n], style) if n in by_layers else "" for n in layers))
                for method, by_layers in values.items()
            ]
            whole = f" (sparse: {style.format(sparse[measure])})" if measure in sparse else ""
            table = format_table([measure, *(f"L{n}" for n in layers)], cells)
            found.append(f"### {comparison}: {measure}{whole}\n\n{table}")
    return "\n\n".join(found)


def main(given: Sequence[str] | None = None) -> None:
    args = parse_arguments(given)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    bench = Bench(args)
    sparse = bench.measure(bench.sparse)
    cells = [(c, m, s, n) for s in args.seeds for c in args.only for m in COMPARISONS[c] for n in args.layers]
    found = [bench.record(*cell) for cell in tqdm(cells, desc="Measuring", unit="model")]
    records = [record for record in found if record is not None]
    if "loss" in sparse:
        add_gap_closed(records, sparse["loss"])
    print(f"{bench.path}, K = {args.num_experts}, seeds {args.seeds}; {common.where(bench.sparse.device)}\n")
    print(tables(records, sparse))
    common.write_json(args.json, {"arguments": vars(args), "sparse": sparse, "records": records})


if __name__ == "__main__":
    main()
