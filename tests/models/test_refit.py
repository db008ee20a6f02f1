"""Fitting condensed layers to the sparse model, against least squares written out by hand."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from cdmoe_plugin import CondenseConfig, apply_plan, condense_pretrained, search_plan
from cdmoe_plugin.condense.refit.ridge import STRENGTHS
from cdmoe_plugin.condense.refit.states import HiddenStates
from cdmoe_plugin.model.lookup import condensed_layers
from tests.helpers.models import sparse_model, uniform
from tests.helpers.naive import naive_glus
from tests.helpers.plans import some_plan
from tests.helpers.states import differing, state
from tests.helpers.tiny_models import ARCHITECTURES, available, tiny_model

# Of equal length, so that their order is known: the 5th, 10th, ... are held out.
IDS = torch.randint(3, 128, (20, 24), generator=torch.Generator().manual_seed(0)).tolist()
MANY = torch.randint(3, 128, (150, 32), generator=torch.Generator().manual_seed(1)).tolist()
HELD_OUT = torch.arange(20) % 5 == 4
TYPES = ["qwen2_moe", "deepseek", "granitemoeshared", "mixtral", "gpt_oss", *filter(available, ["hy_v4"])]


def refitted(model: PreTrainedModel, layers: list[int], ids: Any = IDS, **config: Any) -> PreTrainedModel:
    config = {"refit": "down_proj", "batch_size": 4, "num_samples": len(ids), **config}
    return apply_plan(model, some_plan(layers), CondenseConfig(**config), calibration=ids)


@torch.no_grad()
def watch(model: Any, layer: int, places: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs and outputs of modules of one decoder layer, `[20, 24, H]`; "" is the layer."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    owner = model.base_model.layers[layer]
    hooks = []
    for place in places:

        def hook(_module: Any, args: Any, output: Any, place: str = place) -> None:
            output = output[0] if isinstance(output, tuple) else output
            seen[place] = (args[0].double(), output.double())

        hooks.append(owner.get_submodule(place).register_forward_hook(hook))
    model(input_ids=torch.tensor(IDS), use_cache=False)
    for each in hooks:
        each.remove()
    return seen


def by_least_squares(inner: Tensor, folded: Tensor, target: Tensor, weights: Tensor, constants: int) -> Tensor:
    """The down projection that ridge regression towards the folded one gives, its strength chosen on `HELD_OUT`.

    The first of `inner` may be constants, for a bias, without a ridge.
    """

    def solve(rows: Tensor, strength: float) -> Tensor:
        a, w = inner[rows].flatten(0, 1), weights[rows].flatten()[:, None]
        left = target[rows].flatten(0, 1) - a @ folded.T
        ridge = (strength * (a.square() * w).sum(0)[constants:].mean()).sqrt() * torch.eye(a.shape[1], dtype=a.dtype)
        ridge[:constants] = 0
        system = torch.cat([a * w.sqrt(), ridge])
        goal = torch.cat([left * w.sqrt(), torch.zeros(a.shape[1], left.shape[1], dtype=a.dtype)])
        return folded + torch.linalg.lstsq(system, goal, driver="gelsd").solution.T

    def error(down: Tensor) -> float:
        wrong = (inner[HELD_OUT] @ down.T - target[HELD_OUT]).square().sum(-1)
        return float((wrong * weights[HELD_OUT]).sum())

    best = min(STRENGTHS, key=lambda strength: error(solve(~HELD_OUT, strength)))
    assert error(solve(~HELD_OUT, best)) < error(folded)
    return solve(torch.ones(20, dtype=torch.bool), best)


@pytest.mark.parametrize("target", ["model", "block"])
@pytest.mark.parametrize("model_type", TYPES)
def test_down_projection_solves_the_ridge_regression(model_type: str, target: str) -> None:
    sparse = sparse_model(model_type)
    mlp_name = "block_sparse_moe" if model_type == "granitemoeshared" else "mlp"
    scale = getattr(sparse.config, "residual_multiplier", 1.0)
    done = refitted(copy.deepcopy(sparse), [1, 3], refit_target=target)
    # Up to layer 1 refitted, from there on sparse: what layer 3 sees.
    plan = some_plan([1, 3])
    settings = CondenseConfig(refit="down_proj", refit_target=target)
    below = apply_plan(copy.deepcopy(sparse), replace(plan, layers=plan.layers[:1]), settings, calibration=IDS)
    for layer, under in ((1, sparse), (3, below)):
        folded = condensed_layers(apply_plan(copy.deepcopy(sparse), plan))[layer]
        others = {"granitemoeshared": ["shared_mlp"], "hy_v4": ["ffn_hc"]}.get(model_type, [])
        seen = watch(under, layer, ["", mlp_name, *others])
        inputs, output = seen[mlp_name]
        if "shared_mlp" in seen:
            output = output + seen["shared_mlp"][1]
        hidden, weights = seen[""][1], 1.0
        # hy_v4 adds to several streams, by these factors.
        factors = seen["ffn_hc"][1] if "ffn_hc" in seen else torch.full((20, 24, 1), scale, dtype=torch.float64)
        if target == "model":
            residual = hidden.view(20, 24, -1, 32) - factors[..., None] * output[..., None, :]
            hidden = watch(sparse, layer, [""])[""][1]
            left = hidden.view_as(residual) - residual
            output = (factors[..., None] * left).sum(-2) / factors.square().sum(-1, keepdim=True)
            weights = factors.square().sum(-1)
        folded, width = folded.double(), folded.shared_intermediate_size
        parts = zip(*(p(inputs).tensor_split([width], -1) for p in (folded.gate_proj, folded.up_proj)), strict=True)
        glus = reversed(naive_glus(sparse.config, layer))
        inner = torch.cat([glu(*gate_and_up) for glu, gate_and_up in zip(glus, parts, strict=True)], dim=-1)
        if folded.shared_expert_gate is not None:
            inner[..., :width] *= torch.sigmoid(folded.shared_expert_gate(inputs))
        weights = weights / hidden.flatten(2).square().mean(-1)
        mine = condensed_layers(done)[layer]
        assert torch.equal(mine.up_proj.weight.double(), folded.up_proj.weight)
        before, found = folded.down_proj.weight, mine.down_proj.weight
        if constants := int(folded.down_proj.bias is not None):
            inner = torch.cat([torch.ones(20, 24, 1, dtype=inner.dtype), inner], -1)
            before, found = (
                torch.cat([mlp.down_proj.bias[:, None], mlp.down_proj.weight], 1) for mlp in (folded, mine)
            )
        expected = by_least_squares(inner, before, output, weights, constants)
        change = expected - before
        assert (found - expected).norm() < 2e-3 * change.norm()
        assert change.norm() > 0.05 * expected.norm()


@torch.no_grad()
def distance(one: Any, other: Any) -> float:
    ids = torch.randint(3, 128, (16, 24), generator=torch.Generator().manual_seed(5))
    return float((one(input_ids=ids).logits - other(input_ids=ids).logits).norm())


@pytest.mark.parametrize("model_type", ["qwen2_moe", "deepseek"])
def test_each_step_comes_nearer_to_the_sparse_model(model_type: str) -> None:
    sparse = sparse_model(model_type)
    folded = apply_plan(copy.deepcopy(sparse), some_plan([1, 2, 3]))
    solved = refitted(copy.deepcopy(sparse), [1, 2, 3], MANY)
    trained = refitted(copy.deepcopy(sparse), [1, 2, 3], MANY, refit="distill", refit_steps=200)
    far, near, nearest = (distance(sparse, model) for model in (folded, solved, trained))
    assert near < 0.95 * far
    assert nearest < near
    errors = [model.config.condense_config["refit_errors"] for model in (solved, trained)]
    for layer in ("1", "2", "3"):
        assert errors[0][layer][1] < errors[0][layer][0]
    assert errors[1]["1"][0] == pytest.approx(errors[0]["1"][0])
    assert errors[1]["1"][1] < errors[0]["1"][1]


@pytest.mark.parametrize("refit", ["down_proj", "distill"])
def test_same_result_for_any_batch_size_and_memory(refit: str) -> None:
    given = {"refit": refit, "refit_steps": 20}
    one = refitted(sparse_model("deepseek"), [1, 2], batch_size=20, **given)
    again = refitted(sparse_model("deepseek"), [1, 2], batch_size=20, cache_memory="1KB", **given)
    assert differing(state(one), state(again)) == []
    if refit == "down_proj":
        other = refitted(sparse_model("deepseek"), [1, 2], batch_size=3)
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_a_layer_that_needs_no_refit_stays_folded() -> None:
    # With a uniform router and all experts kept, folding is exact.
    condensed, plan, _ = uniform("qwen3_moe")
    sparse = tiny_model("qwen3_moe", num_experts=4, top_k=4)
    for layer in sparse.model.layers:
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.weight.data.zero_()
    config = CondenseConfig(refit="down_proj", refit_target="block")
    again = apply_plan(sparse, plan, config, calibration=IDS)
    for a, b in zip(condensed.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("model_type", ["ernie4_5_moe", "afmoe", "glm4_moe"])
def test_biases_and_norms_behind_the_block(model_type: str) -> None:
    overrides = {"use_bias": True} if model_type == "ernie4_5_moe" else {}
    sparse = tiny_model(model_type, **overrides)
    layer = max(int(i) for i in range(len(sparse.model.layers)) if hasattr(sparse.model.layers[i].mlp, "experts"))
    folded = apply_plan(copy.deepcopy(sparse), some_plan([layer]))
    assert distance(sparse, refitted(copy.deepcopy(sparse), [layer])) < distance(sparse, folded)


def test_half_precision() -> None:
    sparse = sparse_model("deepseek").to(torch.bfloat16)
    folded = apply_plan(copy.deepcopy(sparse), some_plan([1, 3]))
    for refit in ("down_proj", "distill"):
        model = refitted(copy.deepcopy(sparse), [1, 3], refit=refit, refit_steps=50)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert distance(sparse, model) < distance(sparse, folded)


def test_search_and_refit_in_one_call(tmp_path: Path) -> None:
    sparse = sparse_model("qwen2_moe")
    sparse.save_pretrained(tmp_path / "base")
    config = CondenseConfig(num_layers=2, num_experts=2, refit="down_proj", batch_size=4)
    one = condense_pretrained(tmp_path / "base", config, calibration=IDS)
    plan = search_plan(sparse, config, calibration=IDS)
    before = state(sparse)
    search_plan(sparse, config, calibration=IDS)
    assert differing(before, state(sparse)) == []
    for other in (
        condense_pretrained(tmp_path / "base", config, plan=plan, calibration=IDS),
        apply_plan(sparse, plan, config, calibration=IDS),
    ):
        assert differing(state(one), state(other)) == []
    one.save_pretrained(tmp_path / "out")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert differing(state(one), state(opened)) == []
    noted = opened.config.condense_config
    assert (noted["refit"], noted["refit_target"], noted["refit_steps"]) == ("down_proj", "model", 600)
    assert set(noted["refit_errors"]) == {str(layer.layer) for layer in plan.layers}
    # Without calibration data nothing is fitted, and the config says so.
    plain = condense_pretrained(tmp_path / "base", plan=plan)
    assert plain.config.condense_config["refit"] is None
    assert plain.config.condense_config["refit_errors"] is None


@pytest.mark.parametrize(
    ("config", "calibration", "message"),
    [
        ({"refit": "adapters"}, IDS, "'down_proj', 'distill'"),
        ({"refit": "down_proj", "refit_target": "layer"}, IDS, "'model', 'block'"),
        ({"refit": "down_proj"}, IDS[:4], "at least 5"),
        ({"refit": "distill", "refit_steps": 0}, IDS, "refit_steps"),
        ({"refit": "distill", "form": "trim_layer"}, IDS, "there is nothing to fit"),
    ],
)
def test_bad_requests_change_nothing(config: dict[str, Any], calibration: Any, message: str) -> None:
    model = sparse_model("qwen2_moe")
    before = state(model)
    with pytest.raises(ValueError, match=message):
        apply_plan(model, some_plan([1]), CondenseConfig(**config), calibration=calibration)
    with pytest.raises(ValueError, match=message):
        condense_pretrained(model, CondenseConfig(num_layers=1, num_experts=1, **config), calibration=calibration)
    assert type(model).__name__ == "Qwen2MoeForCausalLM"
    assert differing(before, state(model)) == []


@pytest.mark.parametrize(
    "model_type", [name for name in ("hy_v4", "glm_moe_dsa", "jamba", "dots3_note_text") if available(name)]
)
def test_hidden_states_on_disk(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers may pass on more than hidden states, and files of a refit do not outlive it."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    sparse = tiny_model(model_type)
    layers = ARCHITECTURES[model_type].sparse_layers[:2]
    one, other = (refitted(copy.deepcopy(sparse), list(layers), cache_memory=memory) for memory in ("1GB", "0KB"))
    assert differing(state(one), state(other)) == []
    assert list(tmp_path.iterdir()) == []


def test_states_beyond_some_memory_are_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    draw = lambda: (torch.randn(2, 3).T, None, {"more": [torch.arange(4), "text"]})  # noqa: E731
    expected = [draw() for _ in range(4)]
    size = 24 + 32
    states = HiddenStates(expected, 2 * size)
    files = lambda: len(list(tmp_path.glob("*/*.safetensors")))  # noqa: E731
    assert (len(states), files()) == (4, 2)
    for batch in range(4):
        taken = states[batch]
        expected[batch] = (taken[0] + 1, None, {"more": [taken[2]["more"][0], "text"]})
        states[batch] = expected[batch]
    assert files() == 2
    for mine, other in zip(states, expected, strict=True):
        assert torch.equal(mine[0], other[0])
        assert mine[1] is None
        assert torch.equal(mine[2]["more"][0], other[2]["more"][0])
        assert mine[2]["more"][1] == "text"
    del states
    assert list(tmp_path.iterdir()) == []


def test_few_tokens_for_the_width(caplog: pytest.LogCaptureFixture) -> None:
    sparse = sparse_model("qwen2_moe")
    refitted(copy.deepcopy(sparse), [1], IDS[:13])
    # Widths of 24 shared neurons and three experts of 16; 13 samples of 24 tokens. The same warning comes only once.
    assert "72 neurons to 312 calibration tokens, 4.3 for each neuron: use at least 2,160" in caplog.text
    caplog.clear()
    search_plan(sparse, CondenseConfig(num_layers=1, num_experts=2, refit="down_proj"), calibration=IDS[:11])
    assert "56 neurons to 264 calibration tokens, 4.7 for each neuron: use at least 1,680" in caplog.text
    caplog.clear()
    refitted(copy.deepcopy(sparse), [1], MANY)
    assert "neurons to" not in caplog.text
