"""Plans without a search."""

from __future__ import annotations

import random

from cdmoe_plugin import CondensedLayer, CondensePlan


def some_plan(layers: list[int], num_experts: int = 8) -> CondensePlan:
    rng = random.Random(0)
    rows = [(layer, rng.sample(range(num_experts), 3)) for layer in layers]
    return CondensePlan([CondensedLayer(i, experts, [rng.uniform(-1, 1) for _ in experts]) for i, experts in rows])
