"""The model card of a condensed, trimmed or exported checkpoint, filled in from template.md."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Template  # which torch installs

from ..config import CondenseConfig
from ..data import C4_NAME
from ..plan import CondensePlan
from .base_model import recall_base
from .tables import FORM_TEXTS, MIXED_TEXT, cut_from, format_table, plan_table, recovery_table, refit_table, sizes_table

MODEL_CARD_MARK = "<!-- written by cdmoe_plugin -->"
# A sentence of the card that transformers makes for models without one.
_GENERIC_CARD = "This is the model card of a 🤗 transformers model that has been pushed on the Hub."
_TEMPLATE = Path(__file__).with_name("template.md")
_REFIT = ("refit", "refit_neurons", "refit_target", "refit_steps")
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
    target = "dense" if model_type != base_class.config_class.model_type else "stock"
    if target == "stock" and fields and dense_width is None:
        target = "top_k"
    if target != "dense" and any(layer.routed for layer in plan.layers):
        target = "fewer_experts"
    exported = {
        "target": target,
        "model_type": model_type,
        "parameters": parameters,
        "fields": ", ".join(f"`{name}` = `{json.dumps(value)}`" for name, value in fields.items()),
        "dense_width": f"{dense_width:,}" if dense_width is not None else "",
        "gates": ", ".join(f"{gate:.4f} (layer {layer})" for layer, gate in sorted(shared_gates.items())),
        "divergence": "" if divergence is None else f"{divergence:.3e}",
        "needs_package": target != "dense" and not base_class.__module__.startswith("transformers."),
    }
    _card(model, plan, exported).save(folder / "README.md")


def _card(model: Any, plan: CondensePlan, exported: Mapping[str, Any] | None = None) -> ModelCard:
    # A model without some decoder layers has no such config, but has the name of its checkpoint.
    config = getattr(model.config, "condense_config", None) or recall_base(model)
    named = config.get("base_model")
    base = named or getattr(type(model), "_base_class", type(model)).__name__
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
        pipeline_tag=_pipeline(model),
        datasets=[C4_NAME] if calibration.get("source", "").startswith(C4_NAME) else None,
        **config.get("base_card", {}),
    )
    # As `ModelCard.from_template`, which would compile the template for every card.
    text = _template().render(
        card_data=data.to_yaml(),
        mark=MODEL_CARD_MARK,
        base=base,
        form=form,
        change=_change(plan, config),
        exported=exported or {},
        sizes=sizes_table(sizes, model.dtype) if sizes else "",
        plan=plan_table(plan),
        calibration=calibration,
        refit=config.get("refit"),
        refit_tokens=config.get("refit_tokens"),
        refit_target=config.get("refit_target"),
        refit_neurons=config.get("neurons") and config["refit_neurons"],
        refit_errors=refit_table(config.get("refit_errors") or {}),
        recovery=recovery_table(config["recovery"]) if config.get("recovery") else "",
        quantization=quantization and quantization.value,
        in_memory=not named,
        sees=_sees(model),
        text_only=config.get("text_only"),
        **_commands(plan, config, named or "base-model", exported),
    )
    return ModelCard(text)


@cache
def _template() -> Template:
    """Compile the template, which takes longer than saving a tiny model."""
    return Template(_TEMPLATE.read_text(encoding="utf-8"))


def _change(plan: CondensePlan, config: Mapping[str, Any]) -> str:
    """Say what became of a plan's layers."""
    change = FORM_TEXTS[plan.form].change
    mixed = sum(layer.routed is not None for layer in plan.layers) if plan.form == "condense" else 0
    texts = []
    if mixed < len(plan.layers):
        rest = "some routed neurons" if config.get("neurons") else "a few routed experts"
        texts.append(change.format(layers=len(plan.layers) - mixed, rest=rest, kept=_kept(plan, config)))
    if mixed:
        texts.append(MIXED_TEXT.format(layers=mixed))
    return texts[0] + "".join(f"\n{text[0].upper()}{text[1:]}" for text in texts[1:])


def _kept(plan: CondensePlan, config: Mapping[str, Any]) -> str:
    """Say which experts form the MLPs of a plan's layers, as the subject and verb of a sentence."""
    specs = config.get("condensed_layers", {}).values()
    shared = [spec["shared_intermediate_size"] > 0 for spec in specs if "shared_intermediate_size" in spec]
    kept = [bool(layer.experts or layer.width) for layer in plan.layers if layer.routed is None]
    what, gates = (
        ("neurons", "their experts' constant gates") if config.get("neurons") else ("experts", "constant gates")
    )
    gates = "a gate per token for each expert" if config.get("gates") == "sigmoid" else gates
    parts = [f"the kept {what}, with {gates},"] if any(kept) else []
    parts += ["the shared expert"] if any(shared) else []
    return f"{' and '.join(parts).capitalize()} {'form' if any(kept) else 'forms'}" if parts else "Nothing is left in"


def _sees(model: Any) -> bool:
    """Return whether a model takes images."""
    return hasattr(model.config, "vision_config") and model.config.get_text_config() is not model.config


def _pipeline(model: Any) -> str | None:
    if not model.can_generate():
        return None
    return "image-text-to-text" if _sees(model) else "text-generation"


def _commands(
    plan: CondensePlan, config: Mapping[str, Any], base: str, exported: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return the command that applies a plan (`apply`) and, if known, the one that searches it (`search`)."""
    target = exported["target"] if exported else ""
    more = {"text_only": "true"} if config.get("text_only") else {}
    more |= {"export_stock": "exported"} if target in ("stock", "fewer_experts") else {}
    if exported and target == "stock" and exported["gates"]:
        more["export_approximate"] = "true"
    source = (plan.calibration or {}).get("source", "")
    unnamed = source in ("", "texts", "token ids") or source.startswith("a ")
    calibration = {"calibration": "the-same-texts" if unnamed else _file_name(source)}
    if source.startswith(C4_NAME):  # the default
        calibration = {}
    apply: dict[str, Any] = {"plan": "condense_plan.json"}
    if config.get("refit"):
        apply |= {name: config[name] for name in _REFIT if name in config} | calibration  # version 0.1 had fewer
        apply |= {"gates": "sigmoid"} if config.get("gates") == "sigmoid" else {}
        apply |= {name: config[name] for name in _READ if config.get(name) is not None}
    found = {"apply": _command(base, apply | more), "unnamed": unnamed, "cut_from": cut_from(plan)}
    if plan.config is None or plan.calibration is None:
        return found
    defaults, searched = CondenseConfig().to_dict(), plan.config | (plan.cut_from or {})
    # Left out: defaults other than the budget, and options that do not change the result of the search.
    left_out = {"cache_memory", *(["num_layers"] if searched.get("layers") else [])}
    if searched.get("target_size") is None:  # a size needs them for its search
        left_out |= {*_REFIT}
    always = ("num_layers", "num_experts")
    search = {
        name: searched[name]
        for name in defaults
        if name in searched and name not in left_out and (name in always or searched[name] != defaults[name])
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
