"""Condensed models written as checkpoints of their base architecture, which open without this package."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import logging

from cdmoe_plugin import CondensedLayer, CondensePlan, apply_plan, export_stock
from cdmoe_plugin.condensed import condensed_layers
from cdmoe_plugin.divergence import js_divergence
from cdmoe_plugin.export import StockExport
from cdmoe_plugin.sparse import UnsupportedModelError

from .conftest import IDS, differing, keys_on_disk, some_plan, sparse_model, state_of
from .tiny_models import ARCHITECTURES, available, random_ids, tiny_model
from .trimming import first_output, trim_plan

ANY = ([1], [2], [3, 1], [1, 2, 3])
PREFIX = ([1], [2, 1], [1, 2, 3])
# What each config can say of four layers, of which the first is dense from the start; all others can say nothing.
EXACT: dict[str, tuple[list[int], ...]] = {
    **dict.fromkeys(["bailing_hybrid", "deepseek_v32", "dots3_note_text", "exaone_moe", "flint", "glm4_moe_lite"], ANY),
    **dict.fromkeys(["glm_moe_dsa", "hy_v3", "kimi_linear", "laguna", "beam", "mellum", "mimo_v2_flash"], ANY),
    **dict.fromkeys(["qwen3_moe", "deepseek_ocr2_text", "unlimited_ocr_text", "mistral_large4_text"], ANY),
    **dict.fromkeys(["qwen3_vl_moe_text", "qwen3_omni_moe_text"], ANY),
    **dict.fromkeys(["afmoe", "deepseek", "deepseek_v2", "deepseek_v3", "dots1", "glm4_moe"], PREFIX),
    **dict.fromkeys(["mistral4", "lfm2_moe", "glm4v_moe_text"], PREFIX),
    "ernie4_5_moe": ([1], [2], [3], [1, 3], [1, 2, 3]),
    "jamba": ([1, 3],),
    "granitemoehybrid": ([0, 1, 2, 3],),
}
GATED = ["qwen2_moe", "qwen3_next"]
NEVER = [name for name in ARCHITECTURES if name not in EXACT and name not in GATED]
CASES = [(name, layers) for name, sets in EXACT.items() for layers in sets if name == "deepseek" or available(name)]


def condensed(model_type: str, layers: list[int], **overrides: Any) -> PreTrainedModel:
    model = tiny_model(model_type, **overrides) if overrides else sparse_model(model_type)
    return apply_plan(model, some_plan(layers))


def opened(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The checkpoint in the class that the model had before it was condensed."""
    return type(model)._base_class.from_pretrained(folder)


def output(model: PreTrainedModel) -> Tensor:
    return torch.cat(first_output(model, IDS))


def same(one: Tensor, other: Tensor) -> bool:
    """Not bitwise: a sum over more neurons, zeros among them, may be added up in another order."""
    return torch.allclose(one, other, rtol=1e-5, atol=1e-5 * float(one.abs().max()))


# --- exact ---


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
    assert not hasattr(stock.config, "auto_map")
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
from transformers import AutoModelForCausalLM
ids = torch.tensor([[5, 9, 2, 77, 31, 8, 8, 64]])
for folder in Path(sys.argv[1]).iterdir():
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert type(model).__module__.startswith("transformers.models."), type(model)
    with torch.no_grad():
        torch.save(model(input_ids=ids, use_cache=False).logits[0], folder / "logits.pt")
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
        assert same(torch.load(tmp_path / name / "logits.pt", weights_only=True), expected)


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


@pytest.mark.parametrize("model_type", ["qwen3_moe", "qwen2_moe", "deepseek_v3", "glm4_moe_lite"])
def test_trimmed_mlps(model_type: str, tmp_path: Path) -> None:
    """Layers without an MLP are dense ones of width 0; a gate per token is gone with the layer."""
    model = apply_plan(sparse_model(model_type), trim_plan("trim_layer", [1]))
    report = export_stock(model, tmp_path)
    stock = opened(model, tmp_path)
    assert report.dense_width == 40
    assert not stock.model.layers[1].mlp.down_proj.weight.any()
    assert same(output(stock), output(model))


def test_only_trimmed_mlps(tmp_path: Path) -> None:
    model = apply_plan(tiny_model("qwen3_moe", dense_layers=0), trim_plan("trim_layer", [0, 2]))
    assert export_stock(model, tmp_path).dense_width == 1
    assert same(output(opened(model, tmp_path)), output(model))


def test_trimmed_blocks(tmp_path: Path) -> None:
    model = apply_plan(sparse_model("mixtral"), trim_plan("trim_block", [1, 2]))
    report = export_stock(model, tmp_path)
    assert report == StockExport("mixtral", parameters=model.num_parameters(), parameters_before=model.num_parameters())
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(stock) is type(model)
    assert len(stock.model.layers) == 2
    assert torch.equal(output(stock), output(model))


# --- refused ---


@pytest.mark.parametrize("model_type", [name for name in NEVER if available(name)])
def test_no_dense_layers(model_type: str, tmp_path: Path) -> None:
    model = condensed(model_type, list(ARCHITECTURES[model_type].sparse_layers))
    with pytest.raises(UnsupportedModelError, match=f"{model_type}. can't say .* Keep the condensed checkpoint"):
        export_stock(model, tmp_path / "stock", approximate=True, calibration=IDS)
    assert not (tmp_path / "stock").exists()


@pytest.mark.parametrize(
    ("model_type", "layers", "message"),
    [
        (
            "deepseek_v3",
            [2],
            r"`first_k_dense_replace` .* but dense would be \[0, 2\] of 4: \[1\] would have to be, too",
        ),
        ("deepseek", [3], r"`moe_layer_freq` .* \[0, 3\] of 4: \[1, 2\] would have to be"),
        ("lfm2_moe", [3], r"`num_dense_layers` .* the first layers are dense"),
        ("granitemoehybrid", [0, 1], r"`num_local_experts` .* all layers .* \[2, 3\] would have to be"),
        ("axk2", [1], "layers.1.post_attention_layernorm would be AXK2RMSNorm instead of AXK2GatedRMSNorm"),
        ("mixtral", [1], "has no field that says that a layer is dense"),
        ("granitemoeshared", [0, 1, 2, 3], "instead of one dense MLP"),
        ("qwen2_moe", [1, 3], r"layers \[1, 3\] scale their shared expert by a gate per token.* `approximate=True`"),
    ],
)
def test_refusals_name_the_reason(model_type: str, layers: list[int], message: str, tmp_path: Path) -> None:
    model = condensed(model_type, layers)
    (tmp_path / "mine").write_text("1")
    with pytest.raises(UnsupportedModelError, match=message):
        export_stock(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_other_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What classes and shapes don't show, a few tokens do."""
    model = condensed("qwen3_moe", [1])
    stock_class = type(model)._base_class
    init = stock_class.__init__

    def louder(self: Any, config: Any) -> None:
        init(self, config)
        self.model.layers[1].mlp.register_forward_hook(lambda _m, _a, output: 1.1 * output)

    monkeypatch.setattr(stock_class, "__init__", louder)
    with pytest.raises(UnsupportedModelError, match="'qwen3_moe' computes something else"):
        export_stock(model, tmp_path / "stock")
    assert not (tmp_path / "stock").exists()


def test_loaded_otherwise(tmp_path: Path) -> None:
    model = condensed("qwen3_moe", [1])
    with pytest.raises(ValueError, match="should be a loaded PreTrainedModel, but is a Linear"):
        export_stock(torch.nn.Linear(1, 1), tmp_path)  # type: ignore[arg-type]
    model.save_pretrained(tmp_path / "condensed")
    with pytest.raises(ValueError, match="it holds a condensed checkpoint"):
        export_stock(model, tmp_path / "condensed")
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "condensed",
        device_map={"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}
        | {"lm_head": "cpu"},
        offload_folder=tmp_path / "offload",
    )
    with pytest.raises(ValueError, match=r"weights are on \['cpu', 'meta'\]: open it whole on one"):
        export_stock(offloaded, tmp_path / "stock")


def test_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = condensed("qwen3_moe", [1])
    save = type(model)._base_class.save_pretrained

    def fail(self: Any, folder: Any, **kwargs: Any) -> None:
        save(self, folder, **kwargs)
        raise OSError("disk full")

    monkeypatch.setattr(type(model)._base_class, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        export_stock(model, tmp_path / "stock")
    assert list(tmp_path.iterdir()) == []


def test_other_readers_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.enable_propagation()
    try:
        export_stock(condensed("exaone_moe", [1]), tmp_path / "prefix")
        assert "misread" not in caplog.text
        export_stock(condensed("exaone_moe", [2]), tmp_path / "middle")
        assert "dense layers [0, 2], which its `first_k_dense_replace` (1) can't" in caplog.text
    finally:
        logging.disable_propagation()
    config = json.loads((tmp_path / "prefix" / "config.json").read_text())
    assert config["mlp_layer_types"] == ["dense", "dense", "sparse", "sparse"]
    assert config["first_k_dense_replace"] == 2


# --- approximate ---


@torch.no_grad()
def naive_gates(model: PreTrainedModel, layers: list[int]) -> dict[int, float]:
    """Mean gate of the shared expert over tokens, one sequence after the other."""
    seen: dict[int, list[float]] = {layer: [] for layer in layers}
    for layer in layers:
        mlp = model.model.layers[layer].mlp

        def record(_module: Any, args: Any, mlp: Any = mlp, layer: int = layer) -> None:
            scores = args[0].reshape(-1, 32) @ mlp.shared_expert_gate.weight[0]
            seen[layer] += [float(1 / (1 + torch.exp(-score))) for score in scores]

        mlp.register_forward_pre_hook(record)
    for row in SAMPLES:
        model(input_ids=torch.tensor([row]), use_cache=False)
    return {layer: sum(values) / len(values) for layer, values in seen.items()}


SAMPLES = [row[: 12 - 2 * i] for i, row in enumerate(random_ids(4, 12))]


@pytest.mark.parametrize("model_type", [name for name in GATED if available(name)])
def test_constant_shared_gates(model_type: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    layers = [1, 3]
    model = condensed(model_type, layers)
    before = state_of(model)
    logging.enable_propagation()
    try:
        report = export_stock(model, tmp_path, approximate=True, calibration=SAMPLES)
    finally:
        logging.disable_propagation()
    tensors, rest = state_of(model)
    assert differing(before[0], tensors) == []
    assert rest == before[1]
    expected = naive_gates(copy.deepcopy(model), layers)
    assert report.shared_gates == pytest.approx(expected, rel=1e-5)
    stock = opened(model, tmp_path)
    divergences: list[Tensor] = []
    with torch.no_grad():
        for row in SAMPLES:
            ids = torch.tensor([row])
            exact, found = (each(input_ids=ids, use_cache=False).logits[0] for each in (model, stock))
            divergences += list(js_divergence(exact.double(), found.double()))
    assert report.divergence == pytest.approx(float(sum(divergences)) / len(divergences), rel=1e-3)
    assert report.divergence is not None
    assert f"{report.divergence:.3e} over {len(divergences)}" in caplog.text
    # With its gates at the same constants, the condensed model is the exported one.
    for layer in layers:
        gate = torch.logit(torch.tensor(expected[layer]))
        mlp = condensed_layers(model)[layer]
        mlp.shared_expert_gate.register_forward_hook(lambda _m, _a, out, gate=gate: torch.full_like(out, gate))
    assert same(output(stock), output(model))


def test_nothing_to_approximate(tmp_path: Path) -> None:
    """No calibration data is looked for where the export is exact."""
    model = condensed("qwen3_moe", [1])
    report = export_stock(model, tmp_path, approximate=True)
    assert report.divergence is None
    assert same(output(opened(model, tmp_path)), output(model))
