"""Everything that the searches saw and returned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from torch import Tensor

from cdmoe_plugin.registry import EXPERT_SELECTIONS, LAYER_SELECTIONS


@dataclass
class Record:
    """What the searches saw and gave."""

    gates: dict[int, Tensor]
    experts: dict[int, Any]
    layers: list[Any]


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Record:
    """Everything that passes through the registered greedy functions."""
    kept = Record({}, {}, [])
    by_expert, by_layer = EXPERT_SELECTIONS["greedy"], LAYER_SELECTIONS["greedy"]

    def spy_experts(data: Any, num_experts: int) -> Any:
        kept.gates[data.block.layer] = data.gates
        kept.experts[data.block.layer] = by_expert(data, num_experts)
        return kept.experts[data.block.layer]

    def spy_layers(data: Any, num_layers: int) -> Any:
        kept.layers.append(by_layer(data, num_layers))
        return kept.layers[-1]

    monkeypatch.setitem(EXPERT_SELECTIONS, "greedy", spy_experts)
    monkeypatch.setitem(LAYER_SELECTIONS, "greedy", spy_layers)
    return kept
