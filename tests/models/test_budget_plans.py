"""What becomes of plans whose layers keep different numbers of experts: resumed, saved, opened, refitted, reported."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from cdmoe_plugin import CondenseConfig, CondensePlan, apply_plan, condense_pretrained, search_plan
from cdmoe_plugin.cards.tables import plan_table
from cdmoe_plugin.estimate import dry_run
from cdmoe_plugin.search import check
from cdmoe_plugin.search.state import FILE, SearchState
from tests.helpers.budgets import AUTO, EXPERT, SEQUENCES, helpful
from tests.helpers.interrupting import Interrupted, interrupting


@pytest.mark.parametrize("layers", [None, [3, 1]])
def test_resumes_to_the_same_plan(layers: list[int] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = helpful("qwen2_moe", seed=1), replace(AUTO, layers=layers)
    times = 0
    write = SearchState.update

    def counting(self: SearchState, results: dict[str, Any]) -> None:
        nonlocal times
        times += 1
        write(self, results)

    with monkeypatch.context() as patch:
        patch.setattr(SearchState, "update", counting)
        unbroken = search_plan(model, config, calibration=SEQUENCES, state_dir=tmp_path / "whole")
    results = json.loads((tmp_path / "whole" / FILE).read_text())["results"]
    assert any(name.startswith("spread ") for name in results)
    for after in range(times):
        folder = tmp_path / str(after)
        with monkeypatch.context() as patch:
            patch.setattr(SearchState, "update", interrupting(after))
            with pytest.raises(Interrupted):
                search_plan(model, config, calibration=SEQUENCES, state_dir=folder)
        with monkeypatch.context() as patch:
            patch.setattr(SearchState, "update", interrupting(times - after))
            assert search_plan(model, config, calibration=SEQUENCES, state_dir=folder) == unbroken


@pytest.mark.parametrize("model_type", ["qwen2_moe", "mixtral"])
def test_checkpoints_tables_and_dry_runs(model_type: str, tmp_path: Path) -> None:
    model = copy.deepcopy(helpful(model_type, seed=1))
    model.save_pretrained(tmp_path / "sparse")
    config = replace(AUTO, expert_budget=4)
    plan = search_plan(model, config, calibration=SEQUENCES)
    counts = [len(row.experts) for row in plan.layers]
    assert len(set(counts)) > 1
    assert CondensePlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    table = plan_table(plan).splitlines()[2:]
    assert [int(line.split("|")[2]) for line in table] == counts
    apply_plan(model, plan)
    model.save_pretrained(tmp_path / "condensed")
    ids = torch.tensor([SEQUENCES[0]])
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "condensed")
    from_plan = condense_pretrained(tmp_path / "sparse", plan=tmp_path / "condensed")
    whole = condense_pretrained(tmp_path / "sparse", config, calibration=SEQUENCES)
    for other in (opened, from_plan, whole):
        torch.testing.assert_close(other(ids).logits, model(ids).logits, rtol=0, atol=0)
    assert whole.condense_plan == plan
    after = f"{model.num_parameters():,}"
    assert after in dry_run(tmp_path / "sparse", plan)
    assert (after in dry_run(tmp_path / "sparse", config)) == (sum(counts) == 4)
    budget = replace(config, expert_budget=f"{4 * EXPERT * 2}B")
    assert (after in dry_run(tmp_path / "sparse", budget, dtype="bfloat16")) == (sum(counts) == 4)


def test_bytes_are_counted_in_the_dtype_that_is_loaded(tmp_path: Path) -> None:
    copy.deepcopy(helpful("qwen2_moe")).bfloat16().save_pretrained(tmp_path)
    config = replace(AUTO, expert_budget=f"{18 * EXPERT * 3}B")  # all experts have two thirds of it, or four thirds
    with pytest.raises(
        ValueError, match="`expert_budget` is 82,944 bytes, but all routed experts of 3 layers are 55,296"
    ):
        condense_pretrained(tmp_path, config, calibration=SEQUENCES)
    model = condense_pretrained(tmp_path, config, calibration=SEQUENCES, dtype="float32")
    assert 9 <= sum(len(row.experts) for row in model.condense_plan.layers) <= 13
    with pytest.raises(ValueError, match="55,296 bytes"):
        condense_pretrained(tmp_path, config, calibration=SEQUENCES, dtype=torch.float16)


def test_a_plan_that_is_not_what_the_config_says(monkeypatch: pytest.MonkeyPatch) -> None:
    model, warnings = helpful("qwen2_moe"), []
    monkeypatch.setattr(check.logger, "warning", warnings.append)
    plan = search_plan(model, AUTO, calibration=SEQUENCES)
    for config, warned in ((AUTO, False), (replace(AUTO, expert_budget=7), True), (CondenseConfig(num_layers=3), True)):
        warnings.clear()
        condense_pretrained(copy.deepcopy(model), config, plan=plan)
        assert [text for text in warnings if "The plan overrides" in text] == warnings
        assert bool(warnings) == warned


@pytest.mark.parametrize("refit", ["down_proj", "distill"])
def test_refit_of_layers_with_and_without_experts(refit: str) -> None:
    model = copy.deepcopy(helpful("mixtral", seed=1))
    config = replace(AUTO, expert_budget=7, refit=refit, refit_steps=3)
    plan = search_plan(model, config, calibration=SEQUENCES)
    assert 0 in [len(row.experts) for row in plan.layers]
    apply_plan(model, plan, config, calibration=SEQUENCES)
    assert torch.isfinite(model(torch.tensor([SEQUENCES[0]])).logits).all()
