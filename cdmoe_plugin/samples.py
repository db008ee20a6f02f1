"""Calibration samples: a data source of any supported kind becomes texts, chats or rows of token ids."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .config import CondenseConfig
from .data import C4_FILES, C4_NAME, TEXTS, open_hub, open_source

KINDS = (
    "None (C4), the name of a dataset on the hub (`name:config@split`), a local file or folder of "
    f"{'/'.join(TEXTS)} (also compressed), a list of chats, a Dataset, a list of texts or a list of token ids"
)
_ADVICE = f"Pass `calibration=` a local {'/'.join(TEXTS)} file, a Dataset, texts, chats or token ids."


@dataclass(frozen=True)
class Chat:
    """A conversation that a tokenizer's chat template renders.

    Args:
        messages (`list`): Messages, as dicts with "role" and "content".
        tools (`list`, *optional*): The functions that the assistant may call, as the template reads them.
        options (`Mapping`): Further arguments of the template.
    """

    messages: list[Any]
    tools: list[Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenRow:
    """Token ids and their attention mask, each a list, array or tensor of one row; 1 is a token, 0 is padding."""

    ids: Any
    mask: Any


@dataclass(frozen=True)
class Lines:
    """The lines of a running text, as a `Dataset` with the column "text"."""

    dataset: Any


@dataclass(frozen=True)
class Rows:
    """A `Dataset`, and the function that turns one of its rows into a sample."""

    dataset: Any
    read: Callable[[Mapping[str, Any]], Any]


def open_samples(source: Any) -> tuple[str, Lines | Rows | list[Any]]:
    """Open a data source, and return its name and its samples.

    Raises:
        ValueError: if the source is of no supported kind, can't be opened, or mixes kinds of samples.
    """
    if source is None:
        c4 = open_hub(C4_NAME, "calibration", _ADVICE, streaming=True, data_files={"train": C4_FILES})
        return f"{C4_NAME} ({C4_FILES})", _rows(c4)
    if isinstance(source, (str, os.PathLike)):
        dataset = open_source(source, "calibration", TEXTS, _ADVICE, streaming=True)
        if dataset is None:
            return str(source), []
        is_text = hasattr(dataset, "__len__") and getattr(dataset.info, "builder_name", None) == TEXTS[".txt"]
        return str(source), Lines(dataset) if is_text else _rows(dataset)
    if isinstance(getattr(source, "column_names", None), dict):
        raise ValueError(f"The calibration data has the splits {list(source)}: pass one of them.")
    if hasattr(source, "column_names"):
        return f"a {type(source).__name__}", _rows(source)
    if isinstance(source, Mapping) and "input_ids" in source:  # as a tokenizer returns them
        ids, mask = source["input_ids"], source.get("attention_mask")
        return "token ids", list(ids) if mask is None else list(map(TokenRow, ids, mask))
    if getattr(source, "ndim", None) == 2:
        return "token ids", list(source)
    if isinstance(source, Sequence) and not isinstance(source, (bytes, bytearray)):
        return _open_list(source)
    raise ValueError(f"`calibration` should be {KINDS}, but is a {type(source).__name__}.")


def draw(samples: Rows | list[Any], config: CondenseConfig) -> Iterator[Any]:
    """Draw the samples that are not blank by the seed; `num_samples` of a list in memory keep its order."""
    if isinstance(samples, Rows):
        streams = not hasattr(samples.dataset, "__len__")
        # In memory: otherwise the order of all rows would be written to the cache.
        options: dict[str, Any] = {"buffer_size": 10_000} if streams else {"keep_in_memory": True}
        found = map(samples.read, samples.dataset.shuffle(config.seed, **options))
        return (sample for sample in found if not _is_blank(sample))
    samples = [sample for sample in samples if not _is_blank(sample)]
    if config.num_samples == "auto":
        return iter(random.Random(config.seed).sample(samples, len(samples)))
    if len(samples) > config.num_samples:
        rows = sorted(random.Random(config.seed).sample(range(len(samples)), config.num_samples))
        samples = [samples[row] for row in rows]
    return iter(samples)


def pieces(lines: Lines, config: CondenseConfig) -> Iterator[str]:
    """Yield a running text in up to a hundred pieces; of a large one, only as much as is needed, drawn by the seed."""
    dataset = lines.dataset
    enough = max(4_000_000, 8 * config.num_samples * config.max_length)  # bytes, with 8 for each token
    count = min(len(dataset), max(100, 100 * dataset.data.nbytes // enough))
    for i in sorted(random.Random(config.seed).sample(range(count), min(count, 100))):
        part = dataset.select(range(i * len(dataset) // count, (i + 1) * len(dataset) // count))
        yield "\n".join([*part["text"], ""])


def _open_list(source: Sequence[Any]) -> tuple[str, list[Any]]:
    first = next(iter(source), None)
    if isinstance(first, Mapping) and "role" in first:
        return "a chat", [_sample(list(source))]
    if isinstance(first, Mapping):
        columns, read = _reader(list(first))
        for i, row in enumerate(source):
            if isinstance(row, Mapping) and not set(columns) & set(row):
                raise ValueError(
                    f"The calibration data's row {i} has the columns {list(row)}, but row 0 has {columns}."
                )
        samples = [read(row) if isinstance(row, Mapping) else row for row in source]
    else:
        samples = [_sample(value) for value in source]
    kinds = {_kind(sample) for sample in samples if sample is not None}
    if len(kinds) > 1:
        raise ValueError(f"The calibration data mixes {' and '.join(sorted(kinds))}.")
    return kinds.pop() if kinds else "an empty list", samples


def _kind(sample: Any) -> str:
    return "texts" if isinstance(sample, str) else "chats" if isinstance(sample, Chat) else "token ids"


def _rows(dataset: Any) -> Rows:
    columns, read = _reader(dataset.column_names or list(next(iter(dataset), {})))
    return Rows(dataset.select_columns(columns), read)


def _reader(columns: list[str]) -> tuple[list[str], Callable[[Mapping[str, Any]], Any]]:
    """Return the columns that are read, and the function that turns a row with them into a sample."""
    for needed, further, read in _READERS:
        if set(needed) <= set(columns):
            return [name for name in columns if name in (*needed, *further)], read
    if columns == [str(i) for i in range(len(columns))]:  # from lists of lists in JSON, the shorter ones filled up
        return columns, lambda row: _sample([value for value in row.values() if value is not None])
    if len(columns) == 1:
        return columns, lambda row: _sample(row[columns[0]])
    raise ValueError(
        f"The calibration data has the columns {columns}; it needs one named 'text', 'messages' or 'conversations' "
        "(chats) or 'input_ids' (token ids), or both 'prompt' and 'completion'."
    )


def _sample(value: Any) -> Any:
    """Take a value as a chat if it is a list of messages, and as it is otherwise."""
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], Mapping):
        return Chat(list(value))
    return value


def _read_ids(row: Mapping[str, Any]) -> Any:
    mask = row.get("attention_mask")
    return row["input_ids"] if mask is None else TokenRow(row["input_ids"], mask)


# Chats are read as TRL's SFTTrainer reads them (trl.data_utils).
def _read_chat(row: Mapping[str, Any]) -> Any:
    value = row["messages"] if "messages" in row else row["conversations"]
    return value if value is None or isinstance(value, str) else Chat(_as_list(value), **_options(row))


def _read_prompt(row: Mapping[str, Any]) -> Any:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return prompt + completion
    return (
        None if prompt is None or completion is None else Chat(_as_list(prompt) + _as_list(completion), **_options(row))
    )


def _read_instruction(row: Mapping[str, Any]) -> Any:
    pair = to_prompt_and_completion(row) if isinstance(row["output"], str) and row["instruction"] else None
    return None if pair is None else pair["prompt"] + pair["completion"]


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _options(row: Mapping[str, Any]) -> dict[str, Any]:
    tools, options = row.get("tools"), row.get("chat_template_kwargs") or {}
    return {
        # A template may write about tools for an empty list of them.
        "tools": (json.loads(tools) if isinstance(tools, str) and tools.strip() else tools) or None,
        "options": {name: value for name, value in options.items() if value is not None},
    }


def to_prompt_and_completion(row: Mapping[str, Any]) -> dict[str, str]:
    """Convert a row of commonsense170k to `prompt` and `completion`.

    The completion starts with a space, so that no token spans both.
    """
    parts = (part.strip() for part in (row["instruction"], row.get("input") or "") if part is not None)
    question = "\n\n".join(part for part in parts if part)
    return {"prompt": f"{question}\n\nAnswer:", "completion": f" {row['output'].strip()}"}


# Columns that are needed, further ones that are read with them, and the function for a row. The first match is used.
_READERS: tuple[tuple[tuple[str, ...], tuple[str, ...], Callable[[Mapping[str, Any]], Any]], ...] = (
    (("input_ids",), ("attention_mask",), _read_ids),
    (("text",), (), lambda row: _sample(row["text"])),
    (("messages",), ("tools", "chat_template_kwargs"), _read_chat),
    (("conversations",), ("tools", "chat_template_kwargs"), _read_chat),
    (("prompt", "completion"), ("tools", "chat_template_kwargs"), _read_prompt),
    (("instruction", "output"), ("input",), _read_instruction),
    (("content",), (), lambda row: _sample(row["content"])),
)


def _is_blank(sample: Any) -> bool:
    if isinstance(sample, Chat):
        return not sample.messages
    if isinstance(sample, TokenRow):
        return sample.ids is None or len(sample.ids) == 0
    if sample is not None and not hasattr(sample, "__len__"):
        raise ValueError(
            f"A calibration sample that is no chat should be a text or a list of token ids, but one is {sample!r}."
        )
    return not sample.strip() if isinstance(sample, str) else sample is None or len(sample) == 0
