"""Every form of a checkpoint in transformers itself, and as a graph for other runtimes; see docs/serve.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from cdmoe_plugin import CondensePlan, apply_plan, export_dense, export_stock
from cdmoe_plugin.export.top_k import export_top_k
from tests.helpers.models import build
from tests.helpers.plans import some_plan
from tests.helpers.served import record
from tests.helpers.tiny_models import random_ids, tiny_model
from tests.helpers.trimming import trim_plan

IDS = torch.tensor(random_ids(2, 12)[:1])
TRANSFORMERS = f"transformers {transformers.__version__}"
FULLY = {"deepseek": [1, 2, 3], "qwen3_moe": [1, 2, 3]}


def changed(model_type: str, plan: CondensePlan) -> PreTrainedModel:
    sparse = build("deepseek", num_experts=8) if model_type == "deepseek" else tiny_model(model_type)
    return apply_plan(sparse, plan)


def save(model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder)


FORMS: dict[str, tuple[Any, Any]] = {
    "condensed": (some_plan([1, 2]), save),
    "stock": (some_plan([1, 2]), export_stock),
    "dense": (some_plan([1, 2, 3]), export_dense),
    "top-K": (some_plan([1, 2, 3]), export_top_k),
    "block-trimmed": (trim_plan("trim_block", [2]), save),
}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS).logits


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("model_type", FULLY)
@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str, model_type: str, tmp_path: Path) -> None:
    plan, write = FORMS[form]
    model = changed(model_type, plan)
    write(model, tmp_path)
    found = difference(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))
    record(TRANSFORMERS, form, model_type, found)
    assert found < 2e-6


class Logits(nn.Module):
    """The graph that runtimes get: token ids in, logits out, without a cache."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


LENGTH = {"input_ids": {1: torch.export.Dim("length", min=2, max=32)}}


def fully(model_type: str) -> Logits:
    model = changed(model_type, some_plan(FULLY[model_type]))
    model.set_attn_implementation("eager")
    return Logits(model).eval()


@pytest.mark.slow
def test_torch_export() -> None:
    model = fully("deepseek")
    with torch.no_grad():
        program = torch.export.export(model, (), {"input_ids": IDS}, dynamic_shapes=LENGTH)
        for ids in (IDS, IDS[:, :7]):
            found = difference(program.module()(input_ids=ids), model(ids))
            assert found < 1e-6
    record(f"torch.export, torch {torch.__version__.partition('+')[0]}", "condensed", "deepseek", found)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", FULLY)
def test_onnx(model_type: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, file = fully(model_type), tmp_path / "model.onnx"
    with torch.no_grad():
        torch.onnx.export(
            model, (), file, kwargs={"input_ids": IDS}, dynamo=True, dynamic_shapes=LENGTH, output_names=["logits"]
        )
        session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
        for ids in (IDS, IDS[:, :7]):
            (logits_found,) = session.run(["logits"], {"input_ids": ids.numpy()})
            found = difference(torch.from_numpy(logits_found), model(ids))
            assert found < 1e-5
    record(f"onnxruntime {runtime.__version__}", "condensed", model_type, found)
