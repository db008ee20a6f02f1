"""Parts of model cards: where a model comes from, how large it is, what was measured, how to make it again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers.utils import cached_file
from yaml import YAMLError

from ..config import CondenseConfig
from ..data import C4_NAME
from ..plan import CondensePlan
from .tables import format_table

# What a card keeps of the base model's.
_KEPT = ("license", "license_name", "license_link", "language")
_REFIT = ("refit", "refit_target", "refit_steps")
_READ = ("num_samples", "max_length", "batch_size", "seed")


def base_name(name_or_path: str) -> str:
    """What a card calls a base model: a folder's whole path is nobody's business but its owner's."""
    return Path(name_or_path).name if Path(name_or_path).exists() else name_or_path


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


def card_metadata(model: Any, base: str, base_card: Mapping[str, Any], plan: CondensePlan) -> ModelCardData:
    """The header of a card.

    Args:
        model (`PreTrainedModel`): The model that is saved.
        base (`str`): Name of the sparse model.
        base_card (`Mapping`): What the sparse model's card declares; see `base_metadata`.
        plan (`CondensePlan`): What was applied.
    """
    return ModelCardData(
        library_name="transformers",
        tags=sorted({"cdmoe", "mixture-of-experts", *(model.model_tags or [])}),
        base_model=base if "/" in base else None,  # a folder is no name on the hub
        pipeline_tag="text-generation" if model.can_generate() else None,
        datasets=[C4_NAME] if (plan.calibration or {}).get("source", "").startswith(C4_NAME) else None,
        **base_card,
    )


def sizes_table(parameters: Mapping[str, int], dtype: Any) -> str:
    """Parameters and bytes of several models, the first of which the others are compared with."""
    before = next(iter(parameters.values()))
    rows = [
        (name, f"{count:,}", _bytes(count * dtype.itemsize), f"{1 - count / before:.1%}")
        for name, count in parameters.items()
    ]
    return format_table(["", "parameters", f"in {str(dtype).removeprefix('torch.')}", "saved"], rows)


def _bytes(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"


def calibration_note(plan: CondensePlan) -> str:
    """On what a plan was searched; empty where that is not known."""
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


def refit_section(config: Mapping[str, Any]) -> str:
    """How condensed layers were fitted, by `condense_config`."""
    if not config.get("refit"):
        return "\nThe kept experts' weights are the base model's; nothing was fitted to calibration data.\n"
    rows = [
        (int(layer), f"{before:.3e}", f"{after:.3e}")
        for layer, (before, after) in sorted((config.get("refit_errors") or {}).items(), key=lambda item: int(item[0]))
    ]
    table = format_table(["decoder layer", "error before", "after"], rows)
    target = "the sparse block" if config.get("refit_target") == "block" else "the sparse model's hidden states"
    return f"\nThe condensed layers were then fitted to {target} (`refit={config['refit']!r}`):\n\n{table}\n"


def recovery_section(stages: Sequence[dict[str, Any]]) -> str:
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


def again_section(
    plan: CondensePlan, config: Mapping[str, Any], base: str, more: Mapping[str, Any] | None = None
) -> str:
    """The commands that apply the plan to the base model, and that search it, by what the plan remembers.

    Args:
        plan (`CondensePlan`): What was applied.
        config (`Mapping`): The model's `condense_config`.
        base (`str`): Name of the sparse model.
        more (`Mapping`, *optional*): Further options of `recipes/condense.py` for both.
    """
    more = dict(more or {})
    source = (plan.calibration or {}).get("source", "")
    given = source in ("", "texts", "token ids") or source.startswith("a ")
    calibration = {} if source.startswith(C4_NAME) else {"calibration": "the-same-texts" if given else _name(source)}
    apply: dict[str, Any] = {"plan": "condense_plan.json"}
    if config.get("refit"):
        apply |= {name: config[name] for name in _REFIT} | calibration
        apply |= {name: config[name] for name in _READ if config.get(name) is not None}
    text = "`condense_plan.json` of the condensed checkpoint holds the whole plan. This applies it to the base model:"
    text += f"\n\n{_command(base, apply | more)}"
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
    return f"{text}\n\nAnd this searched it:\n\n{_command(base, search | calibration | more)}{note}"


def _command(base: str, options: Mapping[str, Any]) -> str:
    words = []
    for name, value in options.items():
        values = value if isinstance(value, list) else [value]
        words.append(f"--{name} {' '.join(shlex.quote(str(one)) for one in values)}")
    start = f"python recipes/condense.py --model_name_or_path {shlex.quote(base)} --output_dir condensed"
    return "```bash\n" + " \\\n    ".join([start, *words]) + "\n```"
