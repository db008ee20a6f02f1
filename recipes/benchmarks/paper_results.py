"""What paper_tables.py has measured: one CSV in long format, one row per measurement, replaced at once."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

COLUMNS = (
    *("part", "method", "form", "layers", "experts", "seed"),
    *("expert_selection", "layer_selection", "divergence", "calibration", "refit"),
    *("metric", "value", "model", "settings"),
)


@dataclass(frozen=True)
class Setting:
    """All that a measured model depends on, beside the sparse model and the settings of the whole run.

    Args:
        form (`str`): A form of `CondensePlan`, "sparse", "recovered" (condensed, then trained), or "checkpoint" (one of
            --recovery_dir).
        layers (`int`), experts (`int`): Number of condensed layers, and of routed experts kept in each.
        seed (`int`): Of the calibration draw, and of the draw of random experts.
        expert_selection, layer_selection, divergence (`str`): As in `CondenseConfig` (`metric` there).
        calibration (`str`): "texts" or "questions".
        refit (`str`): As in `CondenseConfig`, or "none"; of a recovered model its stages and their config, of a
            checkpoint its name.
    """

    form: str = "sparse"
    layers: int = 0
    experts: int = 0
    seed: int = 0
    expert_selection: str = "greedy"
    layer_selection: str = "greedy"
    divergence: str = "js"
    calibration: str = "texts"
    refit: str = "none"


@dataclass(frozen=True)
class Cell:
    """A place in a table or figure: a model is measured once, however many places it has."""

    part: str
    method: str
    setting: Setting


@dataclass(frozen=True)
class Row:
    """One measurement."""

    cell: Cell
    metric: str
    value: float


class Results:
    """The rows of a CSV file.

    Args:
        path (`Path`): Where the file lies, or will.
        model (`str`, *optional*), settings (`str`, *optional*): What the rows belong to; None takes the file's own,
            for drawing.

    Raises:
        ValueError: if the file is another kind of table, or belongs to another model or to other settings.
        FileNotFoundError: if there is no file and `model` is None.
    """

    def __init__(self, path: Path, model: str | None = None, settings: str | None = None) -> None:
        self.path, self.model, self.settings = path, model, settings
        self.rows: dict[tuple[Cell, str], float] = {}
        self._by_setting: dict[Setting, dict[str, float]] = {}
        if path.exists() or model is None:
            self._read()

    def _read(self) -> None:
        with self.path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise ValueError(f"{self.path} is no table of this program: its header is {reader.fieldnames}.")
            for line in reader:
                self._check(line)
                self._keep(_row(line, self.path))

    def _check(self, line: Mapping[str, str]) -> None:
        for name in ("model", "settings"):
            mine = getattr(self, name)
            if mine is None:
                setattr(self, name, line[name])
            elif line[name] != mine:
                raise ValueError(
                    f"{self.path} holds results of another run: its {name} is {line[name]!r}, not {mine!r}. Use "
                    "another --output_dir, or delete it."
                )

    def _keep(self, row: Row) -> None:
        self.rows[row.cell, row.metric] = row.value
        self._by_setting.setdefault(row.cell.setting, {})[row.metric] = row.value

    def measured(self) -> list[Setting]:
        """Of all models of which anything has been measured."""
        return list(self._by_setting)

    def known(self, setting: Setting) -> dict[str, float]:
        """What has been measured of a model, for whatever place."""
        return self._by_setting.get(setting, {})

    def add(self, cell: Cell, values: Mapping[str, float]) -> None:
        """Keeps measurements, and writes the file if they are new."""
        new = {metric: value for metric, value in values.items() if self.rows.get((cell, metric)) != value}
        for metric, value in new.items():
            self._keep(Row(cell, metric, value))
        if new:
            self._write()

    def of(self, part: str) -> list[Row]:
        """The rows of a table or figure."""
        return [Row(cell, metric, value) for (cell, metric), value in self.rows.items() if cell.part == part]

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            with temporary.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                writer.writeheader()
                writer.writerows(self._lines())
            temporary.replace(self.path)
        finally:
            temporary.unlink(missing_ok=True)

    def _lines(self) -> Iterable[dict[str, object]]:
        for (cell, metric), value in self.rows.items():
            about = {"part": cell.part, "method": cell.method, **asdict(cell.setting)}
            # repr: what is read again is the very same number
            yield {
                **about,
                "metric": metric,
                "value": repr(float(value)),
                "model": self.model,
                "settings": self.settings,
            }


def _row(line: Mapping[str, str], path: Path) -> Row:
    try:
        values = {
            f.name: int(line[f.name]) if f.name in ("layers", "experts", "seed") else line[f.name]
            for f in fields(Setting)
        }
        return Row(Cell(line["part"], line["method"], Setting(**values)), line["metric"], float(line["value"]))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} has a line that can't be read ({error}): {dict(line)}") from error
