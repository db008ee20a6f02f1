"""How many tokens a refit, a search and a batch get."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import processors
from torch.utils._pytree import tree_leaves
from transformers.utils import logging

from cdmoe_plugin import CondenseConfig, apply_plan, search_plan
from cdmoe_plugin.blocks import find_sparse_blocks, layers_path
from cdmoe_plugin.calibration import Calibration, load_calibration
from cdmoe_plugin.decoder.arguments import _size
from cdmoe_plugin.decoder.stream import LayerStream
from cdmoe_plugin.decoder.whole import searching
from cdmoe_plugin.search.sample import refit_tokens, search_sample
from tests.helpers.models import sparse_model
from tests.helpers.plans import some_plan
from tests.helpers.recovery import WORDS, word_tokenizer

AUTO = {"num_samples": "auto", "refit": "down_proj"}


@pytest.fixture(autouse=True)
def progress_bars() -> Iterator[None]:
    """The line about the data comes with them."""
    shown = logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    yield
    if not shown:
        logging.disable_progress_bar()


def rows(number: int, *lengths: int) -> list[list[int]]:
    """Token ids, each row another one."""
    draw = random.Random(0)
    return [[draw.randrange(3, 128) for _ in range(lengths[i % len(lengths)])] for i in range(number)]


def sequences(calibration: Calibration) -> list[list[int]]:
    found = []
    for batch in calibration.batches:
        found += [ids[mask.bool()].tolist() for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]
    return found


@pytest.mark.parametrize("kind", ["list", "Dataset", "streaming Dataset"])
def test_auto_draws_until_there_are_enough_tokens(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    ids = rows(3000, 40, 300, 7)
    source: Any = ids if kind == "list" else Dataset.from_dict({"input_ids": ids})
    source = source.to_iterable_dataset() if kind == "streaming Dataset" else source
    config = CondenseConfig(**AUTO, max_length=200)
    found = load_calibration(source, config, num_tokens=60_000)
    assert 60_000 <= found.num_tokens < 60_000 + 2000  # the last draw is of at most ten samples
    drawn = sequences(found)
    whole = {tuple(row[:200]) for row in ids}
    assert len(drawn) == len({tuple(row) for row in drawn}) == found.num_samples
    assert all(tuple(row) in whole for row in drawn)
    assert f"{found.num_tokens:,} tokens" in (said := capsys.readouterr().err)
    assert "(at least 60,000, by `num_samples='auto'`)" in said
    # Another seed draws others, and without a number of its own it is the paper's.
    other = load_calibration(source, CondenseConfig(**AUTO, max_length=200, seed=1))
    assert 51_200 <= other.num_tokens < 51_200 + 2000
    assert other.fingerprint != found.fingerprint


def test_auto_takes_all_of_the_data_if_there_is_less(capsys: pytest.CaptureFixture[str]) -> None:
    ids = rows(30, 20)
    found = load_calibration(ids, CondenseConfig(**AUTO), num_tokens=60_000)
    assert sorted(sequences(found)) == sorted(ids)
    assert "600 tokens (all of the data, which has fewer than 60,000, by" in capsys.readouterr().err
    # A sample that is as long as all of them is not enough to hold some out.
    assert load_calibration(rows(12, 6000), CondenseConfig(**AUTO, max_length=6000)).num_samples == 10


def test_auto_cuts_as_many_samples_of_a_running_text(tmp_path: Path) -> None:
    text = "\n".join(" ".join(WORDS[(7 * i + j) % 100] for j in range(50)) for i in range(2000))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    found = load_calibration(tmp_path / "a.txt", CondenseConfig(**AUTO, max_length=128), word_tokenizer())
    assert (found.num_samples, found.num_tokens) == (400, 51_200)


def test_auto_is_sized_by_the_widest_layer() -> None:
    model = sparse_model("qwen2_moe")
    blocks = find_sparse_blocks(model)
    # 24 shared neurons, and experts of 16.
    assert refit_tokens(CondenseConfig(num_layers=1, num_experts=2, **AUTO), blocks) == 30 * 56
    assert refit_tokens(CondenseConfig(**AUTO), blocks, some_plan([1, 2])) == 30 * 72
    assert refit_tokens(CondenseConfig(num_samples="auto"), blocks) == 0
    for wrong in ("all", None, 0, 1.5):
        with pytest.raises(ValueError, match="num_samples"):
            CondenseConfig(num_samples=wrong)  # type: ignore[arg-type]


def test_a_search_has_a_sample_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = rows(1500, 20, 90)
    config = CondenseConfig(num_samples=1500, refit="down_proj", batch_size=64, num_layers=1, num_experts=2)
    data = load_calibration(ids, config)
    sample = search_sample(data, config)
    assert (data.num_tokens, sample.num_tokens) == (82_500, 51_200)
    assert {tuple(row) for row in sequences(sample)[:-1]} <= {tuple(row) for row in ids}
    assert search_sample(data, CondenseConfig(num_samples=1500)) is data
    few = load_calibration(ids[:200], config)
    assert search_sample(few, config) is few
    # Of few long sequences, beginnings that are longer than the paper's; of many, such as the paper's.
    for number, whole, length in ((10, 6000, 5120), (120, 600, 512)):
        long = load_calibration(rows(number, whole), CondenseConfig(num_samples=number, max_length=whole))
        found = sequences(search_sample(long, config))
        assert [len(row) for row in found] == [length] * (51_200 // length)
        assert {tuple(row) for row in found} <= {tuple(row[:length]) for row in rows(number, whole)}
    monkeypatch.setattr("cdmoe_plugin.search.sample.PAPER_TOKENS", 1000)
    monkeypatch.setattr("cdmoe_plugin.search.sample._LENGTH", 30)
    model = sparse_model("qwen2_moe")
    plan = search_plan(model, config, calibration=ids[:100])
    assert plan.calibration is not None
    assert plan.calibration["num_tokens"] == 1000
    condensed = apply_plan(model, plan, config, calibration=ids[:100])
    assert condensed.config.condense_config["refit_tokens"] == 5500


def test_long_samples_count_as_several_of_a_batch() -> None:
    lengths = (5000, 100, 9000, 2048, 3000, 2049, 40)
    data = load_calibration(rows(7, *lengths), CondenseConfig(batch_size=3, max_length=9000))
    assert [list(batch.input_ids.shape) for batch in data.batches] == [[3, 2048], [2, 3000], [1, 5000], [1, 9000]]
    assert data.fingerprint == hashlib.sha256(repr(rows(7, *lengths)).encode()).hexdigest()
    assert torch.equal(data.batches[-1].input_ids[0], torch.tensor(rows(7, *lengths)[2]))


def test_arguments_beyond_some_memory_are_computed_again() -> None:
    model = sparse_model("qwen2_moe")
    data = load_calibration(rows(6, 128, 50, 60), CondenseConfig(batch_size=2))
    path = layers_path(find_sparse_blocks(model))
    with searching(model):
        whole = LayerStream(model, path, data.batches)
        first = _size(whole._arguments[data.batches[0]])
        streams = [whole, *(LayerStream(model, path, data.batches, memory) for memory in (0, first))]
        for batch in (0, 1, 2, 0, 2):
            outputs = [stream.run_layer(1, stream.entering(batch), batch)[0] for stream in streams]
            assert all(torch.equal(outputs[0], output) for output in outputs)
    assert [len(stream._arguments._kept) for stream in streams] == [3, 0, 1]
    # Full sequences need no mask, which would be as large as the square of their length.
    leaves = [leaf for leaf in tree_leaves(streams[1]._arguments[data.batches[2]]) if isinstance(leaf, torch.Tensor)]
    assert leaves
    assert max(leaf.numel() for leaf in leaves) < 128 * 128


def test_a_line_says_if_no_token_comes_before_a_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [" ".join(WORDS[i : i + 12]) for i in range(20)]
    (tmp_path / "a.txt").write_text("\n".join(texts), encoding="utf-8")
    tokenizer = word_tokenizer()
    for source in (texts, tmp_path / "a.txt"):
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
        load_calibration(source, CondenseConfig(max_length=10), tokenizer)
        assert "; the tokenizer adds no token before a text\n" in capsys.readouterr().err
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 1)]
        )
        found = load_calibration(source, CondenseConfig(max_length=10), tokenizer)
        assert all(row[0] == 1 and len(row) <= 10 for row in sequences(found))
        assert "before a text" not in capsys.readouterr().err
