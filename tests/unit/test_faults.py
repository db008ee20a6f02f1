"""Out of memory, an interrupt and bugs are never reported as something that the model or the data can't do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from transformers import PreTrainedModel
from transformers.utils.logging import warning_once

from cdmoe_plugin import apply_plan
from cdmoe_plugin.blocks import UnsupportedModelError, find_sparse_blocks, layers_path
from cdmoe_plugin.calibration import TokenBatch
from cdmoe_plugin.checks import is_out_of_memory
from cdmoe_plugin.data import TEXTS, open_file, open_hub
from cdmoe_plugin.decoder.stream import LayerStream
from cdmoe_plugin.export.stock_config import stock_model_of
from tests.helpers.plans import some_plan
from tests.helpers.tiny_models import tiny_model

OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]
FAULTS = [*OUT_OF_MEMORY, KeyboardInterrupt(), ZeroDivisionError("a bug"), AssertionError("a bug")]
each_fault = pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
SHAPES = RuntimeError("The size of tensor a (4) must match the size of tensor b (2) at non-singleton dimension 0")


@pytest.fixture(autouse=True)
def nothing_said_yet() -> None:
    warning_once.cache_clear()


def raising(error: BaseException) -> Callable[..., Any]:
    def run(*_args: Any, **_kwargs: Any) -> Any:
        raise error

    return run


def test_out_of_memory_is_known_by_its_type_its_text_and_its_cause() -> None:
    assert all(map(is_out_of_memory, OUT_OF_MEMORY))
    assert is_out_of_memory(OSError(12, "Cannot allocate memory"))
    wrapped = ValueError("the file can't be read")
    wrapped.__cause__ = MemoryError()
    assert is_out_of_memory(wrapped)
    others = [SHAPES, ValueError("out of memory"), RuntimeError(), OSError(28, "No space left"), *FAULTS[-3:]]
    assert not any(map(is_out_of_memory, others))


def test_what_the_allocator_of_the_cpu_raises() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert is_out_of_memory(caught.value)


@each_fault
def test_a_fault_in_a_block(fault: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen2_moe")
    monkeypatch.setattr(model.model.layers[2].mlp, "forward", raising(fault))
    monkeypatch.setattr(model.model.layers[1].mlp, "forward", raising(fault))
    with pytest.raises(type(fault)) as caught:
        find_sparse_blocks(model)
    assert caught.value is fault


def test_a_block_that_refuses_its_input(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen2_moe")
    monkeypatch.setattr(model.model.layers[1].mlp, "forward", raising(SHAPES))
    with pytest.raises(UnsupportedModelError, match=r"layer 1 .*needs more than hidden states \(The size of tensor"):
        find_sparse_blocks(model)


@each_fault
def test_a_fault_in_a_config(fault: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    model = apply_plan(tiny_model("qwen3_moe"), some_plan([1]))
    monkeypatch.setattr(type(model)._base_class, "__init__", raising(fault))  # type: ignore[attr-defined]
    with pytest.raises(type(fault)) as caught:
        stock_model_of(model)
    assert caught.value is fault


@pytest.mark.parametrize("error", [KeyError("dense"), ValueError("no such layer"), SHAPES], ids=repr)
def test_a_config_that_is_refused(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    model = apply_plan(tiny_model("qwen3_moe"), some_plan([1]))
    monkeypatch.setattr(type(model)._base_class, "__init__", raising(error))  # type: ignore[attr-defined]
    with pytest.raises(UnsupportedModelError, match="with `mlp_only_layers` changed, it is refused"):
        stock_model_of(model)


@each_fault
def test_a_fault_while_data_are_opened(fault: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "texts.txt"
    path.write_text("one\ntwo\n")
    monkeypatch.setattr(datasets, "load_dataset", raising(fault))
    for opening in (lambda: open_file(path, "calibration", TEXTS), lambda: open_hub("no/name", "calibration", "")):
        with pytest.raises(type(fault)) as caught:
            opening()
        assert caught.value is fault


def test_data_that_can_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "texts.json"
    path.write_text("{")
    broken = DatasetGenerationError("An error occurred while generating the dataset")
    monkeypatch.setattr(datasets, "load_dataset", raising(broken))
    broken.__cause__ = TypeError("no table")
    with pytest.raises(ValueError, match=r"texts\.json can't be read: no table"):
        open_file(path, "calibration", TEXTS)
    broken.__cause__ = MemoryError()
    with pytest.raises(DatasetGenerationError):
        open_file(path, "calibration", TEXTS)
    for error in (DatasetNotFoundError("none"), ConnectionError("none"), RuntimeError("Dataset scripts are no longer")):
        monkeypatch.setattr(datasets, "load_dataset", raising(error))
        with pytest.raises(ValueError, match="'no/name' is not a local file"):
            open_hub("no/name", "calibration", "")


def stream_of(model: PreTrainedModel) -> LayerStream:
    model.eval()
    return LayerStream(model, layers_path(find_sparse_blocks(model)), [TokenBatch.random(model)])


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "cdmoe_plugin.decoder.stream"]


def fail_for_more_rows(
    stream: LayerStream, layer: int, rows: int, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> list[int]:
    """Has a decoder layer raise for batches of more rows; the list tells the rows of all batches that it was given."""
    module, given = stream.layers[layer], []
    forward = module.forward

    def failing(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        given.append(len(hidden))
        if len(hidden) > rows:
            raise error
        return forward(hidden, *args, **kwargs)

    monkeypatch.setattr(module, "forward", failing)
    return given


@pytest.mark.parametrize("error", [SHAPES, IndexError("out of range"), ValueError("rows")], ids=repr)
def test_a_layer_that_takes_no_joined_batch(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stream = stream_of(tiny_model("qwen2_moe"))
    inputs = [stream.embeddings[0]] * 4
    expected = stream.run_layer(1, stream.embeddings[0], 0)[0]
    given = fail_for_more_rows(stream, 1, 2, error, monkeypatch)
    for _ in range(3):
        assert all(torch.equal(output[0], expected) for output in stream.run_together(1, inputs, 0))
    assert given == [8, *[2] * 12]
    [message] = said(caplog)
    assert "Decoder layer 1 can't run 4 inputs at once and will run one" in message
    assert str(error) in message


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=repr)
def test_a_layer_without_memory_for_a_joined_batch(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stream = stream_of(tiny_model("qwen2_moe"))
    inputs = [stream.embeddings[0]] * 4
    expected = stream.run_layer(2, stream.embeddings[0], 0)[0]
    given = fail_for_more_rows(stream, 2, 4, error, monkeypatch)
    for _ in range(3):
        found = stream.run_together(2, inputs, 0)
        assert all(torch.allclose(output[0], expected, atol=1e-5) for output in found)
    assert given == [8, 2, 2, 2, 2, 4, 4, 4, 4]  # half as many are tried from then on
    [message] = said(caplog)
    assert "Decoder layer 2 can't run 4 inputs at once and will run fewer" in message
    monkeypatch.undo()
    fail_for_more_rows(stream, 2, 0, error, monkeypatch)
    with pytest.raises(type(error)) as caught:  # not even for one of them
        stream.run_together(2, inputs, 0)
    assert caught.value is error


@pytest.mark.parametrize("fault", FAULTS[-3:], ids=repr)
def test_a_fault_in_a_joined_batch(fault: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = stream_of(tiny_model("qwen2_moe"))
    fail_for_more_rows(stream, 1, 2, fault, monkeypatch)
    with pytest.raises(type(fault)) as caught:
        stream.run_together(1, [stream.embeddings[0]] * 4, 0)
    assert caught.value is fault


class Tokenizer(list[int]):
    all_special_ids: tuple[int, ...] = ()


@each_fault
def test_results_outlive_a_fault_while_speed_is_measured(
    fault: BaseException, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """lm-eval writes hours of results only after this, so any error is named in them; an interrupt still ends it."""
    module = pytest.importorskip("cdmoe_plugin.integrations.lm_eval_model")
    monkeypatch.setattr(module, "generation_speed", raising(fault))
    harness = SimpleNamespace(
        device=torch.device("cpu"),
        mixed_precision_dtype=None,
        model=tiny_model("qwen2_moe"),
        tokenizer=Tokenizer(range(9)),
        max_length=8,
    )
    measure = module.CDMoELM._speed.func
    if isinstance(fault, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            measure(harness)
        return
    assert measure(harness) == {"tokens_per_second": None, "error": repr(fault)}
    assert caplog.records[-1].exc_info is not None
