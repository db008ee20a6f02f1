"""The charts in the report of a plan, and how its numbers are formatted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from ..plan import CondensePlan
from .tables import spread_rows

_HEIGHT = 210  # of a chart, in CSS pixels
_TIMES = "\N{MULTIPLICATION SIGN}"
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


class Point(NamedTuple):
    """A point of a chart: its place in percent of the width and in pixels, its label on the x axis, and its number.

    `form` is what became of the layer: "condensed", "mixed", or "" if it stays as it is.
    """

    x: float
    y: float
    label: int
    value: float
    order: int | None
    form: str


class Chart(NamedTuple):
    """A chart; `stride` and (on narrow screens) `narrow` say which labels of the x axis there is room for."""

    points: list[Point]
    ticks: list[tuple[float, str]]
    logarithmic: bool
    stride: int
    narrow: int
    height: int = _HEIGHT


def _chart(
    values: Mapping[int, float], logarithmic: bool, forms: Mapping[int, str], orders: Mapping[int, int]
) -> Chart:
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
        Point(round(100 * (i + 0.5) / number, 3), y(value), label, value, orders.get(label), forms.get(label, ""))
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


def layers_alone(plan: CondensePlan) -> Chart | None:
    """Draw the divergence of each layer alone, with its place in the order of selection, if there is one."""
    values = plan.layer_divergences or {}
    orders = {layer.layer: i for i, layer in enumerate(plan.layers, 1)}
    forms = {layer.layer: "mixed" if layer.routed else "condensed" for layer in plan.layers}
    if plan.spread is not None:
        found = {row.layer: row.if_condensed for row in spread_rows(plan, plan.spread)}
        values, orders = {layer: value for layer, value in found.items() if value is not None}, {}
    # The first layers often matter a hundred times as much as those in the middle.
    return _chart(values, min(values.values()) > 0, forms, orders) if values else None


def layers_together(plan: CondensePlan) -> Chart | None:
    """Draw the divergence with the first layer, the first two, ...; as far as it was measured."""
    scores = {i: layer.score for i, layer in enumerate(plan.layers, 1) if layer.score is not None}
    return _chart(scores, False, {}, {}) if scores else None


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
