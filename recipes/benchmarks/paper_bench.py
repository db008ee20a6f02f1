"""What paper_tables.py measures: one model after the other, each at most once."""

from __future__ import annotations

import argparse
import gc
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from paper_models import Opener, Tasks, costs, free, held_out_loss, rows_of_tokens
from paper_recovery import STAGES, Recovery
from paper_results import Cell, Results, Setting
from tqdm import tqdm
from transformers import AutoConfig

from cdmoe_plugin import CondenseConfig, CondensePlan, search_plan
from cdmoe_plugin.config import FORMS
from cdmoe_plugin.estimate import dry_run
from cdmoe_plugin.model.saving import PLAN_FILE

SPARSE = Cell("sparse", "sparse", Setting())
EXPERT_SELECTIONS = ("random", "pl_alpha_hill", "l1", "greedy", "frequency", "reap", "d_optimal")
LAYER_SELECTIONS = ("local", "global", "greedy")
DIVERGENCES = ("ppl", "kl", "js")
REFITS = ("none", "down_proj", "distill")
COSTS = ("weight_bytes", "tokens_per_second", "speedup")
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


def all_cells(args: argparse.Namespace, blocks: int, recovery: str | None = None) -> Iterator[Cell]:
    """Everything that is measured, for one seed after the other.

    Args:
        args (`argparse.Namespace`): The completed arguments.
        blocks (`int`): Decoder layers of the model.
        recovery (`str`, *optional*): How models are recovered, if they are: for the first seed alone.
    """
    k = args.num_experts
    parts = {PARTS[name] for name in args.only}
    for seed in args.seeds:
        for n in args.layers:
            for cell in budget_cells(seed, n, k):
                emptied = cell.setting.form == "trim_block" and n >= blocks
                if cell.part in parts and not emptied:
                    yield cell
            if "figure3" in parts and recovery is not None and seed == args.seeds[0]:
                yield from recovered_cells(seed, n, k, recovery)


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


def recovered_cells(seed: int, n: int, k: int, recovery: str) -> Iterator[Cell]:
    """Figure 3's models; fine-tuning alone, which the paper writes of, with routed experts only."""
    for name, experts in (("LM+SFT", 0), ("LM+SFT", k), ("SFT", k)):
        setting = Setting("recovered", n, experts, seed, refit=f"{STAGES[name]} {recovery}")
        yield Cell("figure3", f"{name} E(shared+{experts})", setting)


def start_of(setting: Setting) -> Setting:
    """What a recovered model was before its recovery."""
    return replace(setting, form="condense", refit="none") if setting.form == "recovered" else setting


class Bench:
    """Measures cells, and keeps what came out.

    Args:
        args (`argparse.Namespace`): The completed arguments.
        calibration (*any*): Calibration data of "texts".
        texts (`list[str]`, *optional*): Held-out documents.
        results (`Results`): Where measurements go.
        recovery (`Recovery`, *optional*): Trains Figure 3's models.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        calibration: Any,
        texts: list[str] | None,
        results: Results,
        recovery: Recovery | None = None,
    ) -> None:
        self.args, self.results, self.calibration, self.recovery = args, results, calibration, recovery
        kwargs: dict[str, Any] = {"dtype": args.dtype}
        device_map = args.device_map or ("auto" if torch.cuda.is_available() else None)
        # On a CPU the loop over experts is many times slower than grouped products.
        kwargs.update({"device_map": device_map} if device_map else {"experts_implementation": "grouped_mm"})
        self.opener = Opener(args.model_name_or_path, **kwargs)
        self.tasks = Tasks(args.tasks, args.include_path, args.limit, args.batch_size)
        tokenizer = self.opener.tokenizer
        self.rows = rows_of_tokens(tokenizer, texts, args.max_length, args.held_out_rows) if texts else None
        generator = torch.Generator().manual_seed(0)
        shape = (max(1, args.speed_tokens // args.max_length), args.max_length)
        self.speed_ids = torch.randint(len(tokenizer), shape, generator=generator)
        self.model_of = cache(self._model_of)

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

    @cached_property
    def blocks(self) -> int:
        """Decoder layers of the model."""
        return AutoConfig.from_pretrained(self.args.model_name_or_path).get_text_config().num_hidden_layers

    def data(self, setting: Setting) -> Any:
        """Calibration data of a setting."""
        if setting.calibration == "questions":
            return self.tasks.questions(self.args.num_samples, setting.seed)
        return self.calibration

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
                calibration=self.data(setting),
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
        if setting.form == "recovered":
            return self.opener.sparse(self.recover(setting))
        if setting.refit == "none":
            return self.opener.condensed(self.plan(setting))
        config = self.config(setting, refit=True)
        config.num_layers = setting.layers
        return self.opener.condensed(self.plan(setting), config, self.data(setting))

    def recover(self, setting: Setting) -> Path:
        """The recovered checkpoint of a setting."""
        assert self.recovery is not None
        stages = setting.refit.split()[0]
        return self.recovery.run(stages, self.plan_path(start_of(setting)), setting.layers, setting.experts)

    def wanted(self, cell: Cell) -> list[str]:
        """Metrics of a cell. Speed and bytes are of Table 1 alone, and do not depend on the seed."""
        names = [f"accuracy:{name}" for name in self.args.tasks] + (["loss"] if self.rows is not None else [])
        if cell.part in ("sparse", "table1", "figure3") and cell.setting.seed in (0, self.args.seeds[0]):
            names += COSTS
        return names

    def missing(self, cell: Cell) -> list[str]:
        return [name for name in self.wanted(cell) if (cell, name) not in self.results.rows]

    def _model_of(self, setting: Setting) -> Hashable:
        """The same for settings of the very same model: searches often choose the same layers, in another order."""
        # What a refit or a recovery makes of a model depends on more than the plan.
        if setting.form not in FORMS or setting.refit != "none" or not self.plan_path(setting).exists():
            return setting
        layers = self.plan(setting).layers
        return setting.form, frozenset((each.layer, tuple(each.experts), tuple(each.gates)) for each in layers)

    def known(self, setting: Setting) -> dict[str, float]:
        """What has been measured of a model, for whatever place and setting."""
        model = self.model_of(setting)
        found: dict[str, float] = {}
        for other in self.results.measured():
            if self.model_of(other) == model:
                found.update(self.results.known(other))
        if setting.form == "recovered":  # that changes neither size nor speed
            found.update({k: v for k, v in self.results.known(start_of(setting)).items() if k in COSTS})
        return found

    def measure(self, cell: Cell, open_model: Callable[[], Any] | None = None) -> None:
        """Measures what is missing of a cell, or copies it from another place with the same model."""
        if self.missing(cell):
            wanted = self.wanted(cell)
            known = self.known(cell.setting)
            kept = {k: v for k, v in known.items() if k in wanted or k.startswith("accuracy_error:")}
            self.results.add(cell, kept)
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

    def checkpoints(self, folder: Path) -> None:
        """Figure 3, from checkpoints that are there; names that differ in an ending like -L9 alone make one line."""
        for path in sorted(file.parent for file in folder.glob("*/config.json")):
            condensed = (path / PLAN_FILE).exists()
            layers = CondensePlan.load(path).layers if condensed else []
            experts = max((len(layer.experts) for layer in layers), default=0)
            setting = Setting("checkpoint", len(layers), experts, refit=path.name)
            cell = Cell("figure3", re.sub(r"-L\d+$", "", path.name), setting)
            self.measure(cell, lambda path=path: self.opener.sparse(path))

    def check(self) -> None:
        """Finds what is wrong before anything is measured.

        Raises:
            ValueError: if the model has too few sparse layers or experts; if the results hold recoveries by another
                config, or if the recipe refuses this one.
        """
        dry_run(self.args.model_name_or_path, self.config(Setting("condense")))
        if self.recovery is None:
            return
        before = {s.refit.partition(" ")[2] for s in self.results.measured() if s.form == "recovered"}
        if before - {self.recovery.name}:
            raise ValueError(
                f"{self.results.path} holds models recovered by {before}, not by {self.recovery.name}. Use another "
                "--output_dir, or delete its rows of figure3 and the folder `recovered`."
            )
        self.recovery.check(max(self.args.layers), self.args.num_experts)

    def run(self) -> None:
        """Everything that is missing."""
        cells = list(all_cells(self.args, self.blocks, self.recovery and self.recovery.name))
        figure1 = [Setting("condense", seed=seed) for seed in self.args.seeds] if "figure1" in self.args.only else []
        gc.freeze()  # or else all that imports have left is looked through again after each model
        self.measure(SPARSE)
        progress = tqdm(total=len(cells), desc=f"Measurements of {self.results.model}", unit="model")
        for seed in self.args.seeds:
            mine = [cell for cell in cells if cell.setting.seed == seed]
            needed = [start_of(c.setting) for c in mine if self.missing(c)]
            self.search(needed + [s for s in figure1 if s.seed == seed])
            if figure1:
                self.layer_divergences(seed)
            for cell in mine:
                self.measure(cell)
                progress.update()
        if self.args.recovery_dir is not None and "figure3" in self.args.only:
            self.checkpoints(self.args.recovery_dir)
        progress.close()
