"""Condensed layers and models: what they compute, save and read, and how they generate and train."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoModel, AutoModelForCausalLM
from transformers.models.qwen2_moe.modeling_qwen2_moe import load_balancing_loss_func

from cdmoe_plugin import (
    CondenseConfig,
    CondensedLayer,
    CondensePlan,
    apply_plan,
    condense_pretrained,
    condensed_module_names,
    search_plan,
    unfreeze_condensed,
)
from cdmoe_plugin.blocks import find_sparse_blocks, hidden_of
from cdmoe_plugin.condense.fold import fold
from tests.helpers.checkpoints import Reads, experts_read, in_layer, keys_on_disk
from tests.helpers.models import FOLDS, FROM_DISK, IDS, QUIRKS, SEARCHABLE, output, sparse_model, uniform
from tests.helpers.naive import naive_block, naive_glus
from tests.helpers.plans import some_plan
from tests.helpers.states import differing, state
from tests.helpers.tiny_models import ARCHITECTURES, available, random_ids, tiny_model


@pytest.mark.parametrize(("model_type", "overrides"), FOLDS)
@torch.no_grad()
def test_fold(model_type: str, overrides: dict[str, Any]) -> None:
    model = tiny_model(model_type, **overrides)
    double = copy.deepcopy(model).double().base_model
    blocks = find_sparse_blocks(model)
    assert [block.layer for block in blocks] == list(ARCHITECTURES[model_type].sparse_layers)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 5, 32, generator=generator)
    for block in (blocks[0], blocks[-1]):
        raw, owner = double.get_submodule(block.path), double.get_submodule(block.path.rpartition(".")[0])
        for kept in ([], [5], [3, 0, 7, 1, 2, 6, 4, 5]):
            gates = torch.randn(len(kept), generator=generator).tolist()
            expected = naive_block(x.double(), raw, owner, (kept, gates), *naive_glus(model.config, block.layer))
            mlp = fold(block, kept, gates)
            assert mlp.up_proj.out_features == block.shared_intermediate_size + 16 * len(kept)
            assert (hidden_of(mlp(x)) - expected).abs().max() <= 1e-6 * max(1.0, float(expected.abs().max()))


def test_fold_rounds_once() -> None:
    block = find_sparse_blocks(tiny_model("qwen2_moe", dtype=torch.bfloat16))[0]
    shared, routed, gates = block.module.shared_expert, block.module.experts, [0.123456789, 1.987654321]
    mlp = fold(block, [6, 2], gates)
    downs = [(routed.down_proj[e].float() * gate).bfloat16() for e, gate in zip([6, 2], gates, strict=True)]
    assert torch.equal(mlp.down_proj.weight, torch.cat([shared.down_proj.weight, *downs], dim=1))
    pairs = [routed.gate_up_proj[e] for e in (6, 2)]
    assert torch.equal(mlp.gate_proj.weight, torch.cat([shared.gate_proj.weight, *(pair[:16] for pair in pairs)]))
    assert torch.equal(mlp.up_proj.weight, torch.cat([shared.up_proj.weight, *(pair[16:] for pair in pairs)]))
    assert torch.equal(mlp.shared_expert_gate.weight, block.module.shared_expert_gate.weight)


# --- whole models ---


@pytest.mark.parametrize("model_type", SEARCHABLE)
def test_uniform_router_is_condensed_exactly_and_saved(model_type: str, tmp_path: Path) -> None:
    model, plan, before = uniform(model_type)
    assert (output(model) - before).abs().max() < 1e-5 * before.abs().max()
    for row in plan.layers:
        assert abs(row.score) < 1e-7
        assert abs(row.expert_scores[-1]) < 1e-3 * row.expert_scores[0]

    model.save_pretrained(tmp_path)
    arch = ARCHITECTURES[model_type]
    auto = AutoModelForCausalLM if arch.causal_lm else AutoModel
    opener = auto if arch.config_class in auto._model_mapping else type(model)
    again = opener.from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert type(again).__name__ == f"CDMoE{arch.model}"
    assert not differing(state(again), state(model))
    # In memory of its own: where a file is mapped, weights lie unaligned, and some kernels round by that.
    assert torch.equal(output(copy.deepcopy(again)), output(model))
    assert again.condense_plan == CondensePlan.load(tmp_path) == plan


@pytest.mark.parametrize("model_type", [*QUIRKS, *filter(available, ["deepseek_v4", "qwen4_exp_text", "hy_v4"])])
def test_search_in_bfloat16(model_type: str) -> None:
    if model_type == "deepseek_v4" and transformers.__version__.startswith("5.17."):
        pytest.skip("there, deepseek_v4 itself does not run in bfloat16")
    half = tiny_model(model_type, dtype=torch.bfloat16)
    config = CondenseConfig(layers=list(ARCHITECTURES[model_type].sparse_layers[-1:]), num_experts=1)
    found, expected = (search_plan(m, config, calibration=IDS).layers[0] for m in (half, copy.deepcopy(half).float()))
    assert found.expert_scores == pytest.approx(expected.expert_scores, rel=0.4)  # some tokens go elsewhere


@pytest.mark.parametrize("model_type", FROM_DISK)
def test_only_what_is_kept_is_read(model_type: str, tmp_path: Path, reads: Reads) -> None:
    model = sparse_model(model_type)
    model.save_pretrained(tmp_path / "sparse", max_shard_size="30KB")
    sparse = [block.layer for block in find_sparse_blocks(model)]
    plan = some_plan(sparse[:0:-1])
    expected = apply_plan(AutoModelForCausalLM.from_pretrained(tmp_path / "sparse"), plan)
    found = condense_pretrained(tmp_path / "sparse", plan=plan)
    assert type(found) is type(expected)
    assert not differing(state(found), state(expected))
    for row in plan.layers:
        read = experts_read(reads, row.layer)
        assert sorted(set(read)) == sorted(row.experts)
        assert len(read) in (2 * 3, 3 * 3, 4 * 3)  # two or three tensors each, or two with biases
    found.save_pretrained(tmp_path / "condensed")
    before, after = (keys_on_disk(tmp_path / name) for name in ("sparse", "condensed"))
    for row in plan.layers:
        new = {key for key in after - before if in_layer(key, row.layer)}
        place = min(new).rpartition(".down_proj.")[0]
        # On disk, all gates are called so there.
        gate = {"hy_v4": "linear_gate", "deepseek_v4": "wgate"}.get(model_type, "gate_proj")
        kinds = ("weight", "bias") if model_type == "gpt_oss" else ("weight",)
        names = ("up_proj", "down_proj") if model_type == "nemotron_h" else (gate, "up_proj", "down_proj")
        bias = {f"{place}.down_proj.bias"} if model_type == "jetmoe" else set()  # the block's own
        assert new == {f"{place}.{name}.{kind}" for name in names for kind in kinds} | bias
        gone = {key for key in before - after if in_layer(key, row.layer)}
        assert all(
            key.startswith(f"{place}.") or re.search(r"\.shared_mlp\.|\.moe\.router\.|\d\.router\.", key)
            for key in gone
        )
        assert {key for key in after if key.startswith(f"{place}.")} - new <= {f"{place}.shared_expert_gate.weight"}
    assert not {key for key in before ^ after if not any(in_layer(key, layer) for layer in sparse[1:])}


@pytest.mark.parametrize("kwargs", [{"dtype": torch.bfloat16}, {"device_map": "cpu"}, {"device_map": "auto"}])
def test_loading_options(kwargs: dict[str, Any], tmp_path: Path) -> None:
    tiny_model("qwen2_moe").save_pretrained(tmp_path)
    found = condense_pretrained(tmp_path, plan=some_plan([1, 3]), **kwargs)
    expected = apply_plan(AutoModelForCausalLM.from_pretrained(tmp_path, **kwargs), some_plan([1, 3]))
    assert not differing(state(found), state(expected))
    assert found.dtype == kwargs.get("dtype", torch.float32)


@pytest.mark.parametrize("lost", ["layers.2.mlp.experts", "layers.2.mlp.shared_expert.", "layers.1.self_attn.q_proj"])
def test_a_checkpoint_with_missing_weights_is_refused(lost: str, tmp_path: Path) -> None:
    tiny_model("qwen2_moe").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if lost not in name}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for how in ({"plan": some_plan([2])}, {"config": CondenseConfig(layers=[2], num_experts=1), "calibration": IDS}):
        with pytest.raises(ValueError, match="lacks"):
            condense_pretrained(tmp_path, **how)


# --- generation and training ---


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("model_type", ["qwen2_moe", "deepseek"])
def test_left_padded_generation(model_type: str, use_cache: bool) -> None:
    model = apply_plan(sparse_model(model_type), some_plan([1, 3]))
    prompts = random_ids(3, 6)
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "use_cache": use_cache, "pad_token_id": 0}
    together = model.generate(ids, attention_mask=(ids != 0).long(), **options)
    for prompt, row in zip(prompts, together, strict=True):
        alone = model.generate(torch.tensor([prompt]), **options)
        assert torch.equal(row[width:], alone[0, len(prompt) :])
        greedy = [*prompt]
        for _ in range(8):
            logits = model(torch.tensor([greedy]), use_cache=False).logits[0, -1]
            logits[2] = -torch.inf  # no end before its time
            greedy.append(int(logits.argmax()))
        assert row[width:].tolist() == greedy[len(prompt) :]


@pytest.mark.parametrize("model_type", ["qwen2_moe", "deepseek", "mixtral", "granitemoe"])
def test_no_router_no_router_loss(model_type: str, tmp_path: Path) -> None:
    model = sparse_model(model_type)
    model.config.output_router_logits, model.config.router_aux_loss_coef = True, 0.01
    model.router_aux_loss_coef = 0.01
    ids = torch.tensor(IDS[:1])
    assert model(ids, labels=ids).aux_loss is not None
    apply_plan(model, some_plan([block.layer for block in find_sparse_blocks(model)]))
    model.save_pretrained(tmp_path)
    on_disk = json.loads((tmp_path / "config.json").read_text())
    assert on_disk["output_router_logits"] is False
    assert on_disk.get("router_aux_loss_coef", on_disk.get("aux_loss_alpha")) == 0.0
    for one in (model, AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert hasattr(one.config, "output_router_logits")  # with the next line, what TRL asks
        assert one.config.router_aux_loss_coef == one.router_aux_loss_coef == 0.0
        found = one.train()(ids, labels=ids)
        assert found.loss.item() == pytest.approx(
            functional.cross_entropy(found.logits[0, :-1], ids[0, 1:]).item(), 1e-5
        )


def test_router_loss_of_the_routers_that_are_left() -> None:
    model = apply_plan(tiny_model("qwen2_moe", output_router_logits=True, router_aux_loss_coef=0.5), some_plan([1, 3]))
    found = model.train()(ids := torch.tensor(IDS[:1]), labels=ids)
    assert [tuple(logits.shape) for logits in found.router_logits] == [(9, 8)]
    aux_loss = load_balancing_loss_func(found.router_logits, num_experts=8, top_k=2)
    plain = functional.cross_entropy(found.logits[0, :-1], ids[0, 1:])
    torch.testing.assert_close(found.loss, plain + 0.5 * aux_loss)
    found.loss.backward()


def train(model: torch.nn.Module, steps: int) -> list[str]:
    """Names of the tensors that training changes."""
    before, ids = state(model), torch.tensor(IDS[:1])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return differing(before, state(model))


def test_only_condensed_layers_learn() -> None:
    model = apply_plan(tiny_model("qwen2_moe", attention_dropout=0.1), some_plan([3, 1])).train()
    parts = ("gate_proj", "up_proj", "down_proj", "shared_expert_gate")
    expected = sorted(f"model.layers.{layer}.mlp.{part}.weight" for layer in (1, 3) for part in parts)
    assert sorted(unfreeze_condensed(model)) == expected
    assert sorted(name for name, p in model.named_parameters() if p.requires_grad) == expected
    assert train(model, steps=1) == expected


def test_adapters_on_condensed_layers() -> None:
    model = apply_plan(tiny_model("qwen2_moe", num_layers=12), some_plan([1, 10]))
    names = condensed_module_names(model)
    assert names == [f"model.layers.{i}.mlp.{part}_proj" for i in (1, 10) for part in ("gate", "up", "down")]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=names))
    assert condensed_module_names(adapted) == names
    with pytest.raises(ValueError, match="Qwen2MoeForCausalLM is not condensed"):
        condensed_module_names(get_peft_model(tiny_model("qwen2_moe"), LoraConfig(target_modules=["q_proj"])))
    changed = train(adapted.train(), steps=2)
    weights = ("lora_A.default.weight", "lora_B.default.weight")
    assert changed == sorted(f"base_model.model.{name}.{weight}" for name in names for weight in weights)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])  # experts stored one by one, and together
@pytest.mark.parametrize("offload", [False, True])
def test_all_experts_in_another_order(model_type: str, offload: bool, tmp_path: Path) -> None:
    model = tiny_model(model_type)
    model.save_pretrained(tmp_path / "sparse")
    count = find_sparse_blocks(model)[0].num_experts
    order = [*range(1, count), 0]
    plan = CondensePlan([CondensedLayer(1, order, [0.1 * (1 + expert) for expert in order])])
    place = {"offload_folder": str(tmp_path / "offload")} if offload else {}
    read = condense_pretrained(tmp_path / "sparse", plan=plan, **place)
    torch.testing.assert_close(output(read), output(apply_plan(model, plan)))
