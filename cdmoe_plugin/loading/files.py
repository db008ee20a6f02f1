"""The files of a checkpoint, checked before anything is made of them."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.modeling_utils import _add_variant
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

_POINTER = b"version https://git-lfs"


def check_folder(path: str | os.PathLike, model_kwargs: Mapping[str, Any]) -> None:
    """Check that a path is a folder with a config, if it is local.

    Raises:
        ValueError: naming the folder and what was found.
    """
    given = os.fspath(path)
    folder = Path(given, model_kwargs.get("subfolder") or "")
    if model_kwargs.get("gguf_file") or given.lower().endswith(".gguf"):
        raise ValueError(f"{model_kwargs.get('gguf_file') or given} is a GGUF file. {_GGUF}")
    if folder.is_file():
        raise ValueError(f"{given} is a file. A checkpoint is a folder with config.json and weights in safetensors.")
    if not folder.is_dir():
        if _is_path(given) or Path(given).is_dir():
            raise ValueError(f"There is no folder {folder}.{_similar(folder)}")
        return  # on the hub
    names = sorted(file.name for file in folder.iterdir())
    if "config.json" in names or "adapter_config.json" in names or "config" in model_kwargs:
        return
    if not names:
        raise ValueError(f"The folder {folder} is empty.")
    gguf = [name for name in names if name.lower().endswith(".gguf")]
    if gguf:
        raise ValueError(f"The folder {folder} has no config.json, but GGUF files such as {gguf[0]}. {_GGUF}")
    inside = [name for name in names if (folder / name / "config.json").is_file()]
    hint = f" Its folder {inside[0]} has one." if inside else ""
    raise ValueError(f"The folder {folder} has no config.json; it has {_some(names)}.{hint}")


_GGUF = "Its weights are quantised in a format of llama.cpp: use the checkpoint in safetensors that it was made from."


def check_weights(
    path: str | os.PathLike, model_kwargs: Mapping[str, Any], kept: bool = False, one_by_one: bool = False
) -> None:
    """Check that the weights of a local checkpoint are there, whole, and in a format that can be read as asked.

    Args:
        path (`str` or `os.PathLike`): Hub name or folder. What is on the hub is not checked.
        model_kwargs (`Mapping`): Arguments of `from_pretrained`.
        kept (`bool`, defaults to `False`): Whether only some experts are read.
        one_by_one (`bool`, defaults to `False`): Whether tensors are read one by one for another reason.

    Raises:
        ValueError: naming the folder and what was found.
    """
    folder = Path(os.fspath(path), model_kwargs.get("subfolder") or "")
    if not folder.is_dir():
        return
    files = _weight_files(folder, model_kwargs)
    on_disk = "offload_folder" in model_kwargs and model_kwargs.get("device_map") is None
    for file in files:
        _check_file(file)
    if any(file.suffix != ".safetensors" for file in files) and (kept or on_disk or one_by_one):
        raise refuse_bin(path, kept, on_disk)


def refuse_bin(path: Any, kept: bool, on_disk: bool) -> ValueError:
    """Make the error that a checkpoint is not stored in safetensors, whose tensors can be read one by one."""
    if on_disk:
        reason = "With an `offload_folder`, single layers are read"
    elif kept:
        reason = "With a plan, only the kept experts are read"
    else:
        reason = "Quantised and extra weights are read one by one"
    whole = ", or load the whole model and give it to `apply_plan`" if kept else ""
    return ValueError(
        f"The weights of {path} are not stored in safetensors. {reason}, which only safetensors allow: write such a "
        f"checkpoint with `AutoModelForCausalLM.from_pretrained({os.fspath(path)!r}).save_pretrained(folder)`{whole}."
    )


def _weight_files(folder: Path, model_kwargs: Mapping[str, Any]) -> list[Path]:
    """Find the files that `from_pretrained` would read, in its order."""
    variant, safe = model_kwargs.get("variant"), model_kwargs.get("use_safetensors")
    wanted = [] if safe is False else [(SAFE_WEIGHTS_NAME, False), (SAFE_WEIGHTS_INDEX_NAME, True)]
    wanted += [] if safe else [(WEIGHTS_NAME, False), (WEIGHTS_INDEX_NAME, True)]
    for name, is_index in wanted:
        file = folder / _add_variant(name, variant)
        if file.is_file():
            return _shards(file) if is_index else [file]
    names = sorted(file.name for file in folder.iterdir())
    gguf = [name for name in names if name.lower().endswith(".gguf")]
    if gguf:
        raise ValueError(f"The folder {folder} has no weights in safetensors, but {_some(gguf)}. {_GGUF}")
    expected = _add_variant(SAFE_WEIGHTS_NAME, variant)
    raise ValueError(f"The folder {folder} has a config, but no weights ({expected}); it has {_some(names)}.")


def _shards(index: Path) -> list[Path]:
    _refuse_pointer(index)
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not a valid index of weights ({error}): download it again.") from error
    lacking = [name for name in names if not (index.parent / name).is_file()]
    if lacking:
        raise ValueError(
            f"The folder {index.parent} lacks {len(lacking)} of {len(names)} files of weights that {index.name} names, "
            f"such as {lacking[0]}: download them."
        )
    return [index.parent / name for name in names]


def _check_file(file: Path) -> None:
    _refuse_pointer(file)
    if file.suffix != ".safetensors":
        return
    size = file.stat().st_size
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        text = handle.read(length) if size >= 8 + length else b""
    try:
        entries = json.loads(text)
        end = max((entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(
            f"{file} is not a file of safetensors, or was cut off ({size:,} bytes): download it again."
        ) from error
    if size < 8 + length + end:
        raise ValueError(f"{file} was cut off: it has {size:,} of {8 + length + end:,} bytes. Download it again.")


def _refuse_pointer(file: Path) -> None:
    with file.open("rb") as handle:
        if handle.read(len(_POINTER)) == _POINTER:
            raise ValueError(f"{file} is a pointer of git-lfs, not the weights: run `git lfs pull` in {file.parent}.")


def _is_path(given: str) -> bool:
    """Return whether a name can't be one on the hub, which has at most one slash inside."""
    return given.startswith((".", "~", os.sep)) or "\\" in given or given.endswith("/") or given.count("/") > 1


def _similar(folder: Path) -> str:
    parent = folder.absolute().parent
    names = [each.name for each in parent.iterdir() if each.is_dir()] if parent.is_dir() else []
    close = difflib.get_close_matches(folder.name, names, n=1)
    return f" Did you mean {folder.parent / close[0]}?" if close else ""


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
