"""recipes/benchmarks/quality.py on a tiny model, with its numbers measured again by other means."""

from __future__ import annotations

import importlib
import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cdmoe_plugin import CondenseConfig, apply_plan, search_plan
from cdmoe_plugin.blocks import find_sparse_blocks
from cdmoe_plugin.registry import REGISTRIES
from tests.helpers.lm_eval_cases import Case, evaluate, make_case
from tests.helpers.recovery import lm_rows, write_data
from tests.helpers.tiny_models import tiny_model

BENCHMARKS = Path(__file__).parents[2] / "recipes" / "benchmarks"


@pytest.fixture(scope="module")
def quality() -> Any:
    """The script, which is in no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("quality")


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("case")
    write_data(folder)
    return make_case(folder)


def run(quality: Any, case: Case, *more: str) -> dict[str, Any]:
    texts = case.base.parent / "lm.jsonl"
    given = {"model_name_or_path": case.base, "held_out": texts, "calibration": texts, "num_experts": 2, "seeds": 0}
    given |= {"num_samples": 16, "max_length": 16, "held_out_rows": 4, "batch_size": 3, "speed": "2,8,2", "repeats": 2}
    given["json"] = case.base.parent / "quality.json"
    quality.main([*(f"--{name}={value}" for name, value in given.items()), *more])
    return json.loads((case.base.parent / "quality.json").read_text())


def naive(sparse: Any, model: Any, case: Case) -> dict[str, float]:
    """The measures on evenly spaced rows of all texts, token by token."""
    tokenizer = AutoTokenizer.from_pretrained(case.base)
    ids = [i for row in lm_rows() for i in [*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]]
    count = len(ids) // 16
    found: dict[str, list[float]] = {"loss": [], "above": [], "KL": [], "top-1": []}
    for start in range(0, count, count // 4):
        row = ids[16 * start : 16 * start + 16]
        with torch.no_grad():
            p, q = (m(torch.tensor([row])).logits[0].double().softmax(-1).tolist() for m in (sparse, model))
        for teacher, student, label in zip(p, q, row[1:], strict=False):
            found["loss"].append(-math.log(student[label]))
            found["above"].append(math.log(teacher[label]) - math.log(student[label]))
            found["KL"].append(sum(a * math.log(a / b) for a, b in zip(teacher, student, strict=True)))
            found["top-1"].append(teacher.index(max(teacher)) == student.index(max(student)))
    return {name: statistics.mean(values[: 4 * 15]) for name, values in found.items()}


def test_every_registered_method_can_be_compared(quality: Any) -> None:
    for name in ("expert_selection", "layer_selection", "metric", "refit", "refit_neurons", "routed_selection"):
        methods = REGISTRIES[name].methods() if name == "metric" else REGISTRIES[name]
        assert list(quality.COMPARISONS[name]) == list(methods)


def test_measures_are_those_of_a_naive_computation(quality: Any, case: Case, capsys: pytest.CaptureFixture) -> None:
    methods = ["pruned by REAP", "condensed and folded", "condensed best", "spread best"]
    found = run(quality, case, "--layers=2", f"--methods={','.join(methods)}")
    rows = {row["method"]: row for row in found["records"]}
    assert list(rows) == methods
    sparse, model = (AutoModelForCausalLM.from_pretrained(case.base) for _ in range(2))
    config = CondenseConfig(2, 2, num_samples=16, max_length=16)
    plan = search_plan(model, config, calibration=str(case.base.parent / "lm.jsonl"))
    model = apply_plan(model, plan)
    expected = naive(sparse, model, case)
    assert min(expected.values()) != 0
    row = rows["condensed and folded"]
    assert {name: row[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    assert row["parameters"] == pytest.approx(model.num_parameters() / sparse.num_parameters())
    assert found["sparse"] == pytest.approx({**naive(sparse, sparse, case), "parameters": 1}, abs=1e-5)
    assert all(row["prefill"] > 0 and row["decoding"] > 0 for row in rows.values())
    # The same shapes in other layers are as fast.
    assert len({row["decoding"] for method, row in rows.items() if method.startswith("condensed")}) == 1
    # Pruning keeps as many experts as there is room for.
    most, pruned = model.num_parameters(), rows["pruned by REAP"]["parameters"] * sparse.num_parameters()
    experts = [block.expert_weights() for block in find_sparse_blocks(sparse)]
    one_more = sum(w.gate[0].numel() + w.up[0].numel() + w.down[0].numel() + w.gate.shape[2] for w in experts)
    assert pruned <= most < pruned + one_more
    assert rows["spread best"]["parameters"] <= row["parameters"]
    assert f"| {rows['condensed best']['above']:.4f} |" in " ".join(capsys.readouterr().out.split())


def test_token_ids_are_rows_of_their_own_and_memory_is_bounded(quality: Any, case: Case, tmp_path: Path) -> None:
    rows = [[i] * (15 + i % 3) for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    found = quality.held_out_rows(quality.read_held_out(tmp_path / "rows.jsonl"), None, 16, 3)
    assert found.tolist() == [[i] * 16 for i in (1, 2, 4)]
    sparse, model = AutoModelForCausalLM.from_pretrained(case.base), tiny_model("qwen2_moe", seed=1)
    held_out = [quality.HeldOut(sparse, found, 2, memory) for memory in (1e9, 2 * 15 * 128 * 4, 0)]
    twice = [[each.measure(model) for _ in range(2)] for each in held_out]
    assert [len(each.kept) for each in held_out] == [2, 1, 0]
    assert all(measures == twice[0][0] for both in twice for measures in both)


def test_accuracy_is_lm_evals(quality: Any, case: Case) -> None:
    only = ["--only=paper", "--methods=E(shared+0)", "--layers=1", "--repeats=0"]
    found = run(quality, case, "--tasks=tiny_choice", f"--include_path={case.tasks}", *only)
    scores = evaluate(case, "hf", pretrained=case.base, device="cpu")["results"]
    assert found["sparse"]["tiny_choice"] == scores["tiny_choice"]["acc,none"]
    assert [0 <= row["tiny_choice"] <= 1 and "prefill" not in row for row in found["records"]] == [True]


def test_trimming_leaves_a_decoder_layer(quality: Any, case: Case, tmp_path: Path) -> None:
    tiny_model("granitemoeshared").save_pretrained(tmp_path)  # all four decoder layers are sparse
    AutoTokenizer.from_pretrained(case.base).save_pretrained(tmp_path)
    found = run(
        quality,
        case,
        f"--model_name_or_path={tmp_path}",
        "--only=paper",
        "--methods=trim_layer,trim_block",
        "--layers=3,4",
        "--repeats=0",
    )
    assert [(row["method"], row["layers"]) for row in found["records"]] == [
        *(("trim_layer", layers) for layers in (3, 4)),
        ("trim_block", 3),
    ]


def test_spread_over_seeds(quality: Any) -> None:
    about = {"comparison": "methods", "method": "best", "layers": 2}
    records = [
        {**about, "seed": 0, "parameters": 0.5, "loss": 4.5, "above": 0.5},
        {**about, "seed": 1, "parameters": 0.5, "loss": 4.75, "above": 0.75},
    ]
    text = " ".join(quality.table(records).split())
    assert "| method | layers | parameters | loss above sparse |" in text
    assert f"| best | L2 | 50.0% | 0.6250 ± {statistics.stdev([0.5, 0.75]):.4f} |" in text
