"""What can't be done is said before anything changes: which field or layer, what was found, and what to do."""

import copy
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from cdmoe_plugin import CondenseConfig, CondensedLayer, CondensePlan, apply_plan, condense_pretrained, search_plan
from cdmoe_plugin.divergence import METRICS
from cdmoe_plugin.selection.experts import EXPERT_SELECTIONS
from cdmoe_plugin.selection.gates import GATES
from cdmoe_plugin.selection.layers import COMPARE, LAYER_SELECTIONS
from cdmoe_plugin.sparse import UnsupportedModelError
from tests.tiny_models import REFUSED, available, random_ids, tiny_model

IDS = random_ids()
SMALL = CondenseConfig(num_layers=1, num_experts=1)
# What the refusal says of the architectures in REFUSED, but for cohere2_moe, which computes what it should.
REASONS = {
    "does more than add shared and routed experts": "axk1",
    "needs more than hidden states": "deepseek_v4",
    "returns more than hidden states": "zaya",
    "its experts are not silu": "glm5_next_text hy_v4 step3p5 minimax_m3_vl_text inkling2_text",
    "its experts have biases": "gpt_oss openai_privacy_filter",
    "not gated MLPs with stacked weights": "inkling_text nemotron_h jetmoe",
    "shapes of its expert weights": "llama4_text longcat_flash",
    "normalises the output of every expert": "muse_spark_text",
    "not in a block of their own": "gemma4_text diffusion_gemma_text ernie4_5_vl_moe_text",
    "'num_experts': 16.* not supported": "doge",
}
REFUSALS = {name: reason for reason, names in REASONS.items() for name in names.split()}
CONFIG_ERRORS = [(name, v) for name in ("num_layers", "num_experts", "batch_size") for v in (-1, True, "2", 2.0, None)]
CONFIG_ERRORS += [("num_layers", 0), ("num_samples", 0), ("max_length", 1), ("seed", -1), ("metric", 3)]
CONFIG_ERRORS += [("layers", value) for value in ([], [1, 1], [True], [1.0], "1", 1)]
CONFIG_ERRORS += [("cache_memory", value) for value in ("lots", "-1GB", "4", "", None, True)]
NAN, INF = float("nan"), float("inf")
# Edits of a plan file: where, the new value, and what the message names.
PLAN_ERRORS: list[tuple[str, Any, str]] = [
    ("version", 2, "version 1.*found version 2"),
    ("layers", {}, "`layers` should be a list"),
    ("layers", [], "condenses no layer"),
    ("layers", None, "`layers` should be a list"),
    ("colour", "red", "unknown fields .'colour'"),
    ("layers.0.layer", "1", r"`layers\[0\].layer` should be a whole number from 0, but is '1'"),
    ("layers.0.layer", True, r"`layers\[0\].layer`.*True"),
    ("layers.0.layer", 2, r"decoder layers \[2\] more than once"),
    ("layers.0.layer", 0, r"decoder layer 0, which is no sparse layer.*\[1, 2, 3\]"),
    ("layers.0.experts", [1, 1], r"`layers\[0\].experts` names an expert more than once"),
    ("layers.0.experts", [1], "1 experts but 2 gates"),
    ("layers.0.experts", [1, -1], r"`layers\[0\].experts`.*-1"),
    ("layers.0.experts", [1, 8], r"experts \[8\] of decoder layer 3, which has 8"),
    ("layers.1.gates", [0.5, NAN], "NaN"),
    ("layers.1.gates", [0.5, INF], "Infinity"),
    ("layers.1.gates", ["x", 1], r"`layers\[1\].gates` should be a finite number, but is 'x'"),
    ("layers.1.gates", None, r"`layers\[1\].gates`"),
    ("layers.1.score", "low", r"`layers\[1\].score`"),
    ("layers.1.expert_scores", [1.0], r"`layers\[1\].expert_scores` should have 3 values"),
    ("layers.1.weight", 1, r"`layers\[1\]` has unknown fields .'weight'"),
    ("model", "qwen", "`model` should be an object"),
    ("model.hidden_size", "32", "`model.hidden_size`"),
    ("model.sparse_layers.0.num_experts", -8, r"`model.sparse_layers\[0\].num_experts`"),
    ("config", "greedy", "`config` should be an object"),
    ("layer_divergences", {"one": 1.0}, "`layer_divergences` .*'one'"),
]
# Tiny models of other sizes, and how the message says in what they differ from the plan's.
OTHERS: list[tuple[str, dict[str, Any], str]] = [
    ("qwen3_moe", {}, "model_type is 'qwen2_moe', this model's is 'qwen3_moe'"),
    ("qwen2_moe", {"hidden": 64}, "hidden_size is 32, this model's is 64"),
    ("qwen2_moe", {"num_layers": 5}, "num_hidden_layers is 4, this model's is 5"),
    ("qwen2_moe", {"num_experts": 16}, "layer=1, num_experts=8.*layer=1, num_experts=16"),
    ("qwen2_moe", {"expert_width": 8}, "intermediate_size=16.* intermediate_size=8"),
    ("qwen2_moe", {"shared_width": 8}, "shared_intermediate_size=24.*shared_intermediate_size=8"),
    ("qwen2_moe", {"dense_layers": 2}, "layer=1.*layer=2"),
]


def plan_for(*layers: int) -> CondensePlan:
    return CondensePlan([CondensedLayer(layer, [1, 0], [0.5, 0.25]) for layer in layers])


def state(model: PreTrainedModel) -> tuple[Any, ...]:
    """Everything of a model that a failed call must leave alone."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    modules = [(id(m), m.training, len(m._forward_hooks), "forward" in vars(m)) for m in model.modules()]
    return type(model), type(model.config), model.config.to_dict(), digest.hexdigest(), modules


@pytest.fixture(scope="module")
def shared() -> PreTrainedModel:
    return tiny_model("qwen2_moe")


@pytest.fixture
def model(shared: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """A sparse model that is after the test what it was before."""
    before = state(shared.train())
    yield shared
    assert state(shared) == before


@pytest.fixture(scope="module")
def plan(shared: PreTrainedModel) -> CondensePlan:
    return search_plan(shared, CondenseConfig(layers=[3, 2], num_experts=2), calibration=IDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint without weights: who reads them before checking fails otherwise than expected."""
    path = tmp_path_factory.mktemp("checkpoint")
    tiny_model("qwen2_moe").config.save_pretrained(path)
    return path


def refused_by_all(model: Any, plan: CondensePlan, words: str) -> None:
    """No verb accepts the model, runs it or changes it."""
    runs: list[None] = []
    before = None
    if isinstance(model, PreTrainedModel):
        model.base_model.register_forward_pre_hook(lambda *_: runs.append(None))
        before = state(model)
    for verb in (
        lambda: search_plan(model, SMALL, calibration=IDS),
        lambda: apply_plan(model, plan),
        lambda: condense_pretrained(model, SMALL, calibration=IDS),
        lambda: condense_pretrained(model, plan=plan),
    ):
        with pytest.raises(ValueError, match=words):
            verb()
    assert not runs
    assert before is None or state(model) == before


def refused_on_disk(path: Path, words: str, **kwargs: Any) -> None:
    for request in ({"plan": plan_for(2)}, {"config": SMALL, "calibration": IDS}):
        with pytest.raises(ValueError, match=words):
            condense_pretrained(path, **request, **kwargs)


def test_dense_model(tmp_path: Path) -> None:
    dense = LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, hidden_size=32, num_attention_heads=4, vocab_size=128))
    dense.config.save_pretrained(tmp_path)
    refused_by_all(dense, plan_for(0), r"'llama' \(LlamaForCausalLM\) is dense")
    refused_on_disk(tmp_path, r"'llama' \(LlamaForCausalLM\) is dense")


@pytest.mark.parametrize("model_type", sorted(set(REFUSED) - {"cohere2_moe"}))
def test_unsupported_architecture(model_type: str) -> None:
    if not available(model_type):
        pytest.skip("not in this transformers")
    refused, first, reason = tiny_model(model_type), REFUSED[model_type].sparse_layers[0], REFUSALS[model_type]
    where = "" if model_type == "doge" or "block of their own" in reason else f"decoder layer {first} .*"
    refused_by_all(refused, plan_for(first), f"(?s)model type '{refused.config.model_type}'.*{where}{reason}")
    with pytest.raises(UnsupportedModelError):
        apply_plan(refused, plan_for(first))


def test_unsupported_checkpoints(tmp_path: Path) -> None:
    tiny_model("gpt_oss").config.save_pretrained(tmp_path / "no weights")
    refused_on_disk(tmp_path / "no weights", "decoder layer 0 .*biases")
    tiny_model("axk1").save_pretrained(tmp_path / "axk1")  # here only the weights tell
    refused_on_disk(tmp_path / "axk1", "decoder layer . .*does more than add")


def test_cohere2_moe_is_exact() -> None:
    """With all experts chosen by every token, with the same weight, condensing changes nothing."""
    model = tiny_model("cohere2_moe", top_k=8)
    for layer in (1, 2, 3):
        model.model.layers[layer].mlp.gate.weight.data.zero_()
    with torch.no_grad():
        expected = model(torch.tensor([IDS[0]])).logits
        condense_pretrained(model, CondenseConfig(layers=[1, 2, 3], num_experts=8), calibration=IDS)
        torch.testing.assert_close(model(torch.tensor([IDS[0]])).logits, expected, rtol=1e-4, atol=1e-5)
    assert type(model).__name__ == "CDMoECohere2MoeForCausalLM"


def test_condensed_already(tmp_path: Path) -> None:
    condensed = apply_plan(tiny_model("qwen2_moe"), plan_for(3, 1))
    condensed.config.save_pretrained(tmp_path)
    refused_by_all(condensed, plan_for(2), r"condensed already \(decoder layers \[1, 3\]\).*sparse model")
    refused_on_disk(tmp_path, "condensed already")


def test_quantised(folder: Path, tmp_path: Path) -> None:
    words, four_bit = "Quantised weights.*condense.* first", BitsAndBytesConfig(load_in_4bit=True)
    refused_on_disk(folder, words, quantization_config=four_bit)
    tiny_model("qwen2_moe").save_pretrained(tmp_path)
    quantised = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=four_bit)
    refused_by_all(quantised, plan_for(2), "[Qq]uantised")
    with pytest.raises(ValueError, match=words):
        apply_plan(quantised, plan_for(2))
    quantised.config.save_pretrained(tmp_path / "quantised")
    refused_on_disk(tmp_path / "quantised", words)


@pytest.mark.parametrize("wrong", [None, 5, torch.nn.Linear(2, 2), b"folder", ["folder"], LlamaConfig()])
def test_no_model(wrong: Any) -> None:
    refused_by_all(wrong, plan_for(1), f"`model` should be a .*PreTrainedModel, but is a {type(wrong).__name__}")


def test_wrong_arguments(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=r"\['device_map', 'dtype'\] only apply when a checkpoint is loaded"):
        condense_pretrained(model, plan=plan_for(1), dtype="bfloat16", device_map="cpu")
    for wrong in ({}, {"num_layers": 1}, "greedy"):
        with pytest.raises(ValueError, match=f"`config` should be a CondenseConfig, but is a {type(wrong).__name__}"):
            search_plan(model, wrong, calibration=IDS)
    for wrong in ({}, plan_for(1).to_dict(), 5, None):
        with pytest.raises(ValueError, match=f"`plan` should be a CondensePlan or .*is a {type(wrong).__name__}"):
            apply_plan(model, wrong)


@pytest.mark.parametrize(("field", "value"), CONFIG_ERRORS)
def test_config(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"`{field}` (should|names)") as caught:
        CondenseConfig(**{field: value})
    assert repr(value) in str(caught.value)


def test_config_against_model(model: PreTrainedModel, folder: Path) -> None:
    for config, words in (
        ({"num_layers": 1, "num_experts": 9}, "`num_experts` is 9, but decoder layer 1 has 8"),
        ({"num_layers": 4, "num_experts": 1}, r"`num_layers` is 4, but the model has 3 sparse layers: \[1, 2, 3\]"),
        ({"layers": [0, 1], "num_experts": 1}, r"`layers` names \[0\], which .*sparse are \[1, 2, 3\]"),
        ({"layers": [2, 7], "num_experts": 1}, r"`layers` names \[7\]"),
        ({"layers": [-1], "num_experts": 1}, r"`layers` names \[-1\]"),
    ):
        for target in (model, folder):
            with pytest.raises(ValueError, match=words):
                condense_pretrained(target, CondenseConfig(**config), calibration=IDS)


def test_unknown_methods(model: PreTrainedModel, folder: Path) -> None:
    registries: dict[str, Any] = {"expert_selection": EXPERT_SELECTIONS, "layer_selection": LAYER_SELECTIONS}
    registries |= {"metric": METRICS, "compare": COMPARE, "gates": GATES, "refit": [None]}
    for field, registry in registries.items():
        for target in (model, folder):
            with pytest.raises(ValueError, match=f"`{field}` is 'magic'") as caught:
                condense_pretrained(target, CondenseConfig(**{field: "magic"}), calibration=IDS)
            assert all(repr(name) in str(caught.value) or name is None for name in registry)


@pytest.mark.parametrize(("place", "value", "words"), PLAN_ERRORS)
def test_plan_edited_into_nonsense(place: str, value: Any, words: str, plan: CondensePlan, tmp_path: Path) -> None:
    edited = copy.deepcopy(plan.to_dict())
    *path, last = (int(key) if key.isdigit() else key for key in place.split("."))
    spot: Any = edited
    for key in path:
        spot = spot[key]
    spot[last] = value
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(edited))
    with pytest.raises(ValueError, match=f"plan.json is no valid condense plan: .*{words}"):
        CondensePlan.load(file)


def test_plan_files(model: PreTrainedModel, tmp_path: Path) -> None:
    for content in (b"", b"greedy", b"\xff\xfe", b"[" * 100_000, b"[1]", b"{}", b"null"):
        (tmp_path / "plan.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"plan.json is no valid condense plan: \S"):
            condense_pretrained(model, plan=tmp_path / "plan.json")
    for missing in (tmp_path / "other.json", tmp_path):
        with pytest.raises(FileNotFoundError, match=r"other.json|condense_plan.json"):
            condense_pretrained(model, plan=missing)


@pytest.mark.parametrize(("model_type", "sizes", "words"), OTHERS)
def test_plan_of_another_model(
    model_type: str, sizes: dict[str, Any], words: str, plan: CondensePlan, tmp_path: Path
) -> None:
    other = tiny_model(model_type, **sizes)
    other.config.save_pretrained(tmp_path)
    before = state(other)
    for target in (other, tmp_path):
        with pytest.raises(ValueError, match=f"made for another model: .*{words}"):
            condense_pretrained(target, plan=plan)
    assert state(other) == before


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize(
    ("weight", "words"),
    [
        ("model.layers.0.mlp.down_proj.weight", "decoder layer 0 contains NaN"),
        ("model.layers.1.self_attn.o_proj.weight", "decoder layer 1 contains NaN"),
        ("model.layers.2.mlp.shared_expert.down_proj.weight", "decoder layer 2 contains NaN"),
        ("model.layers.3.mlp.experts.down_proj", "decoder layer 3 contains NaN"),
        ("model.norm.weight", "final norm"),
        ("lm_head.weight", "the output contains NaN"),
    ],
)
def test_activations_that_are_not_finite(weight: str, value: float, words: str) -> None:
    broken = tiny_model("qwen2_moe")
    broken.get_parameter(weight).data.view(-1)[0] = value
    before = state(broken)
    with pytest.raises(ValueError, match=words):
        search_plan(broken, CondenseConfig(num_layers=1, num_experts=1, compare="logits"), calibration=IDS)
    assert state(broken) == before


def test_an_expert_that_no_token_chose_is_no_candidate() -> None:
    model = tiny_model("deepseek_v3")
    for layer in (1, 2, 3):
        model.model.layers[layer].mlp.gate.e_score_correction_bias[5] = -100.0
    plan = search_plan(model, CondenseConfig(num_layers=3, num_experts=7), calibration=IDS)
    assert all(sorted(layer.experts) == [0, 1, 2, 3, 4, 6, 7] for layer in plan.layers)
    before = state(model)
    with pytest.raises(
        ValueError, match="(?s)Decoder layer 1: only 7 of 8 experts .*so 8 can't be kept.*`num_experts`"
    ):
        search_plan(model, CondenseConfig(num_layers=1, num_experts=8), calibration=IDS)
    assert state(model) == before
