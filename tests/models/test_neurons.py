"""Refits of single routed neurons: their choice against naive computations in float64, and their folding."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from cdmoe_plugin import CondenseConfig, CondensedLayer, CondensePlan, apply_plan, condense_pretrained, search_plan
from cdmoe_plugin.blocks import find_sparse_blocks, layers_path
from cdmoe_plugin.calibration import calibration_for
from cdmoe_plugin.condense.fold import fold
from cdmoe_plugin.condense.refit import LayerExamples, RefitLayer
from cdmoe_plugin.condense.refit.neurons import NeuronPool, forward_least_squares, highest_first
from cdmoe_plugin.decoder.stream import LayerStream
from cdmoe_plugin.decoder.whole import searching
from cdmoe_plugin.model.lookup import condensed_layers
from cdmoe_plugin.registry import EXPERT_SELECTIONS, REFITS
from tests.helpers.models import FOLDS, sparse_model
from tests.helpers.naive import naive_double, naive_gated_expert, naive_glus, naive_route, naive_shared, watch
from tests.helpers.naive_neurons import most, naive_energies, naive_least_squares, naive_neurons
from tests.helpers.plans import some_plan
from tests.helpers.states import differing, state
from tests.helpers.tiny_models import available, tiny_model

IDS = torch.randint(3, 128, (20, 24), generator=torch.Generator().manual_seed(0)).tolist()
MANY = torch.randint(3, 128, (150, 32), generator=torch.Generator().manual_seed(1)).tolist()
KEPT, WIDTH = 3, 16
METHODS = ["energy", "least_squares"]


def refitted(model: PreTrainedModel, plan: CondensePlan, neurons: str, **config: Any) -> PreTrainedModel:
    settings = CondenseConfig(**{"refit": "down_proj", "refit_neurons": neurons, "batch_size": 7, **config})
    return apply_plan(model, plan, settings, calibration=IDS)


def routes_of(model: PreTrainedModel, block: Any, x: Tensor) -> list[dict[int, float]]:
    if model.config.model_type != "gpt_oss":
        return [naive_route(model.config, block.gate, token) for token in x]
    logits, best = (x @ block.router.weight.T + block.router.bias).topk(model.config.num_experts_per_tok)
    return [
        dict(zip(e.tolist(), w.tolist(), strict=True)) for e, w in zip(best, logits.softmax(-1).double(), strict=True)
    ]


@torch.no_grad()
def naive_choice(model: PreTrainedModel, method: str) -> list[int]:
    """The neurons that the first condensed layer, 1, keeps for a target that is the sparse block's output."""
    double = naive_double(model)
    owner = double.model.layers[1]
    block = owner.mlp
    seen = watch(double, IDS, block)
    x = torch.cat([inputs for inputs, _ in seen])
    neurons = naive_neurons(double, block, 1, x)
    energies = naive_energies(neurons, routes_of(double, block, x))
    if method == "energy":
        return most(energies, KEPT * WIDTH)
    candidates = most(energies, 2 * KEPT * WIDTH)
    held_out = torch.arange(len(IDS)).repeat_interleave(24) % 5 == 4
    hidden = torch.cat([output for _, output in watch(double, IDS, owner)])
    given = [torch.ones(len(x), 1, dtype=torch.float64)] if model.config.model_type == "gpt_oss" else []
    shared = next((getattr(block, n) for n in ("shared_expert", "shared_experts") if hasattr(block, n)), None)
    if shared is not None:
        inner = naive_glus(double.config, 1)[1](shared.gate_proj(x), shared.up_proj(x))
        gate = getattr(block, "shared_expert_gate", None)
        given.append(inner if gate is None else inner * torch.sigmoid(gate(x)))
        # that these are the shared expert's activations
        again = naive_shared(block, owner, x, naive_glus(double.config, 1)[1])
        torch.testing.assert_close(given[-1] @ shared.down_proj.weight.T, again)
    columns = torch.cat([*given, neurons.activations[:, candidates]], 1)[~held_out]
    target, weights = torch.cat([output for _, output in seen]), 1 / hidden.square().mean(-1)
    first = columns.shape[1] - len(candidates)
    chosen = naive_least_squares(columns, target[~held_out], weights[~held_out], first, KEPT * WIDTH)
    return [candidates[j] for j in chosen]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model_type", ["qwen2_moe", "deepseek", "mixtral", "gpt_oss"])
def test_chosen_neurons(model_type: str, method: str) -> None:
    sparse = sparse_model(model_type)
    expected = naive_choice(sparse, method)
    by_layer = {block.layer: block for block in find_sparse_blocks(sparse)}
    ups = by_layer[1].expert_weights().up.flatten(0, 1).clone()
    done = refitted(copy.deepcopy(sparse), some_plan([1]), method, refit_target="block")
    mlp = condensed_layers(done)[1]
    shared = mlp.shared_intermediate_size
    assert mlp.intermediate_size == shared + KEPT * WIDTH
    found = [int((ups == row).all(1).nonzero()) for row in mlp.up_proj.weight[shared:]]
    assert found == expected
    # Not by whole experts.
    counts = {str(e): sum(j // WIDTH == e for j in expected) for e in {j // WIDTH for j in expected}}
    assert len(counts) > KEPT
    assert done.config.condense_config["neurons"]["1"] == counts
    assert done.config.condense_config["refit_neurons"] == method


@pytest.mark.parametrize("number", [11, 26])
@pytest.mark.parametrize("together", [1, 2, 5])
def test_forward_least_squares(together: int, number: int) -> None:
    generator = torch.Generator().manual_seed(together)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    columns, weights = draw(60, 6) @ draw(6, 30) + 0.3 * draw(60, 30), draw(60).square()
    columns[:, 20] = columns[:, 10]
    target = columns @ draw(30, 4) + draw(60, 4)
    both = torch.cat([columns, target], 1)
    products = (both[:, :30] * weights[:, None]).T @ both
    before = products[:, :30].clone()
    found = forward_least_squares(products[:, :30], products[:, 30:], 4, number, together)
    # Also of all, the first ones are the best of so few.
    expected = naive_least_squares(columns, target, weights, 4, 10, together)
    assert sorted(found[:10].tolist()) == expected
    assert len(set(found.tolist())) == number
    order = torch.cat([torch.arange(4), found + 4])
    torch.testing.assert_close(products[: len(order), : len(order)].tril(), before[order][:, order].tril())


def test_one_of_two_equal_neurons_is_enough() -> None:
    columns = torch.eye(12, dtype=torch.float64)[:, [0, 0, 0, 1, 2, 3]]
    target = torch.diag(torch.tensor([9.0, 5, 3, 2, *[0] * 8], dtype=torch.float64))
    both = torch.cat([columns, target], 1)
    products = both[:, :6].T @ both
    assert forward_least_squares(products[:, :6], products[:, 6:], 0, 3, 3).tolist() == [0, 3, 4]  # in this order


def test_ties_go_to_the_lower_index() -> None:
    scores = torch.tensor([1.0, 2.0, 0.0, 2.0 * (1 + 1e-9), -1.0, 0.0])
    assert highest_first(scores.double()).tolist()[:2] == [1, 3]
    assert highest_first(scores)[2:4].tolist() == [0, 2]
    assert highest_first(scores.flip(0)).tolist()[:2] == [2, 4]


@pytest.mark.parametrize(("model_type", "overrides"), FOLDS)
def test_parts_of_experts_add_up(model_type: str, overrides: dict[str, Any]) -> None:
    """Half of every expert's neurons and the other half, with half of its output bias each, are the expert."""
    model = tiny_model(model_type, **overrides)
    block = find_sparse_blocks(model)[0]
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    experts, gates = [2, 0, 3], [0.4, 0.1, 0.3]
    order = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(2))
    halves = [fold(block, experts, gates, [part] * 3) for part in (order[:8], order[8:])]
    whole, without = fold(block, experts, gates), fold(block, [], [])
    with torch.no_grad():
        one, other, expected, rest = (mlp.sum_of_experts(x) for mlp in (*halves, whole, without))
    assert {mlp.intermediate_size for mlp in halves} == {block.shared_intermediate_size + 24}
    torch.testing.assert_close(one + other - rest, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(one, expected, rtol=1e-2)
    again = fold(block, experts, gates, [torch.arange(WIDTH)] * 3)
    assert differing(state(whole), state(again)) == []


ENERGIES: list[tuple[str, dict[str, Any]]] = [
    ("qwen2_moe", {}),
    ("gpt_oss", {}),
    ("llama4_text", {}),
    ("gemma4_text", {}),
    ("jetmoe", {}),
    ("dbrx", {}),
    ("deepseek_v3", {}),
    ("nemotron_h", {"moe_latent_size": 24, "mlp_bias": True}),
    *((name, {}) for name in ("inkling2_text",) if available(name)),
]


@pytest.mark.parametrize(("model_type", "overrides"), ENERGIES)
@torch.no_grad()
def test_energies(model_type: str, overrides: dict[str, Any]) -> None:
    """The energy is the squared size of what a neuron adds to the block's output, summed over its tokens."""
    model = tiny_model(model_type, **overrides)
    blocks = find_sparse_blocks(model)
    config = CondenseConfig(batch_size=5)
    data = calibration_for(model, IDS, config, None)
    block = blocks[0]
    with searching(model):
        stream = LayerStream(model, layers_path(blocks), data.batches)
        inputs = list(stream.embeddings)
        for layer in range(block.layer):
            inputs = [stream.run_layer(layer, given, i) for i, given in enumerate(inputs)]
        examples = LayerExamples(stream, block, inputs, None, 0)
        routed = [examples.routed(batch) for batch in range(len(examples))]
        pool = NeuronPool(CondensedLayer(block.layer, [1, 4], [0.3, 0.2]), examples)
    x, experts, weights = (torch.cat(parts).double() for parts in zip(*routed, strict=True))
    down = block.expert_weights().down
    kept = down.clone()
    model = model.double()
    down = block.expert_weights().down
    glu = naive_glus(model.config, block.layer)[0]
    expected = torch.zeros(block.num_experts, WIDTH, dtype=torch.float64)
    for expert in range(block.num_experts):
        tokens, places = (experts == expert).nonzero(as_tuple=True)
        down.zero_()
        gates = weights[tokens, places][:, None]
        nothing = naive_gated_expert(block.module, expert, gates, x[tokens], glu)
        for j in range(WIDTH):
            down[expert, :, j] = kept[expert, :, j]
            alone = naive_gated_expert(block.module, expert, gates, x[tokens], glu) - nothing
            expected[expert, j] = alone.square().sum()
            down.zero_()
        mean = float(gates.mean()) if len(gates) else float("nan")
        assert pool.gates[expert] == pytest.approx({1: 0.3, 4: 0.2}.get(expert, mean), rel=1e-6, nan_ok=True)
    torch.testing.assert_close(pool.energies, expected, rtol=1e-4, atol=1e-8)
    assert expected.max() > 0


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(input_ids=torch.tensor(IDS)).logits


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model_type", ["qwen2_moe", "gpt_oss", "nemotron_h"])
def test_all_neurons_are_all_experts(model_type: str, method: str) -> None:
    sparse = tiny_model(model_type, num_experts=4)
    plan = CondensePlan([CondensedLayer(layer, [2, 0, 3, 1], [0.4, 0.2, 0.1, 0.3]) for layer in (1, 3)])
    one, other = (refitted(copy.deepcopy(sparse), plan, neurons) for neurons in ("experts", method))
    torch.testing.assert_close(logits(one), logits(other), rtol=1e-3, atol=1e-4)
    assert other.config.condense_config["neurons"]["1"] == {str(e): WIDTH for e in range(4)}
    assert "neurons" not in one.config.condense_config


@pytest.mark.parametrize("method", METHODS)
def test_same_choice_for_any_batch_size_and_memory(method: str) -> None:
    one, again, other = (
        refitted(sparse_model("deepseek"), some_plan([1, 2]), method, **given)
        for given in ({"batch_size": 20}, {"batch_size": 20, "cache_memory": "1KB"}, {"batch_size": 3})
    )
    assert differing(state(one), state(again)) == []
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_neurons_come_nearer_than_experts() -> None:
    sparse = sparse_model("deepseek")
    plan = search_plan(sparse, CondenseConfig(layers=[1], num_experts=3), calibration=IDS)
    errors = {}
    for neurons in ("experts", *METHODS):
        config = CondenseConfig(refit="down_proj", refit_neurons=neurons, num_samples=150)
        done = apply_plan(copy.deepcopy(sparse), plan, config, calibration=MANY)
        errors[neurons] = done.config.condense_config["refit_errors"]["1"]
    assert errors["least_squares"][1] < errors["energy"][1] < errors["experts"][1]
    for before, _ in errors.values():  # of the plan's experts, folded
        assert before == pytest.approx(errors["experts"][0])


def test_whole_experts_stay_if_they_are_better(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REFITS, "down_proj", lambda _mlp, _examples: RefitLayer(1e9, 1e9))
    sparse = sparse_model("qwen2_moe")
    done = refitted(copy.deepcopy(sparse), some_plan([1]), "energy")
    plain = apply_plan(sparse, some_plan([1]))
    assert differing(state(done), state(plain)) == []
    noted = done.config.condense_config
    assert noted["neurons"]["1"] == {str(e): WIDTH for e in some_plan([1]).layers[0].experts}
    assert noted["refit_errors"]["1"][0] == noted["refit_errors"]["1"][1] < 1e9


@pytest.mark.parametrize("neurons", METHODS)
def test_no_expert_search(neurons: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sparse = sparse_model("qwen2_moe")
    given = {"num_layers": 2, "num_experts": 3, "batch_size": 5}
    counted = search_plan(sparse, CondenseConfig(expert_selection="frequency", **given), calibration=IDS)

    def refuse(*_: Any) -> None:
        raise AssertionError("experts are searched")

    for name in list(EXPERT_SELECTIONS):
        monkeypatch.setitem(EXPERT_SELECTIONS, name, refuse)
    config = CondenseConfig(refit="down_proj", refit_neurons=neurons, **given)
    plan = search_plan(sparse, config, calibration=IDS)
    for mine, other in zip(plan.layers, counted.layers, strict=True):
        assert (mine.layer, mine.experts, mine.gates) == (other.layer, other.experts, other.gates)
        assert (mine.score, mine.tokens, mine.expert_scores) == (other.score, other.tokens, None)
    assert plan.config == config.to_dict() | {"expert_selection": "frequency"}
    assert CondensePlan.from_dict(plan.to_dict()) == plan
    smaller = plan.truncate(num_layers=1, num_experts=2)
    done = refitted(copy.deepcopy(sparse), smaller, neurons)
    assert sum(done.config.condense_config["neurons"][str(smaller.layers[0].layer)].values()) == 2 * WIDTH
    one = condense_pretrained(copy.deepcopy(sparse), config, calibration=IDS)
    assert differing(state(one), state(refitted(sparse, plan, neurons, batch_size=5))) == []


def test_interrupted_search_goes_on(tmp_path: Any) -> None:
    config = CondenseConfig(num_layers=2, num_experts=3, refit="down_proj", refit_neurons="energy")
    one, again = (search_plan(sparse_model("qwen2_moe"), config, calibration=IDS, state_dir=tmp_path) for _ in range(2))
    assert one == again


def test_layers_without_routed_neurons() -> None:
    plan = CondensePlan([CondensedLayer(1, [], [])])
    sparse = sparse_model("qwen2_moe")
    one, other = (refitted(copy.deepcopy(sparse), plan, neurons) for neurons in ("experts", "least_squares"))
    assert differing(state(one), state(other)) == []


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"refit": "down_proj", "refit_neurons": "some"}, "'experts', 'energy', 'least_squares'"),
        ({"refit_neurons": "energy"}, "needs a `refit`"),
        ({"refit": "down_proj", "refit_neurons": "energy", "layer_selection": "local"}, "`layer_selection='local'`"),
    ],
)
def test_bad_requests(config: dict[str, Any], message: str) -> None:
    model = sparse_model("qwen2_moe")
    with pytest.raises(ValueError, match=message):
        condense_pretrained(model, CondenseConfig(**{"num_layers": 1, "num_experts": 1, **config}), calibration=IDS)
