"""Layers that are dropped instead of condensed: how they are chosen, plans, and models without some MLPs."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

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
from cdmoe_plugin.blocks import UnsupportedModelError, find_sparse_blocks
from cdmoe_plugin.cards.tables import plan_table
from cdmoe_plugin.condense.forms import FORMS as FORMS_BY_NAME
from cdmoe_plugin.config import FORMS as CONFIG_FORMS
from cdmoe_plugin.estimate import dry_run
from cdmoe_plugin.search.layers import similarity as layer_selection
from tests.helpers.checkpoints import Reads, experts_read
from tests.helpers.models import IDS, SEARCHABLE, build, sparse_model
from tests.helpers.naive import sparse_blocks
from tests.helpers.states import differing, state, state_of
from tests.helpers.tiny_models import available, random_ids, tiny_model
from tests.helpers.trimming import by_hand, first_output, naive_greedy, naive_similarities, trim_plan

FORMS = ["condense", "trim_layer", "trim_block"]
NAIVE = ["qwen2_moe", "deepseek", "mixtral", "granitemoeshared", "glm4_moe", "qwen3_moe"]
SAMPLES = random_ids(5, 12)


def model_of(model_type: str) -> Any:
    """Layers differ in size, so that their order is no matter of course."""
    model = tiny_model(model_type, seed=3) if model_type == "granitemoeshared" else build(model_type)
    if model_type == "granitemoeshared":
        for index, block in sparse_blocks(model).items():
            block.experts.down_proj.data *= 1 + (index * 5 % 3)
    return model


# --- choosing ---


@pytest.mark.parametrize(
    ("model_type", "form"),
    [(name, form) for name in NAIVE for form in FORMS]
    + [(name, "trim_block") for name in filter(available, ["hy_v4"])],
)
def test_similarity(model_type: str, form: str) -> None:
    model = model_of(model_type)
    config = CondenseConfig(2, 1, form=form, layer_selection="similarity", batch_size=2)
    plan = search_plan(model, config, calibration=SAMPLES)
    expected = naive_similarities(model, SAMPLES, form)
    assert plan.form == form
    assert plan.layer_similarities == pytest.approx(expected, abs=2e-6)
    assert [row.layer for row in plan.layers] == sorted(expected, key=lambda layer: -expected[layer])[:2]
    assert [row.score for row in plan.layers] == [None, None]
    assert plan.layer_divergences is None
    assert [len(row.experts) for row in plan.layers] == [1 if form == "condense" else 0] * 2


@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("model_type", ["qwen2_moe", "deepseek", "granitemoeshared", *filter(available, ["hy_v4"])])
def test_greedy(model_type: str, form: str) -> None:
    model = model_of(model_type)
    before, about = state_of(model)
    plan = search_plan(model, CondenseConfig(3, 99, form=form, cache_memory="20KB"), calibration=SAMPLES)
    after, about_after = state_of(model)
    assert not differing(before, after)
    assert about == about_after
    order, scores, alone = naive_greedy(model, SAMPLES, form, 3)
    assert [row.layer for row in plan.layers] == order
    assert [row.score for row in plan.layers] == pytest.approx(scores, rel=1e-3)
    assert plan.layer_divergences == pytest.approx(alone, rel=1e-3)
    assert plan.layer_similarities is None
    assert all(row.experts == [] and row.expert_scores is None for row in plan.layers)


def test_ties_go_to_the_lower_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {0: 0.5, 1: 0.9, 2: 0.9 + 1e-8, 3: 0.7}
    monkeypatch.setattr(layer_selection, "_similarity", lambda _data, layer, *_: known[layer])
    config = CondenseConfig(4, form="trim_layer", layer_selection="similarity")
    plan = search_plan(tiny_model("mixtral"), config, calibration=IDS)
    assert [row.layer for row in plan.layers] == [1, 2, 3, 0]


def test_similarities_are_kept_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CondenseConfig(2, form="trim_layer", layer_selection="similarity")
    plan = search_plan(tiny_model("qwen2_moe"), config, calibration=IDS, state_dir=tmp_path)
    monkeypatch.setattr(layer_selection, "_similarity", None)
    assert search_plan(tiny_model("qwen2_moe"), config, calibration=IDS, state_dir=tmp_path) == plan
    with pytest.raises(ValueError, match="another search"):
        search_plan(tiny_model("qwen2_moe"), replace(config, form="trim_block"), calibration=IDS, state_dir=tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_similarity_in_half_precision(dtype: torch.dtype) -> None:
    config = CondenseConfig(2, form="trim_layer", layer_selection="similarity")
    found, expected = (search_plan(tiny_model("mixtral", dtype=d), config, calibration=IDS) for d in (dtype, None))
    assert found.layer_similarities == pytest.approx(expected.layer_similarities, abs=2e-2)


def test_named_layers_need_no_data(tmp_path: Path) -> None:
    tiny_model("qwen2_moe").save_pretrained(tmp_path)
    for form in FORMS[1:]:
        model = condense_pretrained(tmp_path, CondenseConfig(layers=[3, 1], num_experts=99, form=form))
        assert [row.layer for row in model.condense_plan.layers] == [3, 1]
        assert model.condense_plan.form == form


def test_every_form_of_a_config_is_known() -> None:
    assert list(FORMS_BY_NAME) == list(CONFIG_FORMS)
    assert set(FORMS) < set(CONFIG_FORMS)


def test_unknown_forms() -> None:
    for form in ("trim", None, ["condense"], ""):
        with pytest.raises(ValueError, match="`form` is"):
            CondenseConfig(form=form)  # type: ignore[arg-type]


# --- plans ---

PLAN = CondensePlan(
    [CondensedLayer(2, [4, 0], [0.25, 0.1], 0.01, [0.3, 0.2, 0.1]), CondensedLayer(1, [3, 1], [0.5, 0.2], 0.02)],
    config=CondenseConfig(2, 2).to_dict(),
    layer_divergences={1: 0.1, 2: 0.01},
    layer_similarities={1: 0.5, 2: 0.75},
)


@pytest.mark.parametrize("form", FORMS[1:])
def test_a_plan_in_its_own_order(form: str, tmp_path: Path) -> None:
    plan = PLAN.as_trimming(form)
    assert plan.layers == [CondensedLayer(2, [], []), CondensedLayer(1, [], [])]
    assert plan.config == {**CondenseConfig(2, 2, form=form).to_dict()}
    assert plan.layer_divergences is None
    assert plan.layer_similarities == (PLAN.layer_similarities if form == "trim_layer" else None)
    assert plan.truncate(num_layers=1).layers == plan.layers[:1]
    assert plan.truncate(num_layers=1).form == form
    assert PLAN.truncate(num_layers=1).as_trimming(form) == plan.truncate(num_layers=1)
    assert plan != PLAN
    assert plan.as_trimming(form) == plan
    plan.save(tmp_path / "plan.json")
    assert CondensePlan.load(tmp_path / "plan.json") == plan
    with pytest.raises(ValueError, match="'trim_layer' or 'trim_block'"):
        plan.as_trimming("condense")
    with pytest.raises(ValueError, match="`num_experts` should be between 0 and the plan's 0"):
        plan.truncate(num_experts=2)


def test_older_files_mean_condensing(tmp_path: Path) -> None:
    values = PLAN.to_dict()
    assert values["form"] == "condense"
    del values["form"], values["layer_similarities"]
    assert CondensePlan.from_dict(values) == replace(PLAN, layer_similarities=None)


@pytest.mark.parametrize("form", ["trim", "", None, True, 1, 0.5, [], ["trim_layer"], {}, "trim_layer", "trim_block"])
def test_edited_forms_are_refused(form: Any) -> None:
    with pytest.raises(ValueError, match=r"`form` should be one of|decoder layers \[2, 1\] keep experts"):
        CondensePlan.from_dict({**PLAN.to_dict(), "form": form})


def test_edited_similarities_are_refused() -> None:
    for odd in ({"a": 1.0}, {"1": None}, {"1": 10**400}, [1.0], 3):
        with pytest.raises(ValueError, match="layer_similarities"):
            CondensePlan.from_dict({**PLAN.to_dict(), "layer_similarities": odd})


def test_a_trimming_must_fit() -> None:
    for form in FORMS[1:]:
        with pytest.raises(ValueError, match="decoder layer 0, which is not a sparse layer"):
            apply_plan(tiny_model("qwen2_moe"), trim_plan(form, [0]))


# --- models without some MLPs ---


# A dense MLP beside the experts would stay.
PARTS = ("gemma4_text", "diffusion_gemma_text")


@pytest.mark.parametrize("model_type", [*(name for name in SEARCHABLE if name not in PARTS), "deepseek"])
def test_without_mlps(model_type: str) -> None:
    model = sparse_model(model_type)
    layers = [block.layer for block in find_sparse_blocks(model)][-1:0:-1]
    expected = by_hand(model, "trim_layer", layers, IDS)
    assert not any(torch.equal(a, b) for a, b in zip(first_output(model, IDS), expected, strict=True))
    found = apply_plan(model, trim_plan("trim_layer", layers))
    assert type(found).__name__.startswith("CDMoE")
    torch.testing.assert_close(first_output(found, IDS), expected, rtol=1e-5, atol=1e-5)


def test_experts_that_are_a_part_of_the_mlp(tmp_path: Path) -> None:
    model, words = tiny_model("gemma4_text"), "experts of decoder layer 1 are only a part of its MLP"
    model.save_pretrained(tmp_path)
    before = state(model)
    for one in (model, tmp_path):
        with pytest.raises(UnsupportedModelError, match=words):
            condense_pretrained(one, CondenseConfig(layers=[1], form="trim_layer"), calibration=IDS)
        with pytest.raises(UnsupportedModelError, match=words):
            condense_pretrained(one, plan=trim_plan("trim_layer", [1]))
    assert not differing(before, state(model))


@pytest.mark.parametrize("model_type", ["qwen2_moe", "granitemoeshared", "deepseek", "mixtral"])
def test_save_and_open_without_mlps(model_type: str, tmp_path: Path, reads: Reads) -> None:
    model = sparse_model(model_type)
    model.save_pretrained(tmp_path / "sparse")
    layers = [block.layer for block in find_sparse_blocks(model)][1:]
    plan = trim_plan("trim_layer", layers)
    model = apply_plan(model, plan)
    model.save_pretrained(tmp_path / "trimmed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "trimmed")
    at_once = condense_pretrained(tmp_path / "sparse", plan=plan)
    for one in (again, at_once):
        assert type(one) is type(model)
        assert not differing(state(one), state(model))
        assert one.condense_plan == model.condense_plan
        assert one.condense_plan.form == "trim_layer"
    assert all(len(experts_read(reads, layer)) <= 3 for layer in layers)  # one expert, and that is dropped again
    sizes = again.config.condense_config["parameters"]
    assert sizes["after"] == again.num_parameters()
    gone = [rf"layers\.{layer}\.(mlp|block_sparse_moe|shared_mlp)\." for layer in layers]
    assert not [name for name in state(again) if any(re.search(place, name) for place in gone)]
    assert f"{sizes['after']:,}" in dry_run(tmp_path / "sparse", plan)
    card = (tmp_path / "trimmed" / "README.md").read_text()
    assert plan_table(model.condense_plan) in card
    assert "Layer Trimming" in card
    for ask in (unfreeze_condensed, condensed_module_names):
        with pytest.raises(ValueError, match="nothing to train"):
            ask(again)
    with pytest.raises(ValueError, match="condensed already"):
        apply_plan(again, plan)


def test_all_mlps_dropped_no_router_loss() -> None:
    model = tiny_model("mixtral", output_router_logits=True)
    apply_plan(model, trim_plan("trim_layer", [0, 1, 2, 3]))
    ids = torch.tensor(IDS[:1])
    model.train()(ids, labels=ids).loss.backward()
    assert model.config.output_router_logits is False


def test_edited_trimmed_checkpoints(tmp_path: Path) -> None:
    apply_plan(tiny_model("qwen2_moe"), trim_plan("trim_layer", [2])).save_pretrained(tmp_path)
    config, weights = json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / "model.safetensors")
    for form in ("trim", None, "condense"):
        edited = copy.deepcopy(config)
        edited["condense_config"]["condensed_layers"]["2"]["form"] = form
        (tmp_path / "config.json").write_text(json.dumps(edited))
        with pytest.raises(ValueError, match="for decoder layer 2"):
            AutoModelForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    extra = {**weights, "model.layers.2.mlp.gate_proj.weight": torch.ones(3, 32)}
    save_file(extra, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="no place"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
