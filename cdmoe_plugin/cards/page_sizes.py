"""The sizes in the report of a plan: those of its layers, and the other ones that it can be cut to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from ..plan import CondensedLayer, CondensePlan
from ..plan_layer import size_restrictions
from ..shapes import ModelShape
from ..spread import Spread
from .tables import spread_rows


class Sizes:
    """Parameters of the MLPs in a model's sparse layers: gated experts of three matrices, and routers.

    Args:
        model (`ModelShape`): The sizes of the sparse model.
        form (`str`): What becomes of a chosen layer, see `CondenseConfig.form`.
    """

    def __init__(self, model: ModelShape, form: str) -> None:
        self.model = model
        self.keeps_shared = not form.startswith("trim")
        self.layers = {shape.layer: shape for shape in model.sparse_layers}

    def parts(self, layers: Sequence[CondensedLayer] = ()) -> dict[str, int]:
        """Count parameters by part once these layers have been changed; experts become dense neurons, or stay."""
        parts = dict.fromkeys(("routed experts", "dense neurons", "shared experts", "routers"), 0)
        neuron, changed = 3 * self.model.hidden_size, {layer.layer: layer for layer in layers}
        for index, shape in self.layers.items():
            layer = changed.get(index)
            routed = shape.num_experts if layer is None else len(layer.routed or ())
            parts["routed experts"] += neuron * shape.intermediate_size * routed
            parts["dense neurons"] += 0 if layer is None else neuron * layer.dense_neurons(shape.intermediate_size)
            if self.keeps_shared or layer is None:
                parts["shared experts"] += neuron * shape.shared_intermediate_size
            parts["routers"] += self.model.hidden_size * routed
        return parts

    def total(self, layers: Sequence[CondensedLayer] = ()) -> int:
        """Count all parameters once these layers have been changed."""
        return sum(self.parts(layers).values())


class OtherSize(NamedTuple):
    """A size that a plan can be cut to.

    Args:
        target (`str`): The value of `--target_size`.
        parameters (`int`): Parameters of the whole model.
        effect (`float`): Estimated change of the model's output.
        forms (`Counter`): Number of layers by form: "untouched", "mixed" and "condensed".
        own (`bool`): Whether it is the size of the plan itself.
    """

    target: str
    parameters: int
    effect: float
    forms: Counter[str]
    own: bool


def other_sizes(plan: CondensePlan, spread: Spread) -> list[OtherSize]:
    """List a plan and what it would be at other sizes: every tenth of the sparse layers' MLPs less, to the smallest."""
    mlps = sum(layer.parameters for layer in spread.layers) / spread.parameters
    least = spread.smallest(**size_restrictions(plan.config or {}, plan.model)) / spread.parameters
    last = (int(1000 * least) + 1) / 1000  # three digits are enough, and the smallest model fits
    tenths = [round(1 - i / 10 * mlps, 3) for i in range(1, 10)]
    found = [_size(plan, spread, str((plan.config or {}).get("target_size") or "this plan"), own=True)]
    for target in [*(tenth for tenth in tenths if tenth > last), last]:
        if target < 1:
            found.append(_size(plan.truncate(target_size=target), spread, f"{target:.3f}"))
    # A coarse choice of forms may give the same model for several sizes; the first one is the plan itself.
    by_parameters = {size.parameters: size for size in reversed(found)}
    return [size for _, size in sorted(by_parameters.items(), reverse=True)]


def _size(plan: CondensePlan, spread: Spread, target: str, own: bool = False) -> OtherSize:
    rows = spread_rows(plan, spread)
    parameters = spread.size({row.layer: row.choice for row in rows})
    return OtherSize(target, parameters, sum(row.effect for row in rows), Counter(row.form for row in rows), own)
