"""The two stages' training data, in the formats that TRL's SFTTrainer reads."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging
from trl import SFTConfig

from ..data import C4_FILES, C4_NAME, TABLES, is_local, open_file, open_hub

logger = logging.get_logger(__name__)

# Columns that rows may have, and those that TRL reads beside them. The first that are all there are used.
_COLUMNS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("input_ids",): ("labels", "completion_mask", "assistant_masks"),
    ("messages",): ("tools", "chat_template_kwargs"),
    ("conversations",): ("tools", "chat_template_kwargs"),
    ("prompt", "completion"): ("tools", "chat_template_kwargs"),
    ("instruction", "output"): ("input",),
    ("text",): (),
}


@dataclass(frozen=True)
class StageData:
    """Rows to train on, rows to measure on that are never trained on, and where they are from."""

    train: Dataset
    held_out: Dataset
    source: str


def load_stage_data(
    stage: str,
    source: str | os.PathLike | Dataset | None,
    *,
    held_out: str | os.PathLike | Dataset | None = None,
    num_examples: int | None = None,
    num_held_out: int = 512,
    seed: int = 42,
) -> StageData:
    """Open a stage's data and set rows aside to measure on.

    Args:
        stage (`str`): "lm" or "sft"; names the options in error messages.
        source: None (C4's first English shard, as in the paper), a name on the hub, a local .json/.jsonl/.parquet file,
            or a `Dataset`. Rows are `text`, `prompt` and `completion`, `messages`, token ids as `input_ids`, or
            commonsense170k's `instruction`, `input`, `output`, `answer`.
        held_out (*optional*): The same for rows to measure on; by default rows of `source`, a tenth of them at most.
        num_examples (`int`, *optional*): How many rows are trained on, drawn by `seed`; all by default.
        num_held_out (`int`, defaults to 512): How many rows are measured on, at most.
        seed (`int`, defaults to 42): Seed of the draw.

    Raises:
        ValueError: if the source can't be opened, has none of these columns, or has fewer than two rows with text; or
            if a number is below 1.
    """
    for option, number in ((f"{stage}_num_examples", num_examples), ("num_held_out", num_held_out)):
        if number is not None and number < 1:
            raise ValueError(f"`{option}` should be at least 1, but is {number}.")
    name = C4_NAME if source is None else str(source) if isinstance(source, (str, os.PathLike)) else "a Dataset"
    # One process per machine reads and converts; the others find the result in the cache of `datasets`.
    with PartialState().local_main_process_first():
        rows = _rows(stage, source, f"{stage}_dataset", seed)
        if len(rows) < 2:
            raise ValueError(f"`{stage}_dataset` {name} has {len(rows)} rows with text: at least two are needed.")
        if held_out is None:
            count = min(num_held_out, len(rows) // 10) or 1
            measured, rows = rows.take(count), rows.skip(count)
        else:
            measured = _rows(stage, held_out, f"{stage}_eval_dataset", seed).take(num_held_out)
    if not len(measured):
        raise ValueError(f"`{stage}_eval_dataset` {held_out} has no row with text.")
    return StageData(rows if num_examples is None else rows.take(num_examples), measured, name)


def check_tokenizer(stage: str, data: StageData, tokenizer: PreTrainedTokenizerBase, args: SFTConfig) -> None:
    """Check early what TRL would find only when it prepares a stage's data, which may be after another stage.

    Raises:
        ValueError: if rows are chats and there is no chat template, or texts and there is no end-of-sequence token.
    """
    row = data.train[0]
    if "input_ids" in row:
        return
    if any(isinstance(row.get(name), list) for name in ("messages", "conversations", "prompt")):
        if tokenizer.chat_template is None and args.chat_template_path is None:
            raise ValueError(
                f"`{stage}_dataset` {data.source} holds chats, but the tokenizer has no chat template. Pass "
                "`--chat_template_path`, or rows with `prompt` and `completion` as text."
            )
    elif tokenizer.eos_token is None and args.eos_token is None:
        raise ValueError("The tokenizer has no end-of-sequence token. Name one of its tokens by `--eos_token`.")


def _rows(stage: str, source: Any, option: str, seed: int) -> Dataset:
    """The rows of one source in random order, without those that have no text, in columns that TRL reads."""
    if source is None:
        dataset = open_hub(C4_NAME, stage, f"Pass `--{option}` a local file.", data_files={"train": C4_FILES})
    elif not isinstance(source, (str, os.PathLike)):
        dataset = source
    elif is_local(source, TABLES):
        dataset = open_file(Path(source), stage, TABLES)
    else:
        dataset = open_hub(str(source), stage, f"Pass `--{option}` a local {'/'.join(TABLES)} file or another name.")
    if dataset is not None and not hasattr(dataset, "__len__"):
        raise ValueError(f"`{option}` should be a Dataset, which can be drawn from; a {type(dataset).__name__} can't.")
    if dataset is None or not len(dataset):
        raise ValueError(f"`{option}` {source} is empty.")
    needed = next((names for names in _COLUMNS if set(names) <= set(dataset.column_names)), None)
    if needed is None:
        raise ValueError(
            f"`{option}` {source} has the columns {dataset.column_names}; expected are `text`; `prompt` and "
            "`completion`; `messages`; `instruction` and `output`, with or without `input` (commonsense170k); or token "
            "ids as `input_ids`."
        )
    further = [name for name in _COLUMNS[needed] if name in dataset.column_names]
    dataset = dataset.shuffle(seed=seed).select_columns([*needed, *further])
    texts = [name for name in ("text", "instruction", "output", "input") if name in dataset.column_names]
    for name in texts:
        kind = getattr(dataset.features[name], "dtype", type(dataset.features[name]).__name__)
        if kind not in ("string", "large_string", "null"):
            raise ValueError(f"Column `{name}` of `{option}` {source} should hold text, but holds {kind}.")
    has_content = _has_text if texts else bool
    rows = dataset.filter(lambda row: all(has_content(row[name]) for name in needed))
    if len(rows) < len(dataset):
        dropped = f"{len(dataset) - len(rows)} of {len(dataset)} rows"
        logger.warning(f"{dropped} of `{option}` {source} have no text and are dropped.")
    return rows.map(to_prompt_and_completion, remove_columns=rows.column_names) if "instruction" in needed else rows


def _has_text(value: str | None) -> bool:
    return value is not None and bool(value.strip())


def to_prompt_and_completion(row: dict[str, Any]) -> dict[str, str]:
    """Turn a row of commonsense170k into `prompt` and `completion`.

    The completion starts with a space, so that tokens do not merge across the border between the two.
    """
    question = "\n\n".join(part.strip() for part in (row["instruction"], row.get("input") or "") if _has_text(part))
    return {"prompt": f"{question}\n\nAnswer:", "completion": f" {row['output'].strip()}"}
