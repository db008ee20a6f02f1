"""Layers with a gate per token for each routed expert: folded, fitted, saved, trained, compiled, and never exported."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from cdmoe_plugin import (
    CondenseConfig,
    CondensedLayer,
    CondensePlan,
    apply_plan,
    condense_pretrained,
    condensed_module_names,
    export_dense,
    export_stock,
    search_plan,
    unfreeze_condensed,
)
from cdmoe_plugin.blocks import SparseBlock, UnsupportedModelError, find_sparse_blocks, layers_path
from cdmoe_plugin.calibration import calibration_for
from cdmoe_plugin.condense.fold import TokenGates, fold
from cdmoe_plugin.condense.refit import LayerExamples, RefitLayer
from cdmoe_plugin.condense.refit.gates import fit_token_gates
from cdmoe_plugin.decoder.stream import LayerStream
from cdmoe_plugin.decoder.whole import searching
from cdmoe_plugin.estimate import estimate
from cdmoe_plugin.export.check import check_export, sketch_fully
from cdmoe_plugin.export.top_k import export_top_k
from cdmoe_plugin.model.layers_cdmoe import PlainLinear
from cdmoe_plugin.model.lookup import condensed_layers
from cdmoe_plugin.model.modeling_cdmoe import tensor_parallel_plan
from cdmoe_plugin.registry import REFITS
from tests.helpers.models import sparse_model
from tests.helpers.plans import some_plan
from tests.helpers.states import differing, state
from tests.helpers.tiny_models import available, tiny_model

IDS = torch.randint(3, 128, (20, 24), generator=torch.Generator().manual_seed(0)).tolist()
# An architecture for each quirk of blocks.
QUIRKS: list[tuple[str, dict[str, Any]]] = [
    ("qwen2_moe", {}),
    ("llama4_text", {}),
    ("nemotron_h", {"moe_latent_size": 24, "mlp_bias": True}),
    ("gemma4_text", {}),
    ("jetmoe", {}),
    ("gpt_oss", {}),
    ("granitemoeshared", {}),
    *((name, {}) for name in ("axk1", "deepseek_v4", "hy_v4") if available(name)),
]


def gated(model: PreTrainedModel, neurons: str = "least_squares", **config: Any) -> PreTrainedModel:
    given = {"refit": "down_proj", "refit_neurons": neurons, "gates": "sigmoid", "batch_size": 7, **config}
    return apply_plan(model, some_plan([1, 3]), CondenseConfig(**given), calibration=IDS)


@pytest.mark.parametrize(("model_type", "overrides"), QUIRKS)
@torch.no_grad()
def test_gates_scale_what_each_expert_adds(model_type: str, overrides: dict[str, Any]) -> None:
    block = find_sparse_blocks(tiny_model(model_type, **overrides))[0]
    for single in (False, True):
        check_gates_of(block, single)


def check_gates_of(block: SparseBlock, single: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, block.hidden_size, generator=generator)
    experts, gates = [2, 0, 3], [0.4, 0.1, 0.3]
    neurons = [torch.randperm(block.intermediate_size, generator=generator)[:n] for n in (3, 9, 5)] if single else None
    weight, bias = torch.randn(3, block.hidden_size, generator=generator), torch.randn(3, generator=generator)
    mean = torch.tensor([0.3, 0.7, 0.9])
    mlp = fold(block, experts, gates, neurons, TokenGates(weight, bias, mean))
    rest = fold(block, [], []).sum_of_experts(x)
    expected, down_bias = rest.clone(), block.expert_weights().down_bias
    for place, expert in enumerate(experts):
        own = None if neurons is None else [neurons[place]]
        added = fold(block, [expert], gates[place : place + 1], own).sum_of_experts(x) - rest
        share = 1.0 if own is None else len(own[0]) / block.intermediate_size
        constant = 0.0 if down_bias is None else gates[place] * share * down_bias[expert]
        expected += torch.sigmoid(x @ weight[place] + bias[place])[:, None] * (added - constant)
        expected += mean[place] * constant
    torch.testing.assert_close(mlp.sum_of_experts(x), expected, rtol=1e-3, atol=1e-4)
    assert mlp.gated_neurons == ([3, 9, 5] if single else [block.intermediate_size] * 3)


@pytest.mark.parametrize("model_type", ["qwen2_moe", "gemma4_text"])
@torch.no_grad()
def test_gates_are_logistic_regressions_of_the_choice(model_type: str) -> None:
    model = sparse_model(model_type)
    blocks = find_sparse_blocks(model)
    data = calibration_for(model, IDS * 5, CondenseConfig(batch_size=7), None)
    with searching(model):
        stream = LayerStream(model, layers_path(blocks), data.batches)
        inputs = list(stream.embeddings)
        for layer in range(blocks[0].layer):
            inputs = [stream.run_layer(layer, given, i) for i, given in enumerate(inputs)]
        examples = LayerExamples(stream, blocks[0], inputs, None, 2**30)
        found = fit_token_gates(examples)
        x, experts, _ = (torch.cat(p) for p in zip(*(examples.routed(i) for i in range(len(examples))), strict=True))
    held_out = torch.arange(len(IDS) * 5).repeat_interleave(24) % 5 == 4
    x, experts = torch.cat([x, torch.ones_like(x[:, :1])], 1).double()[~held_out], experts[~held_out]
    squares = x.T @ x
    squares += 1e-3 * squares.diagonal().mean() * torch.eye(len(squares), dtype=torch.float64)
    cross_entropy = torch.nn.functional.binary_cross_entropy_with_logits
    for expert in range(blocks[0].num_experts):
        chosen = (experts == expert).any(1).double()
        share = (chosen.sum() + 0.5) / (len(x) + 1)
        weight = torch.zeros(x.shape[1], dtype=torch.float64)
        weight[-1] = torch.logit(share)
        constant = cross_entropy(x @ weight, chosen)
        for _ in range(8):
            weight += torch.linalg.solve(squares / 4, x.T @ (chosen - torch.sigmoid(x @ weight)))
        torch.testing.assert_close(torch.cat([found.weight[expert], found.bias[expert, None]]), weight)
        torch.testing.assert_close(found.mean[expert], share)
        assert cross_entropy(x @ weight, chosen) < 0.8 * constant


@pytest.mark.parametrize("neurons", ["experts", "least_squares"])
def test_refitted_and_opened_again(neurons: str, tmp_path: Path) -> None:
    sparse = sparse_model("qwen2_moe")
    plain = gated(copy.deepcopy(sparse), neurons, gates="mean").config.condense_config
    model = gated(copy.deepcopy(sparse), neurons)
    noted = model.config.condense_config
    assert (noted["gates"], plain.get("gates", "mean"), noted["plan"]["layers"][0]["gates"]) == (
        "sigmoid",
        "mean",
        some_plan([1, 3]).layers[0].gates,
    )
    for layer, (before, after) in noted["refit_errors"].items():
        assert before == pytest.approx(plain["refit_errors"]["1"][0]) or layer != "1"
        assert after < plain["refit_errors"][layer][1]
        sizes = list(noted["neurons"][layer].values()) if neurons != "experts" else [16, 16, 16]
        assert noted["condensed_layers"][layer]["gated_neurons"] == sizes
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert differing(state(model), state(again)) == []
    ids = torch.tensor(IDS[:2])
    assert torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits)
    # Its plan has constant gates, with which a new refit starts.
    bare = condense_pretrained(copy.deepcopy(sparse), plan=tmp_path)
    assert differing(state(bare), state(apply_plan(copy.deepcopy(sparse), some_plan([1, 3])))) == []
    config = CondenseConfig(refit="down_proj", refit_neurons=neurons, gates="sigmoid", batch_size=7)
    refitted = condense_pretrained(copy.deepcopy(sparse), config, plan=tmp_path, calibration=IDS)
    assert differing(state(refitted), state(model)) == []


def test_trained_and_compiled() -> None:
    model = gated(sparse_model("deepseek"), refit="distill", refit_steps=5)
    names = unfreeze_condensed(model)
    assert {"model.layers.1.mlp.expert_gates.weight", "model.layers.1.mlp.expert_gates.bias"} <= set(names)
    assert not any("expert_gates" in name for name in condensed_module_names(model))
    mlp = condensed_layers(model)[1]
    x = torch.randn(2, 3, mlp.hidden_size)
    compiled = torch.compile(mlp, fullgraph=True, backend="eager")(x)
    torch.testing.assert_close(compiled, mlp(x))
    compiled.sum().backward()
    assert mlp.expert_gates is not None
    assert mlp.expert_gates.weight.grad.abs().sum() > 0
    assert type(mlp.expert_gates) is PlainLinear  # which is not quantised
    plan = tensor_parallel_plan({"layers.*.mlp.up_proj": "colwise"}, model.config) or {}
    assert (plan["layers.*.mlp.up_proj"], plan["layers.*.mlp.down_proj"]) == (
        "colwise_gather_output",
        "rowwise_split_input",
    )


def test_search_with_gates_per_token() -> None:
    given = {"layers": [1], "num_experts": 2, "refit": "down_proj"}
    plans = [search_plan(sparse_model("qwen2_moe"), CondenseConfig(gates=g, **given), calibration=IDS) for g in GATES]
    assert plans[0] == plans[1]
    assert plans[0].to_dict()["config"]["gates"] == "mean"


GATES = ("mean", "sigmoid")


def test_plain_layers_stay_if_they_are_better(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REFITS, "down_proj", lambda _mlp, _examples: RefitLayer(1e9, 1e9))
    sparse = sparse_model("qwen2_moe")
    done = gated(copy.deepcopy(sparse), "experts")
    assert differing(state(done), state(apply_plan(sparse, some_plan([1, 3])))) == []
    assert "gates" not in done.config.condense_config


def test_layers_without_routed_neurons() -> None:
    plan = CondensePlan([CondensedLayer(1, [], [])])
    config = CondenseConfig(refit="down_proj", gates="sigmoid")
    model = apply_plan(sparse_model("qwen2_moe"), plan, config, calibration=IDS)
    assert condensed_layers(model)[1].expert_gates is None


def test_no_exports(tmp_path: Path) -> None:
    sparse = sparse_model("deepseek")
    sparse.save_pretrained(tmp_path / "sparse")
    model = gated(sparse)
    for export in (export_stock, export_dense, export_top_k):
        with pytest.raises(UnsupportedModelError, match=r"decoder layers \[1, 3\].*gates='sigmoid'"):
            export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    config = CondenseConfig(layers=[1, 2, 3], num_experts=2, refit="down_proj", gates="sigmoid")
    with pytest.raises(UnsupportedModelError, match="gates='sigmoid'"):
        check_export(tmp_path / "sparse", config)
    with pytest.raises(UnsupportedModelError, match="gates='sigmoid'"):
        sketch_fully(tmp_path / "sparse", config, True, {})


def test_sizes(tmp_path: Path) -> None:
    sparse = sparse_model("qwen2_moe")
    sparse.save_pretrained(tmp_path)
    config = CondenseConfig(layers=[1, 3], num_experts=3, refit="down_proj", gates="sigmoid")
    model = gated(sparse, "experts")
    assert estimate(tmp_path, config).after == model.num_parameters()
    assert sum(mlp.expert_gates.weight.numel() for mlp in condensed_layers(model).values() if mlp.expert_gates) == 192


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"gates": "sigmoid"}, "`gates` is 'sigmoid'.*needs? a `refit`"),
        ({"gates": "sigmoid", "refit": "down_proj", "exportable": "stock"}, "`exportable` is 'stock'"),
        ({"gates": "tanh", "refit": "down_proj"}, "'mean', 'sigmoid'"),
    ],
)
def test_bad_requests(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        condense_pretrained(sparse_model("qwen2_moe"), CondenseConfig(num_layers=1, **config), calibration=IDS)
