"""Methods register themselves: one new file is enough for the searches, the help text and the documentation.

`python -m tests.unit.test_methods` writes the table of all methods, docs/methods.md.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import cdmoe_plugin.search.experts
from cdmoe_plugin import CondenseConfig, search_plan
from cdmoe_plugin.config import condense_arguments
from cdmoe_plugin.registry import EXPERT_SELECTIONS, METRICS, REFITS, REGISTRIES, Registry
from tests.helpers.tiny_models import random_ids, tiny_model

TABLE = Path(__file__).parents[2] / "docs" / "methods.md"
NEW = """
from cdmoe_plugin.registry import EXPERT_SELECTIONS
from cdmoe_plugin.search.experts.ranking import ordered

@EXPERT_SELECTIONS.register("last", "the last expert first")
def last_experts(data, num_experts):
    return ordered(data, data.candidates[::-1][:num_experts])
"""


@pytest.fixture
def new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One more module in the package of the expert selections."""
    (tmp_path / "last.py").write_text(NEW)
    package = cdmoe_plugin.search.experts
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    monkeypatch.setattr(EXPERT_SELECTIONS, "_complete", False)
    yield
    del EXPERT_SELECTIONS["last"]
    del sys.modules[f"{package.__name__}.last"]


def help_of(field: str) -> str:
    return {f.name: f.metadata["help"] for f in fields(condense_arguments())}[field]


def test_a_method_is_one_file(new_file: None) -> None:
    plan = search_plan(
        tiny_model("mixtral", num_experts=4),
        CondenseConfig(layers=[1], num_experts=2, expert_selection="last"),
        calibration=random_ids(4, 16),
    )
    assert plan.layers[0].experts == [3, 2]
    assert "last (the last expert first)" in help_of("expert_selection")
    assert "| `expert_selection` | `last` | the last expert first |" in table()
    with pytest.raises(ValueError, match="'last'"):
        EXPERT_SELECTIONS.lookup("first")


def test_every_default_is_registered_and_comes_first() -> None:
    config = CondenseConfig()
    for field, registry in REGISTRIES.items():
        default = getattr(config, field, None)
        assert default in (None, next(iter(registry)))
        assert list(registry)[1:] == sorted(list(registry)[1:])


def test_names() -> None:
    registry = Registry[Any]("colour", "cdmoe_plugin.metrics", first="red", others=METRICS)
    for name in ("blue", "red"):
        registry.register(name, f"{name} things")(len)
    with pytest.raises(ValueError, match="`colour` has a method 'red' already"):
        registry.register("red", "again")(len)
    with pytest.raises(ValueError, match="`colour` is 'grey', but only 'red', 'blue', 'js', 'kl', 'mse', 'ppl' exist"):
        registry.lookup("grey")
    assert registry.summary().startswith("red (red things), blue (blue things), js (")
    registry["red"] = max
    assert registry.lookup("red") is max
    assert registry.methods()["red"].help == "red things"
    with pytest.raises(KeyError):
        registry["grey"] = max


def test_options_are_given_to_methods_that_ask_for_them() -> None:
    assert [name for name, refit in REFITS.methods().items() if refit.options] == ["distill"]
    registry = Registry[Any]("refit", "cdmoe_plugin.metrics")
    registry.register("plain", "")(lambda **options: options)
    registry.register("steps", "", options=("refit_steps", "seed"))(lambda **options: options)
    assert registry.of(CondenseConfig(refit="plain"))() == {}
    assert registry.of(CondenseConfig(refit="steps", refit_steps=7))() == {"refit_steps": 7, "seed": 0}


def table() -> str:
    """The text of docs/methods.md."""
    rows = []
    for field, registry in REGISTRIES.items():
        for name, method in registry.methods().items():
            about = "; with ".join([method.help, *(f"`{option}`" for option in method.options)])
            rows.append(f"| `{field}` | `{name}` | {about} | {method.source} |")
    lines = [
        "# Methods",
        "",
        "Every method that an option can name, the default first. `refit` is off by default; `export` is how a",
        "condensed model is written [for other programs](export.md). CD-MoE is arXiv 2412.00069.",
        "`python -m tests.unit.test_methods` writes this file; a test fails when it is out of date.",
        "",
        "| option | value | method | source |",
        "| --- | --- | --- | --- |",
        *rows,
    ]
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", "\n".join(lines) + "\n")


def test_the_table_is_up_to_date() -> None:
    assert TABLE.read_text(encoding="utf-8") == table(), "run `python -m tests.unit.test_methods`"


if __name__ == "__main__":
    TABLE.write_text(table(), encoding="utf-8")
