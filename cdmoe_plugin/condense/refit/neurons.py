"""The choice of a refitted layer's neurons: whole experts, or single routed neurons with their expert's gate."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...blocks import SparseBlock
from ...model.layers_cdmoe import CondensedMLP
from ...plan import CondensedLayer
from ...registry import REFIT_NEURONS
from ..fold import TokenGates, fold, fold_beside
from .examples import LayerExamples
from .ridge import regressors
from .sums import Sums

# Least squares chooses from this many times the neurons that are kept, those with the most energy.
CANDIDATES = 2
# It takes at most this part of them at a time, each from twice as many with the highest gains.
_ROUNDS = 36
_POOL = 2
# The given regressors are eliminated so many at a time, which bounds the memory of it.
_BLOCK = 256
# Its ridge, relative to the mean square of an activation.
_RIDGE = 1e-3


class NeuronChoice(NamedTuple):
    """The routed neurons of a condensed layer.

    Args:
        experts (`list[int]`): The experts that they belong to.
        gates (`list[float]`): The constant gates of these experts.
        neurons (`list[Tensor]`, *optional*): Indices of the neurons of each, int64; None for whole experts.
        token_gates (`TokenGates`, *optional*): Their gates per token.
    """

    experts: list[int]
    gates: list[float]
    neurons: list[Tensor] | None = None
    token_gates: TokenGates | None = None

    def gated(self, gates: TokenGates | None) -> NeuronChoice:
        """Add gates per token, from those of all experts, if there are any."""
        own = None if gates is None else TokenGates(*(part[self.experts] for part in gates))
        return self._replace(token_gates=own)

    def fold(self, block: SparseBlock, beside: bool = False) -> CondensedMLP:
        """Fold the neurons, with the shared expert, into one dense MLP, or into that beside a router."""
        if beside:
            return fold_beside(block, self.experts, self.gates, self.neurons)
        return fold(block, self.experts, self.gates, self.neurons, self.token_gates)

    def counts(self, block: SparseBlock) -> dict[int, int]:
        """Count the neurons by expert."""
        if self.neurons is None:
            return dict.fromkeys(self.experts, block.intermediate_size)
        return {expert: len(own) for expert, own in zip(self.experts, self.neurons, strict=True)}


@REFIT_NEURONS.register("experts", "the whole experts of the plan")
def whole_experts(kept: CondensedLayer, examples: LayerExamples, gates: TokenGates | None = None) -> NeuronChoice:
    """Choose the experts of the plan."""
    return NeuronChoice(kept.experts, kept.gates).gated(gates)


@REFIT_NEURONS.register(
    "energy", "the routed neurons with the most energy, gate² · activation² · ‖down column‖²; no expert search"
)
def neurons_of_most_energy(
    kept: CondensedLayer, examples: LayerExamples, gates: TokenGates | None = None
) -> NeuronChoice:
    """Choose as many routed neurons as the plan's experts have, those with the most energy.

    The energy is the sum over the tokens routed to the neuron's expert of the squared size of its output.

    Args:
        kept (`CondensedLayer`): The plan's layer, a budget here.
        examples (`LayerExamples`): The layer on all calibration batches.
        gates (`TokenGates`, *optional*): Gates per token of all experts, by which activations are multiplied.
    """
    pool = NeuronPool(kept, examples, gates)
    return pool.choice(pool.of_most_energy(pool.number).sort().values)


@REFIT_NEURONS.register(
    "least_squares",
    "the routed neurons that explain the target best, by forward orthogonal least squares; no expert search",
    "Chen et al. 1989, Int. J. Control 50(5)",
)
def neurons_by_least_squares(
    kept: CondensedLayer, examples: LayerExamples, gates: TokenGates | None = None
) -> NeuronChoice:
    """Choose as many routed neurons as the plan's experts have, by forward orthogonal least squares.

    The candidates are twice as many neurons, those with the most energy. Each round adds those with which a linear
    function of all chosen activations (and the shared expert's) comes closest to the target, on the tokens to fit on.

    Args:
        kept (`CondensedLayer`): The plan's layer, a budget here.
        examples (`LayerExamples`): The layer on all calibration batches.
        gates (`TokenGates`, *optional*): Gates per token of all experts, by which activations are multiplied.
    """
    pool = NeuronPool(kept, examples, gates)
    candidates = pool.of_most_energy(CANDIDATES * pool.number).sort().values
    if len(candidates) <= pool.number:
        return pool.choice(candidates)
    mlp = pool.choice(candidates).fold(examples.block, examples.beside is not None)
    products, with_target = activation_products(mlp, examples)
    given = len(products) - len(candidates)
    chosen = forward_least_squares(products, with_target, given, pool.number).sort().values
    return pool.choice(candidates[chosen.to(candidates.device)])


class NeuronPool:
    """All routed neurons of a layer, with their energies and the gates of their experts.

    An expert of the plan has its gate there; another one has the mean router weight over the tokens that chose it, as
    in Eq. 2. Experts that are neither in the plan nor chosen by a token have no gate, and their neurons are left out.

    Args:
        kept (`CondensedLayer`): The plan's layer.
        examples (`LayerExamples`): The layer on all calibration batches.
        gates (`TokenGates`, *optional*): Gates per token of all experts.
    """

    def __init__(self, kept: CondensedLayer, examples: LayerExamples, gates: TokenGates | None = None) -> None:
        self.token_gates = gates
        self.block = block = examples.block
        self.number = kept.dense_neurons(block.intermediate_size)
        sums = torch.zeros(2, block.num_experts, dtype=torch.float64, device=block.device)
        self.energies = sums.new_zeros(block.num_experts, block.intermediate_size)
        for batch in range(len(examples)) if self.number else ():
            self._add(*examples.routed(batch), sums)
        examples.processes.add_up(sums, self.energies)
        for expert in range(block.num_experts):
            down = block.pieces([expert], [1.0])[-1].weights.down
            self.energies[expert] *= down.double().square().sum(0)
        weights, counts = sums
        means = (weights / counts.clamp_min(1)).tolist()
        self.counts = counts
        self.gates = dict(enumerate(means)) | dict(zip(kept.experts, kept.gates, strict=True))
        self.open = counts > 0
        self.open[kept.experts] = True
        self.staying = torch.tensor(kept.routed or [], dtype=torch.int64, device=block.device)
        self.open[self.staying] = False
        self.fills = kept.width is not None

    def _add(self, inputs: Tensor, experts: Tensor, weights: Tensor, sums: Tensor) -> None:
        """Add a batch: inputs `[T, H]`, chosen experts and router weights `[T, k]`."""
        for expert in range(self.block.num_experts):
            tokens, places = (experts == expert).nonzero(as_tuple=True)
            gates = weights[tokens, places]
            sums[:, expert] += torch.stack([gates.double().sum(), gates.new_tensor(len(gates)).double()])
            if len(gates):
                activations = self.block.expert_activations(expert, inputs[tokens], gates)
                self.energies[expert] += activations.double().square().sum(0)

    def of_most_energy(self, number: int) -> Tensor:
        """Return the indices of the neurons with the most energy, the highest first; at most as many as there are.

        Neuron j of expert e has the index `e * I + j`. Those without a gate come last, if a width must be reached.
        """
        size = self.block.intermediate_size
        order = highest_first(self.energies.where(self.open[:, None], -1.0).flatten())
        order = order[~torch.isin(order // size, self.staying)]
        available = len(order) if self.fills else int(self.open.sum()) * size
        return order[: min(number, available)]

    def choice(self, indices: Tensor) -> NeuronChoice:
        """Return the choice of neurons by their indices."""
        of, neurons = indices // self.block.intermediate_size, indices % self.block.intermediate_size
        experts = of.unique().tolist()
        own = NeuronChoice(experts, [self.gates[e] for e in experts], [neurons[of == e] for e in experts])
        return own.gated(self.token_gates)


@torch.no_grad()
def activation_products(mlp: CondensedMLP, examples: LayerExamples) -> tuple[Tensor, Tensor]:
    """Compute the weighted products of a layer's activations with each other and with the target, over tokens to fit.

    Returns:
        float64 `[W, W]` and `[W, H]`. With a bias of the output, a constant 1 comes before the activations.
    """
    number = mlp.intermediate_size + int(mlp.down_proj.bias is not None)
    sums = Sums.zeros(number, mlp.hidden_size, 1, mlp.down_proj.weight.device)
    for batch in range(len(examples)):
        for part in examples.fit(batch).split(mlp.intermediate_size):
            sums.add(regressors(mlp, part.inputs), part.target.double(), part.weights.double())
    examples.processes.add_up(sums.products, sums.with_target)
    return sums.products, sums.with_target


def forward_least_squares(
    products: Tensor, with_target: Tensor, given: int, number: int, together: int | None = None
) -> Tensor:
    """Choose regressors by forward orthogonal least squares: those that reduce the squared error most.

    A regressor's gain is the reduction by adding it to the chosen ones. Of the regressors with the highest gains, some
    are chosen one by one (so that two alike are not both taken), before the gains of all others are computed again.

    This is a Cholesky factorisation with pivots, in place, so that it needs no memory beside the products. Of the given
    and chosen regressors, in the order of their choice, the lower triangle still has the products at the end.

    Args:
        products (`Tensor`): float64 `[M, M]`, products of the M regressors with each other; overwritten.
        with_target (`Tensor`): float64 `[M, H]`, products with the target; overwritten.
        given (`int`): The first regressors are chosen already.
        number (`int`): How many of the others to choose.
        together (`int`, *optional*): How many to choose before all gains are computed again; a 36th by default.

    Returns:
        `Tensor`: Indices of the chosen ones, counted from the first that is not given, in the order of their choice.
    """
    together = max(1, number // _ROUNDS) if together is None else together
    size = len(products)
    diagonal = products.diagonal().clone()
    products.diagonal().add_(_RIDGE * diagonal.mean().clamp_min(1e-30))
    left = products.diagonal().clone()  # what the chosen ones leave of each regressor
    order = torch.arange(size, device=products.device)
    for start in range(0, given, _BLOCK):
        _eliminate(products, with_target, left, start, min(start + _BLOCK, given))
    for start in range(given, given + number, together):
        end = min(start + together, given + number)
        places = _best(products, with_target, left, order, start, end - start)
        first = torch.arange(start, end, device=order.device)
        moved = torch.cat([places, first[~torch.isin(first, places)]])
        to = torch.cat([first, places[places >= end]])
        for rows in (products, with_target, left, order):
            rows[to] = rows[moved]
        products[:, to] = products[:, moved]
        _eliminate(products, with_target, left, start, end)
    products.diagonal().copy_(diagonal[order])
    return order[given : given + number] - given


def highest_first(scores: Tensor) -> Tensor:
    """Return the indices in descending order of scores. Equal ones, to six digits, are in the order of their index.

    Rounding depends on a column's position in a matrix product, and copies of a neuron in two experts should tie.
    """
    return (scores.double().log2() * 2**20).round().nan_to_num(nan=-torch.inf).argsort(descending=True, stable=True)


def _best(products: Tensor, with_target: Tensor, left: Tensor, order: Tensor, start: int, few: int) -> Tensor:
    """Choose a few regressors one by one, from twice as many with the highest gains; return their places.

    Equal gains are in the order of the regressors' indices, wherever they are by now.
    """
    by_index = order[start:].argsort()
    gains = _gains(with_target[start:], left[start:])[by_index]
    pool = by_index[highest_first(gains)[: _POOL * few]] + start
    own = products[:start, pool]
    small, target = products[pool[:, None], pool] - own.T @ own, with_target[pool]
    small.diagonal().copy_(left[pool])
    chosen, taken = [], torch.zeros_like(pool, dtype=torch.bool)
    for _ in range(few):
        best = highest_first(_gains(target, small.diagonal()).where(~taken, -1.0))[:1]
        taken[best] = True
        chosen.append(pool[best])
        row, of_target = small[best], target[best]
        factor = row.T / row[:, best]
        small.addmm_(factor, row, alpha=-1)
        target.addmm_(factor, of_target, alpha=-1)
    return torch.cat(chosen)


def _gains(with_target: Tensor, left: Tensor) -> Tensor:
    return with_target.square().sum(1) / left


def _eliminate(products: Tensor, with_target: Tensor, left: Tensor, start: int, end: int) -> None:
    """Put the next rows of the factor into the upper triangle, and subtract what they explain of all others."""
    rows, size = products[start:end, start:], end - start
    new = rows - products[:start, start:end].T @ products[:start, start:]
    own = torch.linalg.cholesky(new[:, :size])
    new = torch.linalg.solve_triangular(own, new, upper=False)
    target = torch.linalg.solve_triangular(own, with_target[start:end], upper=False)
    rows[:, size:] = new[:, size:]
    rows[:, :size].tril_(-1).add_(own.T)
    left[end:] -= new[:, size:].square().sum(0)
    with_target[end:].addmm_(new[:, size:].T, target, alpha=-1)
