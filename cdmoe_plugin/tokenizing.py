"""Tokenizers, and calibration samples as token ids."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin

from .checks import is_int, short
from .config import CondenseConfig
from .naming import base_checkpoint
from .samples import Chat, Lines, TokenRow, pieces


def open_tokenizer(tokenizer: Any, **kwargs: Any) -> PreTrainedTokenizerBase:
    """Return a tokenizer that is given as an object, by the name or folder of its checkpoint, or within a processor.

    Args:
        tokenizer: The tokenizer, a hub name, a folder, or a processor.
        **kwargs: Passed to `AutoTokenizer.from_pretrained` with a name or folder.

    Raises:
        ValueError: if it is anything else, or if the checkpoint has no tokenizer.
    """
    if isinstance(tokenizer, (str, os.PathLike)):
        try:
            return _opened(tokenizer, **kwargs)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"`tokenizer` is {str(tokenizer)!r}, but none can be opened from there: {error}"
            ) from error
    found = getattr(tokenizer, "tokenizer", None) if isinstance(tokenizer, ProcessorMixin) else tokenizer
    if not isinstance(found, PreTrainedTokenizerBase):
        raise ValueError(
            "`tokenizer` should be a tokenizer of transformers, a processor with one, or the name or folder of a "
            f"checkpoint, but is a {type(tokenizer).__name__}."
        )
    return found


def checkpoint_tokenizer(path: str | os.PathLike, **kwargs: Any) -> PreTrainedTokenizerBase:
    """Open the tokenizer of a checkpoint. An empty tokenizer, which transformers may make up, is refused.

    Args:
        path (`str` or `os.PathLike`): Hub name or folder.
        **kwargs: Passed to `AutoTokenizer.from_pretrained` (`revision`, ...).

    Raises:
        ValueError: if the checkpoint has no tokenizer, or an empty one.
    """
    try:
        return _opened(path, **kwargs)
    except (OSError, ValueError) as error:
        base = base_of(path, **kwargs)
        copy = f" Its base model is {base}: `tokenizer={base!r}` uses the tokenizer from there." if base else ""
        raise ValueError(
            f"The calibration data is text, but no tokenizer can be opened from {str(path)!r}: pass `tokenizer=` as "
            f"well, or token ids.{copy} ({error})"
        ) from error


def required_tokenizer(path: str | os.PathLike, **kwargs: Any) -> PreTrainedTokenizerBase:
    """Open the tokenizer of a checkpoint that is trained or evaluated.

    Args:
        path (`str` or `os.PathLike`): Hub name or folder.
        **kwargs: Passed to `AutoTokenizer.from_pretrained` (`revision`, ...).

    Raises:
        ValueError: naming the checkpoint, and the base model to copy the tokenizer from.
    """
    try:
        return _opened(path, **kwargs)
    except (OSError, ValueError) as error:
        base = base_of(path, **kwargs) or "its base model"
        raise ValueError(
            f"No tokenizer can be opened from {str(path)!r} ({error}). Copy that of {base}: "
            f"`AutoTokenizer.from_pretrained({base!r}).save_pretrained({str(path)!r})`."
        ) from error


def base_of(path: str | os.PathLike, **kwargs: Any) -> str | None:
    """Return the name of the model that a checkpoint was made from, if its config has it.

    Args:
        path (`str` or `os.PathLike`): Hub name or folder of the checkpoint.
        **kwargs: Passed to `PreTrainedConfig.get_config_dict` (`revision`, ...).
    """
    try:
        config = PreTrainedConfig.get_config_dict(path, **kwargs)[0]
    except (OSError, ValueError):
        return None
    condensed = config.get("condense_config")
    base = (condensed if isinstance(condensed, Mapping) else {}).get("base_model") or config.get("_name_or_path")
    return str(base) if base and str(base) != str(path) else None


def revision_of(model: Any) -> dict[str, str]:
    """Return the argument `revision` for files of the commit that a model was loaded from; none without a commit."""
    commit = getattr(model.config, "_commit_hash", None)
    return {"revision": commit} if commit and not os.path.isdir(base_checkpoint(model)) else {}


def _opened(path: str | os.PathLike, **kwargs: Any) -> PreTrainedTokenizerBase:
    # From a folder without a tokenizer's files, transformers would ask for sentencepiece, which does not help.
    if os.path.isdir(path) and not _has_files(Path(path, kwargs.get("subfolder") or "")):
        raise ValueError("the folder has no tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(path, **kwargs)
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ValueError("the checkpoint has none")
    return tokenizer


def _has_files(folder: Path) -> bool:
    patterns = ("*token*", "*vocab*", "*.model", "*.tiktoken", "spiece*", "tekken*")
    return any(any(folder.glob(pattern)) for pattern in patterns)


def tokenize(samples: list[Any], tokenizer: Any, config: CondenseConfig, special: Any, name: str) -> list[list[int]]:
    """Turn samples of one kind into token ids without padding, at most `max_length` of each.

    Args:
        samples (`list`): Texts, `Chat`s, `TokenRow`s, or lists, arrays or tensors of token ids.
        tokenizer (*optional*): Needed for texts and chats.
        config (`CondenseConfig`): The settings of the search.
        special: The tokenizer or config that has the ids of the special tokens.
        name (`str`): The data's name in error messages.

    Raises:
        ValueError: if there is no tokenizer or no chat template, if the template can't render a chat, or if a sample is
            of no supported kind.
    """
    if isinstance(samples[0], (str, Chat)):
        check_given(tokenizer, name)
    if isinstance(samples[0], str):
        ids = tokenizer(samples, truncation=True, max_length=config.max_length)["input_ids"]
    elif isinstance(samples[0], Chat):
        ids = _render(samples, tokenizer, name)
    else:
        ids = [_token_ids(sample, i) for i, sample in enumerate(samples)]
    is_exact = isinstance(samples[0], (TokenRow, Chat))
    return [(row if is_exact else strip_padding(row, special))[: config.max_length] for row in ids]


def cut(lines: Lines, tokenizer: Any, config: CondenseConfig, name: str) -> list[list[int]]:
    """Cut a running text into samples of `max_length` tokens across its lines, and draw at most `num_samples` of them.

    The tokenizer's special tokens are around each sample, and count.

    Raises:
        ValueError: if there is no tokenizer.
    """
    check_given(tokenizer, name)
    texts = [text for text in pieces(lines, config) if text.strip()]
    if not texts:
        return []
    start, end = _special_tokens(tokenizer, texts[0].split(maxsplit=1)[0])
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    ids = [token for piece in encoded for token in piece]
    room = max(1, config.max_length - len(start) - len(end))
    cuts = [ids[i : i + room] for i in range(0, len(ids), room)]
    # The last one is shorter: it is used if the others are too few.
    rest = [] if len(cuts[-1]) == room else [len(cuts) - 1]
    order = random.Random(config.seed).sample(range(len(cuts) - len(rest)), len(cuts) - len(rest)) + rest
    return [[*start, *cuts[i], *end] for i in sorted(order[: int(config.num_samples)])]


def adds_first_token(tokenizer: Any) -> bool:
    """Return whether a tokenizer adds a special token before a text, by its own template."""
    return tokenizer("a")["input_ids"][:1] != tokenizer("a", add_special_tokens=False)["input_ids"][:1]


def check_given(tokenizer: Any, name: str) -> None:
    if tokenizer is None:
        raise ValueError(f"The calibration data ({name}) is text: pass `tokenizer=` as well, or token ids.")


def strip_padding(ids: list[int], special: Any) -> list[int]:
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


def _special_tokens(tokenizer: Any, word: str) -> tuple[list[int], list[int]]:
    """Return the special tokens that a tokenizer adds before and after a text."""
    plain = tokenizer(word, add_special_tokens=False)["input_ids"]
    whole = tokenizer(word)["input_ids"]
    found = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), None)
    return ([], []) if found is None else (whole[:found], whole[found + len(plain) :])


def _render(chats: list[Chat], tokenizer: Any, name: str) -> list[list[int]]:
    from jinja2 import TemplateError

    if getattr(tokenizer, "chat_template", "") is None:
        raise ValueError(
            f"The calibration data ({name}) contains chats, but the tokenizer has no `chat_template`: set "
            "`tokenizer.chat_template`, pass the tokenizer of a chat model, or pass texts."
        )
    rows = []
    for i, chat in enumerate(chats):
        messages = [_message(message, i) for message in chat.messages]
        try:
            encoded = tokenizer.apply_chat_template(
                messages, tools=chat.tools, tokenize=True, return_dict=True, **chat.options
            )
        # Templates that join texts fail with a TypeError if there is none.
        except (TemplateError, TypeError, ValueError) as error:
            raise ValueError(
                f"The tokenizer's chat template can't render calibration sample {i}, {short(messages)}: {error}"
            ) from error
        rows.append(list(encoded["input_ids"]))
    return rows


def _joined(parts: list[Any], i: int) -> str:
    """Join the parts of a message's content, as templates of multimodal models do with texts."""
    kinds = {part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__ for part in parts}
    if kinds - {"text"}:
        raise ValueError(
            f"Calibration sample {i} has a message with parts of the types {sorted(map(str, kinds))}, but only text is "
            "rendered. For images, pass a `Dataset` with the columns that the processor makes."
        )
    return "".join(str(part["text"]) for part in parts)


def _message(message: Any, i: int) -> dict[str, Any]:
    """Return a message as chat templates read it, from that or from ShareGPT's format."""
    names = {"from": "role", "value": "content"}
    found: dict[str, Any] = (
        {str(names.get(key, key)): value for key, value in message.items()} if isinstance(message, Mapping) else {}
    )
    if "role" not in found:
        raise ValueError(
            f"Calibration sample {i} should be a chat, a list of messages with `role` and `content`, but a message is "
            f"{short(message)}."
        )
    if isinstance(found.get("content"), list):  # templates for texts would write it as Python does
        found["content"] = _joined(found["content"], i)
    # Rows of a `Dataset` may have all fields in every message, None where the message had none. The newest releases of
    # transformers leave them out themselves.
    return {key: value for key, value in found.items() if value is not None}


def _token_ids(sample: Any, i: int) -> list[int]:
    ids = _values(sample.ids if isinstance(sample, TokenRow) else sample)
    if not all(is_int(token) and token >= 0 for token in ids):
        raise ValueError(f"Calibration sample {i} should be a list of token ids, but is {str(sample)[:60]}.")
    if not isinstance(sample, TokenRow):
        return ids
    mask = _values(sample.mask)
    if len(mask) != len(ids) or any(used not in (0, 1) for used in mask):
        raise ValueError(
            f"The `attention_mask` of calibration sample {i} should be a list of zeros and ones, one for each of the "
            f"{len(ids)} tokens, but is {short(mask)}."
        )
    return [token for token, used in zip(ids, mask, strict=True) if used]


def _values(sample: Any) -> list[Any]:
    """Return the values of a list, or of a tensor or array `[T]`, or `[1, T]` as tokenizers return it."""
    is_row = hasattr(sample, "tolist") and (sample.ndim == 1 or (sample.ndim == 2 and sample.shape[0] == 1))
    return sample.reshape(-1).tolist() if is_row else list(sample)
