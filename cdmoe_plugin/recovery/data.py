"""The training data of the two stages, in the formats of TRL's SFTTrainer."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging
from trl import SFTConfig

from ..data import C4_FILES, C4_NAME, TABLES, open_hub, open_source
from ..samples import to_prompt_and_completion

logger = logging.get_logger(__name__)

# The supported columns, and further ones that TRL reads with them. The first set that a dataset has is used.
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
    """The rows of a stage for training, the held-out rows for evaluation, and their source."""

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
    """Open a stage's data and split off held-out rows.

    Args:
        stage (`str`): "lm" or "sft", as error messages name the options.
        source: None (C4's first English shard, as in the paper), the name of a dataset on the hub, as
            `name:config@split` (the latter two optional), a local .json, .jsonl, .parquet, .csv, .tsv or .arrow file,
            which may be compressed, or a folder of such files, or a `Dataset`. Rows have `text`, `prompt` and
            `completion`, `messages`, token ids as `input_ids`, or commonsense170k's `instruction`, `input`, `output`,
            `answer`.
        held_out (*optional*): The same for held-out rows; by default rows of `source`, at most a tenth of them.
        num_examples (`int`, *optional*): Number of training rows, drawn with `seed`; all by default.
        num_held_out (`int`, defaults to 512): Maximum number of held-out rows.
        seed (`int`, defaults to 42): Seed of the draw.

    Raises:
        ValueError: if the source can't be opened, has none of these columns, or has fewer than two rows with text; or
            if a number is below 1.
    """
    for option, number in ((f"{stage}_num_examples", num_examples), ("num_held_out", num_held_out)):
        if number is not None and number < 1:
            raise ValueError(f"`{option}` should be at least 1, but is {number}.")
    name = C4_NAME if source is None else str(source) if isinstance(source, (str, os.PathLike)) else "a Dataset"
    # One process per machine reads and converts; the others use the cache of `datasets`.
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
    """Check the tokenizer for a stage's data. TRL would do so only after an earlier stage.

    Raises:
        ValueError: if rows are chats and there is no chat template, or texts and there is no end-of-sequence token.
    """
    row = data.train[0]
    if "input_ids" in row:
        return
    if any(isinstance(row.get(name), list) for name in ("messages", "conversations", "prompt")):
        if tokenizer.chat_template is None and args.chat_template_path is None:
            raise ValueError(
                f"`{stage}_dataset` {data.source} contains chats, but the tokenizer has no chat template. Pass "
                "`--chat_template_path`, or rows with `prompt` and `completion` as text."
            )
    elif tokenizer.eos_token is None and args.eos_token is None:
        raise ValueError("The tokenizer has no end-of-sequence token. Choose one of its tokens with `--eos_token`.")


def _rows(stage: str, source: Any, option: str, seed: int) -> Dataset:
    """Open one source and return its rows with text, in random order, with columns that TRL reads."""
    if source is None:
        dataset = open_hub(C4_NAME, stage, f"Pass `--{option}` a local file.", data_files={"train": C4_FILES})
    elif not isinstance(source, (str, os.PathLike)):
        dataset = source
    else:
        advice = f"Pass `--{option}` a local {'/'.join(TABLES)} file or another name."
        dataset = open_source(source, stage, TABLES, advice)
    if dataset is not None and not hasattr(dataset, "__len__"):
        raise ValueError(f"`{option}` should be a Dataset, but is a {type(dataset).__name__}, which has no length.")
    if dataset is None or not len(dataset):
        raise ValueError(f"`{option}` {source} is empty.")
    needed = next((names for names in _COLUMNS if set(names) <= set(dataset.column_names)), None)
    if needed is None:
        raise ValueError(
            f"`{option}` {source} has the columns {dataset.column_names}, but should have `text`; `prompt` and "
            "`completion`; `messages`; `instruction` and `output`, with or without `input` (commonsense170k); or token "
            "ids as `input_ids`."
        )
    further = [name for name in _COLUMNS[needed] if name in dataset.column_names]
    dataset = dataset.shuffle(seed=seed).select_columns([*needed, *further])
    texts = [name for name in ("text", "instruction", "output", "input") if name in dataset.column_names]
    for name in texts:
        kind = getattr(dataset.features[name], "dtype", type(dataset.features[name]).__name__)
        if kind not in ("string", "large_string", "null"):
            raise ValueError(f"Column `{name}` of `{option}` {source} should be text, but is {kind}.")
    has_content = _has_text if texts else bool
    rows = dataset.filter(lambda row: all(has_content(row[name]) for name in needed))
    if len(rows) < len(dataset):
        dropped = f"{len(dataset) - len(rows)} of {len(dataset)} rows"
        logger.warning(f"{dropped} of `{option}` {source} have no text and are dropped.")
    return rows.map(to_prompt_and_completion, remove_columns=rows.column_names) if "instruction" in needed else rows


def _has_text(value: str | None) -> bool:
    return value is not None and bool(value.strip())
