"""Searches with an expert budget: against a naive re-computation, and never worse than the same K for all layers."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from cdmoe_plugin import CondensedLayer, CondensePlan, search_plan
from cdmoe_plugin.registry import EXPERT_SELECTIONS
from tests.helpers import naive
from tests.helpers.budgets import AUTO, EXPERT, SEQUENCES, helpful
from tests.helpers.models import build
from tests.helpers.naive import close
from tests.helpers.naive_methods import naive_own_divergences
from tests.helpers.tiny_models import tiny_model


def same(plan: CondensePlan, other: CondensePlan) -> bool:
    return plan.layers == other.layers


def choices(rows: list[CondensedLayer]) -> dict[int, naive.Choice]:
    return {row.layer: (row.experts, row.gates) for row in rows}


@cache
def targets(model: PreTrainedModel) -> tuple[PreTrainedModel, list[torch.Tensor]]:
    double = naive.naive_double(model)
    return double, naive.run(double, SEQUENCES, "hidden")


def measured(model: PreTrainedModel, chosen: Mapping[int, naive.Choice]) -> float:
    """Divergence of the model's output, by a forward pass in float64 of the model with naive condensed layers."""
    double, target = targets(model)
    with naive.condensed(double, dict(chosen)):
        return naive.distance("js", target, naive.run(double, SEQUENCES, "hidden"))


@cache
def searched(model: PreTrainedModel) -> tuple[Any, Any]:
    """The gates and the greedy orders of a naive search, of which a shallower one finds the first experts."""
    gates = naive.naive_gates(model, SEQUENCES)
    return gates, naive.naive_expert_search(model, SEQUENCES, gates, 6, "js")


CASES = [("helpful", name) for name in ("qwen2_moe", "deepseek_v3", "mixtral")]
CASES += [("random", name) for name in ("qwen2_moe", "mixtral", "deepseek_v3")]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("kind", "model_type"), CASES)
def test_never_worse_than_the_same_number_for_all(kind: str, model_type: str, seed: int) -> None:
    model = helpful(model_type, seed) if kind == "helpful" else tiny_model(model_type, seed=seed, num_experts=6)
    for budget in (3, 7, 12):
        plan = search_plan(model, replace(AUTO, expert_budget=budget), calibration=SEQUENCES)
        same_for_all = replace(AUTO, num_experts=budget // 3, expert_budget=None)
        uniform = search_plan(model, same_for_all, calibration=SEQUENCES)
        assert sum(len(row.experts) for row in plan.layers) <= budget
        assert [row.layer for row in plan.layers] == [row.layer for row in uniform.layers]
        assert plan.layer_divergences == uniform.layer_divergences
        for count in (1, 3):  # `score` is true along the order
            divergence = measured(model, choices(plan.layers[:count]))
            assert plan.layers[count - 1].score == close(divergence)
        better = measured(model, choices(uniform.layers)) - divergence
        assert better > 0 or same(plan, uniform)


def test_spread_is_no_matter_of_course() -> None:
    """Or the test above would prove less."""
    counts = []
    for seed in range(3):
        for model_type in ("qwen2_moe", "deepseek_v3"):
            plan = search_plan(helpful(model_type, seed), replace(AUTO, expert_budget=7), calibration=SEQUENCES)
            counts.append(tuple(len(row.experts) for row in plan.layers))
            assert sum(counts[-1]) >= 6
    assert len(set(counts)) > 2
    assert any(0 in count for count in counts)


@pytest.mark.parametrize("layers", [None, [3, 1]])
@pytest.mark.parametrize("budget", [2, 5, 8])
def test_the_naive_spread(layers: list[int] | None, budget: int) -> None:
    """Greedy orders, effects alone, all allocations, and the better one of two, computed again."""
    model = helpful("qwen2_moe", 1)
    number, order = (3, None) if layers is None else (2, layers)
    k = budget // number
    depth = min(6, budget, 3 * -(-budget // number))
    gates, found = searched(model)

    def choose(numbers: Mapping[int, int]) -> dict[int, naive.Choice]:
        return {i: (found[i].order[:n], [gates[i][e] for e in found[i].order[:n]]) for i, n in numbers.items()}

    if order is None:
        search = naive.naive_layer_search(model, SEQUENCES, choose(dict.fromkeys(found, k)), 3, "js", "hidden")
        order = search.order
    alone = {layer: measured(model, choose({layer: k})) for layer in order}
    own = {
        layer: naive_own_divergences(model, SEQUENCES, "js", layer, choose({layer: depth})[layer]) for layer in order
    }
    allocations = [
        dict(zip(order, numbers, strict=True))
        for numbers in itertools.product(range(depth + 1), repeat=len(order))
        if sum(numbers) <= budget
    ]
    best = min(allocations, key=lambda kept: sum(alone[i] * own[i][n] / own[i][k] for i, n in kept.items()))
    expected = min((dict.fromkeys(order, k), best), key=lambda numbers: measured(model, choose(numbers)))
    plan = search_plan(model, replace(AUTO, layers=layers, expert_budget=budget), calibration=SEQUENCES)
    assert {row.layer: len(row.experts) for row in plan.layers} == expected
    assert {row.layer: row.experts for row in plan.layers} == {i: c[0] for i, c in choose(expected).items()}
    assert plan.layers[-1].score == close(measured(model, choose(expected)))


@pytest.mark.parametrize("wishes", [{"layer_selection": "local"}, {"layer_selection": "global"}, {"metric": "ppl"}])
def test_with_other_methods(wishes: dict[str, Any]) -> None:
    model = helpful("qwen2_moe", 1)
    plan = search_plan(model, replace(AUTO, **wishes), calibration=SEQUENCES)
    uniform = search_plan(model, replace(AUTO, num_experts=2, expert_budget=None, **wishes), calibration=SEQUENCES)
    assert [row.layer for row in plan.layers] == [row.layer for row in uniform.layers]
    assert plan.layer_divergences == uniform.layer_divergences
    assert plan.layers[-1].score is not None
    assert uniform.layers[-1].score is not None
    assert plan.layers[-1].score < uniform.layers[-1].score


@pytest.mark.parametrize("method", list(EXPERT_SELECTIONS))
def test_with_every_expert_selection(method: str) -> None:
    plan = search_plan(helpful("qwen2_moe"), replace(AUTO, expert_selection=method), calibration=SEQUENCES)
    assert 0 < sum(len(row.experts) for row in plan.layers) <= 6


def test_units() -> None:
    model = helpful("qwen2_moe")
    plan = search_plan(model, AUTO, calibration=SEQUENCES)
    assert sum(len(row.experts) for row in plan.layers) == 6
    for budget in (f"{6 * EXPERT} params", f"{6.4 * EXPERT / 1000}K params", f"{6 * EXPERT * 4}B", "36KiB"):
        assert same(search_plan(model, replace(AUTO, expert_budget=budget), calibration=SEQUENCES), plan)
    half = search_plan(model.bfloat16(), replace(AUTO, expert_budget=f"{6 * EXPERT * 2}B"), calibration=SEQUENCES)
    assert sum(len(row.experts) for row in half.layers) == 6
    with pytest.raises(ValueError, match="`expert_budget` is 1,000,000 parameters, but all routed experts of 3 layers"):
        search_plan(model, replace(AUTO, expert_budget="1M params"), calibration=SEQUENCES)
    with pytest.raises(ValueError, match="`expert_budget` is 13 experts, but all routed experts of 2 layers are 12"):
        search_plan(model, replace(AUTO, expert_budget=13, layers=[1, 2]), calibration=SEQUENCES)


def test_all_and_nothing() -> None:
    model = helpful("qwen2_moe")
    nothing = search_plan(model, replace(AUTO, expert_budget=0), calibration=SEQUENCES)
    assert [row.experts for row in nothing.layers] == [[], [], []]
    too_small = replace(AUTO, expert_budget="1KB")
    assert same(search_plan(model, too_small, calibration=SEQUENCES), nothing)
    everything = search_plan(model, replace(AUTO, expert_budget=18), calibration=SEQUENCES)
    assert sum(len(row.experts) for row in everything.layers) >= 15
    assert everything.layers[-1].score < 0.1 * (nothing.layers[-1].score or 0)


def test_an_expert_that_no_token_chose_is_no_candidate() -> None:
    model = build("deepseek_v3", True)
    model.model.layers[1].mlp.gate.e_score_correction_bias[4] = -10.0
    plan = search_plan(model, replace(AUTO, expert_budget=18), calibration=SEQUENCES)
    assert all(4 not in row.experts for row in plan.layers if row.layer == 1)
