"""Checkpoints as they are published: quantised, with weights beside the decoder, in other formats, or broken.

`python -m tests.models.test_published` writes docs/published.md from `ROWS`. What becomes of the weights is tested in
test_dequantised.py and test_extra_weights.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from cdmoe_plugin import CondenseConfig, condense_pretrained
from cdmoe_plugin.estimate import dry_run
from cdmoe_plugin.loading.load import method_of, sketch_model
from cdmoe_plugin.model.extra import extra_weights
from tests.helpers import published
from tests.helpers.plans import some_plan
from tests.helpers.tiny_models import random_ids, tiny_model

PAGE = Path(__file__).parents[2] / "docs" / "published.md"
IDS = random_ids(5)
CONFIG = CondenseConfig(num_layers=1, num_experts=2, batch_size=2)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def plain(folder: Path) -> Path:
    return published.plain(folder, tiny_model("qwen2_moe"))


def said_to_be(method: str, folder: Path, **fields: Any) -> Path:
    """A checkpoint whose config names a method of quantisation."""
    return published.plain(folder, tiny_model("qwen2_moe"), quantization_config={"quant_method": method, **fields})


def in_bin(folder: Path) -> Path:
    plain(folder)
    torch.save(published.read(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def broken(folder: Path, content: bytes | None, name: str = "model.safetensors") -> Path:
    """A checkpoint whose weights are in another state: None is the first half of them."""
    plain(folder)
    weights = folder / "model.safetensors"
    content = weights.read_bytes()[: weights.stat().st_size // 2] if content is None else content
    weights.unlink()
    (folder / name).write_bytes(content)
    return folder


def adapter(folder: Path, beside: bool = False) -> Path:
    """An adapter's config, beside the weights of a base model or without them."""
    folder.mkdir()
    if beside:
        plain(folder)
    values = {"peft_type": "LORA", "base_model_name_or_path": "mistralai/Mixtral-8x7B-v0.1"}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return folder


def only_gguf(folder: Path) -> Path:
    folder.mkdir()
    (folder / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    return folder


def gguf_file(folder: Path) -> Path:
    return only_gguf(folder) / "model-Q4_K_M.gguf"


def empty(folder: Path) -> Path:
    folder.mkdir()
    return folder


def typo(folder: Path) -> Path:
    plain(folder)
    return folder.with_name(f"{folder.name}x")


def only_config(folder: Path) -> Path:
    plain(folder)
    (folder / "model.safetensors").unlink()
    return folder


def lacks_a_shard(folder: Path) -> Path:
    tiny_model("qwen2_moe").save_pretrained(folder, max_shard_size="100KB")
    next(iter(sorted(folder.glob("*.safetensors")))).unlink()
    return folder


@dataclass(frozen=True)
class Row:
    """A way of publishing: for the table, and for the test that tries it.

    Args:
        name (`str`): How a checkpoint is published.
        example (`str`): Where.
        make (`Callable`): Writes such a checkpoint and returns its path.
        wrong (`str`): What is wrong with it: its "weights", which an estimate does not read, or its "path".
        kwargs (`dict`): How it is opened.
    """

    name: str
    example: str
    make: Callable[[Path], Path]
    wrong: str = ""
    kwargs: dict[str, Any] | None = None


def quantised_row(name: str, example: str, layout: str) -> Row:
    return Row(name, example, lambda folder: published.QUANTISED[layout](folder)[0])


ROWS = [
    Row("16 bit, safetensors", "Qwen1.5-MoE-A2.7B", plain),
    quantised_row("FP8 in blocks, a layer for multi-token prediction", "DeepSeek-V3", "deepseek_v3"),
    quantised_row("FP8 in blocks", "Qwen3-30B-A3B-FP8", "qwen_fp8"),
    quantised_row("FP8 with one scale per matrix", "Mixtral in FP8", "static_fp8"),
    quantised_row("MXFP4", "gpt-oss-20b", "gpt_oss"),
    quantised_row("bitsandbytes, 4 bit", "bnb-4bit", "nf4"),
    quantised_row("bitsandbytes, 8 bit", "bnb-8bit", "int8"),
    Row("compressed-tensors", "Kimi-K2-Thinking", partial(said_to_be, "compressed-tensors", format="pack-quantized")),
    Row("GPTQ", "Qwen1.5-MoE-A2.7B-Chat-GPTQ-Int4", partial(said_to_be, "gptq", bits=4)),
    Row("AWQ", "DeepSeek-V3-AWQ", partial(said_to_be, "awq", bits=4)),
    Row("torchao", "", partial(said_to_be, "torchao")),
    Row("a method unknown to transformers", "NVFP4 by ModelOpt", partial(said_to_be, "modelopt")),
    Row("weights beside the decoder", "Qwen3.5, GLM-4.5", published.beside),
    Row("an adapter beside the weights", "a base model to which LoRA was saved", partial(adapter, beside=True), "path"),
    Row("an adapter alone", "LoRA on Mixtral", adapter, "path"),
    Row("pytorch_model.bin", "", in_bin),
    Row("pytorch_model.bin, with `offload_folder`", "", in_bin, "weights", {"offload_folder": "offload"}),
    Row("GGUF, a folder", "", only_gguf, "path"),
    Row("GGUF, a file", "", gguf_file, "path"),
    Row("a pointer of git-lfs", "cloned without git-lfs", partial(broken, content=POINTER), "weights"),
    Row("cut-off weights", "an interrupted download", partial(broken, content=None), "weights"),
    Row("a file of weights is lacking", "an interrupted download", lacks_a_shard, "weights"),
    Row("config.json alone", "", only_config, "weights"),
    Row("an empty folder", "", empty, "path"),
    Row("a path with a typo", "", typo, "path"),
]


def happens(row: Row, folder: Path) -> str:
    """What becomes of a checkpoint, for the table."""
    path = row.make(folder / "checkpoint")
    kwargs = dict(row.kwargs or {})
    if "offload_folder" in kwargs:
        kwargs["offload_folder"] = str(folder / "offload")
    try:
        model = condense_pretrained(path, CONFIG, calibration=IDS, **kwargs)
    except ValueError as error:
        return f"refused: {error}".replace(str(folder / "checkpoint"), "FOLDER")
    words = ["condensed"]
    if method_of(sketch_model(path, {})[0]) is not None:
        words.append("weights are dequantised while they are read")
    if list(path.glob("*.safetensors")):
        model = condense_pretrained(path, plan=model.condense_plan, keep_extra=True)
        words += ["weights beside the decoder are left out, or carried over by `keep_extra`"] * bool(
            extra_weights(model)
        )
    return "; ".join(words)


def table() -> str:
    """The text of docs/published.md."""
    cells = []
    for row in ROWS:
        with TemporaryDirectory() as folder:
            cells.append((row.name, row.example, happens(row, Path(folder))))
    lines = [
        "# Checkpoints as they are published",
        "",
        "What `condense_pretrained` and `cdmoe condense` do with a checkpoint, by how it is published. Each row was",
        "tried on a small checkpoint in that layout; refusals come before weights are read and before a search.",
        "Multimodal checkpoints have [a page of their own](multimodal.md), and so have bases with",
        "[code of their own](condense.md). `python -m tests.models.test_published` writes this file; a test fails when",
        "it is out of date.",
        "",
        "| published as | for example | what happens |",
        "| --- | --- | --- |",
        *(f"| {' | '.join(text.replace('|', '/') for text in row)} |" for row in cells),
    ]
    return "\n".join(lines) + "\n"


# --- files ---


@pytest.mark.parametrize("row", [row for row in ROWS if row.wrong], ids=lambda row: row.name)
def test_what_is_wrong_is_said_first(row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line names the folder, before the calibration data is read."""
    path = row.make(tmp_path / "checkpoint")
    plan = some_plan([1])
    monkeypatch.setattr("cdmoe_plugin.api.load_calibration", lambda *_: pytest.fail("calibration data was read"))
    for kwargs in ({"config": CONFIG, "calibration": "texts"}, {"plan": plan}):
        with pytest.raises(ValueError, match=str(tmp_path / "checkpoint")) as refused:
            condense_pretrained(path, **kwargs, **(row.kwargs or {}))
        assert "\n" not in str(refused.value)
    if row.wrong == "weights":
        assert "parameters" in dry_run(path, CONFIG)
    else:
        with pytest.raises(ValueError, match=str(tmp_path / "checkpoint")):
            dry_run(path, CONFIG)


def test_a_plan_and_weights_that_can_not_be_read_in_part(tmp_path: Path) -> None:
    path = in_bin(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match=r"With a plan.*safetensors.*give it to `apply_plan`"):
        condense_pretrained(path, plan=some_plan([1]))
    with pytest.raises(ValueError, match=r"With an `offload_folder`.*safetensors") as refused:
        condense_pretrained(path, CONFIG, calibration=IDS, offload_folder=str(tmp_path / "offload"))
    assert "a plan" not in str(refused.value)


def test_the_table_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == table(), "run `python -m tests.models.test_published`"


if __name__ == "__main__":
    PAGE.write_text(table(), encoding="utf-8")
