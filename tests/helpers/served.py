"""Figures of the table in docs/serve.md: engines, the forms that they read, and the differences that tests measured.

With `CDMOE_RECORD=1` in the environment, a test that runs an engine keeps its figure in tests/data/served.json;
`python -m tests.unit.test_served` then writes the table.
"""

from __future__ import annotations

import json
import os
from datetime import date
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "data" / "served.json"
# Not run by these tests: engine, form, the finding, and its source.
OTHERS = [
    ("vLLM 0.32, llama.cpp", "block-trimmed", "whole periods of layers; a broken pattern is misread", "earlier run"),
    ("llama.cpp, mlx-lm, transformers 4.57", "condensed", "no: needs this package and transformers 5.15", "not run"),
    ("transformers 4.57", "stock, dense, top-K", "by the older spellings of the config", "read in its source"),
    ("mlx-lm 0.32", "dense", "files of a prototype of this export", "earlier run"),
    ("SGLang", "stock, dense, top-K", "yes, with the limits below", "read in its source"),
    ("SGLang", "condensed", "by an entry point", "read in its source, not run"),
]


def record(engine: str, form: str, model_type: str, difference: float) -> None:
    """Keep the difference between an engine's output and the reference, if the run is a recording one.

    Args:
        engine (`str`): The engine with its version, and those of others that matter.
        form (`str`): The form of the checkpoint, and how it was quantised.
        model_type (`str`): The architecture of the sparse model.
        difference (`float`): A relative error of logits, or a difference of log-probabilities.
    """
    if not os.environ.get("CDMOE_RECORD"):
        return
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    row = results.setdefault(engine, {}).setdefault(form, {})
    row[model_type] = {"difference": float(f"{difference:.1e}"), "date": date.today().isoformat()}
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")


def table() -> str:
    """The rows that tests measured, and those that were not run."""
    results = json.loads(RESULTS.read_text())
    lines = [
        "| engine | form | architectures or finding | largest difference | run |",
        "| --- | --- | --- | --- | --- |",
    ]
    for engine, forms in sorted(results.items()):
        for form, models in sorted(forms.items()):
            largest = max(found["difference"] for found in models.values())
            latest = max(found["date"] for found in models.values())
            shown = f"{largest:.1e}" if largest else "0"
            lines.append(f"| {engine} | {form} | {', '.join(sorted(models))} | {shown} | {latest} |")
    lines += [f"| {engine} | {form} | {finding} | | {source} |" for engine, form, finding, source in OTHERS]
    return "\n".join(lines)
