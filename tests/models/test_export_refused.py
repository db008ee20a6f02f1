"""What can't be exported exactly is refused with the reason, or approximated on demand."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from cdmoe_plugin import apply_plan, export_stock
from cdmoe_plugin.blocks import UnsupportedModelError
from cdmoe_plugin.metrics.js import js_divergence
from cdmoe_plugin.model.lookup import condensed_layers
from tests.helpers.exporting import GATED, NEVER, condensed, opened, output, same
from tests.helpers.models import IDS, sparse_model
from tests.helpers.states import differing, state_of
from tests.helpers.tiny_models import ARCHITECTURES, available, random_ids
from tests.helpers.trimming import trim_plan

# --- refused ---


@pytest.mark.parametrize("model_type", [name for name in NEVER if available(name)])
def test_no_dense_layers(model_type: str, tmp_path: Path) -> None:
    model = condensed(model_type, list(ARCHITECTURES[model_type].sparse_layers))
    with pytest.raises(UnsupportedModelError, match=f"(?s){model_type}. (can't describe|computes something).* Keep"):
        export_stock(model, tmp_path / "stock", approximate=True, calibration=IDS)
    assert not (tmp_path / "stock").exists()


@pytest.mark.parametrize(
    ("model_type", "layers", "message"),
    [
        (
            "deepseek_v3",
            [2],
            r"`first_k_dense_replace` .* but the dense layers would be \[0, 2\] of 4: \[1\] would have to be dense too",
        ),
        ("deepseek", [3], r"`moe_layer_freq` .* \[0, 3\] of 4: \[1, 2\] would have to be"),
        ("lfm2_moe", [3], r"`num_dense_layers` can only mark the first layers as dense"),
        ("granitemoehybrid", [0, 1], r"`num_local_experts` .* all layers .* \[2, 3\] would have to be"),
        ("axk2", [1], "layers.1.post_attention_layernorm would be AXK2RMSNorm instead of AXK2GatedRMSNorm"),
        ("axk1", [2], "the dense MLP of decoder layer 2 would have no post_mlp_layernorm"),
        ("mixtral", [1], "has no field for dense layers"),
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


@pytest.mark.parametrize(
    ("model_type", "layers", "message"),
    [("mixtral", [1], "has no field for dense layers"), ("deepseek_v3", [3], r"would be \[0, 3\] of 4")],
)
def test_trimmed_mlps_that_no_config_can_say(model_type: str, layers: list[int], message: str, tmp_path: Path) -> None:
    model = apply_plan(sparse_model(model_type), trim_plan("trim_layer", layers))
    with pytest.raises(UnsupportedModelError, match=message):
        export_stock(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


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
    with pytest.raises(ValueError, match="it is a condensed checkpoint"):
        export_stock(model, tmp_path / "condensed")
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "condensed",
        device_map={"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}
        | {"lm_head": "cpu"},
        offload_folder=tmp_path / "offload",
    )
    with pytest.raises(ValueError, match=r"weights are on \['cpu', 'meta'\]: load it on one device"):
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
