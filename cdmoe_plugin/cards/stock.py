"""The model card of an exported checkpoint: that it is one of the base architecture, and what it was made from."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from ..atomic import MODEL_CARD_MARK
from .sections import (
    again_section,
    base_metadata,
    base_name,
    calibration_note,
    card_metadata,
    recovery_section,
    refit_section,
    sizes_table,
)
from .tables import DONE, plan_table


@dataclass(frozen=True)
class StockExport:
    """What `export_stock` wrote.

    Args:
        model_type (`str`): Model type of the checkpoint.
        fields (`dict[str, Any]`): Fields of the base architecture's config that differ from the sparse model's.
        dense_width (`int`, *optional*): Width of all dense MLPs; None where no layer was condensed.
        parameters (`int`): Parameters of the checkpoint, with the zeros that pad narrower layers.
        parameters_before (`int`): Parameters of the condensed model.
        shared_gates (`dict[int, float]`): What replaces the per-token gate of the shared expert, by decoder layer;
            empty where the checkpoint is exact.
        divergence (`float`, *optional*): Where it is not: mean over the calibration tokens of the Jensen-Shannon
            divergence (nats) between the outputs of the condensed model and of the checkpoint.
    """

    model_type: str
    fields: dict[str, Any] = field(default_factory=dict)
    dense_width: int | None = None
    parameters: int = 0
    parameters_before: int = 0
    shared_gates: dict[int, float] = field(default_factory=dict)
    divergence: float | None = None


_CARD = """---
{data}
---
{mark}
# {title}

{what}
{sizes}
{table}

`score` is the divergence of the model's output once this layer and those above it in the table are {done}.
{calibration}{fitted}
## Use

```python
{imports}from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("this checkpoint")
```

## Make it again

{again}
"""

_TITLES = {
    "condense": "condensed, with plain dense layers",
    "trim_layer": "trimmed, with plain dense layers",
    "trim_block": "with fewer decoder layers",
}

_WHAT = {
    "condense": """in {layers} decoder layers, the router and all but a few routed experts are gone, and
those that are kept stand, with constant gates, beside the shared expert in one dense MLP
([CD-MoE](https://arxiv.org/abs/2412.00069)).""",
    "trim_layer": """in {layers} decoder layers, the whole MLP sub-layer is gone, and only the residual
passes (Layer Trimming, [He et al. 2024](https://arxiv.org/abs/2406.15786)).""",
    "trim_block": """{layers} decoder layers are gone
(Block Trimming, [He et al. 2024](https://arxiv.org/abs/2406.15786)).""",
}


def write_stock_card(model: Any, export: StockExport, folder: Path) -> None:
    """Writes README.md into the folder of an exported checkpoint; not for a model that nothing was done to.

    Args:
        model (`PreTrainedModel`): The condensed or trimmed model that was exported.
        export (`StockExport`): What was written.
        folder (`Path`): Where to.
    """
    plan = getattr(model, "condense_plan", None)
    if plan is None:
        return
    # A model without some decoder layers has no such config, but the name of the checkpoint that it was read from.
    config: dict[str, Any] = getattr(model.config, "condense_config", None) or {}
    name = model.name_or_path or ""
    base = config.get("base_model") if config else base_name(name)
    base_class = getattr(type(model), "_base_class", type(model))
    base = base or base_class.__name__
    sizes = ""
    if config.get("parameters"):
        counts = {"base model": config["parameters"]["before"], DONE[plan.form]: export.parameters_before}
        sizes = f"\n{sizes_table({**counts, 'this checkpoint': export.parameters}, model.dtype)}\n"
    options = {"export_stock": "exported", **({"export_approximate": "true"} if export.shared_gates else {})}
    is_stock = base_class.__module__.startswith("transformers.")
    text = _CARD.format(
        data=card_metadata(model, base, config.get("base_card", {}) if config else base_metadata(name), plan).to_yaml(),
        mark=MODEL_CARD_MARK,
        title=f"{base}, {_TITLES[plan.form]}",
        what=_what(export, _WHAT[plan.form].format(layers=len(plan.layers))),
        sizes=sizes,
        done=DONE[plan.form],
        table=plan_table(plan),
        calibration=calibration_note(plan),
        fitted=refit_section(config) + recovery_section(config.get("recovery") or []) if config else "",
        imports="" if is_stock else "import cdmoe_plugin  # brings this architecture\n",
        again=again_section(plan, config, base, options),
    )
    ModelCard(text).save(folder / "README.md")


def _what(export: StockExport, done: str) -> str:
    paragraphs = [
        f"A checkpoint of the base architecture (`model_type` {export.model_type!r}), exported from a "
        f"Mixture-of-Experts model that was made smaller: {done}"
    ]
    if export.dense_width is not None:
        fields = ", ".join(f"`{name}` = `{json.dumps(value)}`" for name, value in export.fields.items())
        paragraphs.append(
            f"The config says that these layers are dense ({fields or 'as before'}). All dense layers are "
            f"{export.dense_width:,} neurons wide here; narrower ones are padded with zeros, which changes nothing but "
            "the order of rounding."
        )
    if export.shared_gates:
        gates = ", ".join(f"{gate:.4f} (layer {layer})" for layer, gate in sorted(export.shared_gates.items()))
        paragraphs.append(
            "Dense layers do not have the gate per token of the shared expert: it is a constant here, its mean over "
            f"calibration tokens: {gates}. On these tokens, the mean Jensen-Shannon divergence to the condensed model "
            f"is {export.divergence:.3e} nats."
        )
    return "\n\n".join(paragraphs) + "\n"
