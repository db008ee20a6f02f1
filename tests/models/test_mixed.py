"""Mixed layers: some experts stay behind the router, held against transformers' own class with so many experts."""

from __future__ import annotations

import copy
import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from cdmoe_plugin import (
    CondenseAdapterConfig,
    CondenseConfig,
    CondensedLayer,
    CondensePlan,
    apply_plan,
    condense_pretrained,
    export_dense,
    export_stock,
    search_plan,
    unfreeze_condensed,
)
from cdmoe_plugin.blocks import RoutedPart, SparseBlock, UnsupportedModelError, find_sparse_blocks, hidden_of
from cdmoe_plugin.condense.mixed import mix
from cdmoe_plugin.estimate import estimate
from cdmoe_plugin.export.check import check_export
from tests.helpers.models import QUIRKS, TYPES, output
from tests.helpers.naive import naive_gated_expert, naive_glus
from tests.helpers.states import differing, state
from tests.helpers.tiny_models import ARCHITECTURES, random_ids, tiny_model

ROUTED = [1, 3, 4, 6]  # two of each group of four, where a router has groups
# The table of token ids of deepseek_v4's hash layers.
PRUNED = [name for name in TYPES if name != "deepseek_v4"]


def mixed_plan(model_type: str, dense: dict[int, float] | None = None) -> CondensePlan:
    """All sparse layers keep `ROUTED`, and the experts in `dense` with these gates beside them."""
    dense = dense or {}
    layers = ARCHITECTURES[model_type].sparse_layers
    return CondensePlan([CondensedLayer(i, list(dense), list(dense.values()), routed=ROUTED) for i in layers])


@torch.no_grad()
def smaller(model: PreTrainedModel, model_type: str) -> PreTrainedModel:
    """The same model with the sparse blocks of transformers' class for fewer experts, and their weights."""
    whole, few = copy.deepcopy(model), tiny_model(model_type, num_experts=len(ROUTED))
    for block, small in zip(find_sparse_blocks(whole), find_sparse_blocks(few), strict=True):
        for name, module in small.places(None).items():
            layer = block.decoder_layer(whole)
            weights = getattr(layer, name).state_dict()
            for key, tensor in module.state_dict().items():
                dims = [i for i, (a, b) in enumerate(zip(weights[key].shape, tensor.shape, strict=True)) if a != b]
                tensor.copy_(_taken(weights[key], dims[0], block.num_experts) if dims else weights[key])
            setattr(layer, name, module)
    return whole


def _taken(weight: Tensor, dim: int, count: int) -> Tensor:
    return torch.cat([weight.chunk(count, dim)[expert] for expert in ROUTED], dim)


@pytest.mark.parametrize("model_type", PRUNED)
def test_pruned_as_the_class_with_fewer_experts(model_type: str) -> None:
    model = tiny_model(model_type)
    expected = output(smaller(model, model_type))
    pruned = apply_plan(model, mixed_plan(model_type))
    assert (output(pruned) - expected).abs().max() < 1e-5 * expected.abs().max()
    if model_type in QUIRKS:
        opened = type(pruned)(pruned.config).eval()
        opened.load_state_dict(pruned.state_dict())
        assert torch.equal(output(opened), output(pruned))


def sum_of_experts(layer: Any, block: SparseBlock, x: Tensor) -> Tensor:
    """What a decoder layer adds to its residual before any norm."""
    module = getattr(layer, block.path.rpartition(".")[2])
    names = {id(part): name for name, part in block.module.named_children()}
    if block.norm is not None:
        setattr(module, names[id(block.norm)], torch.nn.Identity())
    if hasattr(layer, "router"):
        _, weights, chosen = layer.router(x[0])
        return module(x[0], chosen, weights)
    return hidden_of(module(x)).view(x.shape)[0] + sum(layer.shared_mlp(x)[0] for _ in block.summands[1:])


@pytest.mark.parametrize(
    ("model_type", "overrides"), [*((name, {}) for name in QUIRKS), ("nemotron_h", {"moe_latent_size": 24})]
)
@torch.no_grad()
def test_dense_part(model_type: str, overrides: dict[str, Any]) -> None:
    """What the dense part adds to the block with fewer experts: experts with gates, in float64 from raw weights."""
    model = tiny_model(model_type, **overrides)
    dense, x = {0: 0.5, 5: 0.25}, torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(2))
    double = copy.deepcopy(model).double().base_model
    block = find_sparse_blocks(model)[-1]
    layer: Any = block.decoder_layer(model)
    raw = double.get_submodule(block.path)
    glu, _ = naive_glus(model.config, block.layer)
    found = []
    for experts in ({}, dense):
        kept = CondensedLayer(block.layer, list(experts), list(experts.values()), routed=ROUTED)
        for name, module in mix(block, kept).named_children():
            setattr(layer, name, module)
        found.append(sum_of_experts(layer, block, x))
    for token, added in zip(x[0].double(), (found[1] - found[0]).double(), strict=True):
        # The factors of config.json's routers are in a plan's gates already.
        naive = sum(naive_gated_expert(raw, expert, gate, token, glu) for expert, gate in dense.items())
        gate = getattr(raw, "shared_expert_gate", None)
        torch.testing.assert_close(added, naive * (1 if gate is None else gate(token).sigmoid()), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("model_type", ["granitemoeshared", "mixtral", "qwen2_moe"])
def test_saved_opened_and_read_from_disk(model_type: str, tmp_path: Path) -> None:
    plan = mixed_plan(model_type, {0: 0.5, 3: 0.25})
    model = tiny_model(model_type)
    model.save_pretrained(tmp_path / "sparse")
    mixed = apply_plan(model, plan)
    mixed.save_pretrained(tmp_path / "mixed")
    assert torch.equal(output(AutoModelForCausalLM.from_pretrained(tmp_path / "mixed")), output(mixed))
    assert CondensePlan.load(tmp_path / "mixed").layers == plan.layers
    read = condense_pretrained(tmp_path / "sparse", plan=plan)
    assert not differing(state(read), state(mixed))
    on_disk = condense_pretrained(tmp_path / "sparse", plan=plan, offload_folder=str(tmp_path / "offload"))
    # Mapped weights have another alignment in memory, on which sums may depend.
    torch.testing.assert_close(output(on_disk), output(mixed), rtol=1e-4, atol=2e-6)
    on_disk.save_pretrained(tmp_path / "again")
    assert not differing(state(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), state(mixed))


@pytest.mark.parametrize(
    ("model_type", "routed", "message"),
    [
        ("qwen2_moe", [3], "chooses 2 of 8 experts for each token: keep 2 to 8"),
        ("deepseek_v3", [1, 3, 6], "has 2 groups, .*use a multiple of 2 from 4 to 8"),
        ("deepseek_v3", [0, 1, 2, 6], r"same number of experts of each of the router's 2 groups of 4.*\[0, 1, 2, 6\]"),
        ("deepseek_v4", ROUTED, r"Decoder layer 0 .*a table of token ids chooses its experts \(`gate.tid2eid`\)"),
    ],
)
def test_refused_before_anything_changes(model_type: str, routed: list[int], message: str) -> None:
    model = tiny_model(model_type)
    before = output(model)
    layer = ARCHITECTURES[model_type].sparse_layers[0]
    with pytest.raises(ValueError, match=message):
        apply_plan(model, CondensePlan([CondensedLayer(layer, [], [], routed=routed)]))
    assert torch.equal(output(model), before)


def test_a_norm_of_the_sum_without_a_shared_expert_is_refused() -> None:
    block = find_sparse_blocks(tiny_model("axk1"))[0]
    block.shared = None
    with pytest.raises(UnsupportedModelError, match="normalises the sum of its experts, and has no shared expert"):
        RoutedPart(block)


@pytest.mark.parametrize("model_type", [name for name in QUIRKS if name != "gemma4_text"])
@torch.no_grad()
def test_errors_of_the_dense_part_are_those_of_the_layer(model_type: str) -> None:
    model = tiny_model(model_type)
    block = find_sparse_blocks(model)[-1]
    generator = torch.Generator().manual_seed(1)
    x, target = (torch.randn(1, 7, 32, generator=generator) for _ in range(2))
    weights = torch.rand(7, generator=generator)
    mixed = mix(block, CondensedLayer(block.layer, [0, 5], [0.5, 0.25], routed=ROUTED))
    assert mixed.dense is not None
    found, new = mixed.missing(x[0], target[0], weights)
    of_dense = ((mixed.dense.sum_of_experts(x[0]) - found).square().sum(-1) * new).double()
    layer: Any = block.decoder_layer(model)
    for name, module in mixed.named_children():
        setattr(layer, name, module)
    errors = ((sum_of_experts(layer, block, x) - target[0]).square().sum(-1) * weights).double()
    torch.testing.assert_close(of_dense, errors, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "refit", "neurons"), [("mixtral", "distill", "experts"), ("qwen2_moe", "down_proj", "least_squares")]
)
def test_refit(model_type: str, refit: str, neurons: str, tmp_path: Path) -> None:
    """The dense part is fitted to what is missing; the same from a checkpoint's files, one layer at a time."""
    sequences = random_ids(20, 24)
    model = tiny_model(model_type)
    model.save_pretrained(tmp_path)
    before = output(model)
    config = CondenseConfig(refit=refit, refit_neurons=neurons, refit_steps=2)
    plan = CondensePlan([CondensedLayer(i, [0, 5], [0.5, 0.25], routed=ROUTED) for i in (2, 3)])
    folded = output(apply_plan(copy.deepcopy(model), plan))
    fitted = apply_plan(model, plan, config, calibration=sequences)
    assert all(after <= first for first, after in fitted.config.condense_config["refit_errors"].values())
    assert (output(fitted) - before).square().sum() < (folded - before).square().sum()
    chosen = fitted.config.condense_config.get("neurons", {}).values()
    assert not any(expert in own for own in chosen for expert in map(str, ROUTED))
    on_disk = condense_pretrained(tmp_path, config, plan=plan, calibration=sequences, offload_folder=tmp_path / "disk")
    torch.testing.assert_close(output(on_disk), output(fitted), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_distillation_trains_experts_and_routers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also of pruned layers without a shared expert; all else is as it was."""
    monkeypatch.setattr(importlib.import_module("cdmoe_plugin.condense.refit.distill"), "_RELATIVE_RATE", 0.005)
    model, ids = tiny_model("mixtral"), random_ids(80, 32)
    expected = output(model)
    config = CondenseConfig(form="prune_experts", layers=[1, 2], num_routed=4, refit="distill", refit_steps=60)
    plan = search_plan(model, config, calibration=ids)
    pruned, fitted = (copy.deepcopy(model) for _ in range(2))
    apply_plan(pruned, plan)
    before = state(fitted)
    apply_plan(fitted, plan, config, calibration=ids)
    assert all(after < first for first, after in fitted.config.condense_config["refit_errors"].values())
    assert (output(fitted) - expected).square().sum() < (output(pruned) - expected).square().sum()
    parts = ("gate.weight", "experts.gate_up_proj", "experts.down_proj")
    trained = {f"model.layers.{layer}.mlp.{part}" for layer in (1, 2) for part in parts}
    assert set(differing(state(fitted), state(pruned))) == trained
    assert not differing(before, state(model))
    fitted.save_pretrained(tmp_path)
    assert torch.equal(output(AutoModelForCausalLM.from_pretrained(tmp_path)), output(fitted))


def test_a_refit_without_anything_to_fit(caplog: pytest.LogCaptureFixture) -> None:
    config = CondenseConfig(form="prune_experts", num_layers=1, num_routed=4, refit="down_proj")
    with pytest.raises(ValueError, match="the model has none"):
        search_plan(tiny_model("mixtral"), config, calibration=random_ids(5, 8))
    plan, config = mixed_plan("mixtral"), CondenseConfig(refit="down_proj")
    fitted = apply_plan(tiny_model("mixtral"), plan, config, calibration=random_ids(5, 8))
    assert "`refit='down_proj'` has nothing to fit" in caplog.text
    assert torch.equal(output(fitted), output(apply_plan(tiny_model("mixtral"), plan)))


def test_a_refit_behind_a_router_of_the_decoder_layer_is_refused() -> None:
    model = tiny_model("gemma4_text")
    message = r"layer 0 .*router, which has other inputs than the experts"
    with pytest.raises(UnsupportedModelError, match=message):
        apply_plan(
            model, mixed_plan("gemma4_text", {0: 0.5}), CondenseConfig(refit="down_proj"), calibration=random_ids(5, 8)
        )
    config = CondenseConfig(form="prune_experts", num_layers=1, num_routed=4, refit="distill")
    with pytest.raises(UnsupportedModelError, match=message):  # before any calibration data is read
        search_plan(model, config, calibration="no-such-file.jsonl")


@pytest.mark.parametrize("method", ["frequency", "reap", "activation_norm"])
@torch.no_grad()
def test_experts_that_stay(method: str) -> None:
    """Naive saliencies, token by token in float64; of a router with two groups, as many of each."""
    model, ids = tiny_model("deepseek_v3"), random_ids(5, 9)
    layer, double = 2, copy.deepcopy(model).double()
    raw = double.get_submodule(f"model.layers.{layer}.mlp")
    glu, _ = naive_glus(model.config, layer)
    sums, counts, calls = [0.0] * 8, [0] * 8, list[Any]()
    experts: Any = model.get_submodule(f"model.layers.{layer}.mlp.experts")
    handle = experts.register_forward_pre_hook(lambda _, args: calls.append(args))
    for row in ids:
        model(torch.tensor([row]))
    handle.remove()
    for x, chosen, weights in calls:
        for token, own, gates in zip(x.double(), chosen.tolist(), weights.tolist(), strict=True):
            for expert, gate in zip(own, gates, strict=True):
                weight = gate if method == "reap" else 1.0
                size = float(naive_gated_expert(raw, expert, weight, token, glu).norm())
                sums[expert] += 1 if method == "frequency" else size
                counts[expert] += 1
    scores = [s if method == "frequency" else s / max(n, 1) for s, n in zip(sums, counts, strict=True)]
    best = [sorted(range(start, start + 4), key=lambda e: (-scores[e], e))[:2] for start in (0, 4)]
    config = CondenseConfig(layers=[layer], num_routed=4, num_experts=2, routed_selection=method)
    row = search_plan(model, config, calibration=ids).layers[0]
    assert row.routed == sorted(best[0] + best[1])
    others = sorted((e for e in range(8) if counts[e] and e not in row.routed), key=lambda e: (-counts[e], e))
    assert row.experts == others[:2]
    # The same order in a search for a size.
    config = CondenseConfig.fast(target_size=0.7, routed_selection=method)
    spread = search_plan(model, config, calibration=ids).spread
    assert spread is not None
    assert spread.layers[layer - spread.layers[0].layer].stay(4) == row.routed


def test_a_search_with_experts_that_stay(tmp_path: Path) -> None:
    """Layers are chosen with the mixed layer in place; pruning keeps no dense experts."""
    model, ids = tiny_model("qwen2_moe"), random_ids(4, 9)
    model.save_pretrained(tmp_path / "sparse")
    config = CondenseConfig(num_layers=2, num_routed=4, form="prune_experts")
    plan = search_plan(model, config, calibration=ids)
    divergences = plan.layer_divergences
    assert divergences is not None
    assert plan.layers[0].layer == min(divergences, key=lambda layer: divergences[layer])
    assert all(len(row.routed or ()) == 4 and not row.experts for row in plan.layers)
    pruned = condense_pretrained(tmp_path / "sparse", plan=plan)
    assert estimate(tmp_path / "sparse", config).after == estimate(tmp_path / "sparse", plan).after
    assert pruned.num_parameters() == estimate(tmp_path / "sparse", plan).after
    pruned.save_pretrained(tmp_path / "pruned")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert torch.equal(output(opened), output(pruned))
    assert opened.condense_plan == plan
    assert CondensePlan.from_dict(plan.to_dict()) == plan


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"form": "prune_experts"}, "needs `num_routed`"),
        ({"form": "trim_layer", "num_routed": 4}, "`num_routed` is 4, but with `form='trim_layer'`"),
        ({"num_routed": 1}, "`num_routed` is 1, but the router .* chooses 2 of 8 experts"),
        ({"num_routed": 4, "num_experts": 5}, "`num_experts` is 5, but with `num_routed=4` there are only 4"),
        ({"num_routed": 4, "num_experts": "auto", "expert_budget": 8}, "`num_experts` is 'auto', but"),
        ({"num_routed": 4, "num_experts": 1, "gates": "sigmoid"}, "`gates` is 'sigmoid', but with `num_routed=4`"),
        ({"num_routed": 4, "num_experts": 1, "routed_selection": "best"}, "`routed_selection` is 'best'"),
        ({"num_routed": 4, "num_experts": 1, "layer_selection": "local"}, r"with `num_routed=4` there is none"),
    ],
)
def test_configs_that_are_refused(fields: dict[str, Any], message: str) -> None:
    model, ids = tiny_model("qwen2_moe"), random_ids(2, 8)
    with pytest.raises(ValueError, match=message):
        search_plan(model, CondenseConfig(**{"num_layers": 1, **fields}), calibration=ids)


# With dense neurons, and without any where a config has no place for them.
STOCK = {
    **{"deepseek_v2": True, "deepseek_v3": True, "nemotron_h": True, "granitemoeshared": True, "qwen2_moe": True},
    **{"gpt_oss": False, "hunyuan_v1_moe": False, "mixtral": False, "qwen3_moe": False},
}


@pytest.mark.parametrize("model_type", STOCK)
def test_stock_checkpoints(model_type: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Layers that are all alike are those of the base architecture with other numbers in its config."""
    mixed = apply_plan(tiny_model(model_type), mixed_plan(model_type, {0: 0.5} if STOCK[model_type] else {}))
    expected, before = output(mixed), state(mixed)
    report = export_stock(mixed, tmp_path)
    assert not differing(state(mixed), before)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(output(stock), expected, rtol=1e-6, atol=2e-6)
    assert {block.num_experts for block in find_sparse_blocks(stock)} == {len(ROUTED)}
    assert report.parameters == stock.num_parameters() == mixed.num_parameters()
    assert "Every sparse layer has fewer experts" in (tmp_path / "README.md").read_text()
    assert "misread" not in caplog.text


def test_shared_experts_are_padded_to_whole_ones(tmp_path: Path) -> None:
    width = ARCHITECTURES["deepseek_v2"].sparse_layers
    plan = CondensePlan([CondensedLayer(i, [], [], routed=ROUTED, width=20) for i in width])
    config = CondenseConfig(refit="down_proj", refit_neurons="energy")
    mixed = apply_plan(tiny_model("deepseek_v2"), plan, config, calibration=random_ids(10, 32))
    report = export_stock(mixed, tmp_path)
    torch.testing.assert_close(output(AutoModelForCausalLM.from_pretrained(tmp_path)), output(mixed), rtol=0, atol=2e-6)
    assert report.parameters > mixed.num_parameters()


@pytest.mark.parametrize(
    ("model_type", "dense", "message"),
    [
        ("mixtral", {0: 0.5}, r"no shared expert for the dense neurons"),
        ("hunyuan_v1_moe", {0: 0.5}, r"the shared expert of decoder layer 0 would be 16 wide"),
        ("jetmoe", {}, r"self_attention\.experts\.input_linear\.weight would be"),
        ("dbrx", {}, r"no field with the number of experts"),
    ],
)
def test_stock_checkpoints_that_can_not_be(
    model_type: str, dense: dict[int, float], message: str, tmp_path: Path
) -> None:
    mixed = apply_plan(tiny_model(model_type), mixed_plan(model_type, dense))
    with pytest.raises(UnsupportedModelError, match=message):
        export_stock(mixed, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_what_can_be_exported_is_known_before_a_search(tmp_path: Path) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path)
    ids = random_ids(10, 32)
    for fields, message in (
        ({"form": "prune_experts", "num_layers": 2, "num_routed": 4}, r"Set `num_layers` to 4"),
        ({"num_layers": 4, "num_routed": 4, "num_experts": 1}, r"no shared expert for the dense neurons"),
    ):
        with pytest.raises((ValueError, UnsupportedModelError), match=message):
            condense_pretrained(tmp_path, CondenseConfig(exportable="stock", **fields), calibration=ids)
    with pytest.raises(UnsupportedModelError, match=r"different numbers of experts.* Set `exportable='stock'`"):
        check_export(tmp_path, CondenseConfig.fast(target_size=0.6))
    check_export(tmp_path, CondenseConfig.fast(target_size=0.6, exportable="stock"))
    config = CondenseConfig(form="prune_experts", num_layers=4, num_routed=4, exportable="stock")
    pruned = condense_pretrained(tmp_path, config, calibration=ids)
    assert export_stock(pruned, tmp_path / "stock").fields["num_local_experts"] == 4


def test_exports_and_adapters_are_refused(tmp_path: Path) -> None:
    plan = mixed_plan("qwen2_moe", {0: 0.5})
    mixed = apply_plan(tiny_model("qwen2_moe"), plan)
    with pytest.raises(UnsupportedModelError, match=r"layers \[1, 2, 3\] are sparse still"):
        export_dense(mixed, tmp_path / "exported")
    several = CondensePlan([replace(layer, routed=ROUTED[: 2 * (1 + i % 2)]) for i, layer in enumerate(plan.layers)])
    with pytest.raises(UnsupportedModelError, match=r"decoder layers keep \{1: 2, 2: 4, 3: 2\} of them"):
        export_stock(apply_plan(tiny_model("qwen2_moe"), several), tmp_path / "exported")
    with pytest.raises(ValueError, match=r"keeps experts behind the router in decoder layers \[1, 2, 3\]"):
        CondenseAdapterConfig(plan=plan)
    assert not (tmp_path / "exported").exists()
    names = unfreeze_condensed(mixed)
    assert {name.rpartition(".mlp.")[2].partition(".")[0] for name in names} == {"shared_expert"}
    assert len(names) == 9
    more = {name.rpartition(".mlp.")[2] for name in set(unfreeze_condensed(mixed, routed=True)).difference(names)}
    assert more == {"experts.gate_up_proj", "experts.down_proj", "gate.weight"}
