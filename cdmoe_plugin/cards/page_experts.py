"""The map of experts in the report of a plan."""

from __future__ import annotations

from typing import NamedTuple

from ..checks import is_int
from ..plan import CondensedLayer, CondensePlan
from .page_charts import format_number, format_tokens


class Cell(NamedTuple):
    """An expert in the map: its left edge in percent, its text, the strength of its colour, and what becomes of it.

    `kind` is "stay" (behind the router) or "fold" (kept in the dense MLP).
    """

    left: float
    text: str
    strength: float
    kind: str


class GridRow(NamedTuple):
    """A sparse layer in the map of experts: its width and cells in percent; `order` is None where it stays sparse.

    `dense` describes the dense neurons, if these are not whole experts.
    """

    layer: int
    order: int | None
    width: float
    dense: str
    cells: list[Cell]


class Grid(NamedTuple):
    """The map of experts: one row per sparse layer, one column per routed expert."""

    rows: list[GridRow]
    cell: float
    ticks: list[tuple[float, int]]
    pitch: int  # from row to row, in CSS pixels
    most: int | None  # tokens that chose the most popular of the kept experts
    fine: bool  # columns are too narrow for gaps

    @property
    def kinds(self) -> set[str]:
        """The kinds of cells that there are, and "dense" if there are neurons that are not whole experts."""
        found = {cell.kind for row in self.rows for cell in row.cells}
        return found | {"dense" for row in self.rows if row.dense}


def expert_map(plan: CondensePlan) -> Grid | None:
    """Draw the experts that are kept or stay behind the router; None if there are none but single neurons."""
    if not any(layer.routed or (layer.experts and layer.width is None) for layer in plan.layers):
        return None
    chosen = {layer.layer: (i, layer) for i, layer in enumerate(plan.layers, 1)}
    if plan.model is not None:
        sizes = {shape.layer: shape.num_experts for shape in plan.model.sparse_layers}
    elif plan.spread is not None:
        sizes = {layer.layer: layer.num_experts for layer in plan.spread.layers}
    else:  # as many experts as are known to be there
        known = [expert for layer in plan.layers for expert in (*layer.experts, *(layer.routed or ()))]
        sizes = dict.fromkeys(sorted(chosen), 1 + max(known))
    number = max(sizes.values())
    most, total = _most_tokens(plan), total_tokens(plan)
    rows = []
    for i, size in sorted(sizes.items()):
        order, layer = chosen.get(i, (None, None))
        cells = [] if layer is None else _cells(layer, number, most, total)
        dense = f"layer {i}: {layer.width:,} dense neurons in place of experts" if layer and layer.width else ""
        rows.append(GridRow(i, order, 100 * size / number, dense, cells))
    step = next(s for s in (1, 2, 4, 8, 16, 32, 64, 128, number) if number / s <= 10 or s == number)
    ticks = [(100 * (i + 0.5) / number, i) for i in range(0, number, step)]
    pitch = 17 if len(rows) > 20 else 24
    return Grid(rows, 100 / number, ticks, pitch, most or None, number > 96)


def _cells(layer: CondensedLayer, number: int, most: int, total: int | None) -> list[Cell]:
    """List the cells of a layer, in a map that is `number` experts wide."""
    cells = []

    def add(expert: int, text: str, strength: float, kind: str) -> None:
        text = f"layer {layer.layer}, expert {expert}: {text}"
        cells.append(Cell(100 * expert / number, text, round(strength, 3), kind))

    for expert in layer.routed or ():
        add(expert, "stays behind the router", 1.0, "stay")
    for j, expert in enumerate(layer.experts if layer.width is None else ()):
        text = f"place {j + 1}, gate {format_number(layer.gates[j])}"
        text += f", chosen by {format_tokens(layer.tokens[j], total)}" if layer.tokens else ""
        add(expert, text, 0.2 + 0.8 * layer.tokens[j] / most if layer.tokens and most else 1.0, "fold")
    return cells


def _most_tokens(plan: CondensePlan) -> int:
    """Return the number of tokens that chose the most popular of the kept experts; 0 where they were not counted."""
    if any(layer.tokens is None for layer in plan.layers):
        return 0
    return max((count for layer in plan.layers for count in layer.tokens or ()), default=0)


def total_tokens(plan: CondensePlan) -> int | None:
    """Return the number of calibration tokens, where it is known and not less than an expert's."""
    total = (plan.calibration or {}).get("num_tokens", 0)
    most = max((count for layer in plan.layers for count in layer.tokens or ()), default=0)
    return total if is_int(total) and total >= max(most, 1) else None
