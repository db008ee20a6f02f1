"""Contradictions in a condensed checkpoint's config.json that no shape of a weight shows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from cdmoe_plugin import apply_plan
from tests.helpers.models import sparse_model
from tests.helpers.plans import some_plan


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("consistency") / "saved"
    apply_plan(sparse_model("qwen2_moe"), some_plan([1, 3])).save_pretrained(folder)
    return folder


def edited(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> Any:
    """Open a checkpoint with an edited `condense_config`, and restore it."""
    file = folder / "config.json"
    text = file.read_text()
    values = json.loads(text)
    edit(values["condense_config"])
    try:
        file.write_text(json.dumps(values))
        return AutoModelForCausalLM.from_pretrained(folder)
    finally:
        file.write_text(text)


def spec(field: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda config: config["condensed_layers"]["3"].update({field: value})


EDITS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "shared": (spec("shared_intermediate_size", 16), "`shared_intermediate_size` 16 for decoder layer 3.* be 24"),
    "width": (spec("intermediate_size", 80), "`intermediate_size` 80 for decoder layer 3.* be 72"),
    "activation": (spec("hidden_act", "gelu"), "`hidden_act` 'gelu' for decoder layer 3.* be 'silu'"),
    "form": (spec("form", "trim_layer"), "`form` 'trim_layer' for decoder layer 3"),
    "experts": (lambda c: [c["plan"]["layers"][1][n].pop() for n in ("experts", "gates")], "`intermediate_size` 72"),
    "shape": (
        lambda c: c["plan"]["model"]["sparse_layers"][2].update(shared_intermediate_size=40),
        "`shared_intermediate_size` 24 for decoder layer 3.* be 40",
    ),
    "layers": (lambda c: c["condensed_layers"].pop("3"), "names the decoder layers \\['1'\\]"),
    "plan": (lambda c: c["plan"]["layers"].pop(), "its plan condenses \\['1'\\]"),
    "all": (lambda c: c.update(all_condensed=True), "`condense_config.all_condensed` is True, but 2 of 3"),
}


@pytest.mark.parametrize("name", EDITS)
def test_contradictions_are_refused(saved: Path, name: str) -> None:
    edit, match = EDITS[name]
    with pytest.raises(ValueError, match=match):
        edited(saved, edit)


def test_what_agrees_opens(saved: Path) -> None:
    assert edited(saved, lambda config: None).condense_plan.layers[1].layer == 3
    assert edited(saved, lambda config: config.pop("plan")).condense_plan is None
