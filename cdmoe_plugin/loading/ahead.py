"""Reading ahead: while one decoder layer computes, the bytes of the next one come from the disk.

They come into the file cache of the system, which gives them up when memory is needed. Weights are made of them when
the layer's turn comes, so that only one layer at a time is converted or dequantised.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from threading import Event, Thread
from typing import Any

from .tensors import Unread

_PIECE = 2**22  # bytes


class ReadAhead:
    """The bytes of decoder layers, read in a thread before they are needed.

    Args:
        tensors (`Mapping[int, Iterable]`): The tensors of each layer on disk, `Unread` or `Packed`.
    """

    def __init__(self, tensors: Mapping[int, Iterable[Any]]) -> None:
        self.tensors = tensors
        self._stopped = Event()
        self._thread: Thread | None = None

    def __deepcopy__(self, _memo: dict[int, Any]) -> ReadAhead:
        return ReadAhead(self.tensors)

    def start(self, layer: int) -> None:
        """Begin to read a layer, and stop reading any other. A layer that has no tensors on disk is not read."""
        self.stop()
        if layer in self.tensors:
            self._stopped = Event()
            self._thread = Thread(target=self._read, args=(layer, self._stopped), daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Stop reading, and wait for the thread."""
        if self._thread is not None:
            self._stopped.set()
            self._thread.join()
            self._thread = None

    def wait(self) -> None:
        """Wait until all is read that was begun."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _read(self, layer: int, stopped: Event) -> None:
        buffer = memoryview(bytearray(_PIECE))
        try:
            for file, ranges in byte_ranges(self.tensors[layer]).items():
                with open(file, "rb", buffering=0) as opened:
                    for start, end in ranges:
                        opened.seek(start)
                        while start < end and not stopped.is_set():
                            number = opened.readinto(buffer[: end - start])
                            if not number:  # the file was cut short meanwhile
                                break
                            start += number
        except (OSError, ValueError):  # reported when the weights themselves are read
            return


def byte_ranges(tensors: Iterable[Any]) -> dict[str, list[tuple[int, int]]]:
    """Return the places of tensors in their files, first and last byte + 1, in order and joined where they meet."""
    keys: dict[str, set[str]] = {}
    for tensor in tensors:
        for part in [tensor] if isinstance(tensor, Unread) else tensor.parts.values():
            keys.setdefault(part.file, set()).add(part.key)
    joined: dict[str, list[tuple[int, int]]] = {}
    for file, wanted in keys.items():
        ranges = joined.setdefault(file, [])
        for start, end in sorted(place for key, place in _offsets(file).items() if key in wanted):
            if ranges and start <= ranges[-1][1]:
                ranges[-1] = (ranges[-1][0], max(end, ranges[-1][1]))
            else:
                ranges.append((start, end))
    return joined


def _offsets(file: str) -> dict[str, tuple[int, int]]:
    """Read the places of all tensors from the header of a safetensors file."""
    with Path(file).open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(length))
    begin = 8 + length
    return {
        key: (begin + entry["data_offsets"][0], begin + entry["data_offsets"][1])
        for key, entry in header.items()
        if key != "__metadata__"
    }
