"""The presets of `CondenseConfig`: the published setting, the best model, and the fastest one that is refitted."""

from __future__ import annotations

from typing import Any

_PAPER: dict[str, Any] = {
    "num_layers": 9,
    "num_experts": 6,
    "expert_selection": "greedy",
    "layer_selection": "greedy",
    "layer_search": "full",
    "metric": "js",
    "compare": "hidden",
    "gates": "mean",
    "refit": None,
    "refit_neurons": "experts",
    "num_samples": 100,
    "max_length": 512,
    "seed": 0,
}
_REFITTED: dict[str, Any] = {**_PAPER, "expert_selection": "frequency", "layer_search": "race", "refit_target": "model"}

# Fields of `CondenseConfig` by preset. A refit needs more calibration tokens than a search does.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": _PAPER,
    "best": {
        **_REFITTED,
        "refit": "distill",
        "refit_neurons": "least_squares",
        "refit_steps": 600,
        "num_samples": "auto",
    },
    "fast": {**_REFITTED, "refit": "down_proj", "refit_neurons": "energy", "num_samples": "auto"},
}
