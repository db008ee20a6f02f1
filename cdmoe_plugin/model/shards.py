"""Tensors added to a saved checkpoint, each read when it is written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import load_file
from transformers.modeling_utils import _add_variant, str_to_torch_dtype
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

_DTYPES = {dtype: name for name, dtype in str_to_torch_dtype.items()}


def add_tensors(folder: Path, tensors: Mapping[str, Any], max_shard_size: int | str, variant: str | None) -> None:
    """Add tensors to a checkpoint that `save_pretrained` has just written.

    Args:
        folder (`Path`): The checkpoint.
        tensors (`Mapping`): Tensors by their names on disk, or what has a `shape` and a `torch_dtype` and is a tensor
            when indexed with `...`.
        max_shard_size (`int` or `str`): Size of a file, at most, as for `save_pretrained`.
        variant (`str`, *optional*): As for `save_pretrained`.
    """
    if not tensors:
        return
    weights_name = _add_variant(SAFE_WEIGHTS_NAME, variant)
    index_file = folder / _add_variant(SAFE_WEIGHTS_INDEX_NAME, variant)
    index: dict[str, Any] = {"metadata": {}, "weight_map": {}}
    if index_file.exists():
        index = json.loads(index_file.read_text(encoding="utf-8"))
    else:
        with safe_open(folder / weights_name, framework="pt") as handle:
            index["weight_map"] = dict.fromkeys(handle.keys(), weights_name)
    pattern = weights_name.replace(".safetensors", "{suffix}.safetensors")
    split = split_torch_state_dict_into_shards(
        {name: _like(tensor) for name, tensor in tensors.items()},
        filename_pattern=pattern,
        max_shard_size=max_shard_size,
    )
    files = sorted(set(index["weight_map"].values()))
    new = list(split.filename_to_tensors.values())
    if len(files) == len(new) == 1 and _fits(folder / files[0], tensors, pattern, max_shard_size):
        write_tensors(folder / "joined.safetensors", {**load_file(folder / files[0]), **tensors})
        (folder / "joined.safetensors").replace(folder / files[0])
        return
    total = len(files) + len(new)
    names = [pattern.format(suffix=f"-{number:05d}-of-{total:05d}") for number in range(1, total + 1)]
    renamed = dict(zip(files, names, strict=False))
    for old, name in renamed.items():
        (folder / old).rename(folder / name)
    index["weight_map"] = {key: renamed[old] for key, old in index["weight_map"].items()}
    for name, keys in zip(names[len(files) :], new, strict=True):
        write_tensors(folder / name, {key: tensors[key] for key in keys})
        index["weight_map"] |= dict.fromkeys(keys, name)
    index["metadata"]["total_size"] = sum((folder / name).stat().st_size for name in names)
    index_file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _fits(file: Path, tensors: Mapping[str, Any], pattern: str, max_shard_size: int | str) -> bool:
    sketch = {f"old {name}": _like(tensor) for name, tensor in load_file(file).items()}
    sketch |= {name: _like(tensor) for name, tensor in tensors.items()}
    split = split_torch_state_dict_into_shards(sketch, filename_pattern=pattern, max_shard_size=max_shard_size)
    return not split.is_sharded


def write_tensors(file: Path, tensors: Mapping[str, Any]) -> None:
    """Write a file of safetensors one tensor after the other; `safetensors` needs all of them in memory.

    Args:
        file (`Path`): The new file.
        tensors (`Mapping`): As for `add_tensors`.
    """
    sketches = {name: _like(tensor) for name, tensor in tensors.items()}
    # Aligned, as by `safetensors`: the largest numbers first.
    names = sorted(sketches, key=lambda name: (-sketches[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        sketch, start = sketches[name], end
        end += sketch.nbytes
        entry = {"dtype": _DTYPES[sketch.dtype], "shape": list(sketch.shape), "data_offsets": [start, end]}
        header[name] = entry
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            handle.write(tensors[name][...].contiguous().flatten().view(torch.uint8).cpu().numpy().data)


def _like(tensor: Any) -> torch.Tensor:
    return torch.empty(tuple(tensor.shape), dtype=getattr(tensor, "torch_dtype", None) or tensor.dtype, device="meta")
