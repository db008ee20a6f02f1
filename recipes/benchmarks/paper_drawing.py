"""Draws tables.md and the figures of paper_tables.py, from its CSV alone."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paper_claims import Curve, claims, curve, main_metrics
from paper_results import Results, Setting

from cdmoe_plugin.cards.tables import format_table

TITLES = {
    "table2": "Table 2. Expert selection",
    "table3": "Table 3. Layer selection",
    "table4": "Table 4. Metric of the layer search",
    "figure3": "Figure 3. Recovered models",
    "figure5": "Figure 5. Calibration data",
    "refit": "Beyond the paper: refit",
}
FIGURES = {
    "figure2": "condensed and trimmed models",
    "figure3": "condensed models before and after recovery",
    "figure4": "the same for another model",
}


def spread(values: Sequence[float], digits: int = 3, factor: float = 1.0) -> str:
    """Mean and, of several values, standard deviation."""
    if not values:
        return ""
    mean = f"{factor * statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {factor * statistics.stdev(values):.{digits}f}"


def cell_text(metric: str, values: Sequence[float]) -> str:
    """Accuracy in percent, loss in nats."""
    return spread(values, 1, 100) if metric.startswith("accuracy") else spread(values, 4)


def draw(results: Results, folder: Path, only: Sequence[str], second: Results | None = None) -> str:
    """Writes tables.md and the figures; returns the text."""
    folder.mkdir(parents=True, exist_ok=True)
    sections = [about(results)]
    if "table1" in only:
        sections.append(table1(results, "Table 1. Against the baselines"))
    for part, title in TITLES.items():
        if part in only and results.of(part):
            sections.append(by_layers(results, part, title))
    if "figure4" in only and second is not None:
        sections.append(table1(second, f"Figure 4. Another model, {second.model}"))
    sections.append(figures(results, folder, only, second))
    sections.append(claims_text(results, second if "figure4" in only else None))
    text = "\n\n".join(section for section in sections if section) + "\n"
    (folder / "tables.md").write_text(text, encoding="utf-8")
    return text


def about(results: Results) -> str:
    seeds = sorted({cell.setting.seed for cell, _ in results.rows})
    return (
        f"Model {results.model}; {results.settings}; seeds {', '.join(map(str, seeds))}. Mean ± standard deviation "
        "over seeds; accuracy in percent, loss in nats per token of held-out text."
    )


def table1(results: Results, title: str) -> str:
    """Method, layers, cost, every task, their average and the loss."""
    tasks = sorted({metric for _, metric in results.rows if metric.startswith("accuracy:")})
    losses = ["loss"] if any(metric == "loss" for _, metric in results.rows) else []
    average = ["accuracy"] if len(tasks) > 1 else []
    columns = [*tasks, *average, *losses]
    sparse = results.known(Setting())
    rows: list[tuple[Any, ...]] = []
    if sparse:
        given = [cell_text(m, [value(sparse, m)]) for m in columns]
        rows.append(("sparse", 0, "1.00x", "100.0%", *given))
    for method in dict.fromkeys(row.cell.method for row in results.of("table1")):
        curves = {m: curve(results, "table1", method, m) for m in (*columns, "speedup", "memory")}
        for n in sorted(next(iter(curves.values()))):
            speeds, memory = (list(curves[m].get(n, {}).values()) for m in ("speedup", "memory"))
            costs = (f"{speeds[0]:.2f}x" if speeds else "", f"{memory[0]:.1%}" if memory else "")
            rows.append((method, n, *costs, *(cell_text(m, list(curves[m].get(n, {}).values())) for m in columns)))
    header = ["method", "layers", "speed", "memory", *(column.removeprefix("accuracy:") for column in columns)]
    return f"### {title}\n\n{format_table(header, rows)}" if rows else ""


def value(known: dict[str, float], metric: str) -> float:
    """A metric of one model, of which "accuracy" is the average over tasks."""
    if metric == "accuracy":
        return statistics.fmean(v for name, v in known.items() if name.startswith("accuracy:"))
    return known[metric]


def by_layers(results: Results, part: str, title: str) -> str:
    """Methods by numbers of layers, for accuracy and for loss."""
    blocks = []
    for metric in main_metrics(results):
        methods = list(dict.fromkeys(row.cell.method for row in results.of(part)))
        curves = {method: curve(results, part, method, metric) for method in methods}
        layers = sorted({n for each in curves.values() for n in each})
        rows = [
            (method, *(cell_text(metric, list(each.get(n, {}).values())) for n in layers))
            for method, each in curves.items()
        ]
        # Of accuracies, the gap may be smaller than their error.
        if part == "refit" and metric == main_metrics(results)[-1]:
            rows += [
                (f"{m}, share of the gap closed", *shares(results, curves, m, metric, layers)) for m in methods[1:]
            ]
        name = "accuracy" if metric == "accuracy" else "held-out loss"
        blocks.append(f"### {title}: {name}\n\n{format_table([name, *(f'L{n}' for n in layers)], rows)}")
    return "\n\n".join(blocks)


def shares(results: Results, curves: dict[str, Curve], method: str, metric: str, layers: list[int]) -> list[str]:
    """What a refit closes of the gap between condensed and sparse; more than 100 % is better than sparse."""
    sparse = value(results.known(Setting()), metric)
    found = []
    for n in layers:
        before, after = curves["none"].get(n, {}), curves[method].get(n, {})
        seeds = [s for s in before if s in after and before[s] != sparse]
        closed = [100 * (before[s] - after[s]) / (before[s] - sparse) for s in seeds]
        found.append(spread(closed, 0) + "%" if closed else "")
    return found


# --- figures ---------------------------------------------------------------------------------------------------------


def figures(results: Results, folder: Path, only: Sequence[str], second: Results | None) -> str:
    """Draws the figures; says which are left out, and why."""
    done, left_out = [], []
    if "figure1" in only and figure1(results, folder / "figure1.png"):
        done.append("figure1.png: divergence of the model's output when one layer alone is condensed")
    for name, source in (("figure2", results), ("figure3", results), ("figure4", second)):
        if name not in only:
            continue
        if name == "figure3" and not results.of("figure3"):
            left_out.append("Figure 3 is left out: no recovered models were measured (--recovery_config)")
        elif source is None:
            left_out.append("Figure 4 is left out: it is Figure 2 for a second model (--second_model_name_or_path)")
        elif lines := lines_of(source, name):
            against_costs(source, lines, folder / f"{name}.png")
            done.append(f"{name}.png: {FIGURES[name]}, against speed and memory")
    if "figure5" in only and results.of("figure5"):
        figure5(results, folder / "figure5.png")
        done.append("figure5.png: texts or questions as calibration data")
    lines = [f"- {line}." for line in (*done, *left_out)]
    return "### Figures\n\n" + "\n".join(lines) if lines else ""


def new_figure(rows: int, columns: int) -> Any:
    # The object interface: no global state, no display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * columns, 3.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for each in axes.flat:
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def label(metric: str) -> str:
    return "average accuracy" if metric == "accuracy" else "held-out loss (nats per token)"


def figure1(results: Results, path: Path) -> bool:
    found: dict[int, list[float]] = {}
    for row in results.of("figure1"):
        found.setdefault(int(row.metric.rsplit("_", 1)[1]), []).append(row.value)
    if not found:
        return False
    figure, axes = new_figure(1, 1)
    layers = sorted(found)
    errors = [statistics.stdev(found[n]) if len(found[n]) > 1 else 0.0 for n in layers]
    axes[0, 0].bar([str(n) for n in layers], [statistics.fmean(found[n]) for n in layers], yerr=errors)
    axes[0, 0].set(xlabel="decoder layer condensed alone", ylabel="JS divergence of the output", yscale="log")
    figure.savefig(path, dpi=150)
    return True


def lines_of(results: Results, name: str) -> list[tuple[str, str]]:
    """Table or figure and method of what Figures 2 to 4 compare."""
    lines = list(dict.fromkeys(("table1", row.cell.method) for row in results.of("table1")))
    if name != "figure3":
        return lines
    recovered = dict.fromkeys(("figure3", row.cell.method) for row in results.of("figure3"))
    return [*(line for line in lines if line[1].startswith("CD-MoE")), *recovered]


def against_costs(results: Results, lines: Sequence[tuple[str, str]], path: Path) -> None:
    """Accuracy and loss against speed (left) and memory (right), as in Figures 2 to 4."""
    metrics = main_metrics(results)
    figure, axes = new_figure(len(metrics), 2)
    for i, metric in enumerate(metrics):
        for j, cost in enumerate(("speedup", "memory")):
            axis = axes[i, j]
            for part, method in lines:
                values, costs = (curve(results, part, method, m) for m in (metric, cost))
                points = [(mean(costs[n]), values[n].values()) for n in sorted(values) if n in costs]
                errors = [statistics.stdev(v) if len(v) > 1 else 0.0 for _, v in points]
                means = [statistics.fmean(v) for _, v in points]
                form = {"marker": "*", "linestyle": "--"} if part == "figure3" else {"marker": "o"}
                axis.errorbar([x for x, _ in points], means, errors, **form, capsize=2, label=method)
            axis.axhline(value(results.known(Setting()), metric), color="grey", linestyle=":", label="sparse")
            axis.set(xlabel="speed-up" if cost == "speedup" else "memory ratio", ylabel=label(metric))
    axes[0, 0].legend(fontsize=7)
    figure.savefig(path, dpi=150)


def mean(by_seed: dict[int, float]) -> float:
    return statistics.fmean(by_seed.values())


def figure5(results: Results, path: Path) -> None:
    metrics = main_metrics(results)
    figure, axes = new_figure(1, len(metrics))
    for axis, metric in zip(axes[0], metrics, strict=True):
        for method in dict.fromkeys(row.cell.method for row in results.of("figure5")):
            points = curve(results, "figure5", method, metric)
            layers = sorted(points)
            errors = [statistics.stdev(points[n].values()) if len(points[n]) > 1 else 0.0 for n in layers]
            axis.errorbar(layers, [mean(points[n]) for n in layers], errors, marker="o", capsize=2, label=method)
        axis.set(xlabel="layers condensed", ylabel=label(metric))
        axis.legend()
    figure.savefig(path, dpi=150)


def claims_text(results: Results, second: Results | None) -> str:
    found = claims(results, second)
    if not found:
        return ""
    rows = [(c.text, c.metric, c.verdict, c.numbers) for c in found]
    return (
        "### Claims\n\nNumbers are advantages of what the claim says is better, averaged over numbers of layers at "
        "which the two differ; ± is the larger of the standard deviation over seeds and, of accuracies, the sparse "
        "model's standard error over questions.\n\n" + format_table(["claim", "by", "here", "numbers"], rows)
    )
