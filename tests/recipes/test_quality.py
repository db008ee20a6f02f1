"""recipes/benchmarks/quality.py on a tiny model, with its numbers measured again by other means."""

from __future__ import annotations

import importlib
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cdmoe_plugin import CondenseConfig, apply_plan, search_plan
from tests.helpers.lm_eval_cases import Case, evaluate, make_case
from tests.helpers.recovery import lm_rows, write_data
from tests.helpers.tiny_models import tiny_model

BENCHMARKS = Path(__file__).parents[2] / "recipes" / "benchmarks"
RECOVERY = """
lm_dataset: {folder}/lm.jsonl
sft_dataset: {folder}/sft.json
learning_rate: 1.0e-2
max_steps: 2
max_length: 32
use_cpu: true
bf16: false
save_strategy: "no"
report_to: none
disable_tqdm: true
"""


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
    given = {
        "model_name_or_path": case.base,
        "held_out": texts,
        "calibration": texts,
        "layers": "1,2",
        "num_experts": 2,
    }
    given |= {"num_samples": 16, "max_length": 16, "held_out_rows": 4, "speed_tokens": 32, "seeds": 0}
    given["json"] = case.base.parent / "quality.json"
    quality.main([*(f"--{name}={value}" for name, value in given.items()), *more])
    return json.loads((case.base.parent / "quality.json").read_text())


@pytest.fixture(scope="module")
def whole(quality: Any, case: Case) -> dict[str, Any]:
    """Every comparison but recovery."""
    return run(quality, case)


def losses(found: dict[str, Any], comparison: str, layers: int) -> dict[str, float]:
    rows = [row for row in found["records"] if (row["comparison"], row["layers"]) == (comparison, layers)]
    return {row["method"]: row["loss"] for row in rows}


def naive_loss(model: Any, case: Case) -> float:
    """Evenly spaced rows of all texts, one by one."""
    tokenizer = AutoTokenizer.from_pretrained(case.base)
    ids = [i for row in lm_rows() for i in [*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]]
    count = len(ids) // 16
    rows = [ids[16 * i : 16 * i + 16] for i in range(0, count, count // 4)][:4]
    with torch.no_grad():
        return statistics.mean(model(torch.tensor([row]), labels=torch.tensor([row])).loss.item() for row in rows)


def test_every_registered_method_is_measured(quality: Any, whole: dict[str, Any]) -> None:
    registries = [
        quality.EXPERT_SELECTIONS,
        quality.LAYER_SELECTIONS,
        quality.METRICS.methods(),
        ["none", *quality.REFITS],
    ]
    names = ("expert_selection", "layer_selection", "metric", "refit")
    for comparison, registry in zip(names, registries, strict=True):
        assert list(losses(whole, comparison, 1)) == list(losses(whole, comparison, 2)) == list(registry)


def test_losses_memory_and_gaps_are_those_of_a_naive_measurement(case: Case, whole: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(case.base)
    assert whole["sparse"]["loss"] == pytest.approx(sparse := naive_loss(model, case), abs=1e-5)
    before = sum(p.numel() for p in model.parameters())
    config = CondenseConfig(3, 2, num_samples=16, max_length=16)
    plan = search_plan(model, config, calibration=str(case.base.parent / "lm.jsonl")).truncate(2)
    model = apply_plan(model, plan)
    expected = naive_loss(model, case)
    default = {"baselines": "E(shared+K)", "expert_selection": "greedy", "layer_selection": "greedy", "metric": "js"}
    for comparison, method in {**default, "refit": "none"}.items():
        assert losses(whole, comparison, 2)[method] == pytest.approx(expected, abs=1e-4)
    (row,) = (r for r in whole["records"] if (r["method"], r["layers"]) == ("E(shared+K)", 2))
    assert row["memory"] == pytest.approx(sum(p.numel() for p in model.parameters()) / before, abs=0.01)
    assert row["speed"] > 0
    for row in (r for r in whole["records"] if "gap closed" in r):
        folded = losses(whole, "refit", row["layers"])["none"]
        assert row["gap closed"] == pytest.approx((folded - row["loss"]) / (folded - sparse), abs=1e-2)


def test_accuracy_is_lm_evals(quality: Any, case: Case) -> None:
    found = run(quality, case, "--tasks=tiny_choice", f"--include_path={case.tasks}", "--only=baselines", "--layers=1")
    scores = evaluate(case, "hf", pretrained=case.base, device="cpu")["results"]
    assert found["sparse"]["tiny_choice"] == scores["tiny_choice"]["acc,none"]
    assert all(0 <= row["tiny_choice"] <= 1 for row in found["records"])


def test_trimming_leaves_a_decoder_layer(quality: Any, case: Case, tmp_path: Path) -> None:
    tiny_model("granitemoeshared").save_pretrained(tmp_path)  # all four decoder layers are sparse
    AutoTokenizer.from_pretrained(case.base).save_pretrained(tmp_path)
    found = run(quality, case, f"--model_name_or_path={tmp_path}", "--only=baselines", "--layers=3,4")
    assert list(losses(found, "baselines", 3)) == list(quality.COMPARISONS["baselines"])
    assert list(losses(found, "baselines", 4)) == ["E(shared+0)", "E(shared+K)", "trim_layer"]


@pytest.mark.slow
def test_recovered_models_are_the_recipes(
    quality: Any, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recovery.yaml").write_text(RECOVERY.format(folder=case.base.parent))
    methods = quality.COMPARISONS["recovery"]
    assert len(methods) == 6
    kept = {name: methods[name] for name in ("E(shared+K) as it is", "E(shared+K) lm,sft")}
    monkeypatch.setitem(quality.COMPARISONS, "recovery", kept)
    found = run(quality, case, "--only=recovery", "--layers=2", f"--recovery_config={tmp_path / 'recovery.yaml'}")
    before, after = losses(found, "recovery", 2).values()
    assert after < before


def test_means_and_spreads(quality: Any) -> None:
    about = {"comparison": "refit", "method": "down_proj", "layers": 1}
    folded = {**about, "method": "none"}
    records = [{**folded, "seed": 0, "loss": 5.0}, {**folded, "seed": 1, "loss": 7.0}]
    records += [{**about, "seed": 0, "loss": 4.5}, {**about, "seed": 1, "loss": 4.75}]
    quality.add_gap_closed(records, sparse_loss=4.0)
    assert [record.get("gap closed") for record in records] == [None, None, 0.5, 0.75]
    text = quality.tables(records, {"loss": 4.0})
    assert "### refit: loss (sparse: 4.0000)" in text
    assert f"{statistics.mean([4.5, 4.75]):.4f} ± {statistics.stdev([4.5, 4.75]):.4f}" in text
    assert "6.0000 ± 1.4142" in text
    assert "62% ± 18%" in text
