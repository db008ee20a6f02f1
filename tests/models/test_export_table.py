"""The table of exports by architecture; that they are so is tested in test_export*.py.

`python -m tests.models.test_export_table` writes the table, docs/exports.md.
"""

from __future__ import annotations

from pathlib import Path

from tests.helpers.exporting import ANY, DENSE, DENSE_GATED, EXACT, GATED, NOT_TOP_K, PREFIX
from tests.helpers.tiny_models import ARCHITECTURES

TABLE = Path(__file__).parents[2] / "docs" / "exports.md"
SETS = {
    "deepseek": "the first layers, or all but every n-th",
    "ernie4_5_moe": "the first and the last layers, or all but every n-th",
    "jamba": "all layers; all but every n-th if as wide as one expert",
    "granitemoehybrid": "all layers",
    "nemotron_h": "any layers",
}


def stock(model_type: str) -> str:
    if model_type in GATED:
        return "any layers, approximately"
    sets = EXACT.get(model_type)
    if sets is None:
        return "no"
    return SETS[model_type] if model_type in SETS else {id(ANY): "any layers", id(PREFIX): "the first layers"}[id(sets)]


def row(model_type: str) -> list[str]:
    sibling = DENSE.get(model_type) or DENSE_GATED.get(model_type)
    dense = "no" if sibling is None else sibling if model_type in DENSE else f"{sibling}, approximately"
    return [model_type, stock(model_type), dense, "no" if model_type in NOT_TOP_K else "yes"]


def table() -> str:
    """The text of docs/exports.md."""
    rows = [row(model_type) for model_type in sorted(["deepseek", *ARCHITECTURES])]
    dense = sum(cells[2] != "no" and "approximately" not in cells[2] for cells in rows)
    lines = [
        "# Exports",
        "",
        "The forms in which a condensed model of each architecture can be [exported](export.md), each tried on a tiny",
        "model with random weights: the layers that may be condensed for the base architecture's own config, the dense",
        "sibling of a fully condensed model, and whether it has a top-K form. Approximately: a gate per token becomes",
        f"a constant. Of {len(rows)} architectures, {dense} have an exact dense sibling and "
        f"{sum(cells[3] == 'yes' for cells in rows)} a top-K form.",
        "`python -m tests.models.test_export_table` writes this file; a test fails when it is out of date.",
        "",
        "| model type | stock | dense | top-K |",
        "| --- | --- | --- | --- |",
        *(f"| {' | '.join(cells)} |" for cells in rows),
    ]
    return "\n".join(lines) + "\n"


def test_the_table_is_up_to_date() -> None:
    assert TABLE.read_text(encoding="utf-8") == table(), "run `python -m tests.models.test_export_table`"


if __name__ == "__main__":
    TABLE.write_text(table(), encoding="utf-8")
