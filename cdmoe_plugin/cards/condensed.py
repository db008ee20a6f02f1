"""The model card of a condensed checkpoint: where it comes from, what was done and measured, how to do it again."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from ..atomic import MODEL_CARD_MARK
from .sections import again_section, calibration_note, card_metadata, recovery_section, refit_section, sizes_table
from .tables import DONE, format_table, plan_table

_CARD = """---
{data}
---
{mark}
# {title}

{what}

{sizes}

{table}

`score` is the divergence of the model's output once this layer and those above it in the table are {done}.
{calibration}{refit}{recovery}
## Use

```python
import cdmoe_plugin  # or, without the package, trust_remote_code=True
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("this checkpoint")
```
{quantised}
## Make it again

{again}
"""

_CONDENSED = """A condensed Mixture-of-Experts model: in {layers} decoder layers, the router and all but a few routed
experts are gone, and those that are kept stand, with constant gates, beside the shared expert in one dense MLP
([CD-MoE](https://arxiv.org/abs/2412.00069))."""

_TRIMMED = """A Mixture-of-Experts model with Layer Trimming ([He et al. 2024](https://arxiv.org/abs/2406.15786)): in
{layers} decoder layers, the whole MLP sub-layer is gone, and only the residual passes."""

_RESULTS = re.compile(r"## Results\n.*?(?=\n## )", re.DOTALL)


def write_model_card(model: Any, folder: Path) -> None:
    """Writes README.md into the folder of a condensed checkpoint that is being saved.

    Raises:
        ValueError: if what the model's config says of how it was condensed was edited and can't be understood.
    """
    try:
        text = _card_of(model)
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"`condense_config` of this model's config can't be understood ({error!r}).") from error
    ModelCard(text).save(folder / "README.md")


def _card_of(model: Any) -> str:
    config = model.config.condense_config
    plan = model.condense_plan
    base = config.get("base_model") or model._base_class.__name__
    done = DONE[plan.form]
    quantised = ""
    if getattr(model, "quantization_method", None) is not None:
        quantised = f"\nThe weights are quantised, by {model.quantization_method.value}; opening them needs it.\n"
    counts = config.get("parameters", {})
    sizes = {"base model": counts["before"], done: counts["after"]} if counts else {}
    return _CARD.format(
        data=card_metadata(model, base, config.get("base_card", {}), plan).to_yaml(),
        mark=MODEL_CARD_MARK,
        title=f"{base}, {done}",
        what=(_CONDENSED if plan.form == "condense" else _TRIMMED).format(layers=len(plan.layers)),
        done=done,
        sizes=sizes_table(sizes, model.dtype) if sizes else "",
        table=plan_table(plan),
        calibration=calibration_note(plan),
        refit=refit_section(config),
        quantised=quantised,
        recovery=recovery_section(config.get("recovery") or []),
        again=again_section(plan, config, base),
    )


def add_results(checkpoint: str | os.PathLike, results: str | os.PathLike | Mapping[str, Any]) -> None:
    """Puts measured results of lm-eval into a saved checkpoint's model card, as a table and as metadata for the hub.

    Results that the card had before are replaced.

    Args:
        checkpoint (`str` or `os.PathLike`): Folder of a condensed checkpoint with its generated README.md.
        results (`str`, `os.PathLike` or mapping): A `results_....json` that `lm_eval --output_path` wrote, or what
            `lm_eval.simple_evaluate` returned.

    Raises:
        ValueError: if the folder has no generated model card, or the results hold no score.
    """
    path = Path(checkpoint) / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if MODEL_CARD_MARK not in text:
        raise ValueError(f"{path} is not a model card that was generated as a condensed model was saved.")
    found = results if isinstance(results, Mapping) else json.loads(Path(results).read_text(encoding="utf-8"))
    scores = _scores(found)
    if not scores:
        raise ValueError("`results` holds no score: it should be a results file of lm-eval, with a key 'results'.")
    card: Any = ModelCard(text)
    name = re.search(r"^# (.*)", card.text, re.MULTILINE)
    card.data.model_name = name[1] if name else Path(checkpoint).name
    card.data.eval_results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=task,
            dataset_name=task,
            metric_type=metric,
            metric_name=metric,
            metric_value=value,
        )
        for task, _, metric, value, _ in scores
    ]
    rows = [
        (task, shots, metric, f"{value:.4f}", "" if error is None else f"± {error:.4f}")
        for task, shots, metric, value, error in scores
    ]
    table = format_table(["task", "shots", "metric", "value", "standard error"], rows)
    section = f"## Results\n\nMeasured with lm-eval:\n\n{table}\n"
    body = _RESULTS.sub("", card.text).replace("\n\n\n## Use", "\n\n## Use")
    card.text = body.replace("## Use\n", f"{section}\n## Use\n", 1)
    path.write_text(f"---\n{card.data.to_yaml()}\n---\n{card.text.lstrip()}", encoding="utf-8")


def _scores(results: Mapping[str, Any]) -> list[tuple[str, Any, str, float, float | None]]:
    """Task, shots, metric, value and standard error of every score in lm-eval's results."""
    rows = []
    for task, values in results.get("results", {}).items():
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = values.get(f"{metric}_stderr,{filtered}")
            shots = results.get("n-shot", {}).get(task, "")
            rows.append((task, shots, metric, float(value), error if isinstance(error, (int, float)) else None))
    return rows
