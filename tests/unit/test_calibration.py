"""Calibration data of every kind becomes the same token batches, and padding never counts."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cdmoe_plugin import CondenseConfig, condense_pretrained, search_plan
from cdmoe_plugin.calibration import Calibration, load_calibration
from tests.helpers.tiny_models import tiny_model

POEM = "the cat sat on a mat while two dogs ran over seven hills and one bird sang"
TEXTS = [" ".join(POEM.split()[i : i + 3 + i % 9]) for i in range(12)]
IDS = [[3 + (7 * i + j) % 90 for j in range(2 + i)] for i in range(12)]
PAD, BOS, EOS = 0, 1, 2


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


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


def save(path: Path, column: str, values: list[Any], **others: list[Any]) -> Path:
    dataset = Dataset.from_dict({**others, column: values})
    if path.suffix == ".parquet":
        dataset.to_parquet(path)
    else:
        dataset.to_json(path, lines=path.suffix == ".jsonl")
    return path


TEXT_SOURCES: dict[str, Callable[[Path], Any]] = {
    "list": lambda tmp: TEXTS,
    "json": lambda tmp: save(tmp / "a.json", "text", TEXTS, url=TEXTS[::-1]),
    "jsonl, by its name": lambda tmp: str(save(tmp / "a.jsonl", "content", TEXTS, id=list(range(12)))),
    "jsonl of one column": lambda tmp: save(tmp / "a.jsonl", "sentence", TEXTS),
    "parquet": lambda tmp: save(tmp / "a.parquet", "text", TEXTS, content=TEXTS[::-1]),
    "Dataset": lambda tmp: Dataset.from_dict({"url": TEXTS[::-1], "text": TEXTS}),
    "streaming Dataset": lambda tmp: Dataset.from_dict({"text": TEXTS}).to_iterable_dataset(),
    "column": lambda tmp: Dataset.from_dict({"text": TEXTS})["text"],
}
ID_SOURCES: dict[str, Callable[[Path], Any]] = {
    "lists": lambda tmp: IDS,
    "tensors": lambda tmp: tuple(torch.tensor(ids) for ids in IDS),
    "rows": lambda tmp: [torch.tensor([ids]) for ids in IDS],
    "arrays": lambda tmp: [torch.tensor(ids).numpy() for ids in IDS],
    "padded tensor": lambda tmp: torch.tensor([ids + [PAD] * (20 - len(ids)) for ids in IDS]),
    "padded on the left": lambda tmp: torch.tensor([[PAD] * (20 - len(ids)) + ids for ids in IDS]),
    "json": lambda tmp: save(tmp / "a.json", "input_ids", IDS, text=TEXTS),
    "Dataset": lambda tmp: Dataset.from_dict({"input_ids": IDS, "labels": IDS[::-1]}),
    "Dataset of arrays": lambda tmp: Dataset.from_dict({"input_ids": IDS}).with_format("numpy"),
    "generator": lambda tmp: IterableDataset.from_generator(lambda: ({"input_ids": ids} for ids in IDS)),
    "column": lambda tmp: Dataset.from_dict({"input_ids": IDS})["input_ids"],
}
# What is no calibration data, and what the message says of it.
ERRORS: list[tuple[Callable[[Path], Any], str]] = [
    (lambda tmp: [], "empty"),
    (lambda tmp: ["", " ", "\n\t"], r"\(texts\) is empty"),
    (lambda tmp: TEXTS, r"\(texts\) is text: pass `tokenizer=`"),
    (lambda tmp: [TEXTS[0], IDS[0]], "mixes texts and token ids"),
    (lambda tmp: [[7]], "no sequence of at least two tokens"),
    (lambda tmp: torch.full((3, 8), PAD), "no sequence of at least two tokens that are not padding"),
    (lambda tmp: [[5, 6], [5, -6]], "sample 1 should be a list of token ids, but is .5, -6"),
    (lambda tmp: [[True, False], [5.0]], "sample 0 should be a list of token ids"),
    (lambda tmp: [5, 6, 7], "should be a text or a list of token ids, but one is 5"),
    (lambda tmp: {"text": TEXTS}, "None .* Dataset, a list of texts or a list of token ids, but is a dict"),
    (lambda tmp: DatasetDict(train=Dataset.from_dict({"text": TEXTS})), "splits .'train'.: pass one"),
    (lambda tmp: tmp / "none.txt", "none.txt does not exist"),
    (lambda tmp: tmp, "is a folder"),
    (lambda tmp: write(tmp / "a.doc", "text"), "a.doc should end in one of .txt, .json, .jsonl, .parquet"),
    (lambda tmp: write(tmp / "a.txt", ""), "a.txt.* is empty"),
    (lambda tmp: write(tmp / "a.json", '{"text": '), "a.json can't be read"),
    (lambda tmp: save(tmp / "a.jsonl", "prompt", TEXTS, answer=TEXTS), "columns .'answer', 'prompt'.; .*'text'"),
    (lambda tmp: save(tmp / "a.jsonl", "text", [1, 2]), "should be a text or a list of token ids, but one is"),
    (lambda tmp: "nobody/nothing", "'nobody/nothing' is not a local file .* can't be opened .*`calibration=`"),
]


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


def test_a_list_keeps_its_order() -> None:
    drawn = load(IDS, num_samples=5, batch_size=12)
    positions = [IDS.index(ids) for ids in sequences(drawn)]
    assert positions == sorted(positions)
    assert drawn.fingerprint == load([IDS[i] for i in positions]).fingerprint
    assert drawn.source == "token ids"


def test_a_dataset_is_shuffled_as_by_its_own_method() -> None:
    dataset = Dataset.from_dict({"input_ids": IDS})
    expected = dataset.shuffle(seed=3).select(range(5))["input_ids"]
    assert sequences(load(dataset, num_samples=5, seed=3)) == sorted(expected, key=len)


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


@pytest.mark.parametrize("kind", ["list", "Dataset"])
def test_blank_samples_do_not_count(kind: str, tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [text for pair in zip(TEXTS, ["", " ", "\t"] * 4, strict=True) for text in pair]
    source: Any = {
        "list": texts,
        "Dataset": Dataset.from_dict({"text": texts}),
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
    ],
)
def test_padding_is_stripped(ids: list[int], special: dict[str, Any], expected: list[int]) -> None:
    """The tokenizer tells what padding is, and where it does not, the model's config."""
    teller, silent, other = SimpleNamespace(**special), SimpleNamespace(), SimpleNamespace(pad_token_id=expected[0])
    for tellers in ((teller, None), (None, teller), (silent, teller), (teller, other)):
        found = load([ids, torch.tensor(ids)], *tellers)
        assert sequences(found) == [expected, expected]
        assert found.num_tokens == 2 * len(expected)


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


@pytest.mark.parametrize(("source", "words"), ERRORS)
def test_errors(source: Callable[[Path], Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        load(source(tmp_path), None, SimpleNamespace(pad_token_id=PAD))


def test_data_of_another_model(tmp_path: Path) -> None:
    model, config = tiny_model("olmoe"), CondenseConfig(num_layers=1, num_experts=1)
    with pytest.raises(ValueError, match="token id 128, but the model knows 128"):
        search_plan(model, config, calibration=[[5, 128, 6]])
    model.save_pretrained(tmp_path)  # without a tokenizer, for which transformers makes up an empty one
    with pytest.raises(ValueError, match=r"is text, but no tokenizer .*pass `tokenizer=`"):
        condense_pretrained(tmp_path, config, calibration=TEXTS)
