"""Plans without a search."""

from __future__ import annotations

import random

from cdmoe_plugin import CondensedLayer, CondensePlan


def some_plan(layers: list[int], num_experts: int = 8, routed: list[int] | None = None) -> CondensePlan:
    rng = random.Random(0)
    others = sorted(set(range(num_experts)).difference(routed or ()))
    rows = [(layer, rng.sample(others, 3)) for layer in layers]
    return CondensePlan(
        [CondensedLayer(i, experts, [rng.uniform(-1, 1) for _ in experts], routed=routed) for i, experts in rows]
    )
