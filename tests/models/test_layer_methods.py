"""Layer selections and metrics against a naive re-computation; every combination of methods; resuming all of them."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterable
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import log_softmax
from transformers import PreTrainedModel

from cdmoe_plugin import CondenseConfig, CondensePlan, search_plan
from cdmoe_plugin.config import condense_arguments
from cdmoe_plugin.metrics.ppl import perplexities
from cdmoe_plugin.registry import COMPARE, EXPERT_SELECTIONS, LAYER_SELECTIONS, METRICS, MODEL_METRICS
from cdmoe_plugin.search.layers import greedy as layer_room
from cdmoe_plugin.search.layers.variants import ModelVariants
from cdmoe_plugin.search.state import SearchState
from tests.helpers.interrupting import Interrupted, interrupting
from tests.helpers.models import build
from tests.helpers.naive import close
from tests.helpers.naive_methods import naive_distance, naive_own_divergences, naive_perplexities, order_of
from tests.helpers.tiny_models import random_ids, tiny_model

SEQUENCES = [ids[:length] for ids, length in zip(random_ids(4, 16, seed=1), (16, 5, 9, 2), strict=True)]
CONFIG = CondenseConfig(num_layers=3, num_experts=2, batch_size=3, expert_selection="frequency")
ALL_METRICS = [*METRICS, *MODEL_METRICS]
# "similarity" measures no divergence: tests of trimming hold it against a naive computation of its own.
MEASURED = [name for name in LAYER_SELECTIONS if name != "similarity"]
CASES = [case for case in itertools.product(MEASURED, ALL_METRICS, COMPARE) if case[:2] != ("local", "ppl")]


@cache
def model() -> PreTrainedModel:
    return build("qwen2_moe", True, num_layers=5)


@cache
def found(selection: str, metric: str, compare: str) -> CondensePlan:
    config = replace(CONFIG, layer_selection=selection, metric=metric, compare=compare)
    return search_plan(model(), config, calibration=SEQUENCES)


@cache
def choices() -> dict[int, Any]:
    """Experts and gates of every sparse layer, which the layer search has no say in."""
    plan = search_plan(model(), replace(CONFIG, layers=[1, 2, 3, 4]), calibration=SEQUENCES)
    return {row.layer: (row.experts, row.gates) for row in plan.layers}


@cache
def distance(layers: tuple[int, ...], metric: str, compare: str) -> float:
    return naive_distance(model(), SEQUENCES, {i: choices()[i] for i in layers}, metric, compare)


def naive_order(selection: str, metric: str, compare: str) -> list[int]:
    if selection == "local":
        own = {i: naive_own_divergences(model(), SEQUENCES, metric, i, c)[-1] for i, c in choices().items()}
        return order_of(own)[:3]
    if selection == "global":
        return order_of({i: distance((i,), metric, compare) for i in choices()})[:3]
    order: list[int] = []
    for _ in range(3):
        left = [i for i in choices() if i not in order]
        order.append(min(left, key=lambda i: distance(tuple(sorted([*order, i])), metric, compare)))
    return order


@pytest.mark.parametrize(("selection", "metric", "compare"), CASES)
def test_order_and_scores_are_the_naive_ones(selection: str, metric: str, compare: str) -> None:
    plan = found(selection, metric, compare)
    layers = [row.layer for row in plan.layers]
    assert layers == naive_order(selection, metric, compare)
    along = [distance(tuple(sorted(layers[: i + 1])), metric, compare) for i in range(3)]
    assert [row.score for row in plan.layers] == pytest.approx(along, rel=1e-3 if metric == "ppl" else 1e-4)
    for row in plan.layers:
        own = naive_own_divergences(
            model(), SEQUENCES, "js" if metric == "ppl" else metric, row.layer, choices()[row.layer]
        )
        assert row.expert_scores == close(own)
    if selection == "local":
        assert plan.layer_divergences is None
        assert [row.expert_scores[-1] for row in plan.layers] == sorted(row.expert_scores[-1] for row in plan.layers)
    else:
        alone = {i: distance((i,), metric, compare) for i in choices()}
        assert plan.layer_divergences == pytest.approx(alone, rel=1e-3 if metric == "ppl" else 1e-4)


def test_orders_are_no_matter_of_course() -> None:
    orders = {case: tuple(row.layer for row in found(*case).layers) for case in CASES}
    assert orders["local", "js", "hidden"] != orders["global", "js", "hidden"]
    assert orders["greedy", "ppl", "hidden"] != orders["global", "ppl", "hidden"] != orders["global", "js", "hidden"]


@pytest.mark.parametrize("selection", MEASURED)
def test_orders_are_nested(selection: str) -> None:
    plan = found(selection, "js", "hidden")
    for number in (1, 2):
        config = replace(CONFIG, layer_selection=selection, num_layers=number)
        smaller, cut = search_plan(model(), config, calibration=SEQUENCES), plan.truncate(num_layers=number)
        assert replace(smaller, layers=cut.layers) == cut
        for mine, its in zip(smaller.layers, cut.layers, strict=True):
            # How many variants of the model run as one batch, the last bits depend on.
            assert mine.score == close(its.score)
            assert replace(mine, score=None) == replace(its, score=None)


def test_perplexity_goes_by_the_head_whatever_is_compared() -> None:
    for selection in ("greedy", "global"):
        assert found(selection, "ppl", "hidden").layers == found(selection, "ppl", "logits").layers
    greedy = replace(CONFIG, layers=[1, 2], expert_selection="greedy")
    plans = [search_plan(model(), replace(greedy, metric=m), calibration=SEQUENCES) for m in ("ppl", "js", "mse")]
    assert plans[0].layers == plans[1].layers != plans[2].layers


def test_perplexities() -> None:
    generator = torch.Generator().manual_seed(0)
    ids, mask = (
        torch.randint(50, (3, 6), generator=generator),
        torch.tensor([[1] * 6, [1] * 3 + [0] * 3, [1] + [0] * 5]),
    )
    logits = 5 * torch.randn(3, 6, 50, generator=generator)
    expected = []
    for row, tokens, length in zip(logits.double(), ids.tolist(), (6, 3, 1), strict=True):
        losses = [-float(log_softmax(row[i], 0)[tokens[i + 1]]) for i in range(length - 1)]
        expected.append(torch.tensor(sum(losses) / max(1, len(losses))).exp().item())
    assert perplexities(logits, ids, mask).tolist() == pytest.approx(expected, rel=1e-5)
    assert perplexities(logits, ids, mask)[2] == 1.0
    half = perplexities(logits.bfloat16(), ids, mask)
    assert torch.equal(half, perplexities(logits.bfloat16().float(), ids, mask))
    tensors = [torch.tensor([ids]) for ids in SEQUENCES]
    measured = [perplexities(model()(ids).logits, ids, torch.ones_like(ids)) for ids in tensors]
    assert torch.cat(measured).tolist() == pytest.approx(naive_perplexities(model(), SEQUENCES), rel=1e-4)


@pytest.mark.parametrize("selection", MEASURED)
def test_ties_go_to_the_lower_index(selection: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = {1: 3.0, 2: 1.0 + 3e-7, 4: 1.0, 5: 2.0, 7: 1.0 - 3e-7}

    class Additive(ModelVariants):
        steps = 1  # type: ignore[assignment]

        def __init__(self, _data: Any) -> None: ...

        def divergences(self, variants: Iterable[frozenset[int]], tick: Any = int) -> dict[frozenset[int], float]:
            return {variant: sum(scores[layer] for layer in variant) for variant in variants}

    name = "variants_of" if selection == "greedy" else "ModelVariants"
    monkeypatch.setattr(sys.modules[LAYER_SELECTIONS[selection].__module__], name, Additive)
    data = SimpleNamespace(candidates=list(scores), own_divergences=scores)
    assert LAYER_SELECTIONS[selection](data, 4).layers == [2, 4, 7, 5]


@pytest.mark.parametrize("cache_memory", ["1KB", "1GB"])
def test_progress_ends_where_it_should(cache_memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = []

    class Watched(ModelVariants):
        def divergences(self, variants: Any, tick: Any = int) -> dict[frozenset[int], float]:
            done: list[int] = []
            scores = super().divergences(variants, done.append)
            rounds.append((sum(done), self.steps))
            return scores

    monkeypatch.setattr(layer_room, "variants_of", Watched)
    search_plan(model(), replace(CONFIG, batch_size=1, cache_memory=cache_memory), calibration=SEQUENCES)
    assert rounds == [(5 * 4, 5 * 4)] * 3  # five layers, four batches


def test_what_does_not_go_together_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"`layer_selection='local'`.*`metric='ppl'`"):
        search_plan(None, CondenseConfig(layer_selection="local", metric="ppl"))
    monkeypatch.setitem(EXPERT_SELECTIONS, "frequency", None)  # the expert search is not reached
    decoder = tiny_model("qwen2_moe").model
    for wish in ({"metric": "ppl"}, {"compare": "logits"}):
        with pytest.raises(ValueError, match="need a model with a language-modelling head"):
            search_plan(decoder, replace(CONFIG, **wish), calibration=SEQUENCES)


def test_the_help_names_every_method() -> None:
    texts = {f.name: f.metadata["help"] for f in fields(condense_arguments())}
    registries: dict[str, Any] = {"expert_selection": EXPERT_SELECTIONS, "layer_selection": LAYER_SELECTIONS}
    for name, registry in (registries | {"metric": ALL_METRICS, "compare": COMPARE}).items():
        assert all(re.search(rf"\b{method}\b", texts[name]) for method in registry)


def test_settings_of_the_paper_do_not_follow_the_defaults() -> None:
    given: dict[str, Any] = {}

    class Recording(CondenseConfig):
        def __init__(self, **values: Any) -> None:
            given.update(values)
            super().__init__(**values)

    assert Recording.paper().num_layers == 9
    names = {"expert_selection": "greedy", "layer_selection": "greedy", "metric": "js", "compare": "hidden"}
    names |= {"layer_search": "full"}
    sizes = {"num_layers": 9, "num_experts": 6, "num_samples": 100, "max_length": 512, "seed": 0}
    assert given == {**names, **sizes, "gates": "mean", "refit": None, "refit_neurons": "experts"}


def test_every_combination() -> None:
    """Each gives a plan, and the plan is the same from any combination that shares what decides.

    With all of three kinds of methods, by turns of hidden states and of logits, which CASES have all of.
    """
    small = tiny_model("qwen2_moe", num_layers=3, num_experts=4, dense_layers=1)
    ids = random_ids(2, 8)
    by_experts: dict[str, Any] = {}
    for experts, layers, metric in itertools.product(EXPERT_SELECTIONS, LAYER_SELECTIONS, ALL_METRICS):
        compare = [*COMPARE][([*LAYER_SELECTIONS].index(layers) + ALL_METRICS.index(metric)) % 2]
        names = {"expert_selection": experts, "layer_selection": layers, "metric": metric, "compare": compare}
        config = CondenseConfig(num_layers=2, num_experts=2, **names)
        if (layers, metric) == ("local", "ppl"):
            with pytest.raises(ValueError, match="'ppl'"):
                search_plan(small, config, calibration=ids)
            continue
        plan = search_plan(small, config, calibration=ids)
        assert CondensePlan.from_dict(plan.to_dict()) == plan
        assert sorted(row.layer for row in plan.layers) == [1, 2]
        assert all(len(row.expert_scores) == 3 for row in plan.layers)
        assert all(row.score is None if layers == "similarity" else row.score > 0 for row in plan.layers)
        chosen = {row.layer: (row.experts, row.expert_scores) for row in plan.layers}
        shared = f"{experts} {'js' if metric == 'ppl' else metric}"
        assert by_experts.setdefault(shared, chosen) == chosen


# What is kept: experts of three layers, and rounds (each alone and along the order; along it; three greedy ones).
RESUMED = [("reap", "global", "js", 5), ("random", "local", "kl", 4), ("d_optimal", "greedy", "ppl", 6)]


@pytest.mark.parametrize(("experts", "layers", "metric", "results"), RESUMED)
def test_resumes_to_the_same_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, experts: str, layers: str, metric: str, results: int
) -> None:
    small = tiny_model("qwen2_moe", num_layers=4, num_experts=4, dense_layers=1)
    config = CondenseConfig(3, 2, expert_selection=experts, layer_selection=layers, metric=metric)
    unbroken = search_plan(small, config, calibration=SEQUENCES)
    for after in range(results):
        with monkeypatch.context() as patch:
            patch.setattr(SearchState, "update", interrupting(after))
            with pytest.raises(Interrupted):
                search_plan(small, config, calibration=SEQUENCES, state_dir=tmp_path / str(after))
        with monkeypatch.context() as patch:
            patch.setattr(SearchState, "update", interrupting(results - after))  # nothing is done again
            assert search_plan(small, config, calibration=SEQUENCES, state_dir=tmp_path / str(after)) == unbroken
    other = replace(config, expert_selection="l1")
    with pytest.raises(ValueError, match="its config differ"):
        search_plan(small, other, calibration=SEQUENCES, state_dir=tmp_path / "1")
