"""Recovers what Figure 3 of paper_tables.py shows: condensed models, trained with recipes/lm_then_sft.py."""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from paper_models import free, passage_questions, write_rows

RECIPES = Path(__file__).parent.parent
QUICKSTART = RECIPES / "configs" / "recover-quickstart-briefly.yaml"
STAGES = {"LM+SFT": "lm,sft", "SFT": "sft"}


class Recovery:
    """Runs the recipe in this process, on one sparse model.

    Args:
        config (`Path`): The recipe's options as YAML. Those that say which model, which stages and where to are given
            beside them.
        model (`str`): The sparse checkpoint.
        folder (`Path`): Where the recovered checkpoints go.
        data (`dict[str, Path]`): More options: data that the config can't know of.
    """

    def __init__(self, config: Path, model: str, folder: Path, data: dict[str, Path]) -> None:
        self.config, self.model, self.folder, self.data = config, model, folder, data

    @property
    def name(self) -> str:
        """Tells recoveries by another config apart."""
        return f"{self.config.stem} {hashlib.sha256(self.config.read_bytes()).hexdigest()[:12]}"

    def check(self, layers: int, experts: int) -> None:
        """Finds what is wrong with the config before anything is measured.

        Raises:
            ModuleNotFoundError: if TRL is not installed.
            ValueError: if the recipe refuses its options.
        """
        arguments = [*self._arguments("lm,sft", layers, experts, "check"), "--dry_run", "true"]
        self._run(self.folder / "check.log", arguments)

    def run(self, stages: str, plan: Path, layers: int, experts: int) -> Path:
        """The recovered checkpoint, trained where it is missing.

        Args:
            stages (`str`): "lm,sft" or "sft".
            plan (`Path`): A plan of at least as many layers and experts.
        """
        name = f"{stages.replace(',', '-')}-E{experts}-L{layers}"
        arguments = [*self._arguments(stages, layers, experts, name), "--plan", plan]
        self._run(self.folder / f"{name}.log", [*arguments, "--resume_from_checkpoint", "true"])
        free()
        return self.folder / name

    def _arguments(self, stages: str, layers: int, experts: int, name: str) -> list[Any]:
        given = {"model_name_or_path": self.model, "stages": stages, "output_dir": self.folder / name, **self.data}
        given |= {"condense_num_layers": layers, "condense_num_experts": experts}
        return ["--config", self.config, *(part for key, value in given.items() for part in (f"--{key}", value))]

    def _run(self, log: Path, arguments: Sequence[Any]) -> None:
        if str(RECIPES) not in sys.path:
            sys.path.insert(0, str(RECIPES))
        recipe = importlib.import_module("lm_then_sft")
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as file, redirect_stdout(file):
            *parsed, search = recipe.make_parser().parse_args_and_config(args=[str(part) for part in arguments])
            condense = {k.removeprefix("condense_"): v for k, v in vars(search).items() if v is not None}
            recipe.main(*parsed, condense)


def write_quickstart_data(folder: Path, texts: Sequence[str]) -> dict[str, Path]:
    """Training data of both stages: documents, and as in the paper the task's questions, of other documents."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {"lm_dataset": folder / "lm.jsonl", "sft_dataset": folder / "sft.jsonl"}
    write_rows(files["lm_dataset"], ({"text": text} for text in texts))
    questions = passage_questions(texts, 2000, seed=1)
    pairs = ({"prompt": row["passage"], "completion": row["choices"][row["label"]]} for row in questions)
    write_rows(files["sft_dataset"], pairs)
    return files
