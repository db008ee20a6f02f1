"""What a search has found so far, on disk, so that one that is interrupted goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from .config import CondenseConfig
from .offload import weight_of
from .plan import read_json, write_json
from .processes import Processes

VERSION = 1
FILE = "search_state.json"
# Values of each weight that go into a model's fingerprint: enough to tell checkpoints apart, cheap for 16 billion.
_SAMPLED_VALUES = 64


class SearchState(MutableMapping[str, Any]):
    """Results by name, in one JSON file that is replaced at once whenever a result comes in.

    Args:
        folder (`str` or `os.PathLike`, *optional*): Where the file lies; None keeps nothing on disk.
        fingerprint (`dict[str, str]`): What the results belong to, see `fingerprint`.
        processes (`Processes`): Who works on the search. The main process alone reads and writes the file.

    Raises:
        ValueError: if the folder holds the state of another search (naming what differs), or no valid state.
    """

    def __init__(
        self, folder: str | os.PathLike | None, fingerprint: dict[str, str], processes: Processes | None = None
    ) -> None:
        processes = Processes() if processes is None else processes
        self.path = Path(folder) / FILE if folder is not None and processes.is_main else None
        self.fingerprint = fingerprint
        self.results: dict[str, Any] = {}
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                self.results = self._read(self.path)
        # All go on from the same place.
        self.results = processes.agreed(self.results)

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            state = read_json(path)
            version, found, results = state["version"], state["fingerprint"], state["results"]
            if version != VERSION or not isinstance(found, dict) or not isinstance(results, dict):
                raise ValueError(f"version {version!r}")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no valid search state ({error!r}): delete it to start anew.") from error
        different = sorted(name for name, value in self.fingerprint.items() if found.get(name) != value)
        if different:
            raise ValueError(
                f"{path} belongs to another search: its {' and '.join(different)} differ. Use another `state_dir`, or "
                "delete it to start anew."
            )
        return results

    def __getitem__(self, name: str) -> Any:
        return self.results[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self.update({name: value})

    def update(self, results: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Keeps several results at once: all of them, or none if it is interrupted."""
        self.results.update(results)
        if self.path is not None:
            write_json(self.path, {"version": VERSION, "fingerprint": self.fingerprint, "results": self.results})

    def __delitem__(self, name: str) -> None:
        del self.results[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)


def fingerprint(model: PreTrainedModel, config: CondenseConfig, calibration: str) -> dict[str, str]:
    """What a search's results belong to: the model's config and weights, the search's config, the calibration tokens.

    Args:
        model (`PreTrainedModel`): Of each weight, shape, dtype and evenly spaced values are taken.
        config (`CondenseConfig`): All of it but `cache_memory`, which changes no result.
        calibration (`str`): `Calibration.fingerprint`.
    """
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, weight in model.state_dict().items():
        flat = weight_of(model, name, weight.detach()).reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLED_VALUES)].to("cpu", torch.float64)
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(sample.numpy().tobytes())
    search = {name: value for name, value in config.to_dict().items() if name != "cache_memory"}
    return {"model": digest.hexdigest(), "config": json.dumps(search, sort_keys=True), "calibration data": calibration}
