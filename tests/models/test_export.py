"""Condensed models written as checkpoints of their base architecture, which open without this package."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from cdmoe_plugin import CondensedLayer, CondensePlan, apply_plan, condense_pretrained, export_stock
from cdmoe_plugin.blocks import UnsupportedModelError
from cdmoe_plugin.export.stock import StockExport
from cdmoe_plugin.model.lookup import condensed_layers
from tests.helpers.checkpoints import keys_on_disk
from tests.helpers.exporting import CASES, condensed, opened, output, same
from tests.helpers.models import sparse_model
from tests.helpers.plans import some_plan
from tests.helpers.states import differing, state_of
from tests.helpers.tiny_models import random_ids, tiny_model
from tests.helpers.trimming import first_output, trim_plan


@pytest.mark.parametrize(("model_type", "layers"), CASES)
def test_exact(model_type: str, layers: list[int], tmp_path: Path) -> None:
    model = condensed(model_type, layers)
    before, expected = state_of(model), output(model)
    report = export_stock(model, tmp_path / "stock")
    tensors, rest = state_of(model)
    assert differing(before[0], tensors) == []
    assert rest == before[1]

    stock = opened(model, tmp_path / "stock")
    assert stock.config.model_type == report.model_type == type(model)._base_class.config_class.model_type
    assert not hasattr(stock.config, "condense_config")
    assert "auto_map" not in json.loads((tmp_path / "stock" / "config.json").read_text())
    assert same(output(stock), expected)
    assert stock.num_parameters() == report.parameters >= report.parameters_before == model.num_parameters()
    assert {name: getattr(stock.config, name) for name in report.fields} == report.fields
    assert report.shared_gates == {}
    assert report.divergence is None
    assert not any("cdmoe" in path.read_text() for path in (tmp_path / "stock").glob("*.json"))


WITHOUT_PACKAGE = """
import sys
from pathlib import Path
sys.modules["cdmoe_plugin"] = None
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
ids = torch.tensor([[5, 9, 2, 77, 31, 8, 8, 64]])
for folder in Path(sys.argv[1]).iterdir():
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert type(model).__module__.startswith("transformers.models."), type(model)
    with torch.no_grad():
        save_file({"logits": model(input_ids=ids, use_cache=False).logits[0]}, folder / "logits.safetensors")
"""


def test_opens_without_this_package(tmp_path: Path) -> None:
    models = {
        name: condensed(name, layers) for name, layers in [("qwen3_moe", [2]), ("deepseek_v3", [1, 2]), ("dots1", [1])]
    }
    for name, model in models.items():
        export_stock(model, tmp_path / name)
    subprocess.run([sys.executable, "-c", WITHOUT_PACKAGE, str(tmp_path)], check=True, timeout=240)
    for name, model in models.items():
        (expected,) = first_output(model, [[5, 9, 2, 77, 31, 8, 8, 64]])
        assert same(load_file(tmp_path / name / "logits.safetensors")["logits"], expected)


def test_names_on_disk_are_the_original_ones(tmp_path: Path) -> None:
    model = tiny_model("deepseek_v3")
    model.save_pretrained(tmp_path / "sparse")
    apply_plan(model, some_plan([1]))
    export_stock(model, tmp_path / "stock")
    before, after = keys_on_disk(tmp_path / "sparse"), keys_on_disk(tmp_path / "stock")
    changed = {f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    assert after - before == changed
    assert all(name.startswith("model.layers.1.mlp.") for name in before - after)


def test_narrower_layers_are_padded_with_zeros(tmp_path: Path) -> None:
    rows = [CondensedLayer(1, [3], [0.5]), CondensedLayer(2, [0, 5, 6], [0.2, -0.3, 0.4]), CondensedLayer(3, [], [])]
    model = apply_plan(tiny_model("exaone_moe"), CondensePlan(rows))
    report = export_stock(model, tmp_path)
    stock = opened(model, tmp_path)
    own = {layer: mlp.intermediate_size for layer, mlp in condensed_layers(model).items()}
    assert own == {1: 32, 2: 64, 3: 16}
    assert report.dense_width == stock.config.intermediate_size == 64
    for layer, width in {0: 40, **own}.items():  # the first layer was dense before
        mlp, source = stock.model.layers[layer].mlp, model.model.layers[layer].mlp
        assert torch.equal(mlp.up_proj.weight[:width], source.up_proj.weight)
        assert torch.equal(mlp.down_proj.weight[:, :width], source.down_proj.weight)
        assert not mlp.gate_proj.weight[width:].any()
        assert not mlp.up_proj.weight[width:].any()
        assert not mlp.down_proj.weight[:, width:].any()
    assert same(output(stock), output(model))


def test_width_of_the_config_may_shrink(tmp_path: Path) -> None:
    model = condensed("qwen3_moe", [1, 2], dense_layers=0, dense_width=200)
    report = export_stock(model, tmp_path)
    assert report.dense_width == 48
    assert report.parameters == report.parameters_before
    assert same(output(opened(model, tmp_path)), output(model))


def test_width_that_sparse_layers_share(tmp_path: Path) -> None:
    """Jamba has one width for dense layers and experts: one kept expert is as wide, three are not."""
    plan = CondensePlan([CondensedLayer(3, [5], [0.7])])
    model = apply_plan(tiny_model("jamba"), plan)
    assert export_stock(model, tmp_path).fields == {"expert_layer_period": 3}
    assert same(output(opened(model, tmp_path)), output(model))
    with pytest.raises(UnsupportedModelError, match="of decoder layer 0 would be 16 wide instead of 48"):
        export_stock(condensed("jamba", [3]), tmp_path)


@pytest.mark.parametrize(("model_type", "bias"), [("ernie4_5_moe", "use_bias"), ("hy_v3", "mlp_bias")])
def test_biases(model_type: str, bias: str, tmp_path: Path) -> None:
    model = condensed(model_type, [1], **{bias: True})
    assert condensed_layers(model)[1].down_proj.bias.any()
    export_stock(model, tmp_path)
    assert same(output(opened(model, tmp_path)), output(model))


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3"])
def test_bfloat16(model_type: str, tmp_path: Path) -> None:
    model = condensed(model_type, [1], dtype=torch.bfloat16)
    export_stock(model, tmp_path)
    stock = opened(model, tmp_path)
    assert stock.dtype == torch.bfloat16
    assert torch.equal(stock.model.layers[1].mlp.down_proj.weight, model.model.layers[1].mlp.down_proj.weight)
    assert torch.allclose(output(stock).float(), output(model).float(), rtol=2e-2, atol=2e-2)


def test_of_an_opened_checkpoint(tmp_path: Path) -> None:
    """With a tied head, from disk, and of a classifier on the same decoder."""
    model = condensed("qwen3_moe", [1, 2], tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "condensed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "condensed")
    export_stock(again, tmp_path / "stock")
    stock = opened(again, tmp_path / "stock")
    assert stock.lm_head.weight is stock.model.embed_tokens.weight
    assert "lm_head.weight" not in keys_on_disk(tmp_path / "stock")
    assert same(output(stock), output(model))

    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "condensed").eval()
    export_stock(classifier, tmp_path / "classifier")
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier")
    assert type(stock).__name__ == "Qwen3MoeForSequenceClassification"
    ids = torch.tensor(random_ids(1, 9))
    with torch.no_grad():
        assert same(stock(input_ids=ids).logits, classifier(input_ids=ids).logits)


def test_training_goes_on_from_it(tmp_path: Path) -> None:
    """With no router left, the load-balancing loss stays off."""
    model = condensed("qwen3_moe", [1, 2, 3])
    export_stock(model, tmp_path)
    stock = opened(model, tmp_path)
    ids = torch.tensor(random_ids(1, 9))
    stock(input_ids=ids, labels=ids).loss.backward()
    assert stock.model.layers[2].mlp.up_proj.weight.grad.abs().sum() > 0


# --- trimmed ---


# One for each way of a config to name dense layers, and one with a gate per token.
TRIMMED = {"qwen3_moe": [1], "glm4_moe_lite": [2], "deepseek_v3": [1], "lfm2_moe": [2, 1], "deepseek": [1, 3]}
TRIMMED |= {"ernie4_5_moe": [3, 1], "jamba": [1, 3], "granitemoehybrid": [0, 1, 2, 3], "qwen2_moe": [2]}


@pytest.mark.parametrize("model_type", TRIMMED)
def test_trimmed_mlps(model_type: str, tmp_path: Path) -> None:
    """Layers without an MLP are dense ones of width 0; a gate per token is gone with the layer."""
    model = apply_plan(sparse_model(model_type), trim_plan("trim_layer", TRIMMED[model_type]))
    report = export_stock(model, tmp_path)
    stock = opened(model, tmp_path)
    assert report.parameters == stock.num_parameters() > report.parameters_before == model.num_parameters()
    for layer in TRIMMED[model_type]:
        weights = dict(stock.model.layers[layer].named_parameters()).items()
        dense = [weight for name, weight in weights if re.match("(shared_)?mlp|feed_forward", name)]
        assert all(report.dense_width in weight.shape or 2 * report.dense_width in weight.shape for weight in dense)
        assert len(dense) >= 2
        assert not any(weight.any() for weight in dense)
    assert same(output(stock), output(model))


def test_only_trimmed_mlps(tmp_path: Path) -> None:
    model = apply_plan(tiny_model("qwen3_moe", dense_layers=0), trim_plan("trim_layer", [0, 2]))
    assert export_stock(model, tmp_path).dense_width == 1
    assert same(output(opened(model, tmp_path)), output(model))


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "deepseek_v3", "laguna", "qwen3_next", "deepseek"])
def test_trimmed_blocks(model_type: str, tmp_path: Path) -> None:
    """What is left is of the base architecture, whatever its config can say of dense layers."""
    model = apply_plan(sparse_model(model_type), trim_plan("trim_block", [2, 1]))
    before, expected = state_of(model), output(model)
    report = export_stock(model, tmp_path)
    assert differing(before[0], state_of(model)[0]) == []
    count = model.num_parameters()
    assert report == StockExport(model.config.model_type, parameters=count, parameters_before=count)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(stock) is type(model)
    assert len(stock.model.layers) == stock.config.num_hidden_layers == 2
    assert same(output(stock), expected)
    assert "2 decoder layers are removed" in (tmp_path / "README.md").read_text()


def test_trimmed_blocks_on_disk(tmp_path: Path) -> None:
    sparse_model("mixtral").save_pretrained(tmp_path / "sparse")
    plan = trim_plan("trim_block", [1])
    model = condense_pretrained(tmp_path / "sparse", plan=plan, offload_folder=tmp_path / "offload")
    assert any(parameter.is_meta for parameter in model.parameters())
    export_stock(model, tmp_path / "stock")
    expected = apply_plan(sparse_model("mixtral"), plan)
    assert same(output(AutoModelForCausalLM.from_pretrained(tmp_path / "stock")), output(expected))
