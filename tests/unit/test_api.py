"""The three verbs as scripts call them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from cdmoe_plugin import CondenseConfig, CondensePlan, apply_plan, condense_pretrained, search_plan
from cdmoe_plugin.cards.plots import plot_layer_divergences
from cdmoe_plugin.condense.forms import condense as condensed
from tests.helpers.tiny_models import random_ids, tiny_model

IDS = random_ids(5)
CONFIG = CondenseConfig(num_layers=2, num_experts=2)


def test_condense_pretrained_is_search_and_apply(tmp_path: Path) -> None:
    tiny_model("qwen2_moe").save_pretrained(tmp_path / "sparse")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    plan = search_plan(loaded, CONFIG, calibration=IDS)
    by_hand = apply_plan(loaded, plan)
    from_path = condense_pretrained(tmp_path / "sparse", CONFIG, calibration=IDS)
    in_place = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    assert condense_pretrained(in_place, CONFIG, calibration=IDS) is in_place
    plan.save(tmp_path / "plan.json")
    with_plan = condense_pretrained(tmp_path / "sparse", plan=tmp_path / "plan.json")
    for model in (from_path, in_place, with_plan):
        assert model.condense_plan == plan
        assert type(model) is type(by_hand)
        weights = model.state_dict()
        assert weights.keys() == by_hand.state_dict().keys()
        assert all(torch.equal(weights[name], value) for name, value in by_hand.state_dict().items())


@pytest.mark.parametrize("form", ["condense", "trim_layer", "trim_block"])
def test_models_of_one_config_object(form: str, tmp_path: Path) -> None:
    one = tiny_model("qwen2_moe")
    other = AutoModelForCausalLM.from_config(one.config)
    before = one.config.to_dict()
    other = apply_plan(
        other, search_plan(one, CondenseConfig(layers=[1, 2], num_experts=1, form=form), calibration=IDS)
    )
    assert {id(module.config) for module in other.modules() if hasattr(module, "config")} == {id(other.config)}
    assert one.config.to_dict() == before
    one.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(one)
    assert torch.equal(again(torch.tensor([IDS[0]])).logits, one(torch.tensor([IDS[0]])).logits)


def test_a_plan_decides_against_the_config() -> None:
    model = tiny_model("qwen2_moe")
    plan = search_plan(model, CONFIG, calibration=IDS)
    assert condense_pretrained(model, CondenseConfig(num_layers=1), plan=plan).condense_plan == plan


def test_a_failure_while_folding_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen2_moe")
    plan = search_plan(model, CONFIG, calibration=IDS)
    inputs = {"input_ids": torch.tensor([IDS[0]])}
    before, fold, calls = model(**inputs).logits, condensed.fold, []

    def fold_once(*args: Any) -> Any:
        calls.append(args)
        if len(calls) > 1:
            raise MemoryError
        return fold(*args)

    monkeypatch.setattr(condensed, "fold", fold_once)
    with pytest.raises(MemoryError):
        apply_plan(model, plan)
    assert type(model).__name__ == "Qwen2MoeForCausalLM"
    assert model.config.model_type == "qwen2_moe"
    assert torch.equal(model(**inputs).logits, before)


def test_figure(tmp_path: Path) -> None:
    plan = search_plan(tiny_model("qwen2_moe"), CONFIG, calibration=IDS)
    assert plan.layer_divergences is not None
    assert set(plan.layer_divergences) == {1, 2, 3}
    assert plan.layers[0].score == min(plan.layer_divergences.values())
    plot_layer_divergences(plan, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no divergence per layer"):
        plot_layer_divergences(CondensePlan(plan.layers), tmp_path / "none.png")
