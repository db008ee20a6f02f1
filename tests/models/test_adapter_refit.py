"""Condense adapters that are fitted to the sparse model beside them, against `apply_plan` with the same refit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from cdmoe_plugin import (
    CondenseAdapterConfig,
    CondenseConfig,
    CondensedLayer,
    CondensePlan,
    apply_plan,
    condense_pretrained,
)
from tests.helpers.models import output, sparse_model
from tests.helpers.plans import some_plan
from tests.helpers.states import differing, state

IDS = torch.randint(3, 128, (20, 24), generator=torch.Generator().manual_seed(0)).tolist()
PLAN = some_plan([1, 3])


# Numbers of single neurons, which only a refit can choose.
WIDTHS = CondensePlan([CondensedLayer(1, [1, 2], [0.5, 0.25], width=20), CondensedLayer(3, [0], [0.5], width=9)])


def config_of(**fields: Any) -> CondenseConfig:
    return CondenseConfig(**{"refit": "down_proj", "batch_size": 4, "num_samples": 20, **fields})


@pytest.mark.parametrize(
    ("model_type", "plan", "dtype", "fields"),
    [
        ("qwen2_moe", PLAN, torch.float32, {}),
        ("qwen2_moe", WIDTHS, torch.float32, {"refit_neurons": "least_squares"}),
        ("granitemoeshared", PLAN, torch.bfloat16, {"refit_neurons": "energy"}),
        ("gpt_oss", WIDTHS, torch.float32, {"refit_neurons": "energy"}),
        ("mixtral", PLAN, torch.float32, {"refit": "distill", "refit_steps": 5}),
    ],
)
def test_as_apply_plan(model_type: str, plan: CondensePlan, dtype: torch.dtype, fields: dict[str, Any]) -> None:
    config, sparse = config_of(**fields), output(sparse_model(model_type).to(dtype))
    expected = apply_plan(sparse_model(model_type).to(dtype), plan, config, calibration=IDS)
    model = get_peft_model(sparse_model(model_type).to(dtype), CondenseAdapterConfig(plan=plan))
    before, trainable = state(model), {name for name, p in model.named_parameters() if p.requires_grad}
    model.refit(config, calibration=IDS)
    assert {name for name in differing(before, state(model)) if ".cdmoe_mlp." not in name} == set()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    with model.disable_adapter():
        assert torch.equal(output(model.get_base_model()), sparse)
    merged = model.merge_and_unload()
    assert not differing(state(merged), state(expected))
    assert merged.config.to_dict() == expected.config.to_dict()


def test_saved(tmp_path: Path) -> None:
    sparse_model("qwen2_moe").save_pretrained(tmp_path / "base")
    expected = apply_plan(sparse_model("qwen2_moe"), PLAN, config_of(), calibration=IDS)
    model = get_peft_model(sparse_model("qwen2_moe"), CondenseAdapterConfig(plan=PLAN))
    model.refit(config_of(), calibration=IDS)
    model.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    small = condense_pretrained(tmp_path / "base", plan=tmp_path / "adapter")
    for opened in (loaded, small):
        assert not differing(state(opened), state(expected))
        assert opened.config.condense_config["refit_errors"] == expected.config.condense_config["refit_errors"]


def test_neurons_that_no_refit_has_chosen() -> None:
    model = get_peft_model(sparse_model("qwen2_moe"), CondenseAdapterConfig(plan=WIDTHS))
    with pytest.raises(ValueError, match=r"not loaded.*single neurons, call `refit`"):
        output(model.get_base_model())
    with pytest.raises(ValueError, match=r"decoder layers \[1, 3\] numbers of single neurons"):
        model.refit(config_of(), calibration=IDS)
    with model.disable_adapter():
        assert torch.equal(output(model.get_base_model()), output(sparse_model("qwen2_moe")))


def test_refused() -> None:
    model = get_peft_model(sparse_model("qwen2_moe"), CondenseAdapterConfig(plan=PLAN))
    before = state(model)
    with pytest.raises(ValueError, match="`refit` of the config is None"):
        model.refit(CondenseConfig(), calibration=IDS)
    with pytest.raises(ValueError, match="holds out every 5th"):
        model.refit(config_of(), calibration=IDS[:3])
    with pytest.raises(ValueError, match="MLPs of a condense adapter have no gates per token"):
        model.refit(config_of(gates="sigmoid"), calibration=IDS)
    with pytest.raises(ValueError, match="`refit` is 'ridge', but only"):
        model.refit(config_of(refit="ridge"), calibration=IDS)
    assert not differing(before, state(model))
