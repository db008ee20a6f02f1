"""What paper_tables.py measures: one model after the other, each at most once."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from paper_models import Opener, Tasks, costs, free, held_out_loss, rows_of_tokens
from paper_results import Cell, Results, Setting
from tqdm import tqdm
from transformers import AutoConfig

from cdmoe_plugin import CondenseConfig, CondensePlan, search_plan

SPARSE = Cell("sparse", "sparse", Setting())
EXPERT_SELECTIONS = ("random", "pl_alpha_hill", "l1", "greedy", "frequency", "reap", "d_optimal")
LAYER_SELECTIONS = ("local", "global", "greedy")
DIVERGENCES = ("ppl", "kl", "js")
REFITS = ("none", "down_proj", "distill")
# What each place needs to have been measured.
PARTS = {
    "table1": "table1",
    "figure1": "figure1",
    "figure2": "table1",
    "figure3": "figure3",
    "figure4": "table1",
    "table2": "table2",
    "table3": "table3",
    "table4": "table4",
    "figure5": "figure5",
    "refit": "refit",
}


def all_cells(args: argparse.Namespace, blocks: int) -> Iterator[Cell]:
    """Everything that is measured, for one seed after the other. `blocks`: decoder layers of the model."""
    k = args.num_experts
    parts = {PARTS[name] for name in args.only}
    for seed in args.seeds:
        for n in args.layers:
            for cell in budget_cells(seed, n, k):
                emptied = cell.setting.form == "trim_block" and n >= blocks
                if cell.part in parts and not emptied:
                    yield cell


def budget_cells(seed: int, n: int, k: int) -> Iterator[Cell]:
    """What is measured with one seed and one number of layers."""

    def cell(part: str, method: str, form: str = "condense", **own: Any) -> Cell:
        return Cell(part, method, Setting(form, n, **{"experts": k, "seed": seed, **own}))

    yield cell("table1", "CD-MoE E(shared+0)", experts=0)
    yield cell("table1", f"CD-MoE E(shared+{k})")
    for form, method in (("trim_layer", "Layer Trimming"), ("trim_block", "Block Trimming")):
        yield cell("table1", method, form, experts=0, layer_selection="similarity")
    yield from (cell("table2", name, expert_selection=name) for name in EXPERT_SELECTIONS)
    yield from (cell("table3", name, layer_selection=name) for name in LAYER_SELECTIONS)
    yield from (cell("table4", name, divergence=name) for name in DIVERGENCES)
    yield from (cell("figure5", name, calibration=name) for name in ("texts", "questions"))
    yield from (cell("refit", name, refit=name) for name in REFITS)


class Bench:
    """Measures cells, and keeps what came out.

    Args:
        args (`argparse.Namespace`): The completed arguments.
        calibration (*any*): Calibration data of "texts".
        texts (`list[str]`, *optional*): Held-out documents.
        results (`Results`): Where measurements go.
    """

    def __init__(self, args: argparse.Namespace, calibration: Any, texts: list[str] | None, results: Results) -> None:
        self.args, self.results = args, results
        kwargs: dict[str, Any] = {"dtype": args.dtype}
        device_map = args.device_map or ("auto" if torch.cuda.is_available() else None)
        # On a CPU the loop over experts is many times slower than grouped products.
        kwargs.update({"device_map": device_map} if device_map else {"experts_implementation": "grouped_mm"})
        self.opener = Opener(args.model_name_or_path, **kwargs)
        self.tasks = Tasks(args.tasks, args.include_path, args.limit, args.batch_size)
        self.data: dict[str, Callable[[], Any]] = {
            "texts": lambda: calibration,
            "questions": lambda: self.tasks.questions(args.num_samples),
        }
        tokenizer = self.opener.tokenizer
        self.rows = rows_of_tokens(tokenizer, texts, args.max_length, args.held_out_rows) if texts else None
        generator = torch.Generator().manual_seed(0)
        shape = (max(1, args.speed_tokens // args.max_length), args.max_length)
        self.speed_ids = torch.randint(len(tokenizer), shape, generator=generator)

    def config(self, setting: Setting, refit: bool = False) -> CondenseConfig:
        """The search that a setting is cut from: with as many layers as are wanted at most."""
        layers = max(self.args.layers)
        if setting.form == "trim_block":
            layers = max(n for n in self.args.layers if n < self.blocks)
        return CondenseConfig(
            num_layers=layers,
            num_experts=self.args.num_experts,
            form=setting.form,
            expert_selection=setting.expert_selection,
            layer_selection=setting.layer_selection,
            metric=setting.divergence,
            refit=setting.refit if refit else None,
            num_samples=self.args.num_samples,
            max_length=self.args.max_length,
            seed=setting.seed,
        )

    @property
    def blocks(self) -> int:
        """Decoder layers of the model."""
        return AutoConfig.from_pretrained(self.args.model_name_or_path).get_text_config().num_hidden_layers

    def plan_path(self, setting: Setting) -> Path:
        name = [setting.form, setting.expert_selection, setting.layer_selection, setting.divergence]
        return self.args.output_dir / "plans" / ("-".join([*name, setting.calibration]) + f"-seed{setting.seed}.json")

    def search(self, settings: Sequence[Setting]) -> None:
        """Finds the plans that are missing, one search per selection and seed, with the sparse model open once."""
        missing = {path: s for s in settings if not (path := self.plan_path(s)).exists()}
        if not missing:
            return
        model = self.opener.sparse()
        for path, setting in tqdm(missing.items(), desc="Searches", unit="search"):
            plan = search_plan(
                model,
                self.config(setting),
                calibration=self.data[setting.calibration](),
                tokenizer=self.opener.tokenizer,
                state_dir=path.with_suffix(""),
            )
            plan.save(path)
        del model
        free()

    def plan(self, setting: Setting) -> CondensePlan:
        """The plan of a setting, cut from the search's.

        Raises:
            ValueError: if the plan on disk is of another search.
        """
        path = self.plan_path(setting)
        plan = CondensePlan.load(path)
        if plan.config != self.config(setting).to_dict():
            raise ValueError(f"{path} is of a search with other settings: delete it, or use another --output_dir.")
        experts = None if setting.form != "condense" else setting.experts
        return plan.truncate(setting.layers, experts)

    def open(self, setting: Setting) -> Any:
        if setting.form == "sparse":
            return self.opener.sparse()
        if setting.refit == "none":
            return self.opener.condensed(self.plan(setting))
        config = self.config(setting, refit=True)
        config.num_layers = setting.layers
        return self.opener.condensed(self.plan(setting), config, self.data[setting.calibration]())

    def wanted(self, cell: Cell) -> list[str]:
        """Metrics of a cell. Speed and bytes are of Table 1 alone, and do not depend on the seed."""
        names = [f"accuracy:{name}" for name in self.args.tasks] + (["loss"] if self.rows is not None else [])
        if cell.part in ("sparse", "table1", "figure3") and cell.setting.seed in (0, self.args.seeds[0]):
            names += ["weight_bytes", "tokens_per_second", "speedup"]
        return names

    def missing(self, cell: Cell) -> list[str]:
        return [name for name in self.wanted(cell) if (cell, name) not in self.results.rows]

    def measure(self, cell: Cell, open_model: Callable[[], Any] | None = None) -> None:
        """Measures what is missing of a cell, or copies it from another place with the same model."""
        self.results.add(cell, {k: v for k, v in self.results.known(cell.setting).items() if "divergence_of" not in k})
        missing = self.missing(cell)
        if not missing:
            return
        model = self.open(cell.setting) if open_model is None else open_model()
        model.eval()
        if any(name.startswith("accuracy:") for name in missing):
            self.results.add(cell, self.tasks.accuracy(model, self.opener.tokenizer))
        if "loss" in missing:
            self.results.add(cell, {"loss": held_out_loss(model, self.rows, self.args.batch_size)})
        if "speedup" in missing:
            self.results.add(cell, costs(model, self.opener.sparse(), self.speed_ids))
        del model
        free()

    def layer_divergences(self, seed: int) -> None:
        """Figure 1, from the greedy search's first round."""
        setting = Setting("condense", max(self.args.layers), self.args.num_experts, seed)
        divergences = self.plan(setting).layer_divergences or {}
        values = {f"divergence_of_layer_{layer}": value for layer, value in divergences.items()}
        self.results.add(Cell("figure1", "greedy", setting), values)

    def recovered(self, folder: Path) -> None:
        """Figure 3, from checkpoints that recovery.py wrote."""
        for path in sorted(folder.glob("*/config.json")):
            setting = Setting("recovered", 0, 0, refit=path.parent.name)
            self.measure(Cell("figure3", path.parent.name, setting), lambda path=path: self.opener.sparse(path.parent))

    def run(self) -> None:
        """Everything that is missing."""
        cells = list(all_cells(self.args, self.blocks))
        figure1 = [Setting("condense", seed=seed) for seed in self.args.seeds] if "figure1" in self.args.only else []
        self.measure(SPARSE)
        progress = tqdm(total=len(cells), desc="Measurements", unit="model")
        for seed in self.args.seeds:
            mine = [cell for cell in cells if cell.setting.seed == seed]
            self.search([c.setting for c in mine if self.missing(c)] + [s for s in figure1 if s.seed == seed])
            if figure1:
                self.layer_divergences(seed)
            for cell in mine:
                self.measure(cell)
                progress.update()
        if self.args.recovery_dir is not None and "figure3" in self.args.only:
            self.recovered(self.args.recovery_dir)
        progress.close()
