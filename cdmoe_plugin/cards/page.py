"""The report of a plan: one HTML page that needs nothing else, filled in from page.html."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ..checks import is_int
from ..plan import CondensedLayer, CondensePlan, ModelShape
from .tables import FORM_TEXTS, divergence_name

_HEIGHT = 210  # of a chart, in CSS pixels
_TIMES = "\N{MULTIPLICATION SIGN}"
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def write_page(plan: CondensePlan, path: str | os.PathLike) -> None:
    """Write a report of a plan as one HTML page, without scripts and without files beside it.

    It shows the divergence per layer and the order of selection, the kept experts and how often calibration tokens
    chose them, the parameters of the MLPs before and after, and what every smaller budget of the plan would cost. What
    the plan does not hold is left out, with the reason.

    Args:
        plan (`CondensePlan`): The plan.
        path (`str` or `os.PathLike`): The file, which is replaced if it exists.

    Raises:
        OSError: if the file can't be written.
    """
    # Jinja comes with torch.
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _data(format_number), "count": _data(format_count)}
    environment.filters["tokens"] = format_tokens
    sizes = None if plan.model is None else Sizes(plan.model, plan.form)
    page = environment.get_template("page.html").render(
        plan=plan,
        form=FORM_TEXTS[plan.form],
        config=plan.config or {},
        source=_public_name((plan.calibration or {}).get("source")),
        metric=divergence_name(plan),
        own_metric=divergence_name(plan, own=True),
        alone=_alone(plan),
        together=_together(plan),
        grid=_grid(plan),
        total_tokens=_total_tokens(plan),
        kept=sum(len(layer.experts) for layer in plan.layers),
        routed=None if sizes is None else sum(sizes.layers[layer.layer].num_experts for layer in plan.layers),
        sizes=sizes,
        parts_after=None if sizes is None else sizes.parts({row.layer: len(row.experts) for row in plan.layers}),
        budgets=_expert_budgets(plan),
    )
    Path(path).write_text(page, encoding="utf-8")


# --- sizes ---


class Sizes:
    """Parameters of the MLPs in a model's sparse layers: gated experts of three matrices, and routers.

    Args:
        model (`ModelShape`): The sizes of the sparse model.
        form (`str`): What becomes of a chosen layer, see `CondenseConfig.form`.
    """

    def __init__(self, model: ModelShape, form: str) -> None:
        self.model = model
        self.keeps_shared = form == "condense"
        self.layers = {shape.layer: shape for shape in model.sparse_layers}

    def parts(self, experts: Mapping[int, int]) -> dict[str, int]:
        """Count parameters by part once the given layers are dense, with so many routed experts in each."""
        parts = dict.fromkeys(("routed experts", "shared experts", "routers"), 0)
        matrices = 3 * self.model.hidden_size
        for layer, shape in self.layers.items():
            chosen = layer in experts
            parts["routed experts"] += matrices * shape.intermediate_size * experts.get(layer, shape.num_experts)
            if self.keeps_shared or not chosen:
                parts["shared experts"] += matrices * shape.shared_intermediate_size
            parts["routers"] += 0 if chosen else self.model.hidden_size * shape.num_experts
        return parts

    def total(self, layers: Sequence[CondensedLayer] = (), most: int | None = None) -> int:
        """Count all parameters once these layers are dense, each with at most `most` of its kept experts."""
        return sum(self.parts({layer.layer: len(layer.experts[:most]) for layer in layers}).values())


# --- charts ---


class Point(NamedTuple):
    """A point of a chart: its place in percent of the width and in pixels, its label on the x axis, and its number."""

    x: float
    y: float
    label: int
    value: float
    order: int | None


class Chart(NamedTuple):
    """A chart; `stride` and (on narrow screens) `narrow` say which labels of the x axis there is room for."""

    points: list[Point]
    ticks: list[tuple[float, str]]
    logarithmic: bool
    stride: int
    narrow: int
    height: int = _HEIGHT


def _chart(values: Mapping[int, float], orders: Mapping[int, int], logarithmic: bool) -> Chart:
    place = math.log10 if logarithmic else float
    low, high = place(min(values.values())), place(max(values.values()))
    if not logarithmic:
        low = min(low, 0.0)
    margin = max(0.1 * (high - low), 0.1 if logarithmic else 0.0)
    low, high = low - (margin if logarithmic else 0.0), high + margin
    span = (high - low) or 1.0

    def y(value: float) -> float:
        return round(_HEIGHT * (1 - (place(value) - low) / span), 2)

    steps = _log_ticks(low, high) if logarithmic else _linear_ticks(low, high)
    number = len(values)
    points = [
        Point(round(100 * (i + 0.5) / number, 3), y(value), label, value, orders.get(label))
        for i, (label, value) in enumerate(sorted(values.items()))
    ]
    stride = math.ceil(number / 28)
    ticks = [(y(value), format_tick(value)) for value in steps]
    return Chart(points, ticks, logarithmic, stride, stride * math.ceil(number / (14 * stride)))


def _log_ticks(low: float, high: float) -> list[float]:
    """Round numbers from 10^low to 10^high: powers of ten, and 2 and 5 times these where there are few."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    for multiples in ((1, 2, 5), (1, 3), (1,)):
        values = [float(f"{m}e{power}") for power in powers for m in multiples]
        values = [value for value in values if value and low <= math.log10(value) <= high]
        if len(values) <= 6:
            return values
    return values[:: math.ceil(len(values) / 6)]


def _linear_ticks(low: float, high: float) -> list[float]:
    if high == low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= (high - low) / 5)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _alone(plan: CondensePlan) -> Chart | None:
    """Draw the divergence of each layer alone, with its place in the order of selection."""
    if not plan.layer_divergences:
        return None
    orders = {layer.layer: i for i, layer in enumerate(plan.layers, 1)}
    # The first layers often matter a hundred times as much as those in the middle.
    return _chart(plan.layer_divergences, orders, min(plan.layer_divergences.values()) > 0)


def _together(plan: CondensePlan) -> Chart | None:
    """Draw the divergence with the first layer, the first two, ...; as far as it was measured."""
    scores = {i: layer.score for i, layer in enumerate(plan.layers, 1) if layer.score is not None}
    return _chart(scores, {}, False) if scores else None


# --- experts ---


class GridRow(NamedTuple):
    """A sparse layer in the map of experts: its width and cells in percent; `order` is None where it stays sparse."""

    layer: int
    order: int | None
    width: float
    cells: list[tuple[float, str, float]]  # left edge, text, strength of the colour


class Grid(NamedTuple):
    """The map of kept experts: one row per sparse layer, one column per routed expert."""

    rows: list[GridRow]
    cell: float
    ticks: list[tuple[float, int]]
    pitch: int  # from row to row, in CSS pixels
    most: int | None  # tokens that chose the most popular of the kept experts
    fine: bool  # columns are too narrow for gaps


def _grid(plan: CondensePlan) -> Grid | None:
    if not any(layer.experts for layer in plan.layers):
        return None
    kept = {layer.layer: (i, layer) for i, layer in enumerate(plan.layers, 1)}
    if plan.model is not None:
        sizes = {shape.layer: shape.num_experts for shape in plan.model.sparse_layers}
    else:  # as many experts as are known to be there
        sizes = dict.fromkeys(sorted(kept), 1 + max(max(layer.experts, default=0) for layer in plan.layers))
    number = max(sizes.values())
    counted = all(layer.tokens is not None for layer in plan.layers)
    most = max((count for layer in plan.layers for count in layer.tokens or ()), default=0) if counted else 0
    total = _total_tokens(plan)
    rows = []
    for i, size in sorted(sizes.items()):
        order, layer = kept.get(i, (None, None))
        cells = []
        for j, expert in enumerate(layer.experts if layer else ()):
            assert layer is not None
            text = f"layer {i}, expert {expert}: place {j + 1}, gate {format_number(layer.gates[j])}"
            text += f", chosen by {format_tokens(layer.tokens[j], total)}" if layer.tokens else ""
            strength = 0.2 + 0.8 * layer.tokens[j] / most if layer.tokens and most else 1.0
            cells.append((100 * expert / number, text, round(strength, 3)))
        rows.append(GridRow(i, order, 100 * size / number, cells))
    step = next(s for s in (1, 2, 4, 8, 16, 32, 64, 128, number) if number / s <= 10 or s == number)
    ticks = [(100 * (i + 0.5) / number, i) for i in range(0, number, step)]
    pitch = 17 if len(rows) > 20 else 24
    return Grid(rows, 100 / number, ticks, pitch, most or None, number > 96)


def _total_tokens(plan: CondensePlan) -> int | None:
    """Return the number of calibration tokens, where it is known and not less than an expert's."""
    total = (plan.calibration or {}).get("num_tokens", 0)
    most = max((count for layer in plan.layers for count in layer.tokens or ()), default=0)
    return total if is_int(total) and total >= max(most, 1) else None


def _expert_budgets(plan: CondensePlan) -> range | None:
    """Return all numbers of experts that the layers can be cut to, where something is known of what they cost."""
    most = max(len(layer.experts) for layer in plan.layers)
    known = plan.model is not None or any(layer.expert_scores for layer in plan.layers)
    return range(most + 1) if most and known else None


# --- texts ---


def _public_name(source: Any) -> str:
    """Return the name of the calibration data; of a local file only its own, as the rest of the path is private."""
    text = "" if source is None else str(source)
    return Path(text).name if Path(text).is_absolute() else text


def format_number(value: float) -> str:
    """Format a number with three digits: 0.0123, 12.3, and 1.23 times a power of ten."""
    mantissa, exponent = f"{value:.2e}".split("e")
    if value == 0:
        return "0"
    if -3 <= int(exponent) <= 3:
        return f"{value:.{max(0, 2 - int(exponent))}f}"
    return f"{mantissa}{_TIMES}10{str(int(exponent)).translate(_SUPERSCRIPTS)}"


def format_tick(value: float) -> str:
    """Format a round number as short as it is: 0.05, 10⁻⁵."""
    mantissa, _, exponent = f"{value:.6g}".partition("e")
    if not exponent:
        return mantissa
    power = f"10{str(int(exponent)).translate(_SUPERSCRIPTS)}"
    return power if mantissa == "1" else f"{mantissa}{_TIMES}{power}"


def format_count(value: int) -> str:
    """Format a number of parameters or tokens: 11.86 B, 197 M, 3,072."""
    for size, unit in ((10**9, "B"), (10**6, "M")):
        if value >= size:
            return f"{value / size:.{2 if value < 100 * size else 1}f} {unit}"
    return f"{value:,}"


def format_tokens(count: int, total: int | None) -> str:
    """Format a number of tokens as a share of all, or as it is where their number is not known."""
    return f"{count:,} tokens" if total is None else f"{count / total:.1%}"


def _data(text: Any) -> Any:
    """Make a filter that shows a number as a text, and keeps the number itself in the page."""
    return lambda value: Markup('<data value="{}">{}</data>').format(repr(value), text(value))
