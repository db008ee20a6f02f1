"""The errors of one sparse layer in all forms that it may take, measured on calibration tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ...blocks import SparseBlock
from ...condense.refit import LayerExamples
from ...condense.refit.examples import Example
from ...condense.refit.neurons import CANDIDATES, NeuronPool, forward_least_squares
from ...condense.refit.ridge import inner_activations
from ...model.layers_cdmoe import CondensedMLP
from ...spread import Curve
from .errors import Sums, fits_along

# Families are measured together if the sums over both sets of tokens need no more memory.
_MOST_BYTES = 5 * 2**30


class Routed(Protocol):
    """The experts of a layer that stay behind the router."""

    def __call__(self, x: Tensor) -> Tensor:
        """Compute their output for inputs `[T, H]`, float32 `[T, H]`."""

    def gate(self, x: Tensor) -> Tensor | None:
        """Compute the factor of all dense neurons beside them, `[T, 1]`; None for 1."""


@dataclass(frozen=True)
class Family:
    """The forms of a layer with the same experts behind the router.

    Args:
        stay (`list[int]`): These experts.
        widths (`list[int]`): Numbers of dense neurons, ascending.
        parameters (`int`): Parameters of the layer without dense neurons.
        routed (`Callable`, *optional*): Computes their output; None if none stays.
    """

    stay: list[int]
    widths: list[int]
    parameters: int
    routed: Routed | None = None


# From a sparse block and the order in which its experts stay to the forms to measure, first those without any.
Families = Callable[[SparseBlock, Sequence[int]], list[Family]]


@torch.no_grad()
def measure_layer(
    examples: LayerExamples, pool: NeuronPool, families: Sequence[Family], by_least_squares: bool
) -> tuple[list[Curve], CondensedMLP]:
    """Measure the held-out errors of all forms of a layer.

    The candidates of a family are twice as many neurons of the experts that do not stay as its largest width, those
    with the most energy. One order of them, by forward orthogonal least squares against the part of the target that the
    staying experts do not give, serves all widths.

    Args:
        examples (`LayerExamples`): The layer on all calibration batches, with the sparse block's output as its target.
        pool (`NeuronPool`): Its neurons.
        families (`Sequence[Family]`): The forms, first those in which no expert stays.
        by_least_squares (`bool`): Whether neurons are in the order of least squares, or in that of their energies.

    Returns:
        The errors of each family, relative to the size of the target, and the widest condensed layer, fitted.
    """
    by_energy = pool.of_most_energy(pool.number)
    candidates = [_candidates(by_energy, family, examples.block.intermediate_size) for family in families]
    curves: list[Curve] = []
    target, widest = 1.0, None
    for places in _together(candidates, families, examples.block):
        union = torch.cat([candidates[place] for place in places]).unique()
        mlp = pool.choice(union).fold(examples.block).float()
        prior, bias = mlp.down_proj.weight.T.double(), mlp.down_proj.bias
        prior = prior if bias is None else torch.cat([bias[None].double(), prior])
        given = len(prior) - len(union)
        for place, (fit, held_out) in zip(places, _sums(examples, mlp, [families[i] for i in places]), strict=True):
            family = families[place]
            own = torch.searchsorted(union, candidates[place]) + given
            order = _ordered(fit, own, given, family, by_least_squares)
            fits = fits_along(order, [given + width for width in family.widths], fit, held_out, prior)
            if widest is None:
                target = float(held_out.size.clamp_min(1e-30))
                widest = _condensed(examples, pool, union[order[given:] - given], fits.last)
            errors = [float(f"{error / target:.6g}") for error in fits.errors]
            curves.append(Curve(len(family.stay), family.parameters, family.widths, errors))
    assert widest is not None
    return curves, widest


def _together(candidates: Sequence[Tensor], families: Sequence[Family], block: SparseBlock) -> list[list[int]]:
    """Divide families, in their order, into groups with the same activations whose sums fit into memory together."""
    groups: list[list[int]] = [[]]
    union = candidates[0][:0]
    for place, own in enumerate(candidates):
        both = torch.cat([union, own]).unique()
        size = 16 * len(both) * (len(both) + block.hidden_size * (len(groups[-1]) + 1))
        # With a gate of the shared expert, neurons beside a router have other factors than in a condensed layer.
        other = block.shared_gate is not None and families[place - 1].routed is None
        if groups[-1] and (other or size > _MOST_BYTES):
            groups.append([])
            both = own
        groups[-1].append(place)
        union = both
    return groups


def _candidates(by_energy: Tensor, family: Family, size: int) -> Tensor:
    """Select the neurons with the most energy of experts that do not stay."""
    stay = torch.tensor(family.stay, device=by_energy.device, dtype=torch.int64)
    left = by_energy[~torch.isin(by_energy // size, stay)]
    return left[: CANDIDATES * family.widths[-1]]


def _ordered(sums: Sums, places: Tensor, given: int, family: Family, by_least_squares: bool) -> Tensor:
    """Put the given regressors, then the best of those at some places, in the order of their choice."""
    number = family.widths[-1]
    first = torch.arange(given, device=places.device)
    if by_least_squares and number < len(places):
        places = places.sort().values
        index = torch.cat([first, places])
        both = torch.cat([sums.products[index][:, index], sums.with_target[index]], 1)
        places = places[forward_least_squares(both, given, number)]
    return torch.cat([first, places[:number]])


def _sums(examples: LayerExamples, mlp: CondensedMLP, families: Sequence[Family]) -> Iterator[tuple[Sums, Sums]]:
    """Yield the sums of families over tokens to fit on, and over held-out tokens. They share products of activations.

    Args:
        examples (`LayerExamples`): The layer.
        mlp (`CondensedMLP`): The candidates of all families, as a condensed layer.
        families (`Sequence[Family]`): The families. Their targets are what their routed experts do not give.
    """
    width, features = mlp.intermediate_size + int(mlp.down_proj.bias is not None), mlp.hidden_size
    device = mlp.down_proj.weight.device
    found = [Sums.zeros(width, len(families) * features, len(families), device) for _ in range(2)]
    for pair in examples.both():
        for sums, example in zip(found, pair, strict=True):
            for some in example.split(mlp.intermediate_size + len(families) * features):
                targets = torch.cat([_missing(family, some) for family in families], 1)
                sums.add(_regressors(mlp, some.inputs, families[0].routed), targets, some.weights.double())
    for sums in found:
        examples.processes.add_up(sums.products, sums.with_target, sums.size)
    yield from zip(*(sums.apart() for sums in found), strict=True)


def _missing(family: Family, example: Example) -> Tensor:
    """Compute what the routed experts do not give, float64 `[T, H]`."""
    target = example.target.double()
    return target if family.routed is None else target - family.routed(example.inputs).double()


def _regressors(mlp: CondensedMLP, inputs: Tensor, routed: Routed | None) -> Tensor:
    """Compute the activations of a layer, float64 `[T, W]`; with a bias of its output, after a constant 1."""
    inner = inner_activations(mlp, inputs.float()).double()
    gate = None if routed is None else routed.gate(inputs)
    if gate is not None:  # the shared expert's activations have it already
        shared = mlp.shared_intermediate_size
        inner = torch.cat([inner[:, :shared], inner[:, shared:] * gate.double()], 1)
    return torch.cat([inner.new_ones(len(inner), int(mlp.down_proj.bias is not None)), inner], 1)


def _condensed(examples: LayerExamples, pool: NeuronPool, neurons: Tensor, coefficients: Tensor) -> CondensedMLP:
    """Fold neurons, and set the down projection of them and of the shared expert's."""
    ranks = neurons.argsort()
    mlp = pool.choice(neurons[ranks]).fold(examples.block)
    given = len(coefficients) - len(neurons)
    coefficients = torch.cat([coefficients[:given], coefficients[given:][ranks]]).to(mlp.down_proj.weight.dtype)
    if mlp.down_proj.bias is not None:
        mlp.down_proj.bias.copy_(coefficients[0])
        coefficients = coefficients[1:]
    mlp.down_proj.weight.copy_(coefficients.T)
    return mlp
