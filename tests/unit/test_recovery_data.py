"""Training data: every format of rows that is read, and what is said of those that are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset

from cdmoe_plugin.recovery import load_stage_data
from cdmoe_plugin.recovery.data import to_prompt_and_completion
from tests.helpers.recovery import lm_rows, sft_rows

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".parquet"])
def test_files(ending: str, tmp_path: Path) -> None:
    rows = [{**row, "url": "x"} for row in lm_rows(30)]
    data = load_stage_data("lm", write(tmp_path / f"data{ending}", rows))
    assert data.train.column_names == ["text"]
    assert (len(data.train), len(data.held_out)) == (27, 3)
    together = [*data.train["text"], *data.held_out["text"]]
    assert sorted(together) == sorted(row["text"] for row in rows)
    assert together != [row["text"] for row in rows]


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"text": "a b", "id": 1}, ["text"]),
        ({"prompt": "a", "completion": " b", "text": "a b"}, ["prompt", "completion"]),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, ["prompt", "completion"]),
        ({"messages": CHAT, "source": "x"}, ["messages"]),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, ["conversations"]),
        ({"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, ["input_ids", "labels"]),
        ({"instruction": "a", "input": "", "output": "b", "answer": "b"}, ["prompt", "completion"]),
        ({"instruction": "a", "output": "b"}, ["prompt", "completion"]),
    ],
)
def test_formats_that_trl_knows(row: dict[str, Any], columns: list[str]) -> None:
    data = load_stage_data("sft", Dataset.from_list([row] * 10))
    assert data.train.column_names == columns
    assert (len(data.train), len(data.held_out)) == (9, 1)


def test_commonsense170k() -> None:
    row = {"instruction": "Is it?\n\nAnswer format: true/false", "input": "", "output": "the correct answer is true"}
    expected = {
        "prompt": "Is it?\n\nAnswer format: true/false\n\nAnswer:",
        "completion": " the correct answer is true",
    }
    assert to_prompt_and_completion({**row, "answer": "true"}) == expected
    assert to_prompt_and_completion({**row, "input": " of it "})["prompt"].endswith("false\n\nof it\n\nAnswer:")
    assert to_prompt_and_completion({**row, "input": None}) == expected


def test_held_out_rows_of_their_own_and_numbers() -> None:
    rows, others = Dataset.from_list(sft_rows(30)), Dataset.from_list(sft_rows(40)[30:])
    data = load_stage_data("sft", rows, held_out=others, num_examples=20, num_held_out=7)
    assert (len(data.train), len(data.held_out)) == (20, 7)
    ours = {to_prompt_and_completion(row)["prompt"] for row in sft_rows(30)}
    assert set(data.train["prompt"]) < ours
    assert not set(data.held_out["prompt"]) & ours


def test_held_out_rows_do_not_depend_on_how_many_are_trained_on() -> None:
    rows = Dataset.from_list(lm_rows())
    few, many = (load_stage_data("lm", rows, num_examples=n) for n in (5, None))
    assert few.held_out["text"] == many.held_out["text"]
    assert few.train["text"] == many.train["text"][:5]
    assert load_stage_data("lm", rows, seed=1).held_out["text"] != many.held_out["text"]


def test_rows_without_text_are_dropped_and_said(caplog: pytest.LogCaptureFixture) -> None:
    from transformers.utils import logging

    logging.enable_propagation()
    rows = [{"text": text} for text in ["a b", "", None, "  ", *["c"] * 8]]
    data = load_stage_data("lm", Dataset.from_list(rows))
    logging.disable_propagation()
    assert len(data.train) + len(data.held_out) == 9
    assert "3 of 12 rows of `lm_dataset`" in caplog.text


@pytest.mark.parametrize(
    ("row", "empty"),
    [
        ({"prompt": "a", "completion": " b"}, {"prompt": "a", "completion": ""}),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, {"prompt": CHAT[:1], "completion": []}),
        ({"messages": CHAT}, {"messages": []}),
        ({"input_ids": [1, 2]}, {"input_ids": []}),
        ({"instruction": "a", "output": "b"}, {"instruction": "a", "output": " "}),
    ],
)
def test_rows_without_content_are_dropped_in_every_format(row: dict[str, Any], empty: dict[str, Any]) -> None:
    data = load_stage_data("sft", Dataset.from_list([*[row] * 5, *[empty] * 3]))
    assert len(data.train) + len(data.held_out) == 5


def test_held_out_rows_of_their_own_must_have_text() -> None:
    rows, others = Dataset.from_list(lm_rows(5)), Dataset.from_list([{"text": " "}])
    with pytest.raises(ValueError, match=r"(?s)`lm_eval_dataset` .* has no row with text"):
        load_stage_data("lm", rows, held_out=others)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "a", "answer": "b"}] * 4, r"columns \['question', 'answer'\].*`prompt` and `completion`"),
        ([{"instruction": "a", "output": 3}] * 4, "`output`.*should be text, but is int64"),
        ([{"instruction": "a"}] * 4, "`instruction` and `output`"),
        ([{"text": ""}] * 4, "at least two"),
        ([{"text": "a"}], "at least two"),
        ([], "empty"),
    ],
)
def test_what_is_missing_is_named(rows: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_stage_data("sft", write(tmp_path / "data.jsonl", rows))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.json", "does not exist"),
        ("broken.json", "can't be read"),
        ("data.doc", "should end in one of .json, .jsonl, .parquet, .csv"),
        ("data.txt", "should end in one of .json, .jsonl, .parquet, .csv"),
        ("nobody/nothing", "--sft_dataset"),
    ],
)
def test_what_can_not_be_opened(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text('{"text": ')
    for ending in ("doc", "txt"):
        (tmp_path / f"data.{ending}").write_text("text\na\n")
    path = tmp_path / name
    with pytest.raises(ValueError, match=message):
        load_stage_data("sft", name if name.startswith("nobody") else path)


def test_streams_are_refused() -> None:
    stream = IterableDataset.from_generator(lambda: iter(lm_rows(5)))
    with pytest.raises(ValueError, match="IterableDataset"):
        load_stage_data("lm", stream)
