"""The model card of a condensed checkpoint: where it comes from, what was done and measured, how to do it again."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers.utils import cached_file
from yaml import YAMLError

from .config import CondenseConfig
from .modeling_cdmoe import MODEL_CARD_MARK
from .plan import CondensePlan
from .report import DONE, format_table, plan_table
from .sources import C4_NAME

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

# What a card keeps of the base model's.
_KEPT = ("license", "license_name", "license_link", "language")
_REFIT = ("refit", "refit_target", "refit_steps")
_READ = ("num_samples", "max_length", "batch_size", "seed")
_RESULTS = re.compile(r"## Results\n.*?(?=\n## )", re.DOTALL)


def base_metadata(name_or_path: str) -> dict[str, Any]:
    """License and languages that a base model's own card declares; empty where it has no card, or none can be read.

    Args:
        name_or_path (`str`): Folder, or hub name; the hub is asked only for what is not in the cache.
    """
    if not name_or_path:
        return {}
    try:
        path = cached_file(
            name_or_path,
            "README.md",
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        data = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict() if path else {}
    except (OSError, ValueError, YAMLError):  # no such repository, or a header that is no YAML
        return {}
    kept = {name: data[name] for name in _KEPT if data.get(name)}
    link = kept.get("license_link")
    if link and "://" not in link and link != "LICENSE":
        kept.pop("license_link")
    elif link == "LICENSE":  # beside the base model's card, not beside this one
        if Path(name_or_path).exists():
            kept.pop("license_link")
        else:
            kept["license_link"] = f"https://huggingface.co/{name_or_path}/blob/main/LICENSE"
    return kept


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
    tags = sorted({"cdmoe", "mixture-of-experts", *(model.model_tags or [])})
    on_hub = "/" in base
    data = ModelCardData(
        library_name="transformers",
        tags=tags,
        base_model=base if on_hub else None,
        pipeline_tag="text-generation" if model.can_generate() else None,
        datasets=[C4_NAME] if (plan.calibration or {}).get("source", "").startswith(C4_NAME) else None,
        **config.get("base_card", {}),
    )
    quantised = ""
    if getattr(model, "quantization_method", None) is not None:
        quantised = f"\nThe weights are quantised, by {model.quantization_method.value}; opening them needs it.\n"
    return _CARD.format(
        data=data.to_yaml(),
        mark=MODEL_CARD_MARK,
        title=f"{base}, {DONE[plan.form]}",
        what=(_CONDENSED if plan.form == "condense" else _TRIMMED).format(layers=len(plan.layers)),
        done=DONE[plan.form],
        sizes=_sizes(config.get("parameters", {}), model.dtype, DONE[plan.form]),
        table=plan_table(plan),
        calibration=_calibration(plan),
        refit=_refit(config),
        quantised=quantised,
        recovery=_recovery_section(config.get("recovery") or []),
        again=_again(plan, config, base),
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


def _sizes(parameters: Mapping[str, int], dtype: Any, done: str) -> str:
    if not parameters:
        return ""
    before = parameters["before"]
    rows = [
        (name, f"{count:,}", _bytes(count * dtype.itemsize), f"{1 - count / before:.1%}")
        for name, count in (("base model", before), (done, parameters["after"]))
    ]
    return format_table(["", "parameters", f"in {str(dtype).removeprefix('torch.')}", "saved"], rows)


def _bytes(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"


def _calibration(plan: CondensePlan) -> str:
    if not plan.calibration:
        return ""
    about = {**plan.calibration, "source": _name(plan.calibration["source"])}
    text = "\nCalibrated on {num_samples} samples ({num_tokens} tokens) of {source}".format(**about)
    return (
        f"{text} (SHA-256 of the token ids: `{about['fingerprint']}`).\n" if about.get("fingerprint") else f"{text}.\n"
    )


def _name(source: str) -> str:
    """A file's whole path is nobody's business but its owner's."""
    return Path(source).name if Path(source).is_absolute() else source


def _refit(config: Mapping[str, Any]) -> str:
    if not config.get("refit"):
        return "\nThe kept experts' weights are the base model's; nothing was fitted to calibration data.\n"
    rows = [
        (int(layer), f"{before:.3e}", f"{after:.3e}")
        for layer, (before, after) in sorted((config.get("refit_errors") or {}).items(), key=lambda item: int(item[0]))
    ]
    table = format_table(["decoder layer", "error before", "after"], rows)
    target = "the sparse block" if config.get("refit_target") == "block" else "the sparse model's hidden states"
    return f"\nThe condensed layers were then fitted to {target} (`refit={config['refit']!r}`):\n\n{table}\n"


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


def _again(plan: CondensePlan, config: Mapping[str, Any], base: str) -> str:
    """The commands that apply the plan to the base model, and that search it, by what the plan remembers."""
    source = (plan.calibration or {}).get("source", "")
    given = source in ("", "texts", "token ids") or source.startswith("a ")
    calibration = {} if source.startswith(C4_NAME) else {"calibration": "the-same-texts" if given else _name(source)}
    apply: dict[str, Any] = {"plan": "condense_plan.json"}
    if config.get("refit"):
        apply |= {name: config[name] for name in _REFIT} | calibration
        apply |= {name: config[name] for name in _READ if config.get(name) is not None}
    text = f"`condense_plan.json` holds the whole plan. This applies it to the base model:\n\n{_command(base, apply)}"
    if config.get("recovery"):
        text += "\n\n(without the training.)"
    if plan.config is None or plan.calibration is None:
        return text
    always = ("num_layers", "num_experts")
    search = {
        name: plan.config[name]
        for name, default in CondenseConfig().to_dict().items()
        if name in plan.config and (name in always or plan.config[name] != default)
    }
    if search.get("layers"):
        search.pop("num_layers", None)
    for name in (*_REFIT, "cache_memory"):
        search.pop(name, None)
    note = f"\n\n(The calibration data had no name: it was given as {source}.)" if given else ""
    return f"{text}\n\nAnd this searched it:\n\n{_command(base, search | calibration)}{note}"


def _command(base: str, options: Mapping[str, Any]) -> str:
    words = []
    for name, value in options.items():
        values = value if isinstance(value, list) else [value]
        words.append(f"--{name} {' '.join(shlex.quote(str(one)) for one in values)}")
    start = f"python recipes/condense.py --model_name_or_path {shlex.quote(base)} --output_dir condensed"
    return "```bash\n" + " \\\n    ".join([start, *words]) + "\n```"
