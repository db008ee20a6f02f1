"""Every expert selection but the greedy one against a naive re-computation, and what they promise in common."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from cdmoe_plugin import CondenseConfig, CondensePlan, search_plan
from cdmoe_plugin.registry import EXPERT_SELECTIONS
from cdmoe_plugin.search.experts import comparison
from cdmoe_plugin.search.experts import d_optimal as diversity
from cdmoe_plugin.search.experts import gram as products
from cdmoe_plugin.search.experts import pl_alpha_hill as spectrum
from cdmoe_plugin.search.experts.pl_alpha_hill import pl_alpha_hill
from cdmoe_plugin.search.order import ascending
from tests.helpers import naive
from tests.helpers.models import build
from tests.helpers.naive import close
from tests.helpers.naive_methods import (
    naive_alpha,
    naive_expert_order,
    naive_frequency,
    naive_own_divergences,
    order_of,
)
from tests.helpers.tiny_models import random_ids, tiny_model

SEQUENCES = [ids[:length] for ids, length in zip(random_ids(5, 16, seed=1), (16, 5, 9, 2, 12), strict=True)]
CONFIG = CondenseConfig(num_experts=6, layers=[1, 2, 3], batch_size=2)
METHODS = list(EXPERT_SELECTIONS)
COMPUTED = [method for method in METHODS if method not in ("greedy", "random")]
TYPES = ["qwen2_moe", "deepseek_v3"]


@cache
def gates_of(model_type: str) -> dict[int, dict[int, float]]:
    return naive.naive_gates(varied(model_type), SEQUENCES)


def varied(model_type: str) -> Any:
    """Experts that differ in the shapes of their spectra, too; two layers in which one expert is never chosen."""
    model = build(model_type, True, top_k=2)
    generator = torch.Generator().manual_seed(4)
    for layer in model.model.layers[1:]:
        for weight in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
            for expert in weight.data:
                u, s, v = torch.linalg.svd(expert, full_matrices=False)
                power = 0.5 + 2 * torch.rand((), generator=generator)
                expert.copy_(u * (s**power * s.norm() / (s**power).norm()) @ v)
    if model_type == "deepseek_v3":
        model.model.layers[2].mlp.gate.e_score_correction_bias[0] = -10.0
        model.model.layers[3].mlp.gate.e_score_correction_bias[4] = -10.0
    return model


def search(model_type: str, method: str, **wishes: Any) -> CondensePlan:
    wishes = {"num_experts": 6 if model_type == "qwen2_moe" else 5} | wishes
    return search_plan(varied(model_type), replace(CONFIG, expert_selection=method, **wishes), calibration=SEQUENCES)


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("method", METHODS)
def test_order_and_divergences_are_the_naive_ones(model_type: str, method: str) -> None:
    for row in search(model_type, method).layers:
        gates = gates_of(model_type)[row.layer]
        assert set(row.experts) <= set(gates)
        if method in COMPUTED:
            expected = naive_expert_order(varied(model_type), SEQUENCES, method, row.layer, gates, len(row.experts))
            assert row.experts == expected
        assert row.gates == pytest.approx([gates[e] for e in row.experts], rel=0, abs=1e-6)
        choice = (row.experts, [gates[e] for e in row.experts])
        scores = naive_own_divergences(varied(model_type), SEQUENCES, "js", row.layer, choice)
        assert row.expert_scores == close(scores)
        seen = naive_frequency(naive.naive_double(varied(model_type)), SEQUENCES, row.layer)
        assert row.tokens == [-seen[e] for e in row.experts]


# Layers that norm what their block gives, mix it into several streams, or own the shared expert; blocks that norm their
# own sum or multiply what their experts are given; other weight layouts.
@pytest.mark.parametrize("model_type", ["afmoe", "axk1", "dbrx", "granitemoeshared", "llama4_text", "qwen4_exp_text"])
@pytest.mark.parametrize("method", ["reap", "d_optimal", "pl_alpha_hill"])
def test_layers_that_do_more_with_their_block(model_type: str, method: str) -> None:
    model = tiny_model(model_type, num_experts=4)
    config = CondenseConfig(num_layers=2, num_experts=2, expert_selection=method, batch_size=3)
    for row in search_plan(model, config, calibration=SEQUENCES[:3]).layers:
        choice = (row.experts, row.gates)
        scores = naive_own_divergences(model, SEQUENCES[:3], "js", row.layer, choice)
        assert row.expert_scores == close(scores)


@pytest.mark.parametrize("method", ["l1", "pl_alpha_hill"])
def test_experts_without_gates_have_two_matrices(method: str) -> None:
    """Their up projections count once; the order would be another one with these counted twice."""
    model = tiny_model("nemotron_h", num_experts=6, top_k=6)
    generator = torch.Generator().manual_seed(1)
    score = {"l1": lambda matrix: float(matrix.abs().sum()), "pl_alpha_hill": naive_alpha}[method]
    doubled = {}
    for layer in (1, 3, 5):
        experts = model.model.layers[layer].mixer.experts
        for expert in (*experts.up_proj.data, *experts.down_proj.data):
            u, s, v = torch.linalg.svd(expert, full_matrices=False)
            size, power = torch.rand(2, generator=generator) + 0.5
            expert.copy_(size * (u * s**power) @ v)
        pairs = enumerate(zip(experts.up_proj.data, experts.down_proj.data, strict=True))
        doubled[layer] = order_of({i: 2 * score(up) + score(down) for i, (up, down) in pairs})
    config = CondenseConfig(num_layers=3, num_experts=6, expert_selection=method)
    rows = search_plan(model, config, calibration=SEQUENCES[:1]).layers
    for row in rows:
        gates = dict(zip(row.experts, row.gates, strict=True))
        assert row.experts == naive_expert_order(model, SEQUENCES, method, row.layer, gates, 6)
    assert {row.layer: row.experts for row in rows} != doubled


def test_reap_where_gates_multiply_inputs() -> None:
    """The saliency is the mean norm of what an expert really added."""
    model = tiny_model("llama4_text", num_experts=5, top_k=5)
    config = CondenseConfig(num_layers=3, num_experts=5, expert_selection="reap")
    rows = {row.layer: row.experts for row in search_plan(model, config, calibration=SEQUENCES).layers}
    double, plain = naive.naive_double(model), {}
    for layer, block in naive.sparse_blocks(double).items():
        added = torch.zeros(2, 5, dtype=torch.float64)
        for inputs, _ in naive.watch(double, SEQUENCES, block):
            for x in inputs:
                for expert, gate in naive.naive_own_route(block, x) or []:
                    added[0, expert] += naive.naive_expert(block, expert, gate * x).norm().item()
                    added[1, expert] += gate * naive.naive_expert(block, expert, x).norm().item()
        expected, plain[layer] = (order_of(dict(enumerate(sums.tolist())), highest=True) for sums in added)
        assert rows[layer] == expected
    assert plain != rows  # what gates on outputs would give


def test_an_expert_that_no_token_chose_is_never_kept() -> None:
    assert 0 not in gates_of("deepseek_v3")[2]
    assert 4 not in gates_of("deepseek_v3")[3]
    for method in METHODS:
        plan = search("deepseek_v3", method)
        assert [sorted(row.experts) for row in plan.layers[1:]] == [[1, 2, 3, 4, 5], [0, 1, 2, 3, 5]]


@pytest.mark.parametrize("method", METHODS)
def test_orders_are_nested(method: str) -> None:
    plan = search("qwen2_moe", method)
    for number in (0, 1, 3):
        fewer = search("qwen2_moe", method, num_experts=number)
        for row, full in zip(fewer.layers, plan.layers, strict=True):
            assert row.experts == full.experts[:number]
            assert row.expert_scores == close(full.expert_scores[: number + 1])


def test_orders_are_no_matter_of_course() -> None:
    orders = {method: [row.experts for row in search("qwen2_moe", method).layers] for method in METHODS}
    assert len(set(map(str, orders.values()))) == len(METHODS)
    assert all(order != sorted(order) for method in COMPUTED for order in orders[method])


def test_seed_decides_random_and_nothing_else() -> None:
    plans = {seed: search("qwen2_moe", "random", seed=seed) for seed in range(4)}
    assert len({str([row.experts for row in plan.layers]) for plan in plans.values()}) == 4
    assert len({str(row.experts) for row in plans[0].layers}) == 3  # layers draw for themselves
    assert search("qwen2_moe", "random", seed=2) == plans[2]
    alone = search("qwen2_moe", "random", layers=[2], seed=2).layers[0]
    assert alone.experts == plans[2].layers[1].experts
    for method in (*COMPUTED, "greedy"):
        assert search("qwen2_moe", method, seed=3).layers == search("qwen2_moe", method).layers


@pytest.mark.parametrize("method", [method for method in METHODS if method != "random"])
@pytest.mark.parametrize("twins", [(0, 4), (1, 3)])
def test_ties_go_to_the_lower_index(method: str, twins: tuple[int, int]) -> None:
    model = tiny_model("qwen2_moe", num_experts=5, top_k=5, dense_layers=0)
    for layer in model.model.layers:
        layer.mlp.gate.weight.data.zero_()  # all gates are 1/5
        for weight in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
            weight.data[twins[1]] = weight.data[twins[0]]
    config = CondenseConfig(num_experts=5, layers=[0, 1, 2, 3], expert_selection=method, batch_size=2)
    for row in search_plan(model, config, calibration=random_ids(5, 16)).layers:
        assert row.experts.index(twins[0]) < row.experts.index(twins[1])
        if method == "frequency":
            assert row.experts == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("method", METHODS)
def test_pieces_and_batches_do_not_matter(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = search("qwen2_moe", method)
    monkeypatch.setattr(comparison, "_COMPUTE_ELEMENTS", 6 * 32 * 7)
    monkeypatch.setattr(comparison, "_COMPARE_ELEMENTS", {"cpu": 5 * 32 * 3})
    monkeypatch.setattr(products, "_OUTPUT_ELEMENTS", {"cpu": 6 * 32 * 7})
    monkeypatch.setattr(products, "_WIDE_ELEMENTS", {"cpu": 6 * 32 * 2})
    monkeypatch.setattr(spectrum, "_GRAM_ELEMENTS", 16 * 16 * 2)
    for row, whole in zip(search("qwen2_moe", method, batch_size=5).layers, plan.layers, strict=True):
        assert row.experts == whole.experts
        assert row.expert_scores == close(whole.expert_scores)


@pytest.mark.parametrize("method", METHODS)
def test_half_precision(method: str) -> None:
    """The weights' own numbers are those of their float32 copies; what depends on activations is near."""
    half = varied("qwen2_moe").bfloat16()
    config = replace(CONFIG, expert_selection=method, num_experts=2)
    plan = search_plan(half, config, calibration=SEQUENCES)
    wide = search_plan(half.float(), config, calibration=SEQUENCES)
    for row, other in zip(plan.layers, wide.layers, strict=True):
        if method in ("random", "l1", "pl_alpha_hill"):
            assert row.experts == other.experts
            assert row.expert_scores == pytest.approx(other.expert_scores, rel=0.05)


@pytest.mark.parametrize("shape", [(16, 32), (32, 16), (40, 40), (200, 300)])
def test_pl_alpha_hill_of_one_matrix(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    for power in (0.5, 1.0, 1.5):
        matrix = torch.randn(shape, generator=generator).double()
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        matrix = u * s**power @ v
        values = torch.linalg.eigvalsh(matrix.T @ matrix)  # the larger of the two, zeros and all
        assert pl_alpha_hill(values) == pytest.approx(naive_alpha(matrix), rel=1e-6)


def test_pl_alpha_hill_by_hand() -> None:
    # Half of the eigenvalues in the lowest bin: the threshold is 1, and the tail what comes after it.
    values = torch.tensor([1.0, 1.001, 1.002, 4.0, 16.0], dtype=torch.float64)
    total = sum(torch.tensor([1.001, 1.002, 4.0, 16.0], dtype=torch.float64).log().tolist())
    assert pl_alpha_hill(values) == pytest.approx(1 + 4 / total, rel=1e-12)
    # A peak inside: what lies below it counts for nothing.
    values = torch.tensor([1e-3, 1.0, 1.001, 4.0], dtype=torch.float64)
    total = sum(torch.tensor([1.001, 4.0], dtype=torch.float64).log().tolist())
    assert pl_alpha_hill(values) == pytest.approx(1 + 2 / total, rel=1e-12)
    for flat in ([0.0, 0.0], [0.0, 2.0], [3.0, 3.0], [1e-20, 2.0]):
        assert pl_alpha_hill(torch.tensor(flat, dtype=torch.float64)) == float("inf")


def test_ascending() -> None:
    assert ascending({3: 1.0, 1: 1.0 + 1e-8, 0: 2.0, 2: -4.0}) == [2, 1, 3, 0]
    assert ascending({0: float("inf"), 1: 5.0, 2: float("inf")}) == [1, 0, 2]
    assert ascending({}) == []


def test_twins_are_not_diverse() -> None:
    """An expert that is there already adds nothing, however large it is."""
    vectors = torch.tensor([[9.0, 0, 0], [9.0, 0, 0], [0, 1.0, 0], [5.0, 0.5, 0.3], [0, 0, 0]], dtype=torch.float64)
    assert diversity.largest_volume(vectors @ vectors.T, 5) == [0, 2, 3, 1, 4]
    assert diversity.largest_volume(torch.zeros(3, 3, dtype=torch.float64), 3) == [0, 1, 2]
