"""The compiled comparison of experts, on the CPU: what the plain one gives."""

from __future__ import annotations

import importlib
import logging
import shutil
from typing import Any

import pytest
import torch

from cdmoe_plugin import CondenseConfig, search_plan
from cdmoe_plugin.registry import METRICS
from cdmoe_plugin.search.experts import comparison
from tests.helpers.naive import close
from tests.helpers.tiny_models import random_ids, tiny_model


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU or with many tokens, with a compiler of its own for each test."""
    monkeypatch.setattr(comparison, "_FUSED_ELEMENTS", {"cpu": 0})
    comparison.fused_divergences.cache_clear()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiles C++")
def test_compiled_or_not(on_the_cpu: None, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("qwen2_moe")
    config = CondenseConfig(layers=[1, 2], num_experts=3, batch_size=2)
    fused = search_plan(model, config, calibration=random_ids(5))
    assert "can't be compiled" not in caplog.text
    comparison._FUSED_ELEMENTS.clear()
    plain = search_plan(model, config, calibration=random_ids(5))
    for one, other in zip(fused.layers, plain.layers, strict=True):
        assert (one.layer, one.experts, one.gates) == (other.layer, other.experts, other.gates)
        assert one.expert_scores == close(other.expert_scores)


def test_without_a_compiler(
    on_the_cpu: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    inductor = importlib.import_module("torch._inductor.config")
    monkeypatch.setattr(inductor.cpp, "cxx", (None, "/no/compiler"))
    monkeypatch.setattr(inductor, "force_disable_caches", True)
    torch.compiler.reset()
    config = CondenseConfig(layers=[1, 2], num_experts=2, batch_size=2)
    model = tiny_model("qwen2_moe")
    logging.getLogger("transformers").propagate = True
    found = search_plan(model, config, calibration=random_ids(5))
    assert caplog.text.count("can't be compiled here") == 1
    comparison._FUSED_ELEMENTS.clear()
    assert found == search_plan(model, config, calibration=random_ids(5))


@pytest.mark.parametrize("metric", METRICS)
def test_divergences(metric: str) -> None:
    """Against the formula, one expert after the other in float64."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Any:
        return torch.randn(shape, generator=generator)

    target, offset, base, outputs, gates = random(7, 5), random(7, 5), random(7, 5), random(3, 7, 5), random(3, 1, 1)
    found = comparison.divergences(METRICS[metric], target, offset, 0.5, base, outputs.bfloat16(), gates)
    for expert in range(3):
        y = base.double() + gates[expert].double() * outputs[expert].bfloat16().double()
        expected = METRICS[metric](target.double(), offset.double() + 0.5 * y)
        torch.testing.assert_close(found[expert].double(), expected, rtol=1e-4, atol=1e-7)
