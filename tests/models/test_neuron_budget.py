"""An expert budget that is spread over layers as numbers of neurons: error curves, plans, and models of these sizes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from cdmoe_plugin import CondenseConfig, CondensePlan, apply_plan, condense_pretrained, search_plan
from cdmoe_plugin.blocks import find_sparse_blocks, layers_path
from cdmoe_plugin.calibration import calibration_for
from cdmoe_plugin.condense.mixed import mix
from cdmoe_plugin.condense.refit import LayerExamples
from cdmoe_plugin.condense.refit.examples import held_out_error, size_of
from cdmoe_plugin.condense.refit.neurons import NeuronPool, neurons_of_most_energy
from cdmoe_plugin.condense.refit.ridge import STRENGTHS, refit_down_proj
from cdmoe_plugin.decoder.stream import LayerStream
from cdmoe_plugin.decoder.whole import searching
from cdmoe_plugin.plan import CondensedLayer
from cdmoe_plugin.search.spread import measure
from cdmoe_plugin.search.spread.measure import Family, measure_layer
from cdmoe_plugin.search.spread.mixed import StayingExperts
from cdmoe_plugin.search.spread.plan import all_forms
from tests.helpers.models import sparse_model
from tests.helpers.naive import naive_double, naive_expert, naive_glus, naive_route, watch
from tests.helpers.naive_neurons import most, naive_energies, naive_neurons
from tests.helpers.states import differing, state

IDS = torch.randint(3, 128, (20, 24), generator=torch.Generator().manual_seed(0)).tolist()
WIDTH = 16
BUDGET = {"num_layers": 2, "num_experts": "auto", "expert_budget": 4, "batch_size": 7}


def second_layer(model: PreTrainedModel) -> tuple[LayerExamples, NeuronPool]:
    block = next(block for block in find_sparse_blocks(model) if block.layer == 1)
    data = calibration_for(model, IDS, CondenseConfig(batch_size=7), None)
    stream = LayerStream(model, layers_path([block]), data.batches)
    inputs = [stream.run_layer(0, entering, batch) for batch, entering in enumerate(stream.embeddings)]
    examples = LayerExamples(stream, block, inputs, None, 2**20)
    return examples, NeuronPool(CondensedLayer(1, [], [], width=block.num_experts * WIDTH), examples)


@pytest.mark.parametrize("stay", [[], [1, 3, 6]])
@torch.no_grad()
def test_errors_of_widths(stay: list[int]) -> None:
    """The neurons with the most energy, fitted for each width by a naive ridge regression in float64.

    If experts stay behind the router, to what they do not give, with the gate of the shared expert for all neurons.
    """
    model = sparse_model("qwen2_moe")
    with searching(model):
        examples, pool = second_layer(model)
        block = examples.block
        families = [Family([], [0, 7, 32], 0)]
        families += [Family(stay, [0, 7, 32], 0, StayingExperts(block, stay))] if stay else []
        curves, mlp = measure_layer(examples, pool, families, by_least_squares=False)
    curve = curves[-1]

    double = naive_double(model)
    owner = double.model.layers[1]
    seen = watch(double, IDS, owner.mlp)
    x, y = (torch.cat(parts) for parts in zip(*seen, strict=True))
    neurons = naive_neurons(double, owner.mlp, 1, x)
    routes = [naive_route(model.config, owner.mlp.gate, token) for token in x]
    shared = owner.mlp.shared_expert
    first = naive_glus(double.config, 1)[1](shared.gate_proj(x), shared.up_proj(x))
    gate = torch.sigmoid(owner.mlp.shared_expert_gate(x))
    gates = [[route[e] for route in routes if e in route] for e in range(block.num_experts)]
    held_out = torch.arange(len(IDS)).repeat_interleave(24) % 5 == 4
    roots = torch.cat([output for _, output in watch(double, IDS, owner)]).square().mean(-1).rsqrt()[:, None]
    energies = naive_energies(neurons, routes)
    energies = [-1.0 if j // WIDTH in stay else energy for j, energy in enumerate(energies)]
    chosen = most(energies, 32)  # in ascending order, not in that of their energies
    ordered = sorted(chosen, key=lambda j: -energies[j])
    given = torch.zeros_like(y)
    few = SimpleNamespace(weight=owner.mlp.gate.weight[stay])
    for token, row in enumerate(x if stay else []):
        for place, weight in naive_route(model.config, few, row).items():
            given[token] += weight * naive_expert(owner.mlp, stay[place], row, naive_glus(double.config, 1)[0])
    for width, error in zip(curve.widths, curve.errors, strict=True):
        own = ordered[:width]
        columns = torch.cat([first * gate, neurons.activations[:, own] * (gate if stay else 1)], 1)
        downs = [neurons.down[:, j] * sum(gates[j // WIDTH]) / max(len(gates[j // WIDTH]), 1) for j in own]
        prior = torch.stack([*shared.down_proj.weight.T, *downs])
        widest = torch.cat([first * gate, neurons.activations[:, chosen] * (gate if stay else 1)], 1)
        widest = widest[~held_out] * roots[~held_out]
        left = (y - given - columns @ prior) * roots
        errors = [left[held_out].square().sum()]
        for strength in STRENGTHS:
            fit, rest = columns[~held_out] * roots[~held_out], left[~held_out]
            ridge = strength * widest.square().sum(0).mean() * torch.eye(columns.shape[1], dtype=fit.dtype)
            change = torch.linalg.solve(fit.T @ fit + ridge, fit.T @ rest)
            errors.append((left[held_out] - (columns[held_out] * roots[held_out]) @ change).square().sum())
        size = (y[held_out] * roots[held_out]).square().sum()
        assert error == pytest.approx(float(min(errors) / size), rel=1e-4)
    # The layer that is condensed to measure the model's output has the last error of a layer without experts.
    own = sum(
        float(((mlp(e.inputs) - e.target).square().sum(-1) * e.weights).sum())
        for _, e in (pair for pair in examples.both())
    )
    assert own / float(size) == pytest.approx(curves[0].errors[-1], rel=1e-3)


@pytest.mark.parametrize("model_type", ["qwen2_moe", "gpt_oss", "mixtral"])
@torch.no_grad()
def test_same_errors_if_forms_are_measured_apart(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forms that do not fit into memory together have sums of their own."""
    model = sparse_model(model_type)
    with searching(model):
        examples, pool = second_layer(model)
        families = all_forms(examples.block, [4, 2, 7, 1, 0, 3, 6, 5])
        together = [measure_layer(examples, pool, families, by) for by in (False, True)]
        monkeypatch.setattr(measure, "_MOST_BYTES", 1)
        apart = [measure_layer(examples, pool, families, by) for by in (False, True)]
    for (curves, widest), (others, same) in zip(together, apart, strict=True):
        assert [curve.errors for curve in curves] == [pytest.approx(curve.errors, rel=1e-5) for curve in others]
        torch.testing.assert_close(state(widest), state(same))
    # The order is another one even where the widest form takes all neurons that are left.
    by_energy, by_least_squares = (curves for curves, _ in together)
    for one, other in zip(by_energy, by_least_squares, strict=True):
        assert len(one.widths) < 3 or one.errors[1:-1] != other.errors[1:-1]


@pytest.mark.parametrize("model_type", ["qwen2_moe", "gpt_oss", "mixtral"])
@torch.no_grad()
def test_errors_are_those_of_fitted_layers(model_type: str) -> None:
    model = sparse_model(model_type)
    with searching(model):
        examples, pool = second_layer(model)
        block = examples.block
        families = all_forms(block, list(range(block.num_experts)))
        curves, _ = measure_layer(examples, pool, families, by_least_squares=False)
        size = sum(float(size_of(examples.held_out(batch))) for batch in range(len(examples)))
        for family, curve in zip(families, curves, strict=True):
            assert curve.parameters == family.parameters
            for width, error in {(curve.widths[0], curve.errors[0]), (curve.widths[-1], curve.errors[-1])}:
                kept = CondensedLayer(1, [], [], width=width, routed=family.stay or None)
                mixed = mix(block, kept) if family.stay else None
                if mixed is not None and width == 0 and block.shared is None:
                    assert error == pytest.approx(held_out_error(mixed, examples), rel=1e-4)
                    continue
                own = LayerExamples(examples.stream, block, examples.inputs, None, 2**20, beside=mixed)
                mlp = neurons_of_most_energy(kept, own).fold(block, mixed is not None)
                target = sum(float(size_of(own.held_out(batch))) for batch in range(len(own)))
                after = refit_down_proj(mlp, own).after * target / size
                # The ridge is relative to the activations of the widest form.
                assert error == pytest.approx(after, rel=1e-4 if width == curve.widths[-1] else 0.02)


@pytest.mark.parametrize("model_type", ["qwen2_moe", "gpt_oss"])
def test_widths(model_type: str, tmp_path: Path) -> None:
    sparse = sparse_model(model_type)
    config = CondenseConfig.fast(**{**BUDGET, "refit_neurons": "least_squares"})
    plan = search_plan(sparse, config, calibration=IDS, state_dir=tmp_path / "state")
    widths = {layer.layer: layer.width for layer in plan.layers}
    assert sum(filter(None, widths.values())) <= 4 * WIDTH
    assert all(width is not None and width % WIDTH == 0 for width in widths.values())
    # Interrupted before the last measurement of a layer, the search goes on to the same plan.
    again = search_plan(sparse, config, calibration=IDS, state_dir=tmp_path / "state")
    assert again == plan == CondensePlan.from_dict(plan.to_dict())
    done = apply_plan(sparse, plan, config, calibration=IDS)
    done.save_pretrained(tmp_path / "model")
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert differing(state(done), state(reopened)) == []
    specs = done.config.condense_config["condensed_layers"]
    shared = next(row.shared_intermediate_size for row in plan.model.sparse_layers)
    assert {int(layer): spec["intermediate_size"] - shared for layer, spec in specs.items()} == widths
    with pytest.raises(ValueError, match=r"single neurons, which a refit chooses: set `refit`"):
        condense_pretrained(tmp_path / "none", plan=plan)


def test_an_interrupted_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config: Any = CondenseConfig.fast(**BUDGET)
    whole = search_plan(sparse_model("qwen2_moe"), config, calibration=IDS)
    from cdmoe_plugin.search.spread import search

    def interrupted(*_args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(search, "output_changes", interrupted)
        with pytest.raises(KeyboardInterrupt):
            search_plan(sparse_model("qwen2_moe"), config, calibration=IDS, state_dir=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(search, "measure_layer", interrupted)  # all of them are known
        assert search_plan(sparse_model("qwen2_moe"), config, calibration=IDS, state_dir=tmp_path) == whole


def test_fewer_experts_have_no_width() -> None:
    rows = [CondensedLayer(1, [3, 0], [0.5, 0.25], width=24), CondensedLayer(2, [1], [0.5], width=8)]
    plan = CondensePlan(rows)
    assert [row.dense_neurons(WIDTH) for row in plan.layers] == [24, 8]
    assert plan.truncate(num_layers=1).layers == rows[:1]
    assert [row.width for row in plan.truncate(num_experts=1).layers] == [None, None]
    assert replace(rows[0], width=None).dense_neurons(WIDTH) == 32
