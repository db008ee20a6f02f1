"""
Tables 1 to 4 and Figures 1 to 5 of the paper (CD-MoE, arXiv 2412.00069) in one run, with a verdict on each claim:

python recipes/benchmarks/paper_tables.py

Without options: the quickstart's model, a multiple-choice task of its held-out documents, three seeds; under half an
hour on two cores. Every measurement is a row of results.csv in the output folder, written as it comes: the same command
goes on where it was interrupted. tables.md and the figures are drawn from that file alone (--draw_only). Figure 4 is
Figure 2 for a second model: give its output folder as --second_dir. Figure 3 shows what recovery.py trained: give its
output folder as --recovery_dir.
Beyond the paper: three more expert selections in Table 2, and what `refit` closes of the gap to the sparse model.

DeepSeekMoE-16B with the paper's eight tasks:

python recipes/benchmarks/paper_tables.py --model_name_or_path deepseek-ai/deepseek-moe-16b-base --dtype bfloat16 \
    --tasks arc_challenge,boolq,hellaswag,openbookqa,piqa,rte,winogrande,mmlu --layers 3,6,9,12,15 --num_experts 6 \
    --num_samples 100 --max_length 512 --batch_size 16 --seeds 0 --output_dir outputs/paper-deepseek

By an estimate (BENCHMARKS.md), that takes 65 GB of GPU memory and, per seed, 33 hours of an A100: 27 for 86
evaluations, 6 for the searches. `--only table1,figure2` needs 21 evaluations and 3 searches; `--limit 200` (questions
per task) makes each evaluation four times as fast.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paper_bench import PARTS, Bench
from paper_drawing import draw
from paper_models import PASSAGE_TASK, Opener, write_passage_task
from paper_results import Results
from transformers.utils import logging

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _names(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model_name_or_path", help="sparse checkpoint; the quickstart's if not given, trained where it is missing")
    add("--tasks", type=_names, help="tasks of lm-eval; for the quickstart's model a local one")
    add("--include_path", type=Path, help="folder with tasks of your own for lm-eval, then the only ones")
    add("--limit", type=int, help="questions per task, at most")
    add("--held_out", type=Path, help="text for the held-out loss: a .txt, .json, .jsonl or .parquet file")
    add("--held_out_rows", type=int, default=64, help="rows of --max_length tokens of it, at most")
    add("--calibration", help="hub name or file; C4, or for the quickstart's model its training documents")
    add("--layers", type=_numbers, help="numbers of condensed layers (3,6,9,12,15; quickstart: 2,4,6,8)")
    add("--num_experts", type=int, help="experts K (6; quickstart: 4)")
    add("--num_samples", type=int, help="calibration samples (100; quickstart: 32)")
    add("--max_length", type=int, help="tokens of each (512; quickstart: 256)")
    add("--seeds", type=_numbers, default=[0, 1, 2], help="of the draw of calibration texts and of random experts")
    add("--batch_size", type=int, default=16)
    add("--speed_tokens", type=int, default=2048, help="tokens of the forward pass whose speed is measured")
    add("--dtype", default="auto")
    add("--device_map", help="for from_pretrained; auto if there is a GPU")
    add("--output_dir", type=Path, default=Path("outputs/paper"))
    add("--cache_dir", type=Path, default=Path(".cache/quickstart"), help="keeps the quickstart's trained model")
    add("--quickstart_dir", type=Path, default=Path("outputs/quickstart"))
    add("--recovery_dir", type=Path, help="output folder of recovery.py, for Figure 3")
    add("--second_dir", type=Path, help="output folder of this program for a second model, for Figure 4")
    add("--only", type=_names, default=list(PARTS), help=f"some of {','.join(PARTS)}")
    add("--draw_only", action="store_true", help="measure nothing")
    args = parser.parse_args(arguments)
    unknown = sorted(set(args.only) - set(PARTS))
    if unknown:
        parser.error(f"--only has {', '.join(unknown)}; there are {', '.join(PARTS)}.")
    return args


def complete(args: argparse.Namespace) -> tuple[Any, list[str] | None]:
    """Fills in what was not given; returns calibration data, and held-out texts if there are any."""
    quickstart = args.model_name_or_path is None
    defaults: dict[str, Any] = {"layers": [3, 6, 9, 12, 15], "num_experts": 6, "num_samples": 100, "max_length": 512}
    calibration, texts = args.calibration, None
    if quickstart:
        defaults = {"layers": [2, 4, 6, 8], "num_experts": 4, "num_samples": 32, "max_length": 256}
        documents, texts = quickstart_model(args)
        calibration = args.calibration or documents
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.held_out is not None:
        texts = read_texts(args.held_out)
    if args.tasks is None:
        args.tasks = []
        if texts:
            args.tasks, args.include_path = [PASSAGE_TASK], args.output_dir / "tasks"
            write_passage_task(args.include_path, texts)
    if not args.tasks and not texts:
        raise ValueError("Nothing would be measured: give --tasks, --held_out, or both.")
    return calibration, texts


def quickstart_model(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The quickstart's sparse checkpoint, written if it is not there; its training and its held-out documents."""
    sys.path.insert(0, str(EXAMPLES))
    from tiny_moe import corpus, train_or_load

    folder = args.quickstart_dir / "sparse"
    args.model_name_or_path = str(folder)
    if not (folder / "config.json").exists() or not (folder / "tokenizer.json").exists():
        model, tokenizer, _, _ = train_or_load(args.cache_dir)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return corpus()


def read_texts(path: Path) -> list[str]:
    """The texts of a .txt file (one document), or of the column "text" of another file."""
    if path.suffix == ".txt":
        return [path.read_text(encoding="utf-8")]
    from datasets import load_dataset

    kind = "parquet" if path.suffix == ".parquet" else "json"
    return list(load_dataset(kind, data_files=str(path), split="train")["text"])


def run_settings(args: argparse.Namespace) -> str:
    """What all rows of a CSV have in common. Layers, seeds and places may be added by a later run."""
    names = ("num_experts", "num_samples", "max_length", "held_out_rows", "limit", "speed_tokens", "dtype")
    own = {name: getattr(args, name) for name in names}
    calibration = args.calibration or "default"
    return json.dumps({**own, "calibration": calibration, "max_layers": max(args.layers), "tasks": args.tasks})


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    path = args.output_dir / "results.csv"
    if args.draw_only:
        results = Results(path)
    else:
        calibration, texts = complete(args)
        results = Results(path, Opener(args.model_name_or_path).identity(), run_settings(args))
        Bench(args, calibration, texts, results).run()
    second = None if args.second_dir is None else Results(args.second_dir / "results.csv")
    print(draw(results, args.output_dir, args.only, second))


if __name__ == "__main__":
    main()
