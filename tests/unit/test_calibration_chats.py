"""Calibration data as chats, rendered by the tokenizer's template, and tokenised sets with an attention mask."""

from __future__ import annotations

import copy
import json
import logging as python_logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from datasets import Dataset, IterableDataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, ProcessorMixin
from transformers.utils import logging
from trl.data_utils import maybe_convert_to_chatml

from cdmoe_plugin import CondenseConfig, condense_pretrained, search_plan
from cdmoe_plugin.calibration import Calibration, calibration_for, load_calibration
from cdmoe_plugin.tokenizing import open_tokenizer
from tests.helpers.recovery import word_tokenizer
from tests.helpers.tiny_models import tiny_model

BOS = 1
TEMPLATE = (
    "<bos> {% if tools is not none %}tools {% for tool in tools %}{{ tool['name'] }} {% endfor %}{% endif %}"
    "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} "
    "{% if message.tool_calls is defined %}calls {{ message.tool_calls[0]['name'] }} {% endif %}<eos> {% endfor %}"
    "{% if style %}style {{ style }}{% endif %}"
)
WORDS = ["<pad>", "<bos>", "<eos>", "<unk>", "user", "assistant", "system", "human", "gpt", "tools", "calls", "style"]
WORDS += [f"w{i}" for i in range(80)]
CHATS = [
    [{"role": "user", "content": f"w{i} w{i + 1}"}, {"role": "assistant", "content": " ".join(["w7"] * (i + 2))}]
    for i in range(8)
]
CHATS[3] = [{"role": "system", "content": "w60"}, *CHATS[3]]
PAIRS = [{"prompt": chat[:1], "completion": chat[1:]} for chat in CHATS]
SHAREGPT = [[{"from": m["role"], "value": m["content"]} for m in chat] for chat in CHATS]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


def make_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """A token per word, and a BOS before each text, as DeepSeek's; the template writes its own."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, chat_template=template, **names)


def ids(text: str) -> list[int]:
    """The token ids of words, without the tokenizer."""
    return [WORDS.index(word) if word in WORDS else 3 for word in text.split()]


def rendered(chat: list[dict[str, Any]]) -> list[int]:
    return ids("<bos> " + " ".join(f"{m['role']} {m['content']} <eos>" for m in chat))


def load(source: Any, tokenizer: Any = None, **config: Any) -> Calibration:
    return load_calibration(source, CondenseConfig(**config), tokenizer)


def sequences(calibration: Calibration) -> list[list[int]]:
    rows = []
    for batch in calibration.batches:
        rows += [row[mask.bool()].tolist() for row, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]
    return rows


def write(path: Path, rows: list[Any]) -> Path:
    if path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        text = json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
        path.write_text(text, encoding="utf-8")
    return path


def rows_of(column: str, values: list[Any], **others: list[Any]) -> list[dict[str, Any]]:
    return [{column: value, **{name: other[i] for name, other in others.items()}} for i, value in enumerate(values)]


SOURCES: dict[str, Callable[[Path], Any]] = {
    "lists of messages": lambda tmp: CHATS,
    "dicts": lambda tmp: rows_of("messages", CHATS),
    "Dataset": lambda tmp: Dataset.from_list(rows_of("messages", CHATS, id=list(range(8)))),
    "stream": lambda tmp: IterableDataset.from_generator(lambda: iter(rows_of("messages", CHATS))),
    "column": lambda tmp: Dataset.from_list(rows_of("messages", CHATS))["messages"],
    "jsonl": lambda tmp: write(tmp / "a.jsonl", rows_of("messages", CHATS)),
    "json": lambda tmp: write(tmp / "a.json", rows_of("messages", CHATS)),
    "parquet": lambda tmp: write(tmp / "a.parquet", rows_of("messages", CHATS)),
    "conversations": lambda tmp: Dataset.from_list(rows_of("conversations", CHATS)),
    "ShareGPT": lambda tmp: Dataset.from_list(rows_of("conversations", SHAREGPT)),
    "ShareGPT in JSON": lambda tmp: write(tmp / "a.json", rows_of("conversations", SHAREGPT)),
    "prompt and completion": lambda tmp: Dataset.from_list(PAIRS),
    "prompt and completion in JSON": lambda tmp: write(tmp / "a.jsonl", PAIRS),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_chats_of_every_kind(kind: str, tmp_path: Path) -> None:
    """Each has one BOS, which the template writes."""
    found = load(SOURCES[kind](tmp_path), make_tokenizer(), batch_size=3)
    assert sorted(sequences(found)) == sorted(map(rendered, CHATS))
    assert found.num_samples == len(CHATS)


def test_lists_of_messages_in_json(tmp_path: Path) -> None:
    found = load(write(tmp_path / "a.json", CHATS[:3]), make_tokenizer())
    assert sorted(sequences(found)) == sorted(map(rendered, CHATS[:3]))


def test_one_chat() -> None:
    assert sequences(load(CHATS[3], make_tokenizer())) == [rendered(CHATS[3])]


def test_roles_are_those_that_trl_gives() -> None:
    chats = [[{"from": "human", "value": "w1"}, {"from": "gpt", "value": "w2 w3"}]]
    converted = maybe_convert_to_chatml({"conversations": copy.deepcopy(chats[0])})["messages"]
    tokenizer = make_tokenizer()
    expected = tokenizer.apply_chat_template(converted, return_dict=True)["input_ids"]
    assert sequences(load(Dataset.from_list(rows_of("conversations", chats)), tokenizer)) == [expected]


def test_prompts_and_completions_as_text() -> None:
    pairs = [{"prompt": "w1 w2", "completion": " w3 w4"}, {"prompt": "w5", "completion": " w6"}]
    expected = [[BOS, *ids("w1 w2 w3 w4")], [BOS, *ids("w5 w6")]]
    for source in (pairs, Dataset.from_list(pairs)):
        assert sorted(sequences(load(source, make_tokenizer(None)))) == sorted(expected)
    rows = [{"instruction": "w1", "input": "w2", "output": "w3", "answer": "w9"}]
    assert sequences(load(rows, make_tokenizer(None))) == [[BOS, *ids("w1 w2 Answer: w3")]]


@pytest.mark.parametrize("as_text", [False, True])
def test_tools_and_options_of_the_template(as_text: bool) -> None:
    tools: list[Any] = [[{"name": "w1"}], [], None]
    chats = [CHATS[0], [*CHATS[1], {"role": "assistant", "content": "w3", "tool_calls": [{"name": "w8"}]}], CHATS[2]]
    if as_text:
        tools = [json.dumps(each) for each in tools]
    rows = rows_of("messages", chats, tools=tools, chat_template_kwargs=[{"style": "w5"}, {"style": None}, {}])
    first, second, third = map(rendered, chats)
    expected = [[BOS, *ids("tools w1"), *first[1:], *ids("style w5")], [*second[:-1], *ids("calls w8 <eos>")], third]
    for source in (rows, Dataset.from_list(rows)):
        assert sorted(sequences(load(source, make_tokenizer()))) == sorted(expected)


def test_fields_without_a_value_are_left_out() -> None:
    """As rows of a `Dataset` have them in messages that had none."""
    chat = [{"role": "user", "content": "w1", "tool_calls": None}, {"role": "assistant", "content": "w2", "name": None}]
    assert sequences(load([chat], make_tokenizer())) == [rendered(chat)]


def test_chats_are_cut_and_drawn_as_texts_are() -> None:
    dataset = Dataset.from_list(rows_of("messages", CHATS))
    assert sorted(sequences(load(dataset, make_tokenizer(), max_length=6))) == sorted(rendered(c)[:6] for c in CHATS)
    texts = Dataset.from_dict({"text": [" ".join(str(m["content"]) for m in chat) for chat in CHATS]})
    drawn = dataset.shuffle(seed=5).select(range(3))["messages"]
    assert sorted(sequences(load(dataset, make_tokenizer(), num_samples=3, seed=5))) == sorted(map(rendered, drawn))
    assert load(texts, make_tokenizer(), num_samples=3, seed=5).num_samples == 3
    with_empty = Dataset.from_list(rows_of("messages", [[], *CHATS, []]))
    assert load(with_empty, make_tokenizer(), num_samples=8).num_samples == 8


ERRORS: list[tuple[Any, Any, str]] = [
    (CHATS, None, r"\(chats\) is text: pass `tokenizer=`"),
    (CHATS, make_tokenizer(None), "contains chats, but the tokenizer has no `chat_template`: set"),
    ([*CHATS, "w1 w2"], make_tokenizer(), "mixes chats and texts"),
    (
        [{"messages": CHATS[0]}, {"text": "w1 w2"}],
        make_tokenizer(),
        "row 1 has the columns .'text'., but row 0 has .'messages'",
    ),
    (
        [[{"content": "w1 w2"}]],
        make_tokenizer(),
        "sample 0 should be a chat.* `role` and `content`, .*'content': 'w1 w2'",
    ),
    (rows_of("messages", [["w1", "w2"]]), make_tokenizer(), "sample 0 should be a chat, .* a message is 'w1'"),
    (rows_of("conversations", [5]), make_tokenizer(), "sample 0 should be a chat, .* a message is 5"),
    (
        CHATS,
        make_tokenizer("{{ raise_exception('roles must alternate') }}"),
        "can't render .* sample 0, .*must alternate",
    ),
    (CHATS, make_tokenizer("{{ messages[0]['content'] + messages[9]['content'] }}"), "can't render .* sample 0"),
    ([[{"role": "user", "content": None}]], make_tokenizer("{{ 'a' + messages[0]['content'] }}"), "can't render"),
    (CHATS, make_tokenizer("{% if %}"), "can't render .* sample 0"),
]


@pytest.mark.parametrize(("source", "tokenizer", "words"), ERRORS)
def test_errors(source: Any, tokenizer: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load(source, tokenizer)


IDS = [[5, 2, 2], [2, 5, 6, 7, 2], [0, 8, 9, 0]]  # with tokens that also serve as padding
PADDED = {
    "right": (
        [[*row, *[2] * (7 - len(row))] for row in IDS],
        [[*[1] * len(row), *[0] * (7 - len(row))] for row in IDS],
    ),
    "left": ([[*[0] * (7 - len(row)), *row] for row in IDS], [[*[0] * (7 - len(row)), *[1] * len(row)] for row in IDS]),
}


@pytest.mark.parametrize("side", PADDED)
@pytest.mark.parametrize("kind", ["Dataset", "torch", "stream", "dict", "rows", "batches", "json"])
def test_padding_is_what_the_mask_says(kind: str, side: str, tmp_path: Path) -> None:
    """Also where the padding token is one that texts have."""
    columns = dict(zip(("input_ids", "attention_mask"), PADDED[side], strict=True))
    dataset = Dataset.from_dict({**columns, "token_type_ids": columns["attention_mask"]})
    tensors = {name: torch.tensor(values) for name, values in columns.items()}
    source: Any = {
        "Dataset": dataset,
        "torch": dataset.with_format("torch"),
        "stream": dataset.to_iterable_dataset(),
        "dict": tensors,
        "rows": list(dataset),
        "batches": [{name: values[i : i + 1] for name, values in tensors.items()} for i in range(len(IDS))],
        "json": write(tmp_path / "a.jsonl", list(dataset)),
    }[kind]
    for pad in ("<eos>", "<pad>"):
        tokenizer = make_tokenizer()
        tokenizer.pad_token = pad
        found = load(source, tokenizer)
        assert sorted(sequences(found)) == sorted(IDS)
        # The fingerprint is that of the same tokens in lists.
        assert len(IDS) == found.num_samples
    assert load(tensors).fingerprint == load([torch.tensor(row) for row in IDS]).fingerprint


def test_the_output_of_a_tokenizer() -> None:
    tokenizer = make_tokenizer()
    texts = ["w1 w2 w3", "w4 w5"]
    expected = sorted([BOS, *ids(text)] for text in texts)
    for options in ({}, {"padding": True}, {"padding": True, "return_tensors": "pt"}):
        assert sorted(sequences(load(tokenizer(texts, **options), tokenizer))) == expected


@pytest.mark.parametrize(
    "mask", [[1, 1], [1, 1, 1, 1], [1, 2, 1], [[1, 1, 1], [1, 1, 1], [1, 1, 1]]], ids=["short", "long", "two", "square"]
)
def test_a_mask_that_does_not_fit(mask: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"`attention_mask` of calibration sample 0 .* each of the 3 tokens"):
        load([{"input_ids": [5, 6, 7], "attention_mask": mask}])


def test_the_number_of_samples_and_tokens_is_said(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    def said(source: Any) -> tuple[str, str]:
        caplog.clear()
        load(source)
        return capsys.readouterr().err, caplog.text

    logging.enable_propagation()
    shown = logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    many = [[7] * 50] * 100
    try:
        assert said(many) == ("Calibration: 100 samples, 5,000 tokens\n", "")
        line, warning = said([*many[:99], [7] * 49])
        assert line == "Calibration: 100 samples, 4,999 tokens\n"
        assert "has 4,999 tokens, which is little" in warning
        assert said(many[:1])[0] == "Calibration: 1 sample, 50 tokens\n"
        logging.disable_progress_bar()
        assert said(many) == ("", "")
    finally:
        if shown:
            logging.enable_progress_bar()
        logging.disable_propagation()


def test_more_than_the_positions_of_the_model(caplog: pytest.LogCaptureFixture) -> None:
    model_config = tiny_model("qwen2_moe").config
    positions = model_config.max_position_embeddings
    logging.enable_propagation()
    with caplog.at_level(python_logging.WARNING):
        found = load_calibration([[7] * (positions + 9)], CondenseConfig(max_length=positions + 1), None, model_config)
        assert found.num_tokens == positions
        assert f"`max_length` is {positions + 1}, but the model has {positions} positions" in caplog.text
        caplog.clear()
        load_calibration([[7] * (positions + 9)], CondenseConfig(max_length=positions), None, model_config)
        assert "positions" not in caplog.text
    logging.disable_propagation()


class WordProcessor(ProcessorMixin):
    """A processor that has nothing but a tokenizer."""

    def __init__(self, tokenizer: Any = None) -> None:
        super().__init__(tokenizer)


CONFIG = CondenseConfig(num_layers=1, num_experts=1)
TEXTS = ["w5 w6 w7", "w8 w9"]


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint without a tokenizer."""
    folder = tmp_path_factory.mktemp("sparse") / "my-moe"
    tiny_model("qwen2_moe").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["name", "path", "processor", "tokenizer"])
def test_tokenizers_of_every_kind(kind: str, sparse: Path, tmp_path: Path) -> None:
    tokenizer: Any = word_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    given = {"name": str(tmp_path), "path": tmp_path, "processor": WordProcessor(tokenizer), "tokenizer": tokenizer}[
        kind
    ]
    expected = load(TEXTS, tokenizer).fingerprint
    model = condense_pretrained(sparse, CONFIG, calibration=TEXTS, tokenizer=given, revision="main")
    assert model.condense_plan.calibration["fingerprint"] == expected
    loaded = tiny_model("qwen2_moe")
    assert search_plan(loaded, CONFIG, calibration=TEXTS, tokenizer=given).calibration["fingerprint"] == expected


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (len, "`tokenizer` should be .* but is a builtin_function_or_method"),
        (word_tokenizer().backend_tokenizer, "`tokenizer` should be a tokenizer of transformers, .* is a Tokenizer"),
        (ProcessorMixin(), "`tokenizer` should be .* is a ProcessorMixin"),  # of images alone
        ("nobody/nothing", "`tokenizer` is 'nobody/nothing', but none can be opened from there"),
    ],
)
def test_other_tokenizers_are_refused(given: Any, words: str, sparse: Path) -> None:
    with pytest.raises(ValueError, match=words):
        condense_pretrained(sparse, CONFIG, calibration=TEXTS, tokenizer=given)
    with pytest.raises(ValueError, match=words):
        open_tokenizer(given)


def test_the_checkpoint_s_tokenizer_is_of_the_same_revision(sparse: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of the same folder in the repository, and read with the same token and cache."""
    asked = []

    def from_pretrained(path: str, **kwargs: Any) -> Any:
        asked.append((str(path), kwargs))
        return word_tokenizer()

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_pretrained)
    model = tiny_model("qwen2_moe")
    model.config._name_or_path = model.name_or_path = "org/name"
    search_plan(model, CONFIG, calibration=TEXTS)
    model.config._commit_hash = "0123abc"
    search_plan(model, CONFIG, calibration=TEXTS)
    assert asked == [("org/name", {}), ("org/name", {"revision": "0123abc"})]

    word_tokenizer().save_pretrained(sparse.parent / "repository" / "inner")
    tiny_model("qwen2_moe").save_pretrained(sparse.parent / "repository" / "inner")
    place = {"subfolder": "inner", "revision": "v1", "cache_dir": "cache", "token": "secret", "local_files_only": True}
    asked.clear()
    condense_pretrained(sparse.parent / "repository", CONFIG, calibration=TEXTS, **place)
    condense_pretrained(sparse.parent / "repository", CONFIG, calibration=TEXTS, tokenizer="org/other", **place)
    elsewhere = {name: value for name, value in place.items() if name not in ("subfolder", "revision")}
    assert asked == [(str(sparse.parent / "repository"), place), ("org/other", elsewhere)]


def test_a_checkpoint_without_a_tokenizer_names_its_base(sparse: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"no tokenizer can be opened from '.*my-moe'.*the folder has no tokenizer"
    ) as error:
        condense_pretrained(sparse, CONFIG, calibration=TEXTS)
    assert "sentencepiece" not in str(error.value)
    condense_pretrained(sparse, CONFIG, calibration=[[5, 6, 7]]).save_pretrained(tmp_path / "condensed")
    condensed = AutoModelForCausalLM.from_pretrained(tmp_path / "condensed")
    with pytest.raises(ValueError, match="Its base model is my-moe: `tokenizer='my-moe'`"):
        calibration_for(condensed, TEXTS, CONFIG)


def test_contents_in_parts() -> None:
    """Texts in parts are joined; a template for texts would write the list as Python does."""
    parts = [
        [{**m, "content": [{"type": "text", "text": m["content"]}, {"type": "text", "text": " w9"}]} for m in chat]
        for chat in CHATS
    ]
    whole = [[{**m, "content": f"{m['content']} w9"} for m in chat] for chat in CHATS]
    assert load(parts, make_tokenizer()).fingerprint == load(whole, make_tokenizer()).fingerprint
    assert load(Dataset.from_list([{"messages": chat} for chat in parts]), make_tokenizer(), num_samples=8).num_tokens
    image = [[{"role": "user", "content": [{"type": "image", "url": "x.png"}, {"type": "text", "text": "w1"}]}]]
    with pytest.raises(ValueError, match=r"parts of the types \['image', 'text'\], but only text"):
        load(image, make_tokenizer())
