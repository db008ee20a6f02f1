"""Calibration data of every kind becomes the same token batches, and padding never counts."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cdmoe_plugin import CondenseConfig, condense_pretrained
from cdmoe_plugin.calibration import Calibration, load_calibration
from tests.tiny_models import tiny_model

POEM = "the cat sat on a mat while two dogs ran over seven hills and one bird sang"
TEXTS = [" ".join(POEM.split()[i : i + 3 + i % 9]) for i in range(12)]
IDS = [[3 + (7 * i + j) % 90 for j in range(2 + i)] for i in range(12)]
PAD, BOS, EOS = 0, 1, 2


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    trained.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=90, special_tokens=special))
    trained.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=trained, **names)


def sequences(calibration: Calibration) -> list[list[int]]:
    """The token ids of all batches, one after the other, without padding."""
    rows = []
    for batch in calibration.batches:
        rows += [ids[mask.bool()].tolist() for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]
    return rows


def load(source: Any, tokenizer: Any = None, model_config: Any = None, **config: Any) -> Calibration:
    return load_calibration(source, CondenseConfig(**config), tokenizer, model_config)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def write_parquet(path: Path, columns: dict[str, Any]) -> Path:
    Dataset.from_dict(columns).to_parquet(path)
    return path


def json_lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def rows_of(column: str, values: list[Any]) -> list[dict[str, Any]]:
    return [{"number": i, column: value} for i, value in enumerate(values)]


TEXT_SOURCES: dict[str, Callable[[Path], Any]] = {
    "list": lambda tmp: TEXTS,
    "tuple": lambda tmp: tuple(TEXTS),
    "txt": lambda tmp: write(tmp / "a.txt", "\n".join(TEXTS)),
    "json": lambda tmp: write(tmp / "a.json", json.dumps(rows_of("text", TEXTS))),
    "jsonl as str": lambda tmp: str(write(tmp / "a.jsonl", json_lines(rows_of("content", TEXTS)))),
    "jsonl of one column": lambda tmp: write(tmp / "b.jsonl", json_lines([{"sentence": text} for text in TEXTS])),
    "parquet": lambda tmp: write_parquet(tmp / "a.parquet", {"url": TEXTS[::-1], "text": TEXTS}),
    "Dataset": lambda tmp: Dataset.from_list(rows_of("text", TEXTS)),
    "streaming Dataset": lambda tmp: Dataset.from_list(rows_of("text", TEXTS)).to_iterable_dataset(),
    "column": lambda tmp: Dataset.from_list(rows_of("text", TEXTS))["text"],
}

ID_SOURCES: dict[str, Callable[[Path], Any]] = {
    "lists": lambda tmp: IDS,
    "tuples": lambda tmp: tuple(map(tuple, IDS)),
    "tensors": lambda tmp: [torch.tensor(ids) for ids in IDS],
    "padded tensor": lambda tmp: torch.tensor([ids + [PAD] * (20 - len(ids)) for ids in IDS]),
    "padded on the left": lambda tmp: torch.tensor([[PAD] * (20 - len(ids)) + ids for ids in IDS]),
    "json": lambda tmp: write(tmp / "a.json", json.dumps([{"input_ids": ids, "text": "no"} for ids in IDS])),
    "parquet": lambda tmp: write_parquet(tmp / "a.parquet", {"input_ids": IDS}),
    "Dataset": lambda tmp: Dataset.from_dict({"input_ids": IDS, "labels": IDS[::-1]}),
    "Dataset of tensors": lambda tmp: Dataset.from_dict({"input_ids": IDS}).with_format("torch"),
    "Dataset of arrays": lambda tmp: Dataset.from_dict({"input_ids": IDS}).with_format("numpy"),
    "generator": lambda tmp: IterableDataset.from_generator(lambda: ({"input_ids": ids} for ids in IDS)),
    "column": lambda tmp: Dataset.from_dict({"input_ids": IDS})["input_ids"],
    "arrays": lambda tmp: [torch.tensor(ids).numpy() for ids in IDS],
}


@pytest.mark.parametrize("kind", TEXT_SOURCES)
def test_texts_of_every_kind(kind: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = TEXT_SOURCES[kind](tmp_path)
    found = load(source, tokenizer, batch_size=5)
    expected = [tokenizer(text)["input_ids"] for text in TEXTS]
    assert all(ids[0] == BOS and len(ids) >= 4 for ids in expected)
    assert sorted(sequences(found)) == sorted(expected)
    assert found.num_samples == len(TEXTS)


@pytest.mark.parametrize("kind", ID_SOURCES)
def test_token_ids_of_every_kind(kind: str, tmp_path: Path) -> None:
    source = ID_SOURCES[kind](tmp_path)
    found = load(source, None, SimpleNamespace(pad_token_id=PAD), batch_size=5)
    assert sorted(sequences(found)) == sorted(IDS)


def test_a_list_keeps_its_order_and_a_file_tells_its_name(tmp_path: Path) -> None:
    drawn = load(IDS, num_samples=5, batch_size=12)
    positions = [IDS.index(ids) for ids in sequences(drawn)]
    assert positions == sorted(positions)
    assert drawn.fingerprint == load([IDS[i] for i in positions]).fingerprint
    assert drawn.source == "token ids"
    path = write(tmp_path / "ids.json", json.dumps([{"input_ids": ids} for ids in IDS]))
    assert load(path).source == str(path)


@pytest.mark.parametrize("kind", ["lists", "Dataset", "generator"])
def test_samples_are_drawn_by_seed(kind: str, tmp_path: Path) -> None:
    def drawn(seed: int) -> Calibration:
        return load(ID_SOURCES[kind](tmp_path), num_samples=5, seed=seed)

    first = drawn(0)
    assert first.num_samples == len(sequences(first)) == 5
    assert len({tuple(ids) for ids in sequences(first)} & set(map(tuple, IDS))) == 5
    assert drawn(0).fingerprint == first.fingerprint
    others = {drawn(seed).fingerprint for seed in range(1, 6)}
    assert len(others | {first.fingerprint}) > 3


@pytest.mark.parametrize("kind", ["list", "Dataset", "txt"])
def test_blank_samples_do_not_count(kind: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [text for pair in zip(TEXTS, ["", " ", "\t"] * 4, strict=True) for text in pair]
    source: Any = {
        "list": texts,
        "Dataset": Dataset.from_dict({"text": texts}),
        "txt": write(tmp_path / "a.txt", "\n".join(texts)),
    }[kind]
    for number in (4, 12):
        assert load(source, tokenizer, num_samples=number).num_samples == number


def test_samples_are_cut_to_max_length(tokenizer: PreTrainedTokenizerFast) -> None:
    assert sorted(sequences(load(IDS, max_length=6))) == sorted(ids[:6] for ids in IDS)
    cut = load(TEXTS, tokenizer, max_length=4)
    assert sorted(sequences(cut)) == sorted(tokenizer(text)["input_ids"][:4] for text in TEXTS)
    padded = [[PAD] * 5 + IDS[9]]  # padding is taken away before anything is cut
    assert sequences(load(padded, None, SimpleNamespace(pad_token_id=PAD), max_length=6)) == [IDS[9][:6]]


@pytest.mark.parametrize("batch_size", [1, 3, 5, 12, 100])
def test_batches(batch_size: int) -> None:
    found = load(IDS[::-1], None, None, batch_size=batch_size)
    assert sequences(found) == sequences(load(IDS[::-1], batch_size=1)) == sorted(IDS, key=len)
    assert found.fingerprint == load(IDS[::-1], batch_size=1).fingerprint
    assert [len(batch.input_ids) for batch in found.batches][:-1] == [batch_size] * (len(found.batches) - 1)
    assert found.num_tokens == sum(int(b.attention_mask.sum()) for b in found.batches) == sum(map(len, IDS))
    for batch in found.batches:
        mask = batch.attention_mask
        assert batch.input_ids.shape == mask.shape
        assert batch.input_ids.dtype == mask.dtype == torch.int64
        assert mask.shape[1] == int(mask.sum(1).max())  # no wider than its longest sequence
        assert torch.equal(mask.cummin(1).values, mask)  # ones, then zeros: padded on the right
        assert set(mask.unique().tolist()) <= {0, 1}


def test_fingerprint() -> None:
    """It stands in saved plans: the same data must have the same one in every release and on every machine."""
    known = "629de7d92ede2c6c46e771de0d41ef1b665f85e7485bb893ad88787d566bf606"
    ids = [[5, 6, 7], [8, 9]]
    assert load(ids).fingerprint == load([torch.tensor(row) for row in ids]).fingerprint == known
    changes: list[Any] = [
        [[5, 6, 8], [8, 9]],
        [[8, 9], [5, 6, 7]],
        [[5, 6, 7]],
        [[5, 6], [7, 8, 9]],
        [[5, 6, 7, 8, 9]],
    ]
    found = {load(changed).fingerprint for changed in changes} | {load(ids, max_length=2).fingerprint}
    assert len(found | {known}) == 7


@pytest.mark.parametrize(
    ("ids", "special", "expected"),
    [
        ([PAD, PAD, 5, PAD, 6, PAD], {"pad_token_id": PAD}, [5, PAD, 6]),  # inside it is a token like others
        ([5, 6, EOS, EOS, EOS], {"pad_token_id": EOS, "eos_token_id": EOS}, [5, 6, EOS]),
        ([EOS, EOS, EOS, 5, 6, 7], {"pad_token_id": EOS, "eos_token_id": [BOS, EOS]}, [EOS, 5, 6, 7]),
        ([BOS, BOS, 5, 6], {"pad_token_id": BOS, "bos_token_id": BOS}, [BOS, 5, 6]),
        ([5, 6, EOS, EOS], {"pad_token_id": EOS, "eos_token_id": [EOS, 9]}, [5, 6, EOS]),
        ([PAD, 5, 6, PAD], {"pad_token_id": None}, [PAD, 5, 6, PAD]),
        ([5, 6, EOS, PAD], {"pad_token_id": PAD, "eos_token_id": EOS}, [5, 6, EOS]),
    ],
)
@pytest.mark.parametrize("holder", ["tokenizer", "model_config"])
def test_padding_is_stripped(ids: list[int], special: dict[str, Any], expected: list[int], holder: str) -> None:
    holders = {"tokenizer": None, "model_config": None, holder: SimpleNamespace(**special)}
    found = load([ids, torch.tensor(ids)], **holders)
    assert sequences(found) == [expected, expected]
    assert found.num_tokens == 2 * len(expected)


def test_the_tokenizer_tells_what_padding_is_before_the_model_does(tokenizer: PreTrainedTokenizerFast) -> None:
    ids, config = [9, 5, 6, PAD, PAD], SimpleNamespace(pad_token_id=9)
    assert sequences(load([ids], tokenizer, config)) == [[9, 5, 6]]
    assert sequences(load([ids], SimpleNamespace(pad_token_id=None), config)) == [[5, 6, PAD, PAD]]


def test_padded_sequences_make_the_same_batches() -> None:
    padded = [[PAD] * (i % 3) + ids + [PAD] * (i % 4) for i, ids in enumerate(IDS)]
    found, bare = load(padded, None, SimpleNamespace(pad_token_id=PAD)), load(IDS)
    assert found.fingerprint == bare.fingerprint
    assert found.num_tokens == bare.num_tokens
    for one, other in zip(found.batches, bare.batches, strict=True):
        assert torch.equal(one.attention_mask, other.attention_mask)
        assert torch.equal(one.input_ids, other.input_ids)


@pytest.mark.parametrize("kind", ["padded tensor", "json", "Dataset", "generator", "column"])
def test_token_ids_need_no_tokenizer(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither one that is not there, nor one that transformers makes up from the model type."""

    def refuse(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("a tokenizer was looked for")

    tiny_model("qwen2_moe").save_pretrained(tmp_path / "model")
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", refuse)
    config = CondenseConfig(num_layers=1, num_experts=1)
    model = condense_pretrained(tmp_path / "model", config, calibration=ID_SOURCES[kind](tmp_path))
    assert model.condense_plan.calibration["num_tokens"] == sum(map(len, IDS))
