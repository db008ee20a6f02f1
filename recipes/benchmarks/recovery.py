"""
What recovery wins back on the quickstart's model, with and without the LM stage, routed experts and a teacher:

python examples/quickstart.py
python recipes/benchmarks/recovery.py

Trains with recipes/lm_then_sft.py and prints a Markdown table of held-out losses: of text, and of answers. Runs that
are there already are not repeated, and one that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import cdmoe_plugin  # noqa: F401  (opens condensed checkpoints)
from cdmoe_plugin.cards.tables import format_table
from cdmoe_plugin.recovery.data import to_prompt_and_completion

RECIPE = Path(__file__).parent.parent / "lm_then_sft.py"
STARTS = {"shared experts only": "shared-only", "shared and routed": "condensed"}
RUNS = {
    "SFT alone": ("sft", "none"),
    "LM + SFT": ("lm,sft", "none"),
    "LM with teacher (logits) + SFT": ("lm,sft", "logits"),
    "LM with teacher (blocks) + SFT": ("lm,sft", "blocks"),
}


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quickstart_dir", type=Path, default=Path("outputs/quickstart"))
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/recovery"))
    return parser.parse_known_args()  # what is left goes to the recipe


def recover(
    start: Path, output: Path, stages: str, distillation: str, args: argparse.Namespace, rest: list[str]
) -> None:
    """Runs the recipe, or what is left of it."""
    data = args.quickstart_dir / "data"
    config = RECIPE.parent / "configs" / "recover-quickstart.yaml"
    command = [sys.executable, RECIPE, "--config", config, "--model_name_or_path", start, "--output_dir", output]
    for stage, ending in (("lm", ".jsonl"), ("sft", ".json")):
        command += [f"--{stage}_dataset", data / f"{stage}{ending}"]
        command += [f"--{stage}_eval_dataset", data / f"{stage}_held_out{ending}"]
    command += ["--stages", stages, "--distillation", distillation, "--resume_from_checkpoint", "true"]
    if distillation != "none":
        command += ["--teacher_name_or_path", args.quickstart_dir / "sparse"]
    command += ["--model_init_kwargs", json.dumps({"experts_implementation": "grouped_mm"}), *rest]
    subprocess.run([str(part) for part in command], check=True)


def text_batches(tokenizer: Any, path: Path, length: int = 256) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and labels of documents, one after the other, in full rows."""
    texts = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
    ids = [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    rows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length).split(16)
    return [(row, row) for row in rows]


def answer_batches(tokenizer: Any, path: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and labels of questions with their answers, one by one; questions have no label."""
    pairs = []
    for row in map(to_prompt_and_completion, json.loads(path.read_text(encoding="utf-8"))):
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]
        pairs.append((torch.tensor([prompt + answer]), torch.tensor([[-100] * len(prompt) + answer])))
    return pairs


@torch.inference_mode()
def mean_loss(model: Any, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Mean loss per token that has a label, in nats."""
    total, tokens = 0.0, 0
    for ids, labels in batches:
        count = int((labels[:, 1:] != -100).sum())
        total, tokens = total + model(input_ids=ids, labels=labels).loss.item() * count, tokens + count
    return total / tokens


def main() -> None:
    args, rest = parse_arguments()
    logging.set_verbosity_error()
    quickstart = args.quickstart_dir
    models: dict[tuple[str, str], Path] = {("sparse", "as it is"): quickstart / "sparse"}
    for name, folder in STARTS.items():
        models[name, "as it is"] = quickstart / folder
        for run, (stages, distillation) in RUNS.items():
            output = args.output_dir / f"{folder}-{stages.replace(',', '-')}-{distillation}"
            recover(quickstart / folder, output, stages, distillation, args, rest)
            if stages.startswith("lm"):
                models[name, run.removesuffix(" + SFT")] = output / "lm"
            models[name, run] = output
    tokenizer = AutoTokenizer.from_pretrained(quickstart / "sparse")
    texts = text_batches(tokenizer, quickstart / "data" / "lm_held_out.jsonl")
    answers = answer_batches(tokenizer, quickstart / "data" / "sft_held_out.json")
    rows = []
    for (name, run), folder in models.items():
        model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="grouped_mm")
        rows.append((name, run, f"{mean_loss(model, texts):.4f}", f"{mean_loss(model, answers):.4f}"))
    print(f"\n{format_table(['model', 'training', 'loss on held-out text', 'on held-out answers'], rows)}")


if __name__ == "__main__":
    main()
