"""What can't be done is said before anything changes: which field or layer, what was found, and what to do."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from cdmoe_plugin import CondenseConfig, CondensedLayer, CondensePlan, apply_plan, condense_pretrained, search_plan
from cdmoe_plugin.blocks import UnsupportedModelError
from cdmoe_plugin.registry import COMPARE, EXPERT_SELECTIONS, GATES, LAYER_SELECTIONS, METRICS
from tests.helpers.tiny_models import REFUSED, available, random_ids, tiny_model

IDS = random_ids()
SMALL = CondenseConfig(num_layers=1, num_experts=1)
NAN, INF = float("nan"), float("inf")
# What the refusal says of the architectures in REFUSED.
REASONS = {
    "returns more than hidden states, and takes `prev_router_hidden_states` from the layer before": "zaya",
    "its shared experts are weighted per token by the router": "inkling_text",
    "2 of the 10 experts .* have no weights and add the token itself": "longcat_flash",
    "normalises the output of every expert": "muse_spark_text",
    "several sets of experts .*, and `moe_mm_token_type_ids` chooses one": "ernie4_5_vl_moe_text",
    r"single neurons, looked up in tables \(down_embed, up_embed\)": "doge",
}
CONFIG_ERRORS = [(name, v) for name in ("num_layers", "num_experts", "batch_size") for v in (-1, True, "2", 2.0, None)]
CONFIG_ERRORS += [("num_layers", 0), ("num_samples", 0), ("max_length", 1), ("seed", -1), ("metric", 3)]
CONFIG_ERRORS += [("layers", value) for value in ([], [1, 1], [True], [1.0], "1", 1)]
CONFIG_ERRORS += [("cache_memory", value) for value in ("lots", "-1GB", "4", "", None, True)]
BEYOND: list[tuple[dict[str, Any], str]] = [  # what is not in a tiny model
    ({"num_layers": 1, "num_experts": 9}, "`num_experts` is 9, but decoder layer 1 has 8"),
    ({"num_layers": 4}, r"`num_layers` is 4, but the model has 3 sparse layers: \[1, 2, 3\]"),
    ({"layers": [0, 1]}, r"`layers` names \[0\], which .*sparse layers are \[1, 2, 3\]"),
    ({"layers": [2, -1, 7]}, r"`layers` names \[-1, 7\], which .*sparse layers are \[1, 2, 3\]"),
]
# Edits of a plan file: where, the new value, and what the message names.
PLAN_ERRORS: list[tuple[str, Any, str]] = [
    ("version", 2, r"`version` .*should be 1, .*but is 2"),
    ("layers", [], "condenses no layer"),
    ("colour", "red", "unknown fields .'colour'"),
    ("layers.0.layer", "1", r"`layers\[0\].layer` should be a whole number of at least 0, but is '1'"),
    ("layers.0.layer", 2, r"decoder layers \[2\] more than once"),
    ("layers.0.layer", 0, r"decoder layer 0, which is not a sparse layer.*\[1, 2, 3\]"),
    ("layers.0.experts", [1, 1], r"`layers\[0\].experts` names an expert more than once"),
    ("layers.0.experts", [1, 8], r"experts \[8\] of decoder layer 3, which has 8"),
    ("layers.1.gates", [NAN, INF], "NaN"),
    ("layers.1.gates", ["x", 1], r"`layers\[1\].gates` should be a finite number, but is 'x'"),
    ("model.sparse_layers.0.num_experts", -8, r"`model.sparse_layers\[0\].num_experts`"),
    ("layer_divergences", {"one": 1.0}, "`layer_divergences` .*'one'"),
]
# Tiny models of other sizes, and how the message says in what they differ from the plan's.
OTHERS: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "qwen3_moe"}, "model_type is 'qwen2_moe', this model's is 'qwen3_moe'"),
    ({"hidden": 64}, "hidden_size is 32, this model's is 64"),
    ({"num_experts": 16}, "layer=1, num_experts=8.*layer=1, num_experts=16"),
    ({"shared_width": 8}, "shared_intermediate_size=24.*shared_intermediate_size=8"),
]
NOT_FINITE = {
    "model.layers.0.mlp.down_proj.weight": "decoder layer 0 contains NaN",
    "model.layers.2.mlp.shared_expert.down_proj.weight": "decoder layer 2 contains NaN",
    "model.layers.3.mlp.experts.down_proj": "decoder layer 3 contains NaN",
    "model.norm.weight": "final norm",
    "lm_head.weight": "output contains NaN",
}


def plan_for(*indices: int) -> CondensePlan:
    return CondensePlan([CondensedLayer(layer, [1, 0], [0.5, 0.25]) for layer in indices])


def state(model: PreTrainedModel) -> tuple[Any, ...]:
    """Everything of a model that a failed call must leave alone."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    modules = [(id(m), m.training, len(m._forward_hooks), "forward" in vars(m)) for m in model.modules()]
    return type(model), type(model.config), model.config.to_dict(), digest.hexdigest(), modules


def refuses(words: str, verb: Callable[..., Any], *args: Any, error: Any = ValueError, **kwargs: Any) -> str:
    """The message of a call that must fail with these words and leave the models among its arguments alone."""
    before = [state(arg) for arg in args if isinstance(arg, PreTrainedModel)]
    with pytest.raises(error, match=words) as caught:
        verb(*args, **kwargs)
    assert [state(arg) for arg in args if isinstance(arg, PreTrainedModel)] == before
    return str(caught.value)


def refused_by_all(words: str, model: Any, layer: int = 2, error: Any = ValueError, **kwargs: Any) -> None:
    """No verb accepts a model (which must not run) or a checkpoint."""
    if isinstance(model, PreTrainedModel):
        model.train().base_model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    refuses(words, condense_pretrained, model, SMALL, calibration=IDS, error=error, **kwargs)
    refuses(words, condense_pretrained, model, plan=plan_for(layer), error=error, **kwargs)
    if not isinstance(model, Path):
        refuses(words, search_plan, model, SMALL, calibration=IDS, error=error)
        refuses(words, apply_plan, model, plan_for(layer), error=error)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("qwen2_moe")


@pytest.fixture(scope="module")
def plan(model: PreTrainedModel) -> CondensePlan:
    return search_plan(model, CondenseConfig(layers=[3, 2], num_experts=2), calibration=IDS)


@pytest.fixture(scope="module")
def folder(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint without weights: who reads them before checking fails otherwise than expected."""
    path = tmp_path_factory.mktemp("checkpoint")
    model.config.save_pretrained(path)
    return path


@pytest.mark.parametrize("model_type", sorted(REFUSED))
def test_unsupported_architecture(model_type: str) -> None:
    if not available(model_type):
        pytest.skip("not in this transformers")
    refused, first = tiny_model(model_type), REFUSED[model_type].sparse_layers[0]
    reason = next(reason for reason, names in REASONS.items() if model_type in names.split())
    where = "" if model_type == "doge" else f"decoder layer {first} .*"
    words = f"(?s)model type '{refused.config.model_type}'.*{where}{reason}"
    refused_by_all(words, refused, first, UnsupportedModelError)


def test_dense_and_condensed_models(tmp_path: Path) -> None:
    dense = LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, hidden_size=32, num_attention_heads=4, vocab_size=128))
    refused_by_all(r"'llama' \(LlamaForCausalLM\) is dense", dense)
    condensed = apply_plan(tiny_model("qwen2_moe"), plan_for(3, 1))
    refused_by_all(r"condensed already \(decoder layers \[1, 3\]\).*sparse model", condensed)
    # On disk, only the config tells where it can: there are no weights.
    for words, model in {
        "is dense": dense,
        "condensed already": condensed,
        "have no weights": tiny_model("longcat_flash"),
    }.items():
        model.config.save_pretrained(tmp_path)
        refused_by_all(words, tmp_path)
    tiny_model("zaya").save_pretrained(tmp_path)
    refused_by_all("returns more than hidden states", tmp_path)


def test_blocks_that_do_more_than_add() -> None:
    model = tiny_model("qwen2_moe")
    model.model.layers[1].mlp.register_forward_hook(lambda _m, _a, output: output.tanh())  # of its kind, it is probed
    refused_by_all("does more than add shared and routed experts", model)


def test_quantised(folder: Path, tmp_path: Path) -> None:
    words, four_bit = "Quantised weights.*condense.* first", BitsAndBytesConfig(load_in_4bit=True)
    refused_by_all(words, folder, quantization_config=four_bit)
    for name in ("mixtral", "qwen2_moe"):
        tiny_model(name).save_pretrained(tmp_path)
        quantised = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=four_bit)
        refuses(words, apply_plan, quantised, plan_for(2))
    refuses(words, search_plan, quantised, SMALL, calibration=IDS)
    # Weights that are stored quantised are dequantised (test_dequantised.py), if there are any.
    quantised.config.save_pretrained(tmp_path / "quantised")
    refused_by_all("has a config, but no weights", tmp_path / "quantised")


def test_wrong_arguments(model: PreTrainedModel) -> None:
    for wrong in (None, 5, torch.nn.Linear(2, 2), b"folder", ["folder"], LlamaConfig()):
        refused_by_all(f"`model` should be a .*PreTrainedModel, but is a {type(wrong).__name__}", wrong)
    words = r"\['device_map', 'dtype'\] only apply when a checkpoint is loaded"
    refuses(words, condense_pretrained, model, plan=plan_for(1), dtype="auto", device_map="cpu")
    for wrong in ({}, {"num_layers": 1}, "greedy"):
        words = f"`config` should be a CondenseConfig, but is a {type(wrong).__name__}"
        refuses(words, search_plan, model, wrong, calibration=IDS)
    for wrong in ({}, plan_for(1).to_dict(), 5, None):
        refuses(f"`plan` should be a CondensePlan or .*is a {type(wrong).__name__}", apply_plan, model, wrong)


@pytest.mark.parametrize(("field", "value"), CONFIG_ERRORS)
def test_config(field: str, value: Any) -> None:
    assert repr(value) in refuses(f"`{field}` (should|names)", CondenseConfig, **{field: value})


@pytest.mark.parametrize(("wishes", "words"), BEYOND)
def test_config_against_model(wishes: dict[str, Any], words: str, model: PreTrainedModel, folder: Path) -> None:
    for target in (model, folder):
        refuses(words, condense_pretrained, target, CondenseConfig(**wishes), calibration=IDS)


def test_unknown_methods(model: PreTrainedModel, folder: Path) -> None:
    names: dict[str, Any] = {"metric": [*METRICS, "ppl"], "gates": GATES, "compare": COMPARE, "refit": []}
    names |= {"expert_selection": EXPERT_SELECTIONS, "layer_selection": LAYER_SELECTIONS}
    for field, registry in names.items():
        for target in (model, folder):
            config = CondenseConfig(**{field: "magic"})
            said = refuses(f"`{field}` is 'magic'", condense_pretrained, target, config, calibration=IDS)
            assert all(repr(name) in said for name in registry)


@pytest.mark.parametrize(("place", "value", "words"), PLAN_ERRORS)
def test_plan_edited_into_nonsense(place: str, value: Any, words: str, plan: CondensePlan, tmp_path: Path) -> None:
    edited = spot = json.loads(json.dumps(plan.to_dict()))
    *path, last = (int(key) if key.isdigit() else key for key in place.split("."))
    for key in path:
        spot = spot[key]
    spot[last] = value
    (tmp_path / "plan.json").write_text(json.dumps(edited))
    refuses(f"plan.json is not a valid condense plan: .*{words}", CondensePlan.load, tmp_path / "plan.json")


def test_plan_files(model: PreTrainedModel, tmp_path: Path) -> None:
    for content in (b"", b"greedy", b"\xff\xfe", b"[" * 100_000, b"[1]", b"{}", b"null"):
        (tmp_path / "plan.json").write_bytes(content)
        refuses(r"plan.json is not a valid condense plan: \S", apply_plan, model, tmp_path / "plan.json")
    for missing in (tmp_path / "other.json", tmp_path):
        refuses("other.json|condense_plan.json", apply_plan, model, missing, error=FileNotFoundError)


@pytest.mark.parametrize(("sizes", "words"), OTHERS)
def test_plan_of_another_model(sizes: dict[str, Any], words: str, plan: CondensePlan, tmp_path: Path) -> None:
    other = tiny_model(**{"model_type": "qwen2_moe", **sizes})
    other.config.save_pretrained(tmp_path)
    for target in (other, tmp_path):
        refuses(f"made for another model: .*{words}", condense_pretrained, target, plan=plan)


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("weight", NOT_FINITE)
def test_activations_that_are_not_finite(weight: str, value: float) -> None:
    broken, config = tiny_model("qwen2_moe"), CondenseConfig(num_layers=1, num_experts=1, compare="logits")
    broken.get_parameter(weight).data.view(-1)[0] = value
    refuses(NOT_FINITE[weight], search_plan, broken, config, calibration=IDS)


def test_an_expert_that_no_token_chose_is_no_candidate() -> None:
    model = tiny_model("deepseek_v3")
    for layer in (1, 2, 3):
        model.model.layers[layer].mlp.gate.e_score_correction_bias[5] = -100.0
    found = search_plan(model, CondenseConfig(num_layers=3, num_experts=7), calibration=IDS).layers
    assert all(sorted(layer.experts) == [0, 1, 2, 3, 4, 6, 7] for layer in found)
    words = "`num_experts` is 8, .*only 7 of the 8 experts of decoder layer 1, .*smaller `num_experts`"
    refuses(words, search_plan, model, CondenseConfig(num_layers=1, num_experts=8), calibration=IDS)
