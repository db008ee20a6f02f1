"""The state of a search on disk, from which an interrupted search resumes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..atomic import read_json, write_json
from ..checks import is_int, read_real
from ..config import CondenseConfig
from ..offload import weight_of
from ..plan import CondensedLayer
from ..processes import Processes
from ..spread import LayerCurves

VERSION = 2
FILE = "search_state.json"
# Values of each weight in a model's fingerprint: enough to distinguish checkpoints, cheap for 16 billion parameters.
_SAMPLED_VALUES = 64


class SearchState(MutableMapping[str, Any]):
    """The results of a search by name, in one JSON file that is replaced atomically with each new result.

    Args:
        folder (`str` or `os.PathLike`, *optional*): Folder of the file; nothing is written if None.
        fingerprint (`dict[str, str]`): Identity of the search, see `fingerprint`.
        num_experts (`dict[int, int]`, *optional*): Numbers of routed experts by searched layer.
        processes (`Processes`, *optional*): The processes of the search. Only the main process uses the file.

    Raises:
        ValueError: if the folder has the state of another search (naming the difference), or a state that is broken,
            was edited, or names layers or experts that do not exist.
    """

    def __init__(
        self,
        folder: str | os.PathLike | None,
        fingerprint: dict[str, str],
        num_experts: Mapping[int, int] | None = None,
        processes: Processes | None = None,
    ) -> None:
        processes = Processes() if processes is None else processes
        self.path = Path(folder) / FILE if folder is not None and processes.is_main else None
        self.fingerprint = fingerprint
        self.num_experts = num_experts or {}
        self.results: dict[str, Any] = {}
        if self.path is not None:
            if self.path.parent.is_file():
                raise ValueError(f"`state_dir` should be a folder, but {folder} is a file.")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                self.results = self._read(self.path)
        # All processes resume from the same results.
        self.results = processes.agreed(self.results)

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            state = read_json(path)
            if not isinstance(state, dict) or set(state) != {"version", "fingerprint", "results", "checksum"}:
                raise ValueError("it should hold a version, a fingerprint, results and a checksum")
            version, found, results = state["version"], state["fingerprint"], state["results"]
            if version != VERSION or not is_int(version):
                raise ValueError(f"its version should be {VERSION}")
            if not isinstance(found, dict) or not isinstance(results, dict):
                raise ValueError("its fingerprint and its results should be objects")
            if state["checksum"] != _checksum(found, results):
                raise ValueError("its checksum does not match its contents")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not a valid search state ({error}): delete it to start again.") from error
        different = sorted(
            name for name in {*self.fingerprint, *found} if found.get(name) != self.fingerprint.get(name)
        )
        if different:
            raise ValueError(
                f"{path} belongs to another search: its {' and '.join(different)} differ. Use another `state_dir`, or "
                "delete it to start again."
            )
        try:
            for name, result in results.items():
                _check_result(name, result, self.num_experts)
        except ValueError as error:
            raise ValueError(f"{path} is not a valid search state ({error}): delete it to start again.") from error
        return results

    def __getitem__(self, name: str) -> Any:
        return self.results[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self.update({name: value})

    def update(self, results: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Add several results in one step: all of them, or none if it is interrupted."""
        self.results.update(results)
        if self.path is not None:
            checksum = _checksum(self.fingerprint, self.results)
            content = {"fingerprint": self.fingerprint, "results": self.results, "checksum": checksum}
            write_json(self.path, {"version": VERSION, **content})

    def __delitem__(self, name: str) -> None:
        del self.results[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)


def _checksum(fingerprint: dict[str, str], results: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps([fingerprint, results], sort_keys=True).encode()).hexdigest()


def _check_result(name: str, result: Any, num_experts: Mapping[int, int]) -> None:
    """Check one result: "experts <layer>" or "curves <layer>", or a divergence."""
    kind, _, layer = name.partition(" ")
    if kind not in ("experts", "curves"):
        read_real(result, name)
        return
    if layer not in map(str, num_experts):
        raise ValueError(f"`{name}` is the result of a layer that is not searched")
    if kind == "curves":
        if LayerCurves.from_dict(result, name).num_experts != num_experts[int(layer)]:
            raise ValueError(f"`{name}` is the result of a layer with another number of experts")
        return
    # Version 0.1 counted no tokens.
    names = set(result) - {"tokens"} if isinstance(result, dict) else set()
    if names != {"experts", "scores", "gates"} or result["scores"] is None:
        raise ValueError(f"`{name}` should hold experts, scores and gates")
    order = {name: value for name, value in result.items() if name != "scores"} | {"layer": int(layer)}
    experts = CondensedLayer.from_dict({**order, "expert_scores": result["scores"]}, name).experts
    total = num_experts[int(layer)]
    if any(expert >= total for expert in experts):
        raise ValueError(f"`{name}` names experts {experts}, but should name experts from 0 to {total - 1}")


def fingerprint(model: PreTrainedModel, config: CondenseConfig, calibration: str) -> dict[str, str]:
    """Compute the identity of a search: fingerprints of the model's weights, the config and the calibration tokens.

    Args:
        model (`PreTrainedModel`): The model: shape, dtype and evenly spaced values of each weight.
        config (`CondenseConfig`): The config, except `cache_memory`, which does not change results.
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
