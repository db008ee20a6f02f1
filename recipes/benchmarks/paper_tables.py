"""
Tables 1 to 4 and Figures 1 to 5 of the paper (CD-MoE, arXiv 2412.00069) in one run, with a verdict on each claim:

python recipes/benchmarks/paper_tables.py

Without options: the quickstart's model, a multiple-choice task of its held-out documents, three seeds; under half an
hour on two cores. Every measurement is a row of results.csv in the output folder, written as it comes: the same command
goes on where it was interrupted. tables.md and the figures are drawn from such files alone (--draw_only).
Figure 3 trains condensed models with recipes/lm_then_sft.py (`pip install ".[recipes]"`). Figure 4 is Figure 2 for a
second model, whose rows are in the folder `second`: here a small one of Qwen1.5-MoE's kind, trained if it is missing.
Beyond the paper: three more expert selections in Table 2, and what `refit` closes of the gap to the sparse model.

DeepSeekMoE-16B with the paper's eight tasks:

python recipes/benchmarks/paper_tables.py --model_name_or_path deepseek-ai/deepseek-moe-16b-base --dtype bfloat16 \
    --tasks arc_challenge,boolq,hellaswag,openbookqa,piqa,rte,winogrande,mmlu --layers 3,6,9,12,15 --num_experts 6 \
    --num_samples 100 --max_length 512 --batch_size 16 --seeds 0 --output_dir outputs/paper-deepseek

Figure 4 needs `--second_model_name_or_path Qwen/Qwen1.5-MoE-A2.7B` as well, or the output folder of a run on that model
with settings of its own (`--num_experts 4`) as --second_dir. Figure 3 needs `--recovery_config
recipes/configs/recover-deepseek-moe-16b.yaml`, which trains three models per number of layers, one after the other in
this process; or train them on several GPUs, call their folders "LM+SFT E(shared+6)-L9" and the like (claims are judged
by these names), and give the folder that these are in as --recovery_dir.

By an estimate (BENCHMARKS.md), all else takes 65 GB of GPU memory and, per seed, 33 hours of an A100: 27 for 86
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

from datasets import disable_progress_bars
from paper_bench import PARTS, Bench
from paper_drawing import draw
from paper_models import PASSAGE_TASK, Opener, write_passage_task
from paper_recovery import QUICKSTART, Recovery, write_quickstart_data
from paper_results import Results
from transformers.utils import logging

CSV = "results.csv"
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
    add("--recovery_config", type=Path, help="options of recipes/lm_then_sft.py as YAML, to train Figure 3's models")
    add("--recovery_dir", type=Path, help="folder of recovered checkpoints for Figure 3, such as recovery.py's output")
    add("--second_model_name_or_path", help="sparse checkpoint for Figure 4, measured with the first seed")
    add("--second_dir", type=Path, help="output folder of this program for a second model, instead of measuring one")
    add("--only", type=_names, default=list(PARTS), help=f"some of {','.join(PARTS)}")
    add("--draw_only", action="store_true", help="measure nothing")
    args = parser.parse_args(arguments)
    unknown = sorted(set(args.only) - set(PARTS))
    if unknown:
        parser.error(f"--only has {', '.join(unknown)}; there are {', '.join(PARTS)}.")
    if args.second_dir is not None and args.second_model_name_or_path is not None:
        parser.error("--second_dir has been measured already: leave out --second_model_name_or_path.")
    return args


def complete(args: argparse.Namespace) -> tuple[Any, list[str] | None, Recovery | None]:
    """Fills in what was not given; returns calibration data, and held-out texts and a recovery if there are any."""
    quickstart = args.model_name_or_path is None
    defaults: dict[str, Any] = {"layers": [3, 6, 9, 12, 15], "num_experts": 6, "num_samples": 100, "max_length": 512}
    calibration, texts, data = args.calibration, None, {}
    if quickstart:
        defaults = {"layers": [2, 4, 6, 8], "num_experts": 4, "num_samples": 32, "max_length": 256}
        documents, texts, data = quickstart_models(args)
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
    recovery = None
    if args.recovery_config is not None and "figure3" in args.only:
        folder = args.output_dir / "recovered"
        recovery = Recovery(args.recovery_config, args.model_name_or_path, folder, data)
    return calibration, texts, recovery


def quickstart_models(args: argparse.Namespace) -> tuple[list[str], list[str], dict[str, Path]]:
    """Fills in the quickstart's checkpoints and recovery; returns calibration and held-out texts, and training data."""
    sys.path.insert(0, str(EXAMPLES))
    from tiny_moe import corpus

    documents, texts = corpus()
    args.model_name_or_path = quickstart_checkpoint(args, "sparse", "deepseek")
    if "figure4" in args.only and args.second_model_name_or_path is None and args.second_dir is None:
        args.second_model_name_or_path = quickstart_checkpoint(args, "second", "qwen2_moe")
    data = {}
    if "figure3" in args.only and args.recovery_config is None:
        args.recovery_config = QUICKSTART
        data = write_quickstart_data(args.output_dir / "recovered", documents)
    return documents, texts, data


def quickstart_checkpoint(args: argparse.Namespace, name: str, architecture: str) -> str:
    """A sparse checkpoint of the quickstart's kind, written if it is not there."""
    from tiny_moe import train_or_load

    folder = args.quickstart_dir / name
    if not (folder / "config.json").exists() or not (folder / "tokenizer.json").exists():
        model, tokenizer, _, _ = train_or_load(args.cache_dir, architecture)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return str(folder)


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
    disable_progress_bars()
    if not args.draw_only:
        calibration, texts, recovery = complete(args)
        benches = [make_bench(args, calibration, texts, recovery)]
        if args.second_model_name_or_path is not None and "figure4" in args.only:
            benches.append(make_bench(second_arguments(args), calibration, texts))
        for bench in benches:
            bench.check()
        for bench in benches:
            bench.run()
    folder = args.second_dir or second_arguments(args).output_dir
    second = Results(folder / CSV) if args.second_dir or (folder / CSV).exists() else None
    print(draw(Results(args.output_dir / CSV), args.output_dir, args.only, second))


def make_bench(
    args: argparse.Namespace, calibration: Any, texts: list[str] | None, recovery: Recovery | None = None
) -> Bench:
    """What measures one sparse model, and what becomes of it."""
    results = Results(args.output_dir / CSV, Opener(args.model_name_or_path).identity(), run_settings(args))
    return Bench(args, calibration, texts, results, recovery)


def second_arguments(args: argparse.Namespace) -> argparse.Namespace:
    """What is measured of the second model: Table 1, in a folder of its own, with one seed."""
    given = {"model_name_or_path": args.second_model_name_or_path, "output_dir": args.output_dir / "second"}
    return argparse.Namespace(**{**vars(args), **given, "only": ["table1"], "seeds": args.seeds[:1]})


if __name__ == "__main__":
    main()
