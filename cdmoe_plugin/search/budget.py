"""A budget of kept experts for all condensed layers together, in experts, parameters or bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..blocks import SparseBlock
from ..condense.forms import FORMS
from ..config import CondenseConfig
from ..plan import CondensePlan
from ..sizes import Unit, read_budget
from .spread.forms import dense_widths

# The expert search orders this many times the average number of experts per layer.
_DEPTH = 3


@dataclass(frozen=True)
class LayerBudget:
    """An expert budget on the layers of a model that may be condensed.

    Args:
        amount (`int`): Total for all condensed layers together, in `unit`.
        unit (`str`): "experts", "parameters" or "bytes".
        costs (`dict[int, int]`): Cost of one routed expert in `unit`, by candidate layer.
        sizes (`dict[int, int]`): Number of routed experts by candidate layer.
        num_layers (`int`): Number of candidates that will be condensed.
    """

    amount: int
    unit: Unit
    costs: Mapping[int, int]
    sizes: Mapping[int, int]
    num_layers: int

    @classmethod
    def of(cls, config: CondenseConfig, blocks: Sequence[SparseBlock]) -> LayerBudget | None:
        """Make the budget of a config for a model's sparse blocks; None if the config has one K for all layers."""
        if config.num_experts != "auto":
            return None
        amount, unit = read_budget(config.expert_budget)
        candidates = [block for block in blocks if config.layers is None or block.layer in config.layers]
        costs = {block.layer: _cost(block, unit) for block in candidates}
        sizes = {block.layer: block.num_experts for block in candidates}
        return cls(amount, unit, costs, sizes, config.num_layers)

    @property
    def uniform(self) -> int:
        """The largest K with which every choice of layers fits into the budget."""
        return self.amount // self._highest_sum(self.costs.values())

    def depth(self, layer: int) -> int:
        """Return the number of a layer's experts to order: three times the average, at most what the budget allows."""
        average = -(-self.amount // self._highest_sum(self.costs.values()))
        return min(_DEPTH * average, self.amount // self.costs[layer], self.sizes[layer])

    def even(self, layers: Sequence[int]) -> dict[int, int]:
        """Spend the budget on these layers evenly, one expert for each in turn."""
        kept, left = dict.fromkeys(layers, 0), self.amount
        while open_layers := [i for i in layers if kept[i] < self.sizes[i] and self.costs[i] <= left]:
            for layer in open_layers:
                if self.costs[layer] <= left:
                    kept[layer] += 1
                    left -= self.costs[layer]
        return kept

    def check(self) -> None:
        """Check that the budget is not larger than the layers.

        Raises:
            ValueError: naming the field, its value and the model's.
        """
        total = self._highest_sum([self.costs[layer] * size for layer, size in self.sizes.items()])
        if self.amount > total:
            raise ValueError(
                f"`expert_budget` is {self.amount:,} {self.unit}, but all routed experts of {self.num_layers} layers "
                f"are {total:,} {self.unit}."
            )

    def _highest_sum(self, each: Iterable[int]) -> int:
        """Compute the highest sum over `num_layers` candidates."""
        return sum(sorted(each)[-self.num_layers :])


def experts_per_layer(
    request: CondensePlan | CondenseConfig, layers: Sequence[int], blocks: Sequence[SparseBlock]
) -> dict[int, int]:
    """Count the experts that each of these layers keeps, for single neurons those with as many.

    Before a search, assume that a budget is spent evenly, and for a size the widest forms.
    """
    sizes = {block.layer: block for block in blocks}
    if isinstance(request, CondensePlan):
        dense = {row.layer: row.dense_neurons(sizes[row.layer].intermediate_size) for row in request.layers}
        return {layer: -(-dense[layer] // sizes[layer].intermediate_size) for layer in layers}
    if not FORMS[request.form].keeps_experts:
        return dict.fromkeys(layers, 0)
    if request.target_size is not None:
        return {i: -(-dense_widths(sizes[i], 0)[-1] // sizes[i].intermediate_size) for i in layers}
    budget = LayerBudget.of(request, blocks)
    if budget is not None:
        return budget.even(layers)
    assert isinstance(request.dense_experts, int)
    return dict.fromkeys(layers, request.dense_experts)


def _cost(block: SparseBlock, unit: Unit) -> int:
    if unit == "experts":
        return 1
    weights = block.pieces([0], [1.0])[-1].weights
    own = (*weights.matrices, weights.gate_bias, weights.up_bias)  # down biases are summed to one
    size = sum(part.numel() for part in own if part is not None)
    return size * block.dtype.itemsize if unit == "bytes" else size
