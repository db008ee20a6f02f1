"""
Peak memory of opening a sparse checkpoint, of condensing it by a plan while it is opened, and of searching and
condensing it one decoder layer at a time, for a number of layers or for a size, measured in one run (on Linux, whose
/proc is read):

python recipes/benchmarks/memory.py

and of searching layer by layer alone at DeepSeekMoE-16B's real sizes, on a disk with room for twice its 33 GB. A search
for a size takes three quarters of an hour per layer on two cores, with as much memory for one layer as for all:

python recipes/benchmarks/memory.py --preset deepseek-moe-16b --folder FOLDER
python recipes/benchmarks/memory.py --preset deepseek-moe-16b --ways size --num_layers 2 --condensed 1 --samples 5

With `--weights fp8`, the checkpoint has DeepSeek-V3's blocks of FP8 numbers, which are dequantised while they are read.

The checkpoint is random, written to a temporary folder and deleted at the end. Every way runs in a process of its own.
Anonymous memory is what a process needs; its resident set also counts pages of mapped files, the weights of the layer
in use, which the system may take back at any time. The memory of the program itself is measured on a tiny model.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import torch
from safetensors.torch import save_file
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging

from cdmoe_plugin import CondensedLayer, CondensePlan
from cdmoe_plugin.cards.tables import format_table

RECIPE = Path(__file__).parent.parent / "condense.py"
WAYS = {
    "sparse": "sparse model opened",
    "plan": "condensed by a plan while opening",
    "layers": "searched and condensed layer by layer",
    "size": "searched for a size and condensed layer by layer",
}
# A size, as a share of all parameters.
SIZE = {"target_size": 0.8, "refit": "down_proj", "refit_neurons": "least_squares"}
SMALL = {
    **common.DEEPSEEK_MOE_16B,
    **{"vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 4096, "moe_intermediate_size": 704},
    **{"num_hidden_layers": 13, "n_routed_experts": 32},
}
BLOCK = 128  # of the FP8 weights that share a scale, in both dimensions
PRESETS: dict[str, dict[str, Any]] = {
    "small": {"sizes": SMALL, "kept": 4, "ways": ["sparse", "plan", "layers"]},
    "deepseek-moe-16b": {"sizes": common.DEEPSEEK_MOE_16B, "kept": 6, "ways": ["layers"]},
}


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_model_arguments(parser)
    add = parser.add_argument
    add("--preset", choices=list(PRESETS), default="small", help="sizes of the model and defaults of other options")
    add("--weights", choices=["bfloat16", "fp8"], default="bfloat16", help="how weights are stored (bfloat16)")
    add("--ways", type=common.words, help=f"some of {','.join(WAYS)} (all but size; deepseek-moe-16b: layers)")
    add("--folder", type=Path, help="where to write the temporary checkpoints (the system's folder for such files)")
    add("--condensed", type=int, default=9, help="layers to condense, unless for a size")
    add("--kept", type=int, help="experts to keep in each (4; deepseek-moe-16b: 6)")
    add("--samples", type=int, default=4, help="calibration samples of the search")
    add("--length", type=int, default=64, help="tokens of each sample")
    parser.set_defaults(**PRESETS[parser.parse_known_args(given)[0].preset])
    args = parser.parse_args(given)
    if unknown := set(args.ways) - set(WAYS):
        parser.error(f"--ways has {', '.join(sorted(unknown))}, but only {', '.join(WAYS)} exist")
    return args


def write_inputs(folder: Path, config: Any, args: argparse.Namespace) -> int:
    """Write a random checkpoint, a plan and calibration data; return the bytes of the weights."""
    sketch = common.build_model(config, torch.device("meta"), torch.bfloat16)
    tensors = revert_weight_conversion(sketch, sketch.state_dict())
    # Random numbers for all weights would take long: each is cut from the same ones at a place of its own.
    largest = max(tensor.numel() for tensor in tensors.values())
    noise = torch.empty(largest + 2**20, dtype=torch.bfloat16).normal_(0, 0.02, generator=torch.manual_seed(0))
    shards: dict[str, list[str]] = defaultdict(list)
    for name in tensors:
        shards[name.split("layers.")[1].split(".")[0] if "layers." in name else "rest"].append(name)
    config.dtype = torch.bfloat16
    if args.weights == "fp8":
        config.quantization_config = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    config.save_pretrained(folder)
    drawn, weight_map, total = random.Random(0), {}, 0
    for key, names in shards.items():
        shard = {}
        for name in names:
            shape, start = tensors[name].shape, drawn.randrange(2**20)
            shard[name] = torch.ones(shape, dtype=noise.dtype) if len(shape) == 1 else noise[start:][: shape.numel()]
            shard[name] = shard[name].view(shape).clone()
            if args.weights == "fp8" and ("_proj." in name) and "layers." in name:
                shard |= in_fp8(name, shard[name])
        weight_map |= dict.fromkeys(shard, f"model-{key}.safetensors")
        total += sum(tensor.nbytes for tensor in shard.values())
        save_file(shard, folder / f"model-{key}.safetensors", {"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    places = range(config.first_k_dense_replace, config.first_k_dense_replace + args.condensed)
    experts, gates = list(range(args.kept)), [0.1] * args.kept
    CondensePlan([CondensedLayer(place, experts, gates) for place in places]).save(folder / "plan.json")
    rows = common.random_ids(config.vocab_size, args.samples, args.length).tolist()
    lines = [json.dumps({"input_ids": row}) + "\n" for row in rows]
    (folder / "calibration.jsonl").write_text("".join(lines), encoding="utf-8")
    return total


def in_fp8(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return a random weight as FP8 numbers with a scale per block."""
    scales = torch.full([math.ceil(size / BLOCK) for size in weight.shape], 2.0**-8)
    return {name: (weight * 2**8).to(torch.float8_e4m3fn), f"{name}_scale_inv": scales}


def bounds(config: Any, args: argparse.Namespace) -> dict[str, int]:
    """Count what condensing layer by layer has to hold at a time, in bytes."""
    model = common.build_model(config, torch.device("meta"), torch.bfloat16)
    layers = [sum(2 * p.numel() for p in layer.parameters()) for layer in model.model.layers]
    # The outputs of all experts are kept, and beside the unmodified model a variant of it for each candidate.
    kept = 2 * args.samples * args.length * config.hidden_size * (config.n_routed_experts + config.num_hidden_layers)
    embeddings = 2 * 2 * config.vocab_size * config.hidden_size
    return {"largest decoder layer": max(layers), "embeddings": embeddings, "kept hidden states": kept}


def command_of(way: str, folder: Path, config: Any, args: argparse.Namespace) -> list[str]:
    """Return the command that runs one way on the checkpoint in a folder."""
    if way == "sparse":
        code = f"import cdmoe_plugin, transformers as t; t.AutoModelForCausalLM.from_pretrained({str(folder)!r})"
        return [sys.executable, "-c", code]
    if way == "plan":
        plan = str(folder / "plan.json")
        return [
            sys.executable,
            "-c",
            f"import cdmoe_plugin as c; c.condense_pretrained({str(folder)!r}, plan={plan!r})",
        ]
    options = {
        "model_name_or_path": folder,
        "calibration": folder / "calibration.jsonl",
        **(SIZE if way == "size" else {"num_layers": args.condensed, "num_experts": args.kept}),
        "num_samples": args.samples,
        "max_length": args.length,
        "cache_memory": f"{bounds(config, args)['kept hidden states'] // 10**6 + 1}MB",
        "output_dir": folder / "condensed",
        "offload_folder": folder / "offload",
        "max_shard_size": "500MB",
    }
    return [sys.executable, str(RECIPE), *(f"--{name}={value}" for name, value in options.items())]


def watch(command: Sequence[str], log: Path) -> dict[str, float]:
    """Run a command and return its seconds and the peaks of its anonymous memory and of its resident set, in bytes.

    Raises:
        RuntimeError: with the end of its output, if it fails.
    """
    start, peak = time.perf_counter(), {"RssAnon": 0.0, "VmHWM": 0.0}
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        while process.poll() is None:
            try:
                lines = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8").splitlines()
            except (FileNotFoundError, ProcessLookupError):  # it has just ended
                break
            for name, _, value in (line.partition(":") for line in lines):
                if name in peak:
                    peak[name] = max(peak[name], int(value.split()[0]) * 1024)
            time.sleep(0.02)
    if process.wait():
        raise RuntimeError(f"{' '.join(command)}\n{log.read_text(encoding='utf-8')[-4000:]}")
    return {"seconds": time.perf_counter() - start, "anonymous": peak["RssAnon"], "resident": peak["VmHWM"]}


def main(given: Sequence[str] | None = None) -> None:
    args = parse_arguments(given)
    logging.set_verbosity_error()
    config = common.deepseek_config(args.sizes, args.hidden_size, args.num_layers, args.experts)
    tiny = common.deepseek_config(SMALL, hidden_size=32, num_layers=3, experts=8)
    few = argparse.Namespace(**{**vars(args), "condensed": 1, "kept": 1})
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        small, whole = Path(name) / "small", Path(name) / "whole"
        write_inputs(small, tiny, few)
        size = write_inputs(whole, config, args)
        for way in args.ways:
            program = watch(command_of(way, small, tiny, few), small / f"{way}.log")
            found[way] = watch(command_of(way, whole, config, args), whole / f"{way}.log")
            found[way] |= {f"{kind}_own": found[way][kind] - program[kind] for kind in ("anonymous", "resident")}
    parts = bounds(config, args)
    layers = f"{args.condensed} of {config.num_hidden_layers - 1} sparse layers condensed to {args.kept} of"
    layers = f"{layers} {config.n_routed_experts} experts, unless for a size"
    print(f"Checkpoint of {size / 1e9:.2f} GB; {layers}; {common.where(torch.device('cpu'))}\n")
    kinds = ("anonymous", "anonymous_own", "resident", "resident_own")
    rows = [
        (WAYS[w], *(f"{run[k] / 1e9:.2f} GB" for k in kinds), f"{run['seconds']:.0f} s") for w, run in found.items()
    ]
    own = "less the program's own"
    print(format_table(["", "anonymous memory", own, "resident set", own, "time"], rows))
    texts = ", ".join(f"{name} {part / 1e9:.2f} GB" for name, part in parts.items())
    print(f"\nLayer by layer, {sum(parts.values()) / 1e9:.2f} GB are in use at a time: {texts}.")
    common.write_json(args.json, {"checkpoint": size, "bounds": parts, "ways": found})


if __name__ == "__main__":
    main()
