"""Models of a given size: what becomes of their layers, how large they are, and what is refused before a search."""

from __future__ import annotations

import gc
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from cdmoe_plugin import CondenseConfig, CondensePlan, condense_pretrained, search_plan
from cdmoe_plugin.estimate import dry_run, estimate
from cdmoe_plugin.search.spread import search
from tests.helpers.models import sparse_model
from tests.helpers.states import differing, state
from tests.helpers.tiny_models import tiny_model

IDS = torch.randint(3, 128, (20, 24), generator=torch.Generator().manual_seed(0)).tolist()
SETTINGS: dict[str, Any] = {"batch_size": 7, "refit_neurons": "least_squares"}


def one_step(plan: CondensePlan) -> int:
    """The largest difference of two neighbouring sizes of a layer."""
    assert plan.spread is not None
    sizes = [sorted({size for _, size in layer.options().values()}) for layer in plan.spread.layers]
    return max(b - a for own in sizes for a, b in itertools.pairwise(own))


@pytest.mark.parametrize("model_type", ["qwen2_moe", "gpt_oss", "deepseek_v3"])
def test_sizes(model_type: str, tmp_path: Path) -> None:
    sparse = tiny_model(model_type)
    whole = sparse.num_parameters()
    sparse.save_pretrained(tmp_path / "sparse")
    settings: dict[str, Any] = {"batch_size": 7, "refit_steps": 5}
    config = CondenseConfig.best(target_size=0.7, **settings)
    done = condense_pretrained(tmp_path / "sparse", config, calibration=IDS, state_dir=tmp_path / "state")
    plan = done.condense_plan
    assert plan.spread is not None
    # Two experts for each token; deepseek_v3 has two groups, each of which keeps as many.
    numbers = {0, 4, 6} if model_type == "deepseek_v3" else {0, *range(2, 8)}
    assert {curve.routed for layer in plan.spread.layers for curve in layer.curves} == numbers
    # With random weights, few experts are worth more than what can be fitted to all of them.
    assert any(layer.routed for layer in plan.layers) or model_type == "deepseek_v3"
    assert int(0.7 * whole) - one_step(plan) < done.num_parameters() <= 0.7 * whole
    assert estimate(tmp_path / "sparse", plan).after == done.num_parameters()
    done.save_pretrained(tmp_path / "small")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert differing(state(done), state(again)) == []
    ids = torch.tensor(IDS[:2])
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, done(input_ids=ids).logits)
    # Another size from the same errors, as a search finds it, from the saved checkpoint.
    smaller = CondensePlan.load(tmp_path / "small").truncate(target_size=0.5)
    if model_type == "qwen2_moe":
        assert smaller == search_plan(sparse, CondenseConfig.best(target_size=0.5, **settings), calibration=IDS)


def test_an_interrupted_search_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CondenseConfig.fast(target_size=0.6, **SETTINGS)
    whole = search_plan(sparse_model("qwen2_moe"), config, calibration=IDS)
    measured, measure = [], search.measure_layer

    def interrupted(examples: Any, *others: Any) -> Any:
        measured.append(examples.block.layer)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return measure(examples, *others)

    monkeypatch.setattr(search, "measure_layer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search_plan(sparse_model("qwen2_moe"), config, calibration=IDS, state_dir=tmp_path)
    assert search_plan(sparse_model("qwen2_moe"), config, calibration=IDS, state_dir=tmp_path) == whole
    assert sorted(measured) == sorted([measured[0], *(layer.layer for layer in whole.spread.layers[1:]), measured[1]])


def test_read_from_disk(tmp_path: Path) -> None:
    """One layer at a time in memory gives the same model."""
    sparse = sparse_model("qwen2_moe")
    sparse.save_pretrained(tmp_path / "sparse")
    config = CondenseConfig.fast(target_size=0.6, **SETTINGS)
    done = condense_pretrained(tmp_path / "sparse", config, calibration=IDS)
    other = condense_pretrained(tmp_path / "sparse", config, calibration=IDS, offload_folder=str(tmp_path / "offload"))
    assert other.condense_plan == done.condense_plan
    for name, model in (("one", done), ("other", other)):
        model.save_pretrained(tmp_path / name)
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("one", "other"))
    assert differing(state(one), state(two)) == []


def test_no_weights_wait_for_the_garbage_collector(tmp_path: Path) -> None:
    """Copies of experts are freed at once: in cycles, several would be in memory together."""
    sparse = tiny_model("mixtral")
    sparse.save_pretrained(tmp_path / "sparse")
    config = CondenseConfig.best(target_size=0.7, batch_size=7, refit_steps=2)
    gc.collect()
    gc.disable()
    try:
        done = condense_pretrained(tmp_path / "sparse", config, calibration=IDS, offload_folder=tmp_path / "offload")
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        waiting = [each for each in gc.garbage if isinstance(each, torch.Tensor) and not each.is_meta]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert any(layer.routed for layer in done.condense_plan.layers)
    experts = sum(parameter.nbytes for parameter in sparse.model.layers[1].mlp.experts.parameters())
    assert sum({each.data_ptr(): each.nbytes for each in waiting}.values()) < 0.05 * experts


def test_alike_for_stock_checkpoints() -> None:
    config = CondenseConfig.fast(target_size=0.6, exportable="stock", **SETTINGS)
    plan = search_plan(sparse_model("deepseek"), config, calibration=IDS)
    assert len({(len(layer.routed or ()), layer.width) for layer in plan.layers}) == 1
    assert plan.spread is not None
    assert len(plan.layers) == len(plan.spread.layers)
    assert plan.truncate(target_size=0.55).layers[0].width == plan.truncate(target_size=0.55).layers[-1].width


def test_estimates(tmp_path: Path) -> None:
    sparse = tiny_model("qwen2_moe")
    sparse.save_pretrained(tmp_path)
    config = CondenseConfig.best(target_size=0.7)
    sizes = estimate(tmp_path, config)
    assert (sizes.before, sizes.after) == (sparse.num_parameters(), int(0.7 * sparse.num_parameters()))
    assert sizes.least is not None
    assert "no routed neuron, least" in dry_run(tmp_path, config)
    shared_only = condense_pretrained(tmp_path, CondenseConfig(num_layers=3, num_experts=0), calibration=IDS)
    assert shared_only.num_parameters() == sizes.least
    for size in (0.05, "10 params", "1GB"):
        with pytest.raises(ValueError, match=f"smallest size, without any routed neuron, is {sizes.least:,}"):
            condense_pretrained(tmp_path, CondenseConfig.best(target_size=size), calibration="no such file")
