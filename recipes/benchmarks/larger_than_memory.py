"""
Condenses a checkpoint one decoder layer at a time, and watches the memory of the process that does it:

python recipes/benchmarks/larger_than_memory.py --folder FOLDER

Without other options: DeepSeekMoE-16B at its real sizes with random weights, 32.8 GB in bfloat16. The folder needs room
for twice that and the condensed checkpoint; all of it is deleted at the end. recipes/condense.py searches experts and
layers and saves, in a process of its own; this one reads /proc (so Linux only).

Anonymous memory is what the process can't do without. Beside it, its resident set counts pages of mapped files, which
the system may take back at any time: the weights of the layer at hand. What the program takes in any case is measured
on a model of next to no size.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging

import cdmoe_plugin  # noqa: F401  (makes AutoConfig know "deepseek")
from cdmoe_plugin.cards.tables import format_table

INDEX = "model.safetensors.index.json"
RECIPE = Path(__file__).parent.parent / "condense.py"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--folder", type=Path, required=True, help="new folder on the disk to use")
    add("--vocab_size", type=int, default=102400)
    add("--hidden_size", type=int, default=2048)
    add("--intermediate_size", type=int, default=10944)
    add("--moe_intermediate_size", type=int, default=1408)
    add("--layers", type=int, default=28, help="decoder layers; the first is dense")
    add("--heads", type=int, default=16)
    add("--experts", type=int, default=64)
    add("--condensed", type=int, default=9, help="layers to condense")
    add("--kept", type=int, default=6, help="experts to keep in each")
    add("--samples", type=int, default=4, help="calibration samples")
    add("--length", type=int, default=64, help="tokens of each")
    add("--keep_files", action="store_true", help="delete nothing at the end; a checkpoint that is there is used again")
    return parser.parse_args()


def config_of(args: argparse.Namespace) -> AutoConfig:
    return AutoConfig.for_model(
        "deepseek",
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        moe_intermediate_size=args.moe_intermediate_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
        n_routed_experts=args.experts,
        n_shared_experts=2,
        num_experts_per_tok=6,
        first_k_dense_replace=1,
        dtype="bfloat16",
    )


def write_checkpoint(args: argparse.Namespace, folder: Path, shard_bytes: int = 4 * 10**9) -> int:
    """Writes a random checkpoint shard by shard; returns the bytes of its weights."""
    folder.mkdir(parents=True)
    config = config_of(args)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    shapes = {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, model.state_dict()).items()}
    # Random numbers for all weights would take an hour: each is cut from the same ones at a place of its own.
    largest = max(torch.Size(shape).numel() for shape in shapes.values())
    noise = torch.empty(largest + 2**24, dtype=torch.bfloat16).normal_(0, 0.02, generator=torch.manual_seed(0))
    places = random.Random(0)
    shards: list[dict[str, torch.Tensor]] = [{}]
    index, total, size = {}, 0, 0
    for name, shape in shapes.items():
        number = torch.Size(shape).numel()
        if size and size + 2 * number > shard_bytes:
            save_shard(shards, folder)
            size = 0
        start = places.randrange(2**24)
        tensor = torch.ones(shape, dtype=noise.dtype) if len(shape) == 1 else noise[start : start + number].view(shape)
        shards[-1][name] = tensor
        index[name] = f"model-{len(shards):05d}.safetensors"
        size, total = size + 2 * number, total + 2 * number
    save_shard(shards, folder)
    content = {"metadata": {"total_size": total}, "weight_map": index}
    config.save_pretrained(folder)
    (folder / INDEX).write_text(json.dumps(content), encoding="utf-8")
    return total


def save_shard(shards: list[dict[str, torch.Tensor]], folder: Path) -> None:
    tensors = {name: tensor.clone() for name, tensor in shards[-1].items()}
    save_file(tensors, folder / f"model-{len(shards):05d}.safetensors", {"format": "pt"})
    shards[-1] = {}
    shards.append({})


def write_calibration(args: argparse.Namespace, path: Path) -> None:
    rng = random.Random(0)
    rows = ([rng.randrange(3, args.vocab_size) for _ in range(args.length)] for _ in range(args.samples))
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows), encoding="utf-8")


def watched(command: list[str], log: Path) -> tuple[dict[str, int], float]:
    """Runs a command; returns the most that it had of each kind of memory, in bytes, and the seconds it took."""
    start = time.perf_counter()
    peak: dict[str, int] = {}
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        while process.poll() is None:
            for name, value in memory_of(process.pid):
                peak[name] = max(peak.get(name, 0), value)
            time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}\n{log.read_text()[-4000:]}")
    return peak, time.perf_counter() - start


def memory_of(pid: int) -> Iterator[tuple[str, int]]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # it has just ended
        return
    for line in lines:
        name, _, value = line.partition(":")
        if name in ("RssAnon", "RssFile", "VmRSS"):
            yield name, int(value.split()[0]) * 1024


def bound(args: argparse.Namespace) -> dict[str, int]:
    """What the memory is to be compared with, in bytes."""
    attention = 4 * args.hidden_size**2
    experts = (args.experts + 2) * 3 * args.hidden_size * args.moe_intermediate_size
    dense = 3 * args.hidden_size * args.intermediate_size
    layer = attention + max(experts + args.experts * args.hidden_size, dense) + 2 * args.hidden_size
    tokens = args.samples * args.length
    # The outputs of all experts are kept, and beside the unmodified model a variant of it for each candidate.
    return {
        "largest decoder layer": 2 * layer,
        "embeddings (input and output)": 2 * 2 * args.vocab_size * args.hidden_size,
        "kept hidden states": 2 * tokens * args.hidden_size * (args.experts + args.layers),
    }


def run(args: argparse.Namespace, folder: Path, output: Path, *more: str) -> tuple[dict[str, int], float]:
    command = [sys.executable, str(RECIPE), "--model_name_or_path", str(folder / "sparse")]
    command += ["--num_layers", str(args.condensed), "--num_experts", str(args.kept), "--output_dir", str(output)]
    command += ["--num_samples", str(args.samples), "--max_length", str(args.length)]
    command += ["--cache_memory", f"{bound(args)['kept hidden states'] // 10**6 + 1}MB"]
    command += ["--calibration", str(folder / "calibration.jsonl"), "--max_shard_size", "500MB", *more]
    return watched(command, output.with_suffix(".log"))


def program_alone(args: argparse.Namespace) -> dict[str, int]:
    """Peaks of the same program on a model that weighs nothing."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "experts": 8}
    tiny = argparse.Namespace(**{**vars(args), **sizes, "layers": 3, "heads": 2, "condensed": 1, "kept": 1})
    folder = args.folder / "tiny"
    write_checkpoint(tiny, folder / "sparse")
    write_calibration(tiny, folder / "calibration.jsonl")
    return run(tiny, folder, folder / "condensed", "--offload_folder", str(folder / "offload"))[0]


def main() -> None:
    args = parse_arguments()
    logging.set_verbosity_error()
    folder = args.folder
    start = time.perf_counter()
    if (folder / "sparse" / INDEX).exists():
        size = json.loads((folder / "sparse" / INDEX).read_text())["metadata"]["total_size"]
    else:
        size = write_checkpoint(args, folder / "sparse")
        write_calibration(args, folder / "calibration.jsonl")
    print(f"Checkpoint of {size / 1e9:.1f} GB; written in {time.perf_counter() - start:.0f} s.", flush=True)
    before = program_alone(args)
    peak, seconds = run(args, folder, folder / "condensed", "--offload_folder", str(folder / "offload"))
    print((folder / "condensed.log").read_text().rsplit("\r", 1)[-1][-2000:])
    parts = bound(args)
    rows = [(name, f"{value / 1e9:.2f} GB") for name, value in parts.items()]
    rows.append(("1.3 times their sum", f"{1.3 * sum(parts.values()) / 1e9:.2f} GB"))
    for name, label in (("RssAnon", "anonymous memory"), ("VmRSS", "resident set, mapped files included")):
        rows.append((f"peak {label}", f"{peak[name] / 1e9:.2f} GB"))
        rows.append(("- less that of the program itself", f"{(peak[name] - before[name]) / 1e9:.2f} GB"))
    print(f"{args.condensed} layers to {args.kept} experts in {seconds:.0f} s; torch {torch.__version__}")
    print(format_table(["", "memory"], rows))
    if not args.keep_files:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
