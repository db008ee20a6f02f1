"""Greedy selection by squared error from inner products alone: the same plans as by comparing outputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from cdmoe_plugin import CondenseConfig, CondensePlan, search_plan
from cdmoe_plugin.search.experts import gram as products
from cdmoe_plugin.search.experts.gram import SquaredErrors
from tests.helpers.models import build
from tests.helpers.naive import close
from tests.helpers.naive_methods import naive_own_divergences
from tests.helpers.records import Record, record
from tests.helpers.tiny_models import available, random_ids, tiny_model

__all__ = ["record"]  # a fixture

SEQUENCES = [ids[:length] for ids, length in zip(random_ids(5, 16, seed=1), (16, 5, 9, 2, 12), strict=True)]
CONFIG = CondenseConfig(num_layers=2, num_experts=3, metric="mse", batch_size=3)
# Layers that add their block's output, some of them with a factor, one with a shared expert of the layer's own.
ADDING = ["qwen2_moe", "deepseek", "deepseek_v3", "mixtral", "laguna", "dbrx", "granitemoeshared", "minimax"]


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For every layer whether inner products served."""
    seen: list[bool] = []
    of = SquaredErrors.of

    def spy(data: Any) -> SquaredErrors | None:
        errors = of(data)
        seen.append(errors is not None)
        return errors

    monkeypatch.setattr(SquaredErrors, "of", spy)
    return seen


def search(model: PreTrainedModel, config: CondenseConfig = CONFIG) -> CondensePlan:
    return search_plan(model, config, calibration=SEQUENCES)


def plainly(model: PreTrainedModel, config: CondenseConfig = CONFIG) -> CondensePlan:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SquaredErrors, "of", lambda _data: None)
        return search(model, config)


def made(model_type: str) -> PreTrainedModel:
    names = ("qwen2_moe", "deepseek", "deepseek_v3", "mixtral", "laguna")
    return build(model_type) if model_type in names else tiny_model(model_type, num_experts=6)


@pytest.mark.parametrize("pieces", [None, (6 * 32 * 7, 6 * 32 * 2), (1, 1)])
@pytest.mark.parametrize("model_type", ADDING)
def test_same_as_by_comparing_outputs(
    model_type: str, pieces: tuple[int, int] | None, record: Record, used: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    if pieces is not None:
        monkeypatch.setattr(products, "_OUTPUT_ELEMENTS", {"cpu": pieces[0]})
        monkeypatch.setattr(products, "_WIDE_ELEMENTS", {"cpu": pieces[1]})
    model = made(model_type)
    plan, fast = search(model), dict(record.experts)
    assert used[-1] is False  # the last layer's output goes through the final norm
    assert sum(used) >= 2
    expected = plainly(model)
    assert [(row.layer, row.experts, row.gates) for row in plan.layers] == [
        (row.layer, row.experts, row.gates) for row in expected.layers
    ]
    for layer, order in record.experts.items():
        assert fast[layer].experts == order.experts
        assert fast[layer].scores == close(order.scores)
        for step, other in zip(fast[layer].steps, order.steps, strict=True):
            assert step == pytest.approx(other, rel=1e-5, abs=0)


def test_divergences_are_the_naive_ones(used: list[bool]) -> None:
    model = made("deepseek_v3")
    for row in search(model, replace(CONFIG, layers=[1, 2])).layers:
        scores = naive_own_divergences(model, SEQUENCES, "mse", row.layer, (row.experts, row.gates))
        assert row.expert_scores == close(scores)
    assert used == [True, True]


@pytest.mark.parametrize("wishes", [{"metric": "js"}, {"metric": "ppl"}])
def test_other_metrics_compare_outputs(wishes: dict[str, Any], used: list[bool]) -> None:
    search(made("qwen2_moe"), replace(CONFIG, **wishes))
    assert not any(used)


@pytest.mark.parametrize("model_type", filter(available, ["afmoe", "flex_olmo", "qwen4_exp_text"]))
def test_layers_that_do_more_compare_outputs(model_type: str, used: list[bool]) -> None:
    plan = search(tiny_model(model_type, num_experts=4))
    assert used
    assert not any(used)
    assert all(len(row.experts) == 3 for row in plan.layers)


def test_no_experts_and_half_precision(used: list[bool]) -> None:
    model = made("qwen2_moe")
    assert search(model, replace(CONFIG, num_experts=0)).layers == plainly(model, replace(CONFIG, num_experts=0)).layers
    assert used == []  # nothing to choose among: the experts need not be computed
    half = model.bfloat16()
    for row, other in zip(search(half).layers, plainly(half).layers, strict=True):
        assert row.experts == other.experts
        assert row.expert_scores == close(other.expert_scores)


@pytest.mark.parametrize("twins", [(0, 4), (1, 3)])
def test_ties_go_to_the_lower_index(twins: tuple[int, int], used: list[bool]) -> None:
    model = tiny_model("qwen2_moe", num_experts=5, top_k=5, dense_layers=0)
    for layer in model.model.layers:
        layer.mlp.gate.weight.data.zero_()  # all gates are 1/5
        for weight in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
            weight.data[twins[1]] = weight.data[twins[0]]
    plan = search(model, replace(CONFIG, num_experts=5, layers=[0, 1, 2]))
    assert used == [True] * 3
    for row in plan.layers:
        assert row.experts.index(twins[0]) < row.experts.index(twins[1])
        assert row.expert_scores is not None
        assert 0 <= row.expert_scores[-1] < 1e-9 * row.expert_scores[0]  # with all of them, nothing is missing


def test_an_expert_that_no_token_chose_is_no_candidate(used: list[bool]) -> None:
    model = build("deepseek_v3", True)
    model.model.layers[1].mlp.gate.e_score_correction_bias[4] = -10.0
    plan = search(model, replace(CONFIG, layers=[1, 2], num_experts=5))
    assert used == [True, True]
    assert sorted(plan.layers[0].experts) == [0, 1, 2, 3, 5]
    assert [row.experts for row in plan.layers] == [
        row.experts for row in plainly(model, replace(CONFIG, layers=[1, 2], num_experts=5)).layers
    ]


def test_errors_by_hand() -> None:
    errors = SquaredErrors(torch.tensor([[1, 0, 0.5], [0, 1, 1], [0.5, 1, 2]], dtype=torch.float64))
    assert (errors.without(), errors.with_each()) == (2.0, [2.0, 1.0])
    errors.keep(1)
    assert errors.with_each() == [1.0, 2.0]  # a second time, the same expert is too much
    rounded = SquaredErrors(torch.tensor([[1, 1], [1, 1 - 1e-12]], dtype=torch.float64))
    assert rounded.with_each() == [0.0]


def test_what_is_not_finite_is_left_to_comparison(used: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    model, gram_matrix = made("qwen2_moe"), products.gram_matrix

    def overflowing(*args: Any, **kwargs: Any) -> torch.Tensor:
        gram = gram_matrix(*args, **kwargs)
        gram[2, 2] = torch.inf
        return gram

    expected = plainly(model)
    monkeypatch.setattr(products, "gram_matrix", overflowing)
    assert search(model).layers == expected.layers
    assert used
    assert not any(used)
