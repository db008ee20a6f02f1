"""Names in checkpoints, and reads of their tensors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from torch import Tensor

from cdmoe_plugin.loading import tensors as unread


def keys_on_disk(folder: Path) -> set[str]:
    return {key for file in folder.glob("*.safetensors") for key in safe_open(file, "pt").keys()}  # noqa: SIM118


Reads = list[tuple[str, Any, list[int]]]  # names of tensors, which rows of them, and their shapes


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """What the package reads from safetensors files."""
    log: Reads = []

    class Watched:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.file = safe_open(*args, **kwargs)

        def __enter__(self) -> Watched:
            return self

        def __exit__(self, *error: object) -> None:
            self.file.__exit__(*error)

        def keys(self) -> list[str]:
            return self.file.keys()

        def get_slice(self, key: str) -> Any:
            part = self.file.get_slice(key)

            class Slice:
                get_shape, get_dtype = part.get_shape, part.get_dtype

                def __getitem__(self, index: Any) -> Tensor:
                    log.append((key, index, part.get_shape()))
                    return part[index]

            return Slice()

    monkeypatch.setattr(unread, "safe_open", Watched)
    return log


def in_layer(key: str, layer: int) -> bool:
    return re.search(rf"(layers|blocks)\.{layer}\.", key) is not None


def experts_read(reads: Reads, layer: int) -> list[int]:
    """Which of a layer's 8 routed experts have been read, once per tensor."""
    found = []
    for key, index, shape in reads:
        is_expert = re.search(r"\.experts\.|\.(block_sparse_moe|mlp)\.(in|out)put_linear", key) and len(shape) > 1
        if not is_expert or not in_layer(key, layer) or ".self_attention.experts." in key:
            continue
        own = re.search(r"\.experts\.(\d+)\.", key)
        rows = list(range(shape[0])[index]) if isinstance(index, slice) else list(range(shape[0]))
        found += [int(own[1])] if own else sorted({row // (shape[0] // 8) for row in rows})
    return found
