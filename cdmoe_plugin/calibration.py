"""Calibration data: a hub name, a local file, a `Dataset`, texts or token ids become batches of token ids."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoTokenizer
from transformers.utils import logging

from .checks import is_int
from .config import CondenseConfig
from .data import C4_FILES, C4_NAME, TEXTS, is_local, open_file, open_hub

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.get_logger(__name__)

_TEXT_COLUMNS = ("text", "content")


@dataclass(frozen=True)
class TokenBatch:
    """Token ids `[B, S]` int64, padded on the right, and their attention mask `[B, S]` int64 (1 is a token)."""

    input_ids: Tensor
    attention_mask: Tensor

    def truncate(self, rows: int, length: int) -> TokenBatch:
        """Return the first `length` tokens of the first `rows` sequences."""
        return TokenBatch(self.input_ids[:rows, :length], self.attention_mask[:rows, :length])

    @classmethod
    def random(cls, model: PreTrainedModel) -> TokenBatch:
        """Draw two sequences of 16 tokens that a model knows, the same ones each time."""
        ids = torch.randint(_vocabulary_size(model), (2, 16), generator=torch.Generator().manual_seed(0))
        return cls(ids, torch.ones_like(ids))


@dataclass(frozen=True)
class Calibration:
    """The token batches of a search and their source.

    Args:
        batches (`list[TokenBatch]`): Sequences of similar length together, so that little is padding.
        source (`str`): The data that the user named.
        num_samples (`int`): Number of sequences.
        num_tokens (`int`): Number of tokens, without padding.
        fingerprint (`str`): SHA-256 of the token ids in the order in which they were drawn.
    """

    batches: list[TokenBatch]
    source: str
    num_samples: int
    num_tokens: int
    fingerprint: str

    def to_dict(self) -> dict[str, Any]:
        """Return the entries that a plan keeps: source, numbers of samples and tokens, and fingerprint."""
        names = ("source", "num_samples", "num_tokens", "fingerprint")
        return {name: getattr(self, name) for name in names}


def load_calibration(
    source: Any,
    config: CondenseConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    model_config: PreTrainedConfig | None = None,
    find_tokenizer: Callable[[], PreTrainedTokenizerBase] | None = None,
) -> Calibration:
    """Turn calibration data of any supported kind into token batches.

    Args:
        source: None (C4 as in the paper), a name on the hub, a local .txt/.json/.jsonl/.parquet file, a `Dataset`, a
            list of texts, or a list of token-id lists or 1-D tensors.
        config (`CondenseConfig`): Number and length of samples, batch size, seed.
        tokenizer: Needed for texts only. Its own special tokens are added (DeepSeek's has a BOS).
        model_config (*optional*): Gives the id of the padding token if no tokenizer does.
        find_tokenizer (*optional*): Called if texts need a tokenizer and none is given.

    Raises:
        ValueError: if there is no text, no tokenizer for texts, no column with texts, or no sequence of at least two
            tokens.
    """
    name, samples = _open(source)
    drawn = _draw(samples, config)
    if not drawn:
        raise ValueError(f"The calibration data ({name}) is empty.")
    if tokenizer is None and find_tokenizer is not None and isinstance(drawn[0], str):
        tokenizer = find_tokenizer()
    sequences = _tokenize(drawn, tokenizer, config.max_length, name)
    special = tokenizer if getattr(tokenizer, "pad_token_id", None) is not None else model_config
    sequences = [_strip_padding(ids, special)[: config.max_length] for ids in sequences]
    sequences = [ids for ids in sequences if len(ids) >= 2]
    if not sequences:
        raise ValueError(
            f"The calibration data ({name}) has no sequence of at least two tokens that are not padding; {len(drawn)} "
            "samples were read."
        )
    dropped = len(drawn) - len(sequences)
    if dropped:
        logger.warning(f"{dropped} of {len(drawn)} calibration samples have fewer than two tokens and are not used.")
    pad = getattr(tokenizer, "pad_token_id", None) or 0
    ordered = sorted(sequences, key=len)
    groups = [ordered[i : i + config.batch_size] for i in range(0, len(ordered), config.batch_size)]
    return Calibration(
        batches=[_pad(group, pad) for group in groups],
        source=name,
        num_samples=len(sequences),
        num_tokens=sum(map(len, sequences)),
        fingerprint=hashlib.sha256(repr(sequences).encode()).hexdigest(),
    )


def calibration_for(
    model: PreTrainedModel, source: Any, config: CondenseConfig, tokenizer: PreTrainedTokenizerBase | None = None
) -> Calibration:
    """Load calibration data for a loaded model, with its checkpoint's tokenizer if none is given.

    Args:
        model (`PreTrainedModel`): The model that the token ids are for.
        source: As in `load_calibration`; a `Calibration` is checked and returned.
        config (`CondenseConfig`), tokenizer (*optional*): As in `load_calibration`.

    Raises:
        ValueError: as `load_calibration`, and if the model has no embedding for a token id.
    """
    if not isinstance(source, Calibration):
        path = model.name_or_path
        own = (lambda: checkpoint_tokenizer(path)) if path else None
        source = load_calibration(source, config, tokenizer, model.config, own)
    _check_vocabulary(model, source)
    return source


def checkpoint_tokenizer(path: str | os.PathLike, **kwargs: Any) -> PreTrainedTokenizerBase:
    """Open the tokenizer of a checkpoint. An empty tokenizer, which transformers may make up, is refused.

    Args:
        path (`str` or `os.PathLike`): Hub name or folder.
        **kwargs: Passed to `AutoTokenizer.from_pretrained` (`revision`, ...).

    Raises:
        ValueError: if the checkpoint has no tokenizer, or an empty one.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **kwargs)
        if len(tokenizer) > len(tokenizer.all_special_ids):
            return tokenizer
        reason = "the checkpoint has none"
    except (OSError, ValueError) as error:
        reason = str(error)
    raise ValueError(
        f"The calibration data is text, but no tokenizer can be opened from {str(path)!r}: pass `tokenizer=` as well, "
        f"or token ids ({reason})."
    )


def _vocabulary_size(model: PreTrainedModel) -> int:
    embeddings: Any = model.get_input_embeddings()
    return embeddings.weight.shape[0]


def _check_vocabulary(model: PreTrainedModel, calibration: Calibration) -> None:
    size = _vocabulary_size(model)
    highest = max(int(batch.input_ids.max()) for batch in calibration.batches)
    if highest >= size:
        raise ValueError(
            f"The calibration data ({calibration.source}) has the token id {highest}, but the model knows {size} "
            "tokens: the data was tokenised for another model."
        )


def _open(source: Any) -> tuple[str, Iterable[Any]]:
    if source is None:
        return f"{C4_NAME} ({C4_FILES})", _stream_hub(C4_NAME, data_files={"train": C4_FILES})
    if isinstance(source, (str, os.PathLike)):
        if is_local(source, TEXTS):
            dataset = open_file(Path(source), "calibration", TEXTS)
            return str(source), [] if dataset is None else _column(dataset)
        return str(source), _stream_hub(str(source))
    if isinstance(getattr(source, "column_names", None), dict):
        raise ValueError(f"The calibration data has the splits {list(source)}: pass one of them.")
    if hasattr(source, "column_names"):
        return f"a {type(source).__name__}", _column(source)
    if getattr(source, "ndim", None) == 2:
        return "token ids", list(source)
    if isinstance(source, Sequence):
        kinds = {"texts" if isinstance(sample, str) else "token ids" for sample in source}
        if len(kinds) > 1:
            raise ValueError("The calibration data mixes texts and token ids.")
        return kinds.pop() if kinds else "an empty list", source
    raise ValueError(
        "`calibration` should be None (C4), a hub name, a local .txt/.json/.jsonl/.parquet file, a Dataset, a list of "
        f"texts or a list of token ids, but is a {type(source).__name__}."
    )


def _stream_hub(name: str, **kwargs: Any) -> Any:
    advice = "Pass `calibration=` a local .txt/.json/.jsonl/.parquet file, a Dataset, texts or token ids."
    return _column(open_hub(name, "calibration", advice, streaming=True, **kwargs))


def _column(dataset: Any) -> Any:
    columns = dataset.column_names or list(next(iter(dataset), {}))
    if "input_ids" in columns:
        return dataset.select_columns("input_ids")
    name = next((column for column in _TEXT_COLUMNS if column in columns), None)
    if name is None and len(columns) == 1:
        name = columns[0]
    if name is None:
        raise ValueError(
            f"The calibration data has the columns {columns}; it needs one named 'text' (or 'input_ids' for token ids)."
        )
    return dataset.select_columns(name)


def _draw(samples: Any, config: CondenseConfig) -> list[Any]:
    """Draw at most `num_samples` of the samples that are not blank; those of a list in memory keep its order."""
    if hasattr(samples, "shuffle"):  # a dataset of one column
        streams = not hasattr(samples, "__len__")
        # In memory: otherwise the order of all rows would be written to the cache.
        rows = samples.shuffle(config.seed, **({"buffer_size": 10_000} if streams else {"keep_in_memory": True}))
        drawn = (sample for row in rows for sample in row.values() if not _is_blank(sample))
        return list(islice(drawn, config.num_samples))
    samples = [sample for sample in samples if not _is_blank(sample)]
    if len(samples) > config.num_samples:
        rows = sorted(random.Random(config.seed).sample(range(len(samples)), config.num_samples))
        samples = [samples[row] for row in rows]
    return samples


def _is_blank(sample: Any) -> bool:
    if sample is not None and not hasattr(sample, "__len__"):
        raise ValueError(f"A calibration sample should be a text or a list of token ids, but one is {sample!r}.")
    return not sample.strip() if isinstance(sample, str) else sample is None or len(sample) == 0


def _tokenize(samples: list[Any], tokenizer: Any, max_length: int, name: str) -> list[list[int]]:
    if isinstance(samples[0], str):
        if tokenizer is None:
            raise ValueError(f"The calibration data ({name}) is text: pass `tokenizer=` as well, or token ids.")
        return tokenizer(samples, truncation=True, max_length=max_length)["input_ids"]
    sequences = []
    for i, sample in enumerate(samples):
        ids = sample.reshape(-1).tolist() if _is_row(sample) else list(sample)
        if not all(is_int(token) and token >= 0 for token in ids):
            raise ValueError(f"Calibration sample {i} should be a list of token ids, but is {str(sample)[:60]}.")
        sequences.append(ids)
    return sequences


def _is_row(sample: Any) -> bool:
    """Return whether a sample is a tensor or array `[T]`, or `[1, T]` as tokenizers return it."""
    return hasattr(sample, "tolist") and (sample.ndim == 1 or (sample.ndim == 2 and sample.shape[0] == 1))


def _strip_padding(ids: list[int], special: Any) -> list[int]:
    """Remove the padding at both ends; of a pad token that is also BOS or EOS, one stays."""
    pad = getattr(special, "pad_token_id", None)
    if pad is None:
        return ids
    start, end = 0, len(ids)
    while start < end and ids[start] == pad:
        start += 1
    while end > start and ids[end - 1] == pad:
        end -= 1
    if start == end:
        return []
    ends = (getattr(special, "bos_token_id", None), getattr(special, "eos_token_id", None))  # one id, or several
    margin = 1 if any(pad in end if isinstance(end, (list, tuple)) else pad == end for end in ends) else 0
    return ids[max(0, start - margin) : end + margin]


def _pad(group: list[list[int]], pad: int) -> TokenBatch:
    length = max(map(len, group))
    ids = torch.tensor([row + [pad] * (length - len(row)) for row in group])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in group])
    return TokenBatch(ids, mask)
