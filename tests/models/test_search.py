"""The searches against the naive reference: gates, every divergence of every step, and every order."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from cdmoe_plugin import CondenseConfig, CondensePlan, apply_plan, search_plan
from cdmoe_plugin.decoder.tails import AffineTail, PlaybackTail, StreamsTail
from cdmoe_plugin.registry import EXPERT_SELECTIONS, METRICS
from cdmoe_plugin.search.experts import comparison
from tests.helpers import naive
from tests.helpers.models import build
from tests.helpers.naive import close
from tests.helpers.records import Record
from tests.helpers.states import state_of
from tests.helpers.tiny_models import available, random_ids, tiny_model

CASES = [("mixtral", None), ("laguna", None)]
CASES += [(name, norm) for name in ("qwen2_moe", "deepseek", "deepseek_v3") for norm in (False, True)]
SEQUENCES = [ids[:length] for ids, length in zip(random_ids(5, 16, seed=1), (16, 5, 9, 2, 12), strict=True)]
SEARCH = CondenseConfig(num_layers=3, num_experts=3, batch_size=3)


@cache
def reference(model_type: str, norm: bool | None, metric: str, compare: str) -> tuple[Any, ...]:
    """Naive gates, expert search and layer search of `build(model_type, norm)`."""
    model = build(model_type, norm)
    gates = naive.naive_gates(model, SEQUENCES)
    experts = naive.naive_expert_search(model, SEQUENCES, gates, 3, metric)
    choices = {layer: (s.order, [gates[layer][e] for e in s.order]) for layer, s in experts.items()}
    return gates, experts, naive.naive_layer_search(model, SEQUENCES, choices, 3, metric, compare)


def same_steps(found: list[dict[int, float]], expected: list[dict[int, float]]) -> None:
    assert [list(step) for step in found] == [list(step) for step in expected]  # the candidates
    for step, other in zip(found, expected, strict=True):
        assert step == close(other)


def check(plan: CondensePlan, record: Record, *case: Any) -> None:
    gates, experts, layers = reference(*case)
    assert sorted(record.gates) == sorted(gates)
    for layer, expected in gates.items():
        found = {e: float(g) for e, g in enumerate(record.gates[layer]) if not g.isnan()}
        assert found == pytest.approx(expected, rel=0, abs=1e-6)
        assert record.experts[layer].experts == experts[layer].order
        assert record.experts[layer].scores == close(experts[layer].scores)
        same_steps(record.experts[layer].steps, experts[layer].steps)
    assert [row.layer for row in plan.layers] == record.layers[0].layers == layers.order
    assert [row.score for row in plan.layers] == record.layers[0].scores
    assert record.layers[0].scores == close(layers.scores[1:])
    same_steps(record.layers[0].rounds, layers.steps)
    assert plan.layer_divergences == record.layers[0].rounds[0]
    for row in plan.layers:
        assert row.experts == experts[row.layer].order
        assert row.expert_scores == record.experts[row.layer].scores
        assert row.gates == [float(record.gates[row.layer][e]) for e in row.experts]


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(("model_type", "norm"), CASES)
def test_search_is_the_naive_one(model_type: str, norm: bool | None, batch_size: int, record: Record) -> None:
    config = replace(SEARCH, batch_size=batch_size)
    model = build(model_type, norm)
    plan = search_plan(model, config, calibration=SEQUENCES)
    check(plan, record, model_type, norm, "js", "hidden")
    expected = naive.naive_condensed_forward(
        model, SEQUENCES, {row.layer: (row.experts, row.gates) for row in plan.layers}
    )
    apply_plan(model, plan)
    for ids, logits in zip(SEQUENCES, expected, strict=True):
        torch.testing.assert_close(model(torch.tensor([ids])).logits[0].double(), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("metric", "compare"), [("js", "logits"), ("kl", "hidden"), ("mse", "logits")])
@pytest.mark.parametrize(("model_type", "norm"), [("qwen2_moe", True), ("deepseek_v3", False)])
def test_other_outputs_and_metrics(model_type: str, norm: bool, metric: str, compare: str, record: Record) -> None:
    config = replace(SEARCH, metric=metric, compare=compare)
    plan = search_plan(build(model_type, norm), config, calibration=SEQUENCES)
    check(plan, record, model_type, norm, metric, compare)


# Layers that scale or norm what their block gives, mix it into several streams, own the shared expert, or read from the
# inputs of layers before; blocks that norm their own sum, add a bias, multiply what their experts are given, or are but
# a part of the layer's MLP.
OTHER_LAYERS = ("afmoe", "beam", "dbrx", "flex_olmo", "granitemoeshared", "kolibri1", "minimax", "qwen4_exp_text")
OTHER_LAYERS += ("deepseek_v4", "glm5_next_text", "hy_v4", "inkling2_text")
OTHER_BLOCKS = ("axk1", "gemma4_text", "jetmoe", "llama4_text")


@pytest.mark.parametrize(
    ("model_type", "metric"),
    [*((name, "js") for name in filter(available, (*OTHER_LAYERS, *OTHER_BLOCKS))), ("llama4_text", "mse")],
)
def test_layers_that_do_more_with_their_block(model_type: str, metric: str, record: Record) -> None:
    model = tiny_model(model_type, num_experts=4)
    config = replace(SEARCH, num_layers=2, num_experts=2, metric=metric)
    plan = search_plan(model, config, calibration=SEQUENCES[:3])
    gates = {layer: dict(enumerate(found.tolist())) for layer, found in record.gates.items()}
    experts = naive.naive_expert_search(model, SEQUENCES[:3], gates, 2, metric)
    for layer, search in experts.items():
        assert record.experts[layer].scores == close(search.scores)
        same_steps(record.experts[layer].steps, search.steps)
    choices = {layer: (search.order, [gates[layer][e] for e in search.order]) for layer, search in experts.items()}
    layers = naive.naive_layer_search(model, SEQUENCES[:3], choices, 2, metric, "hidden")
    same_steps(record.layers[0].rounds, layers.steps)
    assert [row.layer for row in plan.layers] == layers.order


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("qwen2_moe", AffineTail),
        ("granitemoeshared", AffineTail),
        ("afmoe", PlaybackTail),
        ("qwen4_exp_text", StreamsTail),
    ]
    + [(name, StreamsTail) for name in ("deepseek_v4", "glm5_next_text", "hy_v4")]
    + [("inkling2_text", PlaybackTail)],
)
def test_how_layers_use_what_their_block_gives(
    model_type: str, expected: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what is no sum is run again for every candidate."""
    if not available(model_type):
        pytest.skip("not in this transformers")
    kinds, greedy = set(), EXPERT_SELECTIONS["greedy"]

    def spy(data: Any, num_experts: int) -> Any:
        kinds.update(type(call.tail) for call in data.calls)
        return greedy(data, num_experts)

    monkeypatch.setitem(EXPERT_SELECTIONS, "greedy", spy)
    search_plan(tiny_model(model_type), replace(SEARCH, num_layers=1, num_experts=0), calibration=SEQUENCES[:2])
    assert kinds == {expected}


def test_the_orders_are_no_matter_of_course() -> None:
    """Or the tests above would prove less: layers are not chosen by depth, nor the same experts everywhere."""
    orders = [reference(*case, "js", "hidden")[2].order for case in CASES]
    assert len(set(map(tuple, orders))) > 2
    firsts = {search.order[0] for case in CASES for search in reference(*case, "js", "hidden")[1].values()}
    assert len(firsts) > 3


@pytest.mark.parametrize("metric", METRICS)
def test_divergences_of_any_outputs(metric: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-2, 1.0, 30.0):  # nearly uniform to nearly one-hot
        target, candidate = (scale * torch.randn(5, 7, 40, generator=generator) for _ in range(2))
        expected = naive.NAIVE_METRICS[metric](target, candidate)
        torch.testing.assert_close(METRICS[metric](target, candidate).double(), expected, rtol=1e-4, atol=5e-7)
        assert METRICS[metric](target, target).abs().max() < 1e-6
        half = METRICS[metric](target.bfloat16(), candidate.bfloat16())
        assert torch.equal(half, METRICS[metric](target.bfloat16().float(), candidate.bfloat16().float()))


@pytest.mark.parametrize("cache_memory", ["1KB", "30KB", "4GB"])
def test_memory_and_pieces_do_not_matter(cache_memory: str, record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens computed and compared in small pieces, all, some or none of them kept."""
    monkeypatch.setattr(comparison, "_COMPUTE_ELEMENTS", 6 * 32 * 7)
    monkeypatch.setattr(comparison, "_COMPARE_ELEMENTS", {"cpu": 5 * 32 * 3})
    model = build("qwen2_moe", True)
    plan = search_plan(model, replace(SEARCH, cache_memory=cache_memory), calibration=SEQUENCES)
    check(plan, record, "qwen2_moe", True, "js", "hidden")
    kept = search_plan(model, SEARCH, calibration=SEQUENCES)
    assert [row.expert_scores for row in kept.layers] == [row.expert_scores for row in plan.layers]  # bitwise
    assert replace(kept, config=None) == replace(plan, config=None)


def test_smaller_plans_are_prefixes() -> None:
    model = build("deepseek_v3", True)
    large = search_plan(model, SEARCH, calibration=SEQUENCES)
    small = search_plan(model, replace(SEARCH, num_experts=1, layers=[3, 1]), calibration=SEQUENCES)
    rows = {row.layer: row for row in large.layers}
    assert [row.layer for row in small.layers] == [3, 1]
    assert small.layer_divergences is None
    for row in small.layers:
        assert row.score is None
        assert row.experts == rows[row.layer].experts[:1]
        assert row.gates == rows[row.layer].gates[:1]
        assert row.expert_scores == rows[row.layer].expert_scores[:2]
    fewer = search_plan(model, replace(SEARCH, num_layers=2), calibration=SEQUENCES)
    assert fewer == large.truncate(num_layers=2)


def test_an_expert_that_no_token_chose_is_no_candidate(record: Record) -> None:
    model = build("deepseek_v3", True)
    model.model.layers[1].mlp.gate.e_score_correction_bias[4] = -10.0
    search_plan(model, replace(SEARCH, num_experts=5, layers=[1, 2]), calibration=SEQUENCES)
    assert [4 in gates for gates in naive.naive_gates(model, SEQUENCES).values()] == [False, True, True]
    assert sorted(record.experts[1].experts) == [0, 1, 2, 3, 5]
    with pytest.raises(ValueError, match="only 5 of the 6 experts of decoder layer 1"):
        search_plan(model, replace(SEARCH, num_experts=6), calibration=SEQUENCES)


@pytest.mark.parametrize("cache_memory", ["1KB", "4GB"])
@pytest.mark.parametrize("twins", [(0, 4), (1, 3)])
def test_ties_go_to_the_lower_index(twins: tuple[int, int], cache_memory: str, record: Record) -> None:
    model = tiny_model("qwen2_moe", num_experts=5, top_k=5, dense_layers=0)
    for layer in model.model.layers:
        layer.mlp.gate.weight.data.zero_()  # all gates are 1/5
        for weight in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
            weight.data[twins[1]] = weight.data[twins[0]]
    config = replace(SEARCH, num_experts=5, batch_size=2, cache_memory=cache_memory)
    for number, length in ((5, 16), (3, 9), (6, 30)):
        search_plan(model, config, calibration=random_ids(number, length))
        for order in record.experts.values():
            assert order.experts.index(twins[0]) < order.experts.index(twins[1])


@pytest.fixture
def mixed_modes() -> Iterator[PreTrainedModel]:
    """A model, partly in training mode, that must come out as it went in."""
    model = build("qwen2_moe", True, attention_dropout=0.3).train()
    model.model.layers[2].eval()
    model.model.layers[1].mlp.experts.gate_up_proj.requires_grad_(False)
    with torch.no_grad():
        model(torch.tensor(SEQUENCES[:1]))  # transformers' own lazy set-up
    before = state_of(model)
    yield model
    after = state_of(model)
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=0)
    assert after[1] == before[1]


def test_the_model_stays_as_it_was(mixed_modes: PreTrainedModel) -> None:
    search_plan(mixed_modes, SEARCH, calibration=SEQUENCES)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("share", [0.0, 0.4, 0.8, 1.0])
def test_the_model_stays_as_it_was_when_a_search_fails(
    mixed_modes: PreTrainedModel, share: float, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted after a share of all calls of experts: while observing, choosing experts, or choosing layers."""
    calls, last = 0, float("inf")
    forward = type(mixed_modes.model.layers[3]).forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls >= last:
            raise error("stop")
        return forward(*args, **kwargs)

    monkeypatch.setattr(type(mixed_modes.model.layers[3]), "forward", counting)
    search_plan(mixed_modes, SEARCH, calibration=SEQUENCES)
    last = max(1, int(share * calls))
    calls = 0
    with pytest.raises(error, match="stop"):
        search_plan(mixed_modes, SEARCH, calibration=SEQUENCES)


def test_training_mode_and_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("mixtral", router_jitter_noise=0.5, attention_dropout=0.5)
    config = replace(SEARCH, num_samples=3)
    plan = search_plan(model, config, calibration=SEQUENCES)
    assert search_plan(model.train(), config, calibration=SEQUENCES) == plan
    other = search_plan(model, replace(config, seed=1), calibration=SEQUENCES)
    assert other.calibration["fingerprint"] != plan.calibration["fingerprint"]
    assert other.layers != plan.layers


@pytest.mark.parametrize("model_type", ["qwen2_moe", "deepseek_v3", "mixtral"])
def test_bfloat16_chooses_as_float32_does(model_type: str, record: Record) -> None:
    half = build(model_type).bfloat16()
    calibration = random_ids(12, 40, seed=2)
    search_plan(half, SEARCH, calibration=calibration)
    gates, experts = dict(record.gates), dict(record.experts)
    search_plan(copy.deepcopy(half).float(), SEARCH, calibration=calibration)
    for layer, wide in record.experts.items():
        torch.testing.assert_close(gates[layer], record.gates[layer], rtol=0, atol=1e-2)
        assert experts[layer].experts[:2] == wide.experts[:2]
        assert experts[layer].scores == pytest.approx(wide.scores, rel=0.03)
    assert record.layers[0].layers == record.layers[1].layers
    assert record.layers[0].scores == pytest.approx(record.layers[1].scores, rel=0.05)
