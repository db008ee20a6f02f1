"""Fully condensed models written as plain dense ones, which compute the same, or refused with the reason."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from cdmoe_plugin import CondenseConfig, CondensedLayer, CondensePlan, apply_plan, export_dense
from cdmoe_plugin.blocks import UnsupportedModelError, find_sparse_blocks
from cdmoe_plugin.export import compare
from cdmoe_plugin.export.dense import check_dense
from cdmoe_plugin.export.siblings import CANDIDATES, siblings_of
from cdmoe_plugin.model.lookup import condensed_layers
from cdmoe_plugin.registry import EXPORT_TARGETS
from tests.helpers.exporting import DENSE, DENSE_GATED, output, same
from tests.helpers.models import IDS, TYPES, sparse_model
from tests.helpers.programs import Programs
from tests.helpers.states import differing, state_of
from tests.helpers.tiny_models import available, random_ids, tiny_config, tiny_model
from tests.helpers.trimming import first_output, trim_plan

# Those that the installed transformers has.
EXACT = [name for name in DENSE if (name == "deepseek" or available(name)) and DENSE[name] in CONFIG_MAPPING]
OTHERS = [name for name in TYPES if name not in DENSE and name not in DENSE_GATED]


def fully_condensed(model_type: str, uneven: bool = False, **overrides: Any) -> PreTrainedModel:
    """All sparse layers condensed, with two experts each, or with one, two or three."""
    model = tiny_model(model_type, **overrides) if overrides else sparse_model(model_type)
    kept = ([3], [5, 1], [0, 6, 2]) if uneven else ([1, 5],)
    layers = [block.layer for block in find_sparse_blocks(model)]
    rows = [(layer, kept[i % len(kept)]) for i, layer in enumerate(layers)]
    return apply_plan(model, CondensePlan([CondensedLayer(n, k, [0.5, -0.3, 0.8][: len(k)]) for n, k in rows]))


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("model_type", EXACT)
def test_exact(model_type: str, tmp_path: Path) -> None:
    model = fully_condensed(model_type, uneven=True)
    before, expected = state_of(model), output(model)
    report = export_dense(model, tmp_path)
    tensors, rest = state_of(model)
    assert differing(before[0], tensors) == []
    assert rest == before[1]
    assert report.model_type == DENSE[model_type]
    dense = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(dense).__module__.split(".")[2] == report.model_type.removesuffix("_text")
    assert difference(output(dense), expected) < 1e-6
    assert dense.num_parameters() == report.parameters
    assert report.divergence is None
    assert not any("cdmoe" in path.read_text() for path in tmp_path.glob("*.json"))
    assert report.model_type in (tmp_path / "README.md").read_text()


def test_equal_widths_give_equal_logits(tmp_path: Path) -> None:
    """With the width of the layers that were dense before, no sum has more terms."""
    model = fully_condensed("hy_v3", dense_width=48)
    report = export_dense(model, tmp_path)
    assert report.parameters == report.parameters_before
    assert torch.equal(output(AutoModelForCausalLM.from_pretrained(tmp_path)), output(model))


def test_narrower_layers_are_padded_with_zeros(tmp_path: Path) -> None:
    model = fully_condensed("deepseek", uneven=True)
    width = export_dense(model, tmp_path).dense_width
    dense = AutoModelForCausalLM.from_pretrained(tmp_path)
    own = {layer: mlp.intermediate_size for layer, mlp in condensed_layers(model).items()}
    assert len(set(own.values())) == 3
    assert width == dense.config.intermediate_size == max(own.values())
    for layer, mlp in condensed_layers(model).items():
        new = dense.model.layers[layer].mlp
        assert torch.equal(new.gate_proj.weight[: own[layer]], mlp.gate_proj.weight)
        assert torch.equal(new.down_proj.weight[:, : own[layer]], mlp.down_proj.weight)
        assert not new.up_proj.weight[own[layer] :].any()
        assert not new.down_proj.weight[:, own[layer] :].any()


@pytest.mark.parametrize("model_type", [name for name in DENSE_GATED if available(name)])
def test_gates_per_token(model_type: str, tmp_path: Path) -> None:
    model = fully_condensed(model_type)
    with pytest.raises(UnsupportedModelError, match=r"gate per token.*`approximate=True`"):
        export_dense(model, tmp_path / "dense")
    assert not (tmp_path / "dense").exists()
    report = export_dense(model, tmp_path / "dense", approximate=True, calibration=IDS)
    assert report.model_type == DENSE_GATED[model_type]
    assert report.divergence is not None
    assert report.divergence > 0
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    for layer, mlp in condensed_layers(model).items():  # with its gates at the same constants
        gate = torch.logit(torch.tensor(report.shared_gates[layer]))
        mlp.shared_expert_gate.register_forward_hook(lambda _m, _a, out, gate=gate: torch.full_like(out, gate))
    assert same(output(dense), output(model))


@pytest.mark.parametrize("model_type", ["deepseek", "mixtral"])
def test_bfloat16(model_type: str, tmp_path: Path) -> None:
    model = fully_condensed(model_type, uneven=True).to(torch.bfloat16)
    export_dense(model, tmp_path)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert dense.dtype == torch.bfloat16
    assert difference(output(dense).float(), output(model).float()) < 1e-2


def test_trimmed_mlps(tmp_path: Path) -> None:
    model = apply_plan(sparse_model("mixtral"), trim_plan("trim_layer", [0, 1, 2, 3]))
    assert export_dense(model, tmp_path).dense_width == 1
    assert same(output(AutoModelForCausalLM.from_pretrained(tmp_path)), output(model))


def test_heads_and_tied_weights(tmp_path: Path) -> None:
    model = fully_condensed("qwen3_moe", tie_word_embeddings=True)
    export_dense(model, tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert dense.lm_head.weight is dense.model.embed_tokens.weight
    assert same(output(dense), output(model))
    model.save_pretrained(tmp_path / "condensed")
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "condensed").eval()
    export_dense(classifier, tmp_path / "classifier")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier")
    assert type(again).__name__ == "Qwen3ForSequenceClassification"
    ids = torch.tensor(random_ids(1, 9))
    with torch.no_grad():
        assert same(again(input_ids=ids).logits, classifier(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("target", "said"), [("dense", "a dense architecture (`model_type` 'llama')"), ("top_k", "zeros")]
)
def test_model_card(target: str, said: str, tmp_path: Path) -> None:
    model = fully_condensed("deepseek")
    EXPORT_TARGETS[target].write(model, tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert said in card
    assert f"cdmoe export condensed --to {target} --output_dir exported\n" in card
    assert "--export_stock" not in card
    assert ("import cdmoe_plugin" in card) == (target == "top_k")  # transformers lacks deepseek, and has llama


# --- what short texts don't show ---


def long_output(model: PreTrainedModel) -> Tensor:
    return torch.cat(first_output(model, random_ids(2, 60)))


@pytest.mark.parametrize(
    ("model_type", "overrides", "sibling"),
    [
        ("mixtral", {"sliding_window": 5}, "mistral"),
        ("granitemoe_swa", {"sliding_window": 5}, "granite_swa"),
        ("dots1", {"sliding_window": 5, "layer_types": ("full_attention", "sliding_attention")}, "qwen3"),
        ("cohere2_moe", {"sliding_window": 5}, "cohere2"),
        ("mixtral", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5}}, "mistral"),
    ],
)
def test_long_texts(model_type: str, overrides: dict[str, Any], sibling: str, tmp_path: Path) -> None:
    model = fully_condensed(model_type, **overrides)
    assert export_dense(model, tmp_path).model_type == sibling
    dense = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert difference(long_output(dense), long_output(model)) < 1e-6


def test_window_that_no_sibling_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window far longer than the compared texts, in an architecture whose siblings have none."""
    monkeypatch.setattr("cdmoe_plugin.export.siblings.CANDIDATES", ("llama",))
    export_dense(fully_condensed("mixtral"), tmp_path / "without")
    with pytest.raises(UnsupportedModelError, match=r"'llama' has the same weights but.*last positions"):
        export_dense(fully_condensed("mixtral", sliding_window=100), tmp_path / "with")
    assert not (tmp_path / "with").exists()


def test_a_default_window_is_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cdmoe_plugin.export.siblings.CANDIDATES", ("mistral",))
    export_dense(fully_condensed("solar_open"), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["sliding_window"] is None


def test_scale_of_late_positions(tmp_path: Path) -> None:
    """mistral4 scales queries from a position on, which only its own attention does."""
    rope = tiny_config("mistral4").rope_parameters
    late = {**rope, "original_max_position_embeddings": 32, "factor": 4.0, "max_position_embeddings": 128}
    with pytest.raises(UnsupportedModelError, match="last positions"):
        export_dense(fully_condensed("mistral4", rope_parameters=late), tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- refused ---


@pytest.mark.parametrize("model_type", OTHERS)
def test_without_a_sibling(model_type: str, tmp_path: Path) -> None:
    model = fully_condensed(model_type)
    with pytest.raises(
        UnsupportedModelError, match=r"nearest|computes something else|gated activation|has a norm|no head"
    ):
        export_dense(model, tmp_path, approximate=True, calibration=IDS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("olmoe", "nearest, 'llama', 8 weights differ, such as model.layers.0.self_attn.k_norm.weight"),
        ("gpt_oss", "gated activation 'gpt_oss', which no dense"),
        ("axk1", "post_mlp_layernorm"),
        ("exaone_moe", "'qwen3' has the same weights but computes something else: the logits have"),
    ],
)
def test_refusals_name_the_reason(model_type: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        export_dense(fully_condensed(model_type), tmp_path)


def test_layers_that_are_sparse_still(tmp_path: Path) -> None:
    model = apply_plan(sparse_model("qwen3_moe"), trim_plan("trim_layer", [1, 3]))
    with pytest.raises(UnsupportedModelError, match=r"decoder layers \[2\] are sparse still"):
        export_dense(model, tmp_path)
    with pytest.raises(ValueError, match="is not condensed"):
        export_dense(sparse_model("qwen3_moe"), tmp_path)


def test_other_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A difference of one part in a thousand is found."""
    build = compare.outputs
    monkeypatch.setattr(
        compare,
        "outputs",
        lambda each, *a, **k: build(each, *a, **k) * (1.001 if each.config.model_type == "mistral" else 1),
    )
    monkeypatch.setattr("cdmoe_plugin.export.siblings.CANDIDATES", ("mistral",))
    with pytest.raises(UnsupportedModelError, match=r"relative difference of 1\.0e-03"):
        export_dense(fully_condensed("mixtral"), tmp_path)


def test_before_a_search(tmp_path: Path) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path / "mixtral")
    tiny_model("olmoe").save_pretrained(tmp_path / "olmoe")
    tiny_model("qwen2_moe").save_pretrained(tmp_path / "qwen2_moe")
    check_dense(tmp_path / "mixtral", CondenseConfig(4, 2))
    with pytest.raises(UnsupportedModelError, match=r"all 4 sparse layers condensed .*`num_layers` is 3"):
        check_dense(tmp_path / "mixtral", CondenseConfig(3, 2))
    with pytest.raises(UnsupportedModelError, match="nearest, 'llama'"):
        check_dense(tmp_path / "olmoe", CondenseConfig(4, 2))
    with pytest.raises(UnsupportedModelError, match="gate per token"):
        check_dense(tmp_path / "qwen2_moe", CondenseConfig(3, 2))
    check_dense(tmp_path / "qwen2_moe", CondenseConfig(3, 2), approximate=True)


def test_candidates_are_dense() -> None:
    assert set(DENSE.values()) | set(DENSE_GATED.values()) <= set(CANDIDATES)
    known = [name for name in CANDIDATES if name in CONFIG_MAPPING]
    assert not any("expert" in field for name in known for field in CONFIG_MAPPING[name]().to_dict())
    assert next(siblings_of(fully_condensed("mixtral"))).described.config.model_type == "mistral"


# --- the command ---


def test_command(tmp_path: Path, programs: Programs) -> None:
    model = fully_condensed("mixtral", uneven=True)
    model.save_pretrained(tmp_path / "condensed")
    command = [programs.folder / "cdmoe", "export", tmp_path / "condensed", "--to", "dense"]
    command += ["--output_dir", tmp_path / "dense"]
    run = subprocess.run(command, env=programs.environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "as mistral" in run.stdout
    assert same(output(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")), output(model))
