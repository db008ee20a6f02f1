"""The three ways into a training script that docs/recover.md promises, each a program of its own."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from cdmoe_plugin import CondensePlan, apply_plan
from tests.helpers.plans import some_plan
from tests.helpers.recovery import lm_rows, word_tokenizer
from tests.helpers.states import differing, state
from tests.helpers.tiny_models import tiny_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse checkpoint, the same one condensed, and texts."""
    folder = tmp_path_factory.mktemp("examples")
    tiny_model("qwen2_moe").save_pretrained(folder / "sparse")
    apply_plan(tiny_model("qwen2_moe"), some_plan([1, 2, 3])).save_pretrained(folder / "condensed")
    for name in ("sparse", "condensed"):
        word_tokenizer().save_pretrained(folder / name)
    rows = lm_rows(24)
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [{"prompt": row["text"][:20], "completion": row["text"][20:]} for row in rows]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return folder


def run(example: str, *arguments: object) -> None:
    runpy.run_path(str(ROOT / "examples" / example))["main"](*map(str, arguments))


def test_in_trainer(place: Path, tmp_path: Path) -> None:
    run("in_trainer.py", place / "sparse", place / "texts.jsonl", tmp_path)
    plan = CondensePlan.load(tmp_path)
    assert [len(layer.experts) for layer in plan.layers] == [2, 2]
    trained = state(AutoModelForCausalLM.from_pretrained(tmp_path))
    folded = state(apply_plan(tiny_model("qwen2_moe"), plan))
    changed = differing(trained, folded)
    assert changed
    assert {name.split(".")[2] for name in changed} == {str(layer.layer) for layer in plan.layers}
    assert all("mlp" in name for name in changed)


def test_in_peft(place: Path, tmp_path: Path) -> None:
    run("in_peft.py", place / "sparse", place / "condensed" / "condense_plan.json", place / "texts.jsonl", tmp_path)
    base = AutoModelForCausalLM.from_pretrained(place / "condensed")
    ids = torch.arange(3, 27).view(2, 12)
    with torch.no_grad():
        before = base(input_ids=ids).logits
        after = PeftModel.from_pretrained(base, tmp_path)(input_ids=ids).logits
    assert not torch.equal(before, after)
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.slow
def test_in_trl(place: Path, tmp_path: Path) -> None:
    # In a process of its own, where nothing but the example imports the package.
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [
        sys.executable,
        str(ROOT / "examples" / "in_trl.py"),
        place / "condensed",
        place / "pairs.jsonl",
        tmp_path,
    ]
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    trained = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(trained).__name__ == "CDMoEQwen2MoeForCausalLM"
    assert CondensePlan.load(tmp_path) == CondensePlan.load(place / "condensed")
    assert differing(state(trained), state(AutoModelForCausalLM.from_pretrained(place / "condensed")))
