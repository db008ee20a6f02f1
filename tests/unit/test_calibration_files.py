"""Calibration data in files, folders and hub datasets, as `datasets` reads them; running texts are cut across lines."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from cdmoe_plugin import CondenseConfig
from cdmoe_plugin.calibration import Calibration, load_calibration
from cdmoe_plugin.data import split_name
from cdmoe_plugin.recovery import load_stage_data
from cdmoe_plugin.samples import Lines, pieces

WORDS = [f"w{i}" for i in range(120)]
BOS, EOS = 1, 2
TEXTS = [" ".join(WORDS[(7 * i + j) % 120] for j in range(4 + i % 5)) for i in range(12)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A token per word, BOS before and EOS after each text."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [("<bos>", BOS), ("<eos>", EOS)]
    words.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=special)
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **names)


def load(source: Any, tokenizer: Any, **config: Any) -> Calibration:
    return load_calibration(source, CondenseConfig(**config), tokenizer)


def sequences(calibration: Calibration) -> list[list[int]]:
    rows = []
    for batch in calibration.batches:
        rows += [ids[mask.bool()].tolist() for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]
    return rows


def table(ending: str, column: str = "text") -> str:
    if ending.startswith(".json"):
        return "".join(json.dumps({column: text, "id": i}) + "\n" for i, text in enumerate(TEXTS))
    mark = "\t" if ending == ".tsv" else ","
    return "".join(f"{a}{mark}{b}\n" for a, b in [("id", column), *enumerate(TEXTS)])


def packed(path: Path, text: str) -> Path:
    opening: Any = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(path.suffix, open)
    with opening(path, "wt", encoding="utf-8") as file:
        file.write(text)
    return path


def zstandard_frame(text: bytes) -> bytes:
    """Frame a short text as Zstandard does, in one block that is not compressed."""
    return bytes.fromhex("28b52ffd20") + bytes([len(text)]) + (1 | len(text) << 3).to_bytes(3, "little") + text


def in_folder(tmp: Path, names: list[str]) -> Path:
    for i, name in enumerate(names):
        (tmp / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        packed(tmp / "data" / name, "".join(json.dumps({"text": t}) + "\n" for t in TEXTS[i :: len(names)]))
    return tmp / "data"


def saved(tmp: Path, dataset: Any) -> Path:
    dataset.save_to_disk(tmp / "saved")
    return tmp / "saved"


def arrow(tmp: Path) -> Path:
    return next(saved(tmp, Dataset.from_dict({"text": TEXTS})).glob("*.arrow"))


FILES: dict[str, Callable[[Path], Any]] = {
    **{
        name: lambda tmp, name=name: packed(tmp / f"a{name}", table(name))
        for name in (".csv", ".tsv", ".CSV", ".jsonl")
    },
    **{
        name: lambda tmp, name=name: packed(tmp / f"my.texts{name}", table("." + name.split(".")[1]))
        for name in (".csv.gz", ".jsonl.bz2", ".tsv.xz", ".jsonl.gz")
    },
    "a name that looks like a pattern": lambda tmp: packed(tmp / "[a]*.jsonl", table(".jsonl")),
    ".arrow": arrow,
    "saved": lambda tmp: saved(tmp, Dataset.from_dict({"text": TEXTS})),
    "saved with splits": lambda tmp: saved(
        tmp, DatasetDict(test=Dataset.from_dict({"text": TEXTS[:2]}), train=Dataset.from_dict({"text": TEXTS}))
    ),
    "a split of them": lambda tmp: f"{saved(tmp, DatasetDict(test=Dataset.from_dict({'text': TEXTS})))}@test",
    "folder": lambda tmp: in_folder(tmp, ["a.jsonl", "b.jsonl", "c/d.jsonl"]),
    "folder of compressed files": lambda tmp: in_folder(tmp, ["a.jsonl.gz", "b.jsonl.gz"]),
    "list of texts in JSON": lambda tmp: packed(tmp / "a.json", json.dumps(TEXTS)),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_row_is_a_sample(kind: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    found = load(FILES[kind](tmp_path), tokenizer)
    assert sorted(sequences(found)) == sorted(tokenizer(TEXTS)["input_ids"])


@pytest.mark.parametrize("kind", [".csv", ".csv.gz", ".tsv.xz", ".arrow", "saved", "folder", "a split of them"])
def test_recovery_opens_the_same_files(kind: str, tmp_path: Path) -> None:
    data = load_stage_data("lm", FILES[kind](tmp_path))
    assert sorted([*data.train["text"], *data.held_out["text"]]) == sorted(TEXTS)


def test_the_train_split_of_a_folder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    folder = in_folder(tmp_path, ["train.jsonl", "test.jsonl"])
    for source, texts in (
        (folder, TEXTS[::2]),
        (f"{folder}@test", TEXTS[1::2]),
        (f"{folder}@train[:3]", TEXTS[::2][:3]),
    ):
        assert sorted(sequences(load(source, tokenizer))) == sorted(tokenizer(texts)["input_ids"])


@pytest.mark.parametrize("ending", [".txt", ".txt.gz"])
@pytest.mark.parametrize("max_length", [5, 16, 64, 512])
def test_a_running_text_is_cut_across_lines(
    ending: str, max_length: int, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    words = [WORDS[(3 * i * i + i) % 120] for i in range(500)]
    text = "".join(word + ("\n\n" if i % 7 == 0 else "\n" if i % 5 == 0 else " ") for i, word in enumerate(words))
    found = load(packed(tmp_path / f"a{ending}", text), tokenizer, max_length=max_length, num_samples=1000)
    room = max_length - 2
    ids = tokenizer(words, add_special_tokens=False)["input_ids"]
    expected = [[BOS, *(ids[i + j][0] for j in range(min(room, 500 - i))), EOS] for i in range(0, 500, room)]
    assert sorted(sequences(found)) == sorted(expected)
    assert found.num_tokens == 500 + 2 * math.ceil(500 / room)
    # Whole samples are drawn before the shorter last one, and few of them are some of many.
    few, more = (load(tmp_path / f"a{ending}", tokenizer, max_length=16, num_samples=n, seed=3) for n in (4, 9))
    assert [len(row) for row in sequences(few)] == [16] * 4
    assert all(row in sequences(more) for row in sequences(few))
    again, other = (load(tmp_path / f"a{ending}", tokenizer, max_length=16, num_samples=4, seed=s) for s in (3, 4))
    assert again.fingerprint == few.fingerprint != other.fingerprint


def test_a_running_text_in_several_files(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "texts").mkdir()
    for i in range(2):
        packed(tmp_path / "texts" / f"{i}.txt", "\n".join(TEXTS[i * 6 : i * 6 + 6]))
    found = load(tmp_path / "texts", tokenizer)
    assert sequences(found) == [tokenizer(" ".join(TEXTS))["input_ids"]]


def test_pieces_of_a_large_text() -> None:
    """Of a text of 17 MB, some 4 MB are tokenised, from all of it; of a small one, all."""
    line = "x" * 999
    large = Lines(Dataset.from_dict({"text": [f"{i:05}{line}" for i in range(17_000)]}))
    found = "".join(pieces(large, CondenseConfig())).splitlines()
    numbers = [int(text[:5]) for text in found]
    assert 3_000 < len(numbers) < 5_000
    assert numbers == sorted(set(numbers))
    assert numbers[0] < 2_000
    assert numbers[-1] > 15_000
    assert found != "".join(pieces(large, CondenseConfig(seed=1))).splitlines()
    small = Lines(large.dataset.select(range(1234)))
    assert [int(text[:5]) for text in "".join(pieces(small, CondenseConfig())).splitlines()] == list(range(1234))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("org/name", {"split": "train", "streaming": True}),
        ("org/name@validation", {"split": "validation", "streaming": True}),
        ("org/name:config", {"split": "train", "name": "config", "streaming": True}),
        ("org/name:config@train[:10]", {"split": "train[:10]", "name": "config"}),
    ],
)
def test_config_and_split_on_the_hub(
    source: str, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast
) -> None:
    asked = []

    def load_dataset(name: str, /, **kwargs: Any) -> Any:
        asked.append((name, kwargs))
        # A stream whose columns are not known before its first row.
        return IterableDataset.from_generator(lambda: ({"text": text} for text in TEXTS))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = load(source, tokenizer, num_samples=5)
    assert asked == [("org/name", expected)]
    assert (found.num_samples, found.source) == (5, source)
    asked.clear()
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, /, **kw: asked.append((name, kw)) or Dataset.from_dict({"text": TEXTS})
    )
    load_stage_data("lm", source)
    assert asked == [("org/name", {key: value for key, value in expected.items() if key != "streaming"})]


def test_names_of_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a:b@c").mkdir()
    assert split_name("a:b@c") == ("a:b@c", None, None)
    assert split_name("a:b@c@test") == ("a", "b", "c@test")
    assert split_name(r"C:\texts\a.txt@test") == (r"C:\texts\a.txt", None, "test")
    assert split_name("c:/texts/a.txt") == ("c:/texts/a.txt", None, None)
    for wrong in ("", "@train", "name@", "name:", "name:@train"):
        with pytest.raises(ValueError, match="`name:config@split`"):
            split_name(wrong)


ERRORS: list[tuple[Callable[[Path], Any], str]] = [
    (lambda tmp: tmp / "none.csv.gz", "none.csv.gz does not exist"),
    (lambda tmp: f"{tmp}/none.jsonl@test", "none.jsonl does not exist"),
    (
        lambda tmp: packed(tmp / "a.doc.gz", "x"),
        r"a.doc.gz should end in one of .txt, .json, .* followed by one of .gz, .zst",
    ),
    (lambda tmp: packed(tmp / "a.jsonl.gz", ""), "is empty"),
    (lambda tmp: packed(tmp / "a.csv", "id,text\n"), "is empty"),
    (lambda tmp: "D:/texts/none.txt", "D:/texts/none.txt does not exist"),
    (lambda tmp: packed(tmp / "a.txt.xz", " \n\n"), "is empty"),
    (
        lambda tmp: (tmp / "a.csv.gz").write_text("text\nx\n") and tmp / "a.csv.gz",
        "a.csv.gz can't be read: Not a gzipped",
    ),
    (lambda tmp: in_folder(tmp, ["a.jsonl", "b.csv"]), "files of several kinds, .csv, .jsonl: name one"),
    (
        lambda tmp: f"{in_folder(tmp, ['train.jsonl', 'test.jsonl'])}@dev",
        "can't be read: Unknown split .dev.*'train', 'test'",
    ),
    (lambda tmp: f"{packed(tmp / 'a.csv', table('.csv'))}:x", "is a local path, which has no config 'x'"),
    (
        lambda tmp: saved(tmp, DatasetDict(dev=Dataset.from_dict({"text": TEXTS}))),
        r"has the splits \['dev'\]: choose one by",
    ),
    (lambda tmp: f"{saved(tmp, Dataset.from_dict({'text': TEXTS}))}@test", "is one dataset, which has no split 'test'"),
    (lambda tmp: "https://example.org/a.jsonl", "is a URL: download it first"),
    (lambda tmp: "no such text, but a long one " * 300, "is not a local file"),
    (lambda tmp: "org/name:config@split", "'org/name' is not a local file .*`name:config@split`.* `calibration=`"),
]


@pytest.mark.parametrize(("source", "words"), ERRORS)
def test_errors(source: Callable[[Path], Any], words: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match=words):
        load(source(tmp_path), tokenizer)


def test_zstandard(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """`datasets` reads it with a package that it does not install."""
    path = tmp_path / "a.txt.zst"
    path.write_bytes(zstandard_frame(b"w1 w2 w3\nw4 w5\n"))
    try:
        import zstandard  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match=r"a.txt.zst can't be read: .*install the package `zstandard`"):
            load(path, tokenizer)
    else:
        assert sequences(load(path, tokenizer)) == [tokenizer("w1 w2 w3 w4 w5")["input_ids"]]
