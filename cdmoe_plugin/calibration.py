"""Calibration data: samples of every supported kind become batches of token ids."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers.utils import logging

from .checks import is_int
from .config import CondenseConfig
from .images import has_media, media_samples
from .naming import base_checkpoint
from .samples import Chat, Lines, draw, open_samples
from .tokenizing import adds_first_token, checkpoint_tokenizer, cut, open_tokenizer, revision_of, tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

logger = logging.get_logger(__name__)

# With fewer calibration tokens, a warning is logged.
FEW_TOKENS = 5_000
# The paper's sample, which `num_samples="auto"` has at least, from at least so many sequences.
PAPER_TOKENS = 51_200
_FEWEST_SAMPLES = 10
# Longer samples count as several of a batch, for the memory that attention and masks need.
_LONG = 2048


@dataclass(frozen=True)
class TokenBatch:
    """Token ids `[B, S]` int64, padded on the right, and their attention mask `[B, S]` int64 (1 is a token).

    `others` are further inputs of a multimodal model by name, such as the pixel values of images.
    """

    input_ids: Tensor
    attention_mask: Tensor
    others: Mapping[str, Tensor] = field(default_factory=dict)

    def truncate(self, rows: int, length: int) -> TokenBatch:
        """Return the first `length` tokens of the first `rows` sequences, without images."""
        return TokenBatch(self.input_ids[:rows, :length], self.attention_mask[:rows, :length])

    def rows(self, rows: Sequence[int]) -> TokenBatch:
        """Return some of the sequences, without images."""
        chosen = torch.tensor(rows)
        mask = self.attention_mask[chosen]
        length = int(mask.sum(1).max())
        return TokenBatch(self.input_ids[chosen, :length], mask[:, :length])

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
        pad (`int`, defaults to 0): The token id of padding.
    """

    batches: list[TokenBatch]
    source: str
    num_samples: int
    num_tokens: int
    fingerprint: str
    pad: int = 0

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
    num_tokens: int | None = None,
) -> Calibration:
    """Turn calibration data of any supported kind into token batches, and print their number.

    The line is printed where transformers' progress bars are, and not if those are disabled.

    Args:
        source: None (C4 as in the paper); the name of a dataset on the hub, as `name:config@split`, the latter two
            optional; a local .txt, .json, .jsonl, .parquet, .csv, .tsv or .arrow file, which may be compressed, or a
            folder of such files; a `Dataset`; a list of texts, chats, token-id lists or 1-D tensors; or the output of
            a tokenizer. A text is one sample, except for .txt files, which are cut into samples of `max_length` tokens
            across lines. Padding is what the attention mask says or, without one, the padding token at both ends.
            A `Dataset` with the columns that the processor of a multimodal model makes (`input_ids`, `pixel_values`,
            ...) has one sequence with its images in each row, which is used whole, whatever its length.
        config (`CondenseConfig`): Number and length of samples, batch size, seed.
        tokenizer: Needed for texts and chats only. Its own special tokens are added to texts (DeepSeek's has a BOS);
            its chat template renders chats.
        model_config (*optional*): Gives the id of the padding token if no tokenizer does, and the number of positions,
            to which samples are cut as well.
        find_tokenizer (*optional*): Called if texts or chats need a tokenizer and none is given.
        num_tokens (`int`, *optional*): Number of tokens for `num_samples="auto"`, at least; the paper's if lower.

    Raises:
        ValueError: if there is no text, no tokenizer for texts, no chat template for chats, no column with samples, or
            no sequence of at least two tokens.
    """
    if has_media(source):
        return _with_media(source, config, num_tokens)
    text_config = _text_config(model_config)
    config = _within_positions(config, text_config)
    wanted = _wanted(config, num_tokens)
    name, samples = open_samples(source)
    if wanted is not None and isinstance(samples, Lines):
        config = replace(config, num_samples=max(_FEWEST_SAMPLES, -(-wanted // config.max_length)))
    drawn = samples if isinstance(samples, Lines) else draw(samples, config)
    first = next(drawn, None) if isinstance(drawn, Iterator) else None
    is_text = isinstance(first, str) or isinstance(drawn, Lines)
    if tokenizer is None and find_tokenizer is not None and (is_text or isinstance(first, Chat)):
        tokenizer = find_tokenizer()
    special = tokenizer if getattr(tokenizer, "pad_token_id", None) is not None else text_config
    found: list[list[int]] = []
    if isinstance(drawn, Lines):
        found = cut(drawn, tokenizer, config, name)
    elif first is not None:
        drawn = chain([first], drawn)
        while some := list(islice(drawn, _next_number(found, wanted, config))):
            found += tokenize(some, tokenizer, config, special, name)
    if not found:
        raise ValueError(f"The calibration data ({name}) is empty.")
    sequences = [ids for ids in found if len(ids) >= 2]
    if not sequences:
        raise ValueError(
            f"The calibration data ({name}) has no sequence of at least two tokens that are not padding; {len(found)} "
            "samples were read."
        )
    dropped = len(found) - len(sequences)
    if dropped:
        logger.warning(f"{dropped} of {len(found)} calibration samples have fewer than two tokens and are not used.")
    calibration = collate(sequences, name, config.batch_size, getattr(tokenizer, "pad_token_id", None) or 0)
    bare = is_text and not adds_first_token(tokenizer)
    _announce(calibration, wanted, "; the tokenizer adds no token before a text" if bare else "")
    return calibration


def collate(sequences: Sequence[list[int]], source: str, batch_size: int, pad: int) -> Calibration:
    """Put sequences of token ids into batches, those of similar length together.

    Args:
        sequences (`Sequence[list[int]]`): The sequences in the order in which they were drawn.
        source (`str`): The data that the user named.
        batch_size (`int`): Sequences per batch; one of more than 2,048 tokens counts as several.
        pad (`int`): The token id of padding.
    """
    groups: list[list[list[int]]] = []
    for row in sorted(sequences, key=len):
        number = min(batch_size, batch_size * _LONG // len(row))
        if not groups or len(groups[-1]) >= number:
            groups.append([])
        groups[-1].append(row)
    digest = hashlib.sha256()
    for i, row in enumerate(sequences):
        digest.update(f"{', ' if i else '['}{row}".encode())
    digest.update(b"]")
    return Calibration(
        batches=[_pad(group, pad) for group in groups],
        source=source,
        num_samples=len(sequences),
        num_tokens=sum(map(len, sequences)),
        fingerprint=digest.hexdigest(),
        pad=pad,
    )


def _wanted(config: CondenseConfig, num_tokens: int | None) -> int | None:
    """Return the number of tokens to draw with `num_samples="auto"`; None with a number of samples."""
    return max(PAPER_TOKENS, num_tokens or 0) if config.num_samples == "auto" else None


def _next_number(found: Sequence[Sized], wanted: int | None, config: CondenseConfig) -> int:
    """Return how many samples to read next: all at once, or until there are as many tokens as wanted."""
    if wanted is None:
        return 0 if found else int(config.num_samples)
    missing = -(-(wanted - sum(map(len, found))) // config.max_length)
    return max(0, missing, _FEWEST_SAMPLES - len(found))


def _with_media(dataset: Any, config: CondenseConfig, num_tokens: int | None) -> Calibration:
    """Turn a dataset of a processor's outputs into batches of one sample each."""
    wanted = _wanted(config, num_tokens)
    samples: list[dict[str, Tensor]] = []
    tokens = 0
    for sample in islice(media_samples(dataset, config.seed), None if wanted else int(config.num_samples)):
        samples.append(sample)
        tokens += sample["input_ids"].numel()
        if wanted is not None and tokens >= wanted and len(samples) >= _FEWEST_SAMPLES:
            break
    samples.sort(key=lambda inputs: inputs["input_ids"].numel())
    if not samples:
        raise ValueError(f"The calibration data (a {type(dataset).__name__}) is empty.")
    digest = hashlib.sha256()
    for sample in samples:
        for name, value in sorted(sample.items()):
            digest.update(f"{name} {list(value.shape)}".encode() + value.contiguous().numpy().tobytes())
    calibration = Calibration(
        batches=[TokenBatch(each.pop("input_ids"), each.pop("attention_mask"), each) for each in samples],
        source=f"a {type(dataset).__name__}",
        num_samples=len(samples),
        num_tokens=tokens,
        fingerprint=digest.hexdigest(),
    )
    _announce(calibration, wanted)
    return calibration


def calibration_for(
    model: PreTrainedModel,
    source: Any,
    config: CondenseConfig,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | str | os.PathLike | None = None,
    num_tokens: int | None = None,
) -> Calibration:
    """Load calibration data for a loaded model, with its checkpoint's tokenizer if none is given.

    Args:
        model (`PreTrainedModel`): The model that the token ids are for.
        source: As in `load_calibration`; a `Calibration` is checked and returned.
        config (`CondenseConfig`): As in `load_calibration`.
        tokenizer (*optional*): A tokenizer, its name or folder, or a processor.
        num_tokens (`int`, *optional*): As in `load_calibration`.

    Raises:
        ValueError: as `load_calibration`, and if the model has no embedding for a token id.
    """
    if not isinstance(source, Calibration):
        path = base_checkpoint(model)
        own = (lambda: checkpoint_tokenizer(path, **revision_of(model))) if path else None
        opened = None if tokenizer is None else open_tokenizer(tokenizer)
        source = load_calibration(source, config, opened, model.config, own, num_tokens)
    _check_vocabulary(model, source)
    return source


def _announce(calibration: Calibration, wanted: int | None, note: str = "") -> None:
    """Print how much data is used, beside the progress bars of the search, and warn if it is little."""
    tokens = f"{calibration.num_tokens:,} tokens"
    if logging.is_progress_bar_enabled() and os.environ.get("RANK", "0") == "0":
        samples = "1 sample" if calibration.num_samples == 1 else f"{calibration.num_samples:,} samples"
        source = "" if calibration.source == "token ids" else f" of {calibration.source}"
        if wanted is not None:
            which = "all of the data, which has fewer than" if calibration.num_tokens < wanted else "at least"
            note = f" ({which} {wanted:,}, by `num_samples='auto'`){note}"
        tqdm.write(f"Calibration: {samples}, {tokens}{source}{note}", file=sys.stderr)
    if calibration.num_tokens < FEW_TOKENS:
        logger.warning(
            f"The calibration data has {tokens}, which is little to choose experts and layers by: use at least "
            f"{FEW_TOKENS:,}. The paper uses 100 samples of 512 tokens."
        )


def _text_config(model_config: Any) -> Any:
    return model_config.get_text_config() if hasattr(model_config, "get_text_config") else model_config


def _within_positions(config: CondenseConfig, model_config: Any) -> CondenseConfig:
    """Return the config with a `max_length` that a model has positions for."""
    positions: Any = getattr(model_config, "max_position_embeddings", None)
    if not is_int(positions) or not 2 <= positions < config.max_length:
        return config
    logger.warning(
        f"`max_length` is {config.max_length}, but the model has {positions} positions (`max_position_embeddings`): "
        f"calibration samples are cut to {positions} tokens."
    )
    return replace(config, max_length=positions)


def _vocabulary_size(model: PreTrainedModel) -> int:
    try:
        embeddings: Any = model.get_input_embeddings()
    except NotImplementedError:  # the wrapper of qwen3_omni_moe has no embeddings of its own
        return model.config.get_text_config().vocab_size
    return embeddings.weight.shape[0]


def _check_vocabulary(model: PreTrainedModel, calibration: Calibration) -> None:
    size = _vocabulary_size(model)
    highest = max(int(batch.input_ids.max()) for batch in calibration.batches)
    if highest >= size:
        raise ValueError(
            f"The calibration data ({calibration.source}) has the token id {highest}, but the model knows {size} "
            "tokens: the data was tokenised for another model."
        )


def _pad(group: list[list[int]], pad: int) -> TokenBatch:
    length = max(map(len, group))
    ids = torch.tensor([row + [pad] * (length - len(row)) for row in group])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in group])
    return TokenBatch(ids, mask)
