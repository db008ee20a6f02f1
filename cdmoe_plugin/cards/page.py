"""The report of a plan: one HTML page that needs nothing else, filled in from page.html."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ..plan import CondensePlan
from .page_charts import format_count, format_number, format_tokens, layers_alone, layers_together
from .page_experts import expert_map, total_tokens
from .page_sizes import Sizes, other_sizes
from .tables import FORM_TEXTS, divergence_name, spread_rows


def write_page(plan: CondensePlan, path: str | os.PathLike) -> None:
    """Write a report of a plan as one HTML page, without scripts and without files beside it.

    It shows the divergence per layer and the order of selection, the kept experts and how often calibration tokens
    chose them, the parameters of the MLPs before and after, and what every smaller budget of the plan would cost. Of a
    plan for a size, it shows what became of every sparse layer and why, and the cost of other sizes. What the plan does
    not hold is left out, with the reason.

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
        alone=layers_alone(plan),
        together=layers_together(plan),
        grid=expert_map(plan),
        total_tokens=total_tokens(plan),
        kept=_kept(plan, sizes),
        listed=sum(len(layer.experts) + len(layer.routed or ()) for layer in plan.layers),
        sizes=sizes,
        parts_after=None if sizes is None else sizes.parts(plan.layers),
        budgets=_expert_budgets(plan),
        spread=plan.spread,
        rows=None if plan.spread is None else spread_rows(plan, plan.spread),
        others=None if plan.spread is None else other_sizes(plan, plan.spread),
    )
    Path(path).write_text(page, encoding="utf-8")


def _kept(plan: CondensePlan, sizes: Sizes | None) -> list[tuple[int, int | None, str]]:
    """Count the experts and neurons that the plan's layers keep, of how many if that is known, with what they are."""
    every = None if sizes is None else sum(sizes.layers[layer.layer].num_experts for layer in plan.layers)
    staying = sum(len(layer.routed or ()) for layer in plan.layers)
    found = [(staying, every, "routed experts stay behind the router in these layers")] if staying else []
    widths = [layer.width for layer in plan.layers if layer.width is not None]
    if widths:
        shared = ", beside those of shared experts" if plan.model is None or plan.model.has_shared else ""
        found.append((sum(widths), None, f"dense neurons in these layers{shared}"))
    experts = sum(len(layer.experts) for layer in plan.layers if layer.width is None)
    if experts or not found:
        found.append((experts, every, f"routed experts kept in {'dense MLPs of ' if found else ''}these layers"))
    return found


def _expert_budgets(plan: CondensePlan) -> range | None:
    """Return all numbers of experts that the layers can be cut to, where something is known of what they cost."""
    most = max(len(layer.experts) for layer in plan.layers)
    known = plan.model is not None or any(layer.expert_scores for layer in plan.layers)
    return range(most + 1) if most and known else None


def _public_name(source: Any) -> str:
    """Return the name of the calibration data; of a local file only its own, as the rest of the path is private."""
    text = "" if source is None else str(source)
    return Path(text).name if Path(text).is_absolute() else text


def _data(text: Any) -> Any:
    """Make a filter that shows a number as a text, and keeps the number itself in the page."""
    return lambda value: Markup('<data value="{}">{}</data>').format(repr(value), text(value))
