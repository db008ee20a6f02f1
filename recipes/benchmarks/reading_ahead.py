"""
The time to condense a checkpoint from disk, one decoder layer at a time, with the next layer read while one computes,
and without, in turns:

python recipes/benchmarks/reading_ahead.py

The checkpoint is random, written to a temporary folder and deleted at the end. The system's file cache loses a layer as
soon as the next one is in use, as it would if the checkpoint were larger than memory (on Linux).
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import common
import memory
import torch
from tqdm import tqdm
from transformers.utils import logging

from cdmoe_plugin import CondenseConfig, condense_pretrained
from cdmoe_plugin.cards.tables import format_table
from cdmoe_plugin.loading.ahead import ReadAhead
from cdmoe_plugin.loading.layers_on_disk import CheckpointLayers


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_model_arguments(parser)
    add = parser.add_argument
    add("--folder", type=Path, help="where to write the temporary checkpoints (the system's folder for such files)")
    add("--condensed", type=int, default=3, help="layers to condense (%(default)s)")
    add("--kept", type=int, default=4, help="experts to keep in each (%(default)s)")
    add("--samples", type=int, default=8, help="calibration samples of the search (%(default)s)")
    add("--length", type=int, default=64, help="tokens of each sample (%(default)s)")
    add("--repeats", type=int, default=3, help="turns (%(default)s)")
    parser.set_defaults(weights="bfloat16")
    return parser.parse_args(given)


def drop(files: Iterable[str | Path]) -> None:
    """Ask the system to forget what it keeps of some files."""
    for file in files:
        opened = os.open(file, os.O_RDONLY)
        os.posix_fadvise(opened, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(opened)


def forgetting(read: Callable[[Any, int], Any]) -> Callable[[Any, int], Any]:
    """Return a method that reads a layer, and then drops the files of the layer that was read before."""
    last: dict[int, int] = {}

    def method(layers: Any, layer: int) -> Any:
        found = read(layers, layer)
        before = last.get(id(layers), layer)
        if before != layer:
            drop({file for each in layers.stored[before].values() for file in each.tensor.files})
        last[id(layers)] = layer
        return found

    return method


def condense(checkpoint: Path, args: argparse.Namespace, ahead: bool) -> float:
    """Search and condense the checkpoint from disk; return the seconds."""
    drop(checkpoint.glob("*.safetensors"))
    start = ReadAhead.start
    if not ahead:
        ReadAhead.start = lambda self, layer: None  # type: ignore[method-assign]
    config = CondenseConfig(num_layers=args.condensed, num_experts=args.kept, layer_search="full")
    call = partial(condense_pretrained, checkpoint, config, calibration=str(checkpoint / "calibration.jsonl"))
    try:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            return common.timed(torch.device("cpu"), lambda: call(dtype="auto", offload_folder=folder))[1]
    finally:
        ReadAhead.start = start  # type: ignore[method-assign]


def main(given: Sequence[str] | None = None) -> None:
    args = parse_arguments(given)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    config = common.deepseek_config(memory.SMALL, args.hidden_size, args.num_layers, args.experts)
    read, CheckpointLayers._read = CheckpointLayers._read, forgetting(CheckpointLayers._read)  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder, tqdm(total=2 * args.repeats + 2) as bar:
            size = memory.write_inputs(Path(folder), config, args)

            def run(ahead: bool) -> float:
                seconds = condense(Path(folder), args, ahead)
                bar.update()
                return seconds

            runs = {"in turn": partial(run, False), "read ahead": partial(run, True)}
            turns = common.take_turns(runs, args.repeats)
    finally:
        CheckpointLayers._read = read  # type: ignore[method-assign]
    ratios = common.paired_ratios(turns["in turn"], turns["read ahead"])
    print(f"{common.gigabytes(size)} in {config.num_hidden_layers} layers; {common.where(torch.device('cpu'))}\n")
    rows = [(name, f"{statistics.median(seconds):.1f} s") for name, seconds in turns.items()]
    print(format_table(["layers are read", "search and condensing"], rows))
    print(f"\nratio: {statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})")
    common.write_json(args.json, {"arguments": vars(args), "checkpoint": size, "seconds": turns})


if __name__ == "__main__":
    main()
