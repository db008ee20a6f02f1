"""The model card of a condensed, trimmed or exported checkpoint, filled in from template.md."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..config import CondenseConfig
from ..data import C4_NAME
from ..plan import CondensePlan
from .base_model import describe_base
from .tables import FORM_TEXTS, format_table, plan_table, recovery_table, refit_table, sizes_table

MODEL_CARD_MARK = "<!-- written by cdmoe_plugin -->"
# A sentence of the card that transformers makes for models without one.
_GENERIC_CARD = "This is the model card of a 🤗 transformers model that has been pushed on the Hub."
_TEMPLATE = Path(__file__).with_name("template.md")
_REFIT = ("refit", "refit_target", "refit_steps")
_READ = ("num_samples", "max_length", "batch_size", "seed")
_RESULTS = re.compile(r"(^## Results\n.*?)?(?=^## Use\n)", re.DOTALL | re.MULTILINE)


def is_someones_card(path: Path) -> bool:
    """Return whether a file is a model card written by hand, which a generated one must not replace."""
    if path.name != "README.md" or not path.is_file():
        return False
    text = path.read_text(encoding="utf-8", errors="replace")
    return MODEL_CARD_MARK not in text and _GENERIC_CARD not in text


def write_model_card(model: Any, folder: Path) -> None:
    """Write the README.md of a condensed checkpoint that is being saved.

    Raises:
        ValueError: if the model's `condense_config` was edited and can't be understood.
    """
    try:
        card = _card(model, model.condense_plan)
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"`condense_config` of this model's config can't be understood ({error!r}).") from error
    card.save(folder / "README.md")


def write_stock_card(
    model: Any,
    folder: Path,
    model_type: str,
    parameters: int,
    fields: Mapping[str, Any],
    dense_width: int | None,
    shared_gates: Mapping[int, float],
    divergence: float | None,
) -> None:
    """Write the README.md of an exported checkpoint; none for a model without a plan.

    Args:
        model (`PreTrainedModel`): The condensed or trimmed model that was exported.
        folder (`Path`): The checkpoint's folder.
        model_type (`str`): Model type of the checkpoint.
        parameters (`int`): Number of its parameters.
        fields (`Mapping[str, Any]`): Fields of the base architecture's config that differ from the sparse model's.
        dense_width (`int`, *optional*): Width of all dense MLPs; None if no layer was condensed.
        shared_gates (`Mapping[int, float]`): Constant gates of shared experts, by decoder layer.
        divergence (`float`, *optional*): Divergence caused by these gates, in nats.
    """
    plan = getattr(model, "condense_plan", None)
    if plan is None:
        return
    base_class = getattr(type(model), "_base_class", type(model))
    exported = {
        "model_type": model_type,
        "parameters": parameters,
        "fields": ", ".join(f"`{name}` = `{json.dumps(value)}`" for name, value in fields.items()),
        "dense_width": f"{dense_width:,}" if dense_width is not None else "",
        "gates": ", ".join(f"{gate:.4f} (layer {layer})" for layer, gate in sorted(shared_gates.items())),
        "divergence": "" if divergence is None else f"{divergence:.3e}",
        "needs_package": not base_class.__module__.startswith("transformers."),
    }
    _card(model, plan, exported).save(folder / "README.md")


def _card(model: Any, plan: CondensePlan, exported: Mapping[str, Any] | None = None) -> ModelCard:
    # A model without some decoder layers has no such config, but has the name of its checkpoint.
    config = getattr(model.config, "condense_config", None) or describe_base(model.name_or_path or "")
    base = config.get("base_model") or getattr(type(model), "_base_class", type(model)).__name__
    form = FORM_TEXTS[plan.form]
    counts = config.get("parameters")
    sizes = {"base model": counts["before"], form.done: counts["after"]} if counts else {}
    if sizes and exported:
        sizes["this checkpoint"] = exported["parameters"]
    calibration = {}
    if plan.calibration:
        calibration = {name: plan.calibration[name] for name in ("source", "num_samples", "num_tokens")}
        calibration |= {"source": _file_name(calibration["source"]), "fingerprint": plan.calibration.get("fingerprint")}
    quantization = getattr(model, "quantization_method", None)
    data = ModelCardData(
        library_name="transformers",
        tags=sorted({"cdmoe", "mixture-of-experts", *(model.model_tags or [])}),
        base_model=base if "/" in base else None,  # a folder is not a name on the hub
        pipeline_tag="text-generation" if model.can_generate() else None,
        datasets=[C4_NAME] if calibration.get("source", "").startswith(C4_NAME) else None,
        **config.get("base_card", {}),
    )
    # Needs Jinja, which torch installs.
    return ModelCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        mark=MODEL_CARD_MARK,
        base=base,
        form=form,
        change=form.change.format(layers=len(plan.layers)),
        exported=exported or {},
        sizes=sizes_table(sizes, model.dtype) if sizes else "",
        plan=plan_table(plan),
        calibration=calibration,
        refit=config.get("refit"),
        refit_target=config.get("refit_target"),
        refit_errors=refit_table(config.get("refit_errors") or {}),
        recovery=recovery_table(config["recovery"]) if config.get("recovery") else "",
        quantization=quantization and quantization.value,
        **_commands(plan, config, base, exported),
    )


def _commands(
    plan: CondensePlan, config: Mapping[str, Any], base: str, exported: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return the command that applies a plan (`apply`) and, if known, the one that searches it (`search`)."""
    more = {"export_stock": "exported"} if exported else {}
    if exported and exported["gates"]:
        more["export_approximate"] = "true"
    source = (plan.calibration or {}).get("source", "")
    unnamed = source in ("", "texts", "token ids") or source.startswith("a ")
    calibration = {"calibration": "the-same-texts" if unnamed else _file_name(source)}
    if source.startswith(C4_NAME):  # the default
        calibration = {}
    apply: dict[str, Any] = {"plan": "condense_plan.json"}
    if config.get("refit"):
        apply |= {name: config[name] for name in _REFIT} | calibration
        apply |= {name: config[name] for name in _READ if config.get(name) is not None}
    found = {"apply": _command(base, apply | more), "unnamed": unnamed}
    if plan.config is None or plan.calibration is None:
        return found
    defaults = CondenseConfig().to_dict()
    # Left out: defaults other than the budget, and options that do not change the result of the search.
    left_out = {*_REFIT, "cache_memory", *(["num_layers"] if plan.config.get("layers") else [])}
    always = ("num_layers", "num_experts")
    search = {
        name: plan.config[name]
        for name in defaults
        if name in plan.config and name not in left_out and (name in always or plan.config[name] != defaults[name])
    }
    return {**found, "search": _command(base, search | calibration | more)}


def _command(base: str, options: Mapping[str, Any]) -> str:
    words = [f"cdmoe condense --model_name_or_path {shlex.quote(base)} --output_dir condensed"]
    for name, value in options.items():
        values = value if isinstance(value, list) else [value]
        words.append(f"--{name} {shlex.join(map(str, values))}")
    return " \\\n    ".join(words)


def _file_name(source: str) -> str:
    """Return only the name of a local file: the rest of its path is private."""
    return Path(source).name if Path(source).is_absolute() else source


def add_results(checkpoint: str | os.PathLike, results: str | os.PathLike | Mapping[str, Any]) -> None:
    """Add lm-eval's results to a saved checkpoint's model card, as a table and as metadata for the hub.

    Results that the card already has are replaced.

    Args:
        checkpoint (`str` or `os.PathLike`): Folder of a condensed checkpoint with its generated README.md.
        results (`str`, `os.PathLike` or mapping): A `results_....json` written by `lm_eval --output_path`, or the
            return value of `lm_eval.simple_evaluate`.

    Raises:
        ValueError: if the folder has no generated model card, or there is no score in the results.
    """
    path = Path(checkpoint) / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if MODEL_CARD_MARK not in text:
        raise ValueError(f"{path} is not a model card generated by saving a condensed model.")
    scores = _scores(results if isinstance(results, Mapping) else json.loads(Path(results).read_text(encoding="utf-8")))
    if not scores:
        raise ValueError("`results` has no score: it should be a results file of lm-eval, with a key 'results'.")
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
    section = f"## Results\n\nMeasured with lm-eval:\n\n{table}\n\n"
    card.text = _RESULTS.sub(lambda _: section, card.text, count=1)
    card.save(path)


def _scores(results: Mapping[str, Any]) -> list[tuple[str, Any, str, float, float | None]]:
    """Return the task, shots, metric, value and standard error of every score in lm-eval's results."""
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
