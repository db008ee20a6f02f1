"""The ways into a training script that docs/recover.md promises, each a program of its own."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from cdmoe_plugin import CondensePlan, apply_plan, condense_pretrained
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
    preferences = [{"prompt": row["text"][:20], "chosen": "w1 w2", "rejected": "w3"} for row in rows[:4]]
    (folder / "preferences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in preferences))
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


def test_in_dpo(place: Path, tmp_path: Path) -> None:
    run(
        "in_dpo.py", place / "sparse", place / "condensed" / "condense_plan.json", place / "preferences.jsonl", tmp_path
    )
    trained = condense_pretrained(place / "sparse", plan=tmp_path)
    changed = differing(state(trained), state(AutoModelForCausalLM.from_pretrained(place / "condensed")))
    assert changed
    assert all(".mlp." in name for name in changed)
    assert not (tmp_path / "model.safetensors").exists()


@torch.no_grad()
def held_out_loss(model: Any, rows: list[Tensor]) -> float:
    total = sum(F.cross_entropy(model(row[None]).logits[0, :-1], row[1:], reduction="sum") for row in rows)
    return float(total / sum(len(row) - 1 for row in rows))


def test_in_distillation(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = place / "texts.jsonl"
    run("in_distillation.py", place / "sparse", place / "condensed", texts, texts, tmp_path, 3e-3)
    last = capsys.readouterr().out.splitlines()[-1]
    printed = [float(number) for number in re.findall(r"\d+\.\d{4}", last)]
    sparse, before = (AutoModelForCausalLM.from_pretrained(place / name) for name in ("sparse", "condensed"))
    after = condense_pretrained(place / "sparse", plan=tmp_path)
    tokenizer = word_tokenizer()
    rows = torch.tensor([i for row in lm_rows(24) for i in [*tokenizer(row["text"])["input_ids"], 2]]).split(256)
    expected = [held_out_loss(model, list(rows)) for model in (sparse, before, after)]
    assert printed == pytest.approx(expected, abs=1e-4)
    with torch.no_grad():
        p, *others = (model(rows[0][None]).logits.log_softmax(-1) for model in (sparse, before, after))
    far, near = (float((p.exp() * (p - q)).sum()) for q in others)
    assert near < 0.9 * far


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
