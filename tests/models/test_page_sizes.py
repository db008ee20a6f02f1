"""The sizes in the report of a plan, against models that are really condensed by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cdmoe_plugin import CondenseConfig, apply_plan, search_plan
from cdmoe_plugin.cards.page_sizes import Sizes, other_sizes
from tests.helpers.tiny_models import tiny_model
from tests.unit.test_page import Page

IDS = torch.randint(3, 128, (20, 24), generator=torch.Generator().manual_seed(0)).tolist()
MODELS = ["qwen2_moe", "dots1", "qwen3_moe"]  # a shared expert with a gate, one without a gate, none
CONFIGS: dict[str, CondenseConfig] = {
    "paper": CondenseConfig(num_layers=2, num_experts=3, expert_selection="frequency", batch_size=7),
    "mixed": CondenseConfig(num_layers=2, num_experts=2, num_routed=3, batch_size=7),
    "pruned": CondenseConfig(num_layers=2, num_routed=3, form="prune_experts", batch_size=7),
    "neurons": CondenseConfig.fast(num_layers=2, num_experts="auto", expert_budget=3, batch_size=7),
    "size": CondenseConfig.fast(target_size=0.6, refit_neurons="least_squares", batch_size=7),
    "large size": CondenseConfig.fast(target_size=0.85, refit_neurons="least_squares", batch_size=7),
}


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("name", CONFIGS)
def test_sizes_are_those_of_condensed_models(name: str, model_type: str, tmp_path: Path) -> None:
    model = tiny_model(model_type)
    whole = model.num_parameters()
    plan = search_plan(model, CONFIGS[name], calibration=IDS)
    apply_plan(model, plan, CONFIGS[name], calibration=IDS)
    saved = whole - model.num_parameters()
    assert saved > 0
    assert plan.model is not None
    sizes = Sizes(plan.model, plan.form)
    assert sizes.total() - sizes.total(plan.layers) == saved
    page = Page(plan, tmp_path)
    cells = {part: cells for part, *cells in page.rows["Parameters of the sparse layers' MLPs"]}
    before, after = map(int, cells["together"][:2])
    assert before - after == saved
    assert sum(int(row[1]) for part, row in cells.items() if part not in ("", "together", "whole model")) == after
    assert plan.spread is None or cells["whole model"][:2] == [str(whole), str(whole - saved)]


@pytest.mark.parametrize(("model_type", "exportable"), [("qwen3_moe", None), ("dots1", "stock")])
def test_other_sizes_are_those_of_smaller_plans(model_type: str, exportable: str | None) -> None:
    settings: dict[str, Any] = {"refit_neurons": "least_squares", "batch_size": 7, "exportable": exportable}
    config = CondenseConfig.fast(target_size=0.6, **settings)
    plan = search_plan(model := tiny_model(model_type), config, calibration=IDS)
    whole = model.num_parameters()
    assert plan.spread is not None
    found = other_sizes(plan, plan.spread)
    assert [size.target for size in found if size.own] == ["0.6"]
    smallest = found[-1]
    apply_plan(model, plan.truncate(target_size=float(smallest.target)), config, calibration=IDS)
    assert smallest.parameters == model.num_parameters()
    with pytest.raises(ValueError, match="smallest model that this search can make"):
        plan.truncate(target_size=f"{smallest.parameters - whole // 1000 - 1} params")
