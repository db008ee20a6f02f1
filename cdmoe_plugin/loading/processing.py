"""The tokenizer and the processor files of a checkpoint, for a checkpoint that is made from it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.utils import cached_file

# Files of processors (images, audio, video) and chat templates. They are copied as they are: to open them, transformers
# may need libraries that are not needed here.
_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "chat_template.jinja",
    "chat_template.json",
)


def save_processing(
    name_or_path: str | os.PathLike, folder: str | os.PathLike, processor: bool = True, **hub: Any
) -> None:
    """Save the tokenizer of a checkpoint in another folder, and copy its processor files there.

    Args:
        name_or_path (`str` or `os.PathLike`): Hub name or folder of the checkpoint. A folder may hold no tokenizer.
        folder (`str` or `os.PathLike`): The folder to save to, which exists.
        processor (`bool`, defaults to `True`): Whether to copy processor files, too.
        **hub: Passed to `from_pretrained` (`revision`, `cache_dir`, ...).
    """
    if not os.path.isdir(name_or_path) or _has_tokenizer(Path(name_or_path)):
        AutoTokenizer.from_pretrained(name_or_path, **hub).save_pretrained(folder)
    located = {name: value for name, value in hub.items() if name != "trust_remote_code"}
    for name in _FILES if processor else ():
        found = cached_file(
            str(name_or_path),
            name,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **located,
        )
        if found is not None:
            shutil.copyfile(found, Path(folder) / name)


def _has_tokenizer(folder: Path) -> bool:
    return any(folder.glob("tokenizer*")) or (folder / "vocab.json").exists()
