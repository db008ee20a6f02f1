"""
Peak memory of condensing a checkpoint with a plan in hand, beside opening the sparse model, measured in one run:

python recipes/benchmarks/peak_memory.py

A random DeepSeekMoE-like checkpoint of about 1.9 GB is written to a temporary folder and deleted afterwards. Each way
to open it runs in a process of its own; the figure is the process's highest resident set, less what it had after
imports.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from cdmoe_plugin import CondensePlan, condense_pretrained
from cdmoe_plugin.cards.tables import format_table
from cdmoe_plugin.plan import CondensedLayer


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_size", type=int, default=1024)
    parser.add_argument("--num_layers", type=int, default=13, help="decoder layers; the first is dense")
    parser.add_argument("--experts", type=int, default=32, help="routed experts per layer")
    parser.add_argument("--condensed", type=int, default=9, help="layers to condense")
    parser.add_argument("--kept", type=int, default=4, help="experts to keep in each")
    parser.add_argument("--step", choices=("write", "sparse", "condensed"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def write_checkpoint(args: argparse.Namespace) -> None:
    config = AutoConfig.for_model(
        "deepseek",
        vocab_size=8192,
        hidden_size=args.hidden_size,
        intermediate_size=4 * args.hidden_size,
        moe_intermediate_size=704,
        num_hidden_layers=args.num_layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        n_routed_experts=args.experts,
        n_shared_experts=2,
        num_experts_per_tok=4,
        first_k_dense_replace=1,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(args.folder, max_shard_size="500MB")


def open_condensed(args: argparse.Namespace) -> Any:
    kept = list(range(0, args.experts, args.experts // args.kept))[: args.kept]
    layers = [CondensedLayer(layer + 1, kept, [0.25] * args.kept) for layer in range(args.condensed)]
    return condense_pretrained(args.folder, plan=CondensePlan(layers))


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def run_step(args: argparse.Namespace) -> None:
    """One step in a process of its own; prints what it measured as JSON."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if args.step == "write":
        write_checkpoint(args)
        return
    before = resident_bytes()
    model = AutoModelForCausalLM.from_pretrained(args.folder) if args.step == "sparse" else open_condensed(args)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    print(json.dumps({"weights": weights, "peak": peak}))


def measure(args: argparse.Namespace, step: str, folder: str) -> dict[str, int]:
    options = [f"--{name}={value}" for name, value in vars(args).items() if name not in ("step", "folder")]
    command = [sys.executable, __file__, *options, f"--step={step}", f"--folder={folder}"]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output) if output else {}


def main() -> None:
    args = parse_arguments()
    if args.step:
        run_step(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        measure(args, "write", folder)
        on_disk = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        sparse, condensed = (measure(args, step, folder) for step in ("sparse", "condensed"))
    print(
        f"Checkpoint of {on_disk / 1e9:.2f} GB; {args.condensed} of {args.num_layers - 1} sparse layers condensed to "
        f"{args.kept} of {args.experts} experts; torch {torch.__version__}"
    )
    rows = [
        (name, *(f"{result[key] / 1e9:.2f} GB" for key in ("weights", "peak")))
        for name, result in (("sparse model opened", sparse), ("condensed while opening", condensed))
    ]
    print(format_table(["", "weights", "peak memory"], rows))


if __name__ == "__main__":
    main()
