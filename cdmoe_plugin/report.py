"""What people look at: tables, the figure of divergence per layer, and the model card of a condensed checkpoint."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import ModelCard, ModelCardData

from .budget import LayerBudget
from .condensed import apply_layers
from .config import CondenseConfig
from .loading import sketch_model
from .modeling_cdmoe import MODEL_CARD_MARK
from .plan import CondensedLayer, CondensePlan
from .sparse import SparseBlock, check_config, model_shape
from .trimming import check_trimming, parameters_without

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CARD = """---
{data}
---
{mark}
# {title}

{what} {parameters}

{table}

`score` is the divergence of the model's output once this layer and those above it in the table are {done}.
{calibration}
{recovery}
## Use

```python
import cdmoe_plugin  # or, without the package, trust_remote_code=True
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("this checkpoint")
```
{quantised}
`condense_plan.json` holds the whole plan; `cdmoe_plugin.condense_pretrained(base, plan="condense_plan.json")` makes
this model again from the base model.
"""

_CONDENSED = """A condensed Mixture-of-Experts model: in {layers} decoder layers, the router and all but a few routed
experts are gone, and those that are kept stand, with constant gates, beside the shared expert in one dense MLP
([CD-MoE](https://arxiv.org/abs/2412.00069))."""

_TRIMMED = """A Mixture-of-Experts model with Layer Trimming ([He et al. 2024](https://arxiv.org/abs/2406.15786)): in
{layers} decoder layers, the whole MLP sub-layer is gone, and only the residual passes."""

# What is said of a plan's layers, by its form.
_DONE = {"condense": "condensed", "trim_layer": "trimmed", "trim_block": "dropped"}


def format_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table whose columns line up, numbers to the right."""
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(header), *texts]) for i in range(len(header))]
    left = [all(isinstance(row[i], str) for row in rows) and i == 0 for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [c.ljust(w) if is_left else c.rjust(w) for c, w, is_left in zip(cells, widths, left, strict=True)]
        return f"| {' | '.join(padded)} |"

    rule = [("-" * w) if is_left else ("-" * (w - 1) + ":") for w, is_left in zip(widths, left, strict=True)]
    return "\n".join([line(list(header)), line(rule), *(line(row) for row in texts)])


def plan_table(plan: CondensePlan) -> str:
    """The layers of a plan in the order of their selection, as a Markdown table."""
    if plan.form != "condense":
        similarities = plan.layer_similarities or {}
        trimmed = [
            (
                layer.layer,
                f"{similarities[layer.layer]:.4f}" if layer.layer in similarities else "",
                "" if layer.score is None else f"{layer.score:.3e}",
            )
            for layer in plan.layers
        ]
        return format_table([f"decoder layer {_DONE[plan.form]}", "similarity", "score"], trimmed)
    rows = [
        (
            layer.layer,
            len(layer.experts),
            ", ".join(map(str, layer.experts)) or "none",
            "" if layer.expert_scores is None else f"{layer.expert_scores[-1]:.3e}",
            "" if layer.score is None else f"{layer.score:.3e}",
        )
        for layer in plan.layers
    ]
    return format_table(["decoder layer", "kept", "experts", "layer's own", "score"], rows)


def dry_run(
    model_name_or_path: str | os.PathLike, request: CondensePlan | CondenseConfig, dtype: str = "auto", **hub: Any
) -> str:
    """What condensing would save, from a checkpoint's config alone: a Markdown table.

    Args:
        model_name_or_path (`str` or `os.PathLike`): Hub name or folder of a sparse checkpoint; no weight is read.
        request (`CondensePlan` or `CondenseConfig`): What would be condensed. Where a config leaves the layers to a
            search, the first sparse ones are counted; they all have the same size in nearly every architecture. An
            expert budget counts as spent in full; a search may leave some of it.
        dtype (`str`, defaults to `"auto"`): Dtype to count bytes in; "auto" is the checkpoint's own.
        **hub: `revision`, `trust_remote_code` and the like.

    Raises:
        UnsupportedModelError: if the model is dense or has sparse layers that can't be condensed.
        ValueError: if the request does not fit the model.
    """
    sketch, blocks = sketch_model(model_name_or_path, hub)
    width = (sketch.dtype if dtype == "auto" else getattr(torch, dtype)).itemsize
    if dtype != "auto":
        sketch.to(getattr(torch, dtype))  # a budget may be in bytes
    if isinstance(request, CondensePlan):
        request.check_fits(model_shape(sketch, blocks))
        experts = {layer.layer: len(layer.experts) for layer in request.layers}
        check_trimming(sketch, blocks, request.form, list(experts))
    else:
        check_config(request, blocks)
        check_trimming(sketch, blocks, request.form, request.layers, request.num_layers)
        layers = request.layers or [block.layer for block in blocks[: request.num_layers]]
        experts = _numbers(request, layers, blocks)
    before = sketch.num_parameters()
    if request.form == "trim_block":
        after = parameters_without(sketch, blocks, list(experts))
    else:
        kept = [CondensedLayer(layer, list(range(number)), [1.0] * number) for layer, number in experts.items()]
        apply_layers(sketch, blocks, kept, request.form)
        after = sketch.num_parameters()
    rows = [
        (name, f"{count:,}", f"{count / 1e9:.2f} B", f"{count * width / 2**30:.2f} GiB", f"{1 - count / before:.1%}")
        for name, count in (("sparse", before), (f"{len(experts)} layers {_DONE[request.form]}", after))
    ]
    return format_table(["model", "parameters", "", "weights", "saved"], rows)


def _numbers(config: CondenseConfig, layers: Sequence[int], blocks: Sequence[SparseBlock]) -> dict[int, int]:
    budget = LayerBudget.of(config, blocks)
    if budget is not None:
        return budget.even(layers)
    assert isinstance(config.num_experts, int)
    return dict.fromkeys(layers, config.num_experts)


def plot_layer_divergences(plan: CondensePlan, path: str | os.PathLike) -> None:
    """Draws the divergence of the model's output when one layer alone is condensed (Figure 1 of the paper), as PNG.

    Raises:
        ValueError: if the plan has none, because its layers were given or ranked locally, or because it was truncated.
    """
    if not plan.layer_divergences:
        raise ValueError(
            "The plan has no divergence per layer: no layer search was run (or a local one), or experts were dropped "
            "since."
        )
    figure = _bar_chart(plan.layer_divergences, [layer.layer for layer in plan.layers])
    figure.savefig(path, dpi=150)


def _bar_chart(divergences: dict[int, float], chosen: Sequence[int]) -> Figure:
    # The object interface: no global state, no display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.add_subplot()
    layers = sorted(divergences)
    colours = ["tab:orange" if layer in chosen else "tab:blue" for layer in layers]
    axes.bar(range(len(layers)), [divergences[layer] for layer in layers], color=colours)
    axes.set_xticks(range(len(layers)), [str(layer) for layer in layers])
    axes.set_xlabel("decoder layer condensed alone (orange: chosen by the plan)")
    axes.set_ylabel("divergence of the output")
    # The first layers often matter a hundred times as much as those in the middle.
    axes.set_yscale("log")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _recovery_section(stages: Sequence[dict[str, Any]]) -> str:
    """What training after condensing did, by the summaries in the config; see `recovery.stages.StageSummary`."""
    if not stages:
        return ""
    rows = [
        (
            s["stage"],
            f"{s['held_out_before']:.4f}",
            f"{s['held_out_after']:.4f}",
            f"{s['tokens']:,}",
            f"{s['trained']:,}",
        )
        for s in stages
    ]
    header = ["stage", "held-out loss before", "after", "tokens", "parameters trained"]
    return f"\nThe condensed layers were then trained, all else frozen:\n\n{format_table(header, rows)}\n"


def write_model_card(model: Any, folder: Path) -> None:
    """Writes README.md into the folder of a condensed checkpoint that is being saved.

    Raises:
        ValueError: if what the model's config says of how it was condensed was edited and can't be understood.
    """
    try:
        text = _model_card(model)
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"`condense_config` of this model's config can't be understood ({error!r}).") from error
    ModelCard(text).save(folder / "README.md")


def _model_card(model: Any) -> str:
    config = model.config.condense_config
    plan = model.condense_plan
    base = config.get("base_model") or model._base_class.__name__
    sizes = config.get("parameters", {})
    parameters = ""
    if sizes:
        saved = 1 - sizes["after"] / sizes["before"]
        parameters = f"{sizes['before']:,} parameters became {sizes['after']:,}, {saved:.1%} fewer."
    calibration = ""
    if plan.calibration:
        calibration = "Calibrated on {num_samples} samples ({num_tokens} tokens) of {source}.".format(
            **plan.calibration
        )
    quantised = ""
    if getattr(model, "quantization_method", None) is not None:
        quantised = f"\nThe weights are quantised, by {model.quantization_method.value}; opening them needs it.\n"
    tags = sorted({"cdmoe", "mixture-of-experts", *(model.model_tags or [])})
    data = ModelCardData(library_name="transformers", tags=tags, base_model=base if "/" in base else None)
    return _CARD.format(
        data=data.to_yaml(),
        mark=MODEL_CARD_MARK,
        title=f"{base}, {_DONE[plan.form]}",
        what=(_CONDENSED if plan.form == "condense" else _TRIMMED).format(layers=len(plan.layers)),
        done=_DONE[plan.form],
        parameters=parameters,
        table=plan_table(plan),
        calibration=calibration,
        quantised=quantised,
        recovery=_recovery_section(config.get("recovery") or []),
    )
