"""The errors of one sparse layer in all forms that it may take, measured on calibration tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ...blocks import SparseBlock
from ...condense.refit import LayerExamples
from ...condense.refit.examples import Example
from ...condense.refit.neurons import CANDIDATES, NeuronPool, forward_least_squares
from ...condense.refit.ridge import coefficients, regressors, set_coefficients
from ...condense.refit.sums import Sums
from ...model.layers_cdmoe import CondensedMLP
from ...spread import Curve
from .errors import fits_along

# Families are measured together if their sums need no more memory.
_MOST_BYTES = 2**30


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
        dense (`bool`, defaults to `True`): Whether there is a dense part, whose output may have a bias. Without a
            shared expert, there is none if its width is 0.
    """

    stay: list[int]
    widths: list[int]
    parameters: int
    routed: Routed | None = None
    dense: bool = True


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
    candidates = [_candidates(by_energy, family, examples.block, by_least_squares) for family in families]
    curves: list[Curve] = []
    target, widest = 1.0, None
    for places in _together(candidates, families, examples.block):
        group = [families[place] for place in places]
        found = _fit(examples, pool, group, [candidates[place] for place in places], by_least_squares)
        for family, (errors, size, layer) in zip(group, found, strict=True):
            if widest is None:
                target, widest = size, layer
            relative = [float(f"{error / target:.6g}") for error in errors]
            curves.append(Curve(len(family.stay), family.parameters, family.widths, relative))
    assert widest is not None
    return curves, widest


def _fit(
    examples: LayerExamples,
    pool: NeuronPool,
    families: Sequence[Family],
    candidates: Sequence[Tensor],
    by_least_squares: bool,
) -> list[tuple[list[float], float, CondensedMLP | None]]:
    """Fit families of a layer that share the activations of their neurons.

    Returns:
        For each family its errors, the size of the held-out target, and, if no expert stays, the widest layer.
    """
    chosen = _choose(examples, pool, families, candidates, by_least_squares)
    union = torch.cat([neurons for neurons, _ in chosen]).unique()
    mlp, left = _sums(examples, pool, union, families, LayerExamples.held_out)
    prior, constants = coefficients(mlp), int(mlp.down_proj.bias is not None)
    del mlp
    found = []
    for family, (neurons, fit) in zip(families, chosen, strict=True):
        order = _places(family, neurons, union, len(prior))
        numbers = [len(order) - len(neurons) + width for width in family.widths]
        held_out = left.pop(0).of(order)
        fits = fits_along(numbers, fit, held_out, prior[order], constants if family.dense else 0)
        layer = _condensed(examples, pool, neurons, fits.last) if family.routed is None else None
        found.append((fits.errors, float(held_out.size.clamp_min(1e-30)), layer))
    return found


def _places(family: Family, neurons: Tensor, union: Tensor, width: int) -> Tensor:
    """Return the places of a family's regressors: those before all neurons, if it has a dense part, and its neurons."""
    given = width - len(union)
    places = torch.searchsorted(union, neurons) + given
    return torch.cat([torch.arange(given, device=places.device), places]) if family.dense else places


def _together(candidates: Sequence[Tensor], families: Sequence[Family], block: SparseBlock) -> list[list[int]]:
    """Divide families, in their order, into groups with the same activations whose sums fit into memory together."""
    groups: list[list[int]] = [[]]
    union, own = candidates[0][:0], 0
    for place, some in enumerate(candidates):
        both = torch.cat([union, some]).unique()
        own += len(some) ** 2
        size = 8 * (len(both) * (len(both) + block.hidden_size * (len(groups[-1]) + 1)) + own)
        # With a gate of the shared expert, neurons beside a router have other factors than in a condensed layer.
        other = block.shared_gate is not None and families[place - 1].routed is None
        if groups[-1] and (other or size > _MOST_BYTES):
            groups.append([])
            both, own = some, len(some) ** 2
        groups[-1].append(place)
        union = both
    return groups


def _candidates(by_energy: Tensor, family: Family, block: SparseBlock, by_least_squares: bool) -> Tensor:
    """Select the neurons with the most energy of experts that do not stay."""
    stay = torch.tensor(family.stay, device=by_energy.device, dtype=torch.int64)
    left = by_energy[~torch.isin(by_energy // block.intermediate_size, stay)]
    number = family.widths[-1]
    return left[: CANDIDATES * number].sort().values if by_least_squares else left[:number]


def _choose(
    examples: LayerExamples,
    pool: NeuronPool,
    families: Sequence[Family],
    candidates: Sequence[Tensor],
    by_least_squares: bool,
) -> list[tuple[Tensor, Sums]]:
    """Put the neurons of families into an order that serves all widths.

    Returns:
        For each family the neurons, in this order, and the sums over tokens to fit on.
    """
    union = torch.cat(list(candidates)).unique()
    left = _sums(examples, pool, union, families, LayerExamples.fit)[1]
    chosen = []
    for family, own in zip(families, candidates, strict=True):
        sums, number = left.pop(0), family.widths[-1]
        places = _places(family, own, union, len(sums.products))
        if len(families) > 1 or not by_least_squares:
            sums = sums.of(places)
        if by_least_squares:
            given = len(places) - len(own)
            order = forward_least_squares(sums.products, sums.with_target.clone(), given, number)
            own, order = own[order], torch.cat([torch.arange(given, device=order.device), order + given])
            # A part of the products as a copy, so that the rest is not kept.
            sums = Sums(sums.products[: len(order), : len(order)].clone(), sums.with_target[order], sums.size)
        chosen.append((own, sums))
    return chosen


def _sums(
    examples: LayerExamples,
    pool: NeuronPool,
    neurons: Tensor,
    families: Sequence[Family],
    part: Callable[[LayerExamples, int], Example],
) -> tuple[CondensedMLP, list[Sums]]:
    """Compute the sums of families over tokens to fit on or over held-out ones. They share products of activations.

    Args:
        examples (`LayerExamples`): The layer.
        pool (`NeuronPool`): Its neurons.
        neurons (`Tensor`): Those of all families.
        families (`Sequence[Family]`): The families. Their targets are what their routed experts do not give.
        part (`Callable`): Which tokens of a batch.

    Returns:
        The folded layer, in float32, and the sums of each family.
    """
    mlp = pool.choice(neurons).fold(examples.block).float()
    width, features = mlp.intermediate_size + int(mlp.down_proj.bias is not None), mlp.hidden_size
    sums = Sums.zeros(width, len(families) * features, len(families), mlp.down_proj.weight.device)
    for batch in range(len(examples)):
        for some in part(examples, batch).split(mlp.intermediate_size + len(families) * features):
            targets = torch.cat([_missing(family, some) for family in families], 1)
            sums.add(_regressors(mlp, some.inputs, families[0].routed), targets, some.weights.double())
    examples.processes.add_up(sums.products, sums.with_target, sums.size)
    return mlp, list(sums.apart())


def _missing(family: Family, example: Example) -> Tensor:
    """Compute what the routed experts do not give, float64 `[T, H]`."""
    target = example.target.double()
    return target if family.routed is None else target - family.routed(example.inputs).double()


def _regressors(mlp: CondensedMLP, inputs: Tensor, routed: Routed | None) -> Tensor:
    """Compute the regressors of a layer, float64 `[T, W]`, with the factor that routed experts give to its neurons."""
    inner = regressors(mlp, inputs.float())
    gate = None if routed is None else routed.gate(inputs)
    if gate is not None:  # the shared expert's activations have it already
        shared = inner.shape[1] - mlp.intermediate_size + mlp.shared_intermediate_size
        inner = torch.cat([inner[:, :shared], inner[:, shared:] * gate.double()], 1)
    return inner


def _condensed(examples: LayerExamples, pool: NeuronPool, neurons: Tensor, values: Tensor) -> CondensedMLP:
    """Fold neurons, and set the coefficients of them and of the shared expert's."""
    ranks = neurons.argsort()
    mlp = pool.choice(neurons[ranks]).fold(examples.block)
    given = len(values) - len(neurons)
    set_coefficients(mlp, torch.cat([values[:given], values[given:][ranks]]))
    return mlp
