"""The forms that a model's sparse layers may take, their errors and sizes, and the best choice for a given size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from .checks import read_list, read_object, read_real, read_whole
from .knapsack import cheapest


class Choice(NamedTuple):
    """One form of a sparse layer.

    Args:
        routed (`int`): Number of experts that stay behind the router; all of them for an untouched layer.
        width (`int`): Number of dense neurons beside those of the shared expert.
    """

    routed: int
    width: int


@dataclass(frozen=True)
class Curve:
    """The errors of one layer with a number of experts behind the router, by its number of dense neurons.

    Args:
        routed (`int`): Number of experts that stay; 0 for a condensed layer.
        parameters (`int`): Parameters of the layer's sparse block without dense neurons.
        widths (`list[int]`): Numbers of dense neurons, ascending.
        errors (`list[float]`): Squared errors on held-out calibration tokens, relative to the size of the target.
    """

    routed: int
    parameters: int
    widths: list[int]
    errors: list[float]

    @classmethod
    def from_dict(cls, values: Any, where: str) -> Curve:
        fields = read_object(values, where, cls.__dataclass_fields__)
        widths = [read_whole(each, f"{where}.widths") for each in read_list(fields["widths"], f"{where}.widths")]
        errors = [read_real(each, f"{where}.errors") for each in read_list(fields["errors"], f"{where}.errors")]
        if len(widths) != len(errors) or widths != sorted(set(widths)) or not widths:
            raise ValueError(f"`{where}` should have an error for each of its `widths`, which ascend.")
        routed, parameters = (read_whole(fields[name], f"{where}.{name}") for name in ("routed", "parameters"))
        return cls(routed, parameters, widths, errors)


@dataclass(frozen=True)
class LayerCurves:
    """The forms that one sparse layer may take.

    Args:
        layer (`int`): Decoder layer index.
        num_experts (`int`): Number N of its routed experts.
        parameters (`int`): Parameters of its sparse block.
        neuron (`int`): Parameters of one dense neuron.
        sensitivity (`float`): How much a relative error of 1 would change the model's output.
        experts (`list[int]`): Its routed experts in the order in which they stay.
        curves (`list[Curve]`): Its errors, by number of experts that stay. There may be two with the same number, for
            different widths.
    """

    layer: int
    num_experts: int
    parameters: int
    neuron: int
    sensitivity: float
    experts: list[int]
    curves: list[Curve]

    @classmethod
    def from_dict(cls, values: Any, where: str = "spread.layers") -> LayerCurves:
        fields = read_object(values, where, cls.__dataclass_fields__)
        names = ("layer", "num_experts", "parameters", "neuron")
        layer, count, parameters, neuron = (read_whole(fields[name], f"{where}.{name}") for name in names)
        experts = [read_whole(e, f"{where}.experts") for e in read_list(fields["experts"], f"{where}.experts")]
        if len(set(experts)) < len(experts) or any(expert >= count for expert in experts):
            raise ValueError(f"`{where}.experts` should name some of {count} experts once, but is {experts}.")
        rows = read_list(fields["curves"], f"{where}.curves")
        curves = [Curve.from_dict(row, f"{where}.curves[{i}]") for i, row in enumerate(rows)]
        if not curves or any(curve.routed > len(experts) for curve in curves):
            raise ValueError(f"`{where}.curves` should be for at most {len(experts)} experts that stay, and not empty.")
        sensitivity = read_real(fields["sensitivity"], f"{where}.sensitivity")
        return cls(layer, count, parameters, neuron, sensitivity, experts, curves)

    @property
    def untouched(self) -> Choice:
        return Choice(self.num_experts, 0)

    def options(self) -> dict[Choice, tuple[float, int]]:
        """Return the effect on the model's output and the parameters of every form, the largest first."""
        found = {self.untouched: (0.0, self.parameters)}
        for curve in sorted(self.curves, key=lambda curve: -curve.routed):
            for width, error in zip(reversed(curve.widths), reversed(curve.errors), strict=True):
                size = curve.parameters + width * self.neuron
                found[Choice(curve.routed, width)] = (max(self.sensitivity, 0.0) * error, size)
        return found

    def error(self, choice: Choice) -> float:
        """Return the error of a form, relative to the size of the layer's output."""
        if choice == self.untouched:
            return 0.0
        same = (curve for curve in self.curves if curve.routed == choice.routed and choice.width in curve.widths)
        curve = next(same)
        return curve.errors[curve.widths.index(choice.width)]

    def stay(self, number: int) -> list[int] | None:
        """Return the experts that stay, in ascending order; None if there is none."""
        return sorted(self.experts[:number]) or None


@dataclass(frozen=True)
class Spread:
    """The forms that every sparse layer of a model may take.

    Args:
        parameters (`int`): Parameters of the sparse model.
        itemsize (`int`): Bytes of one in the dtype of the search.
        layers (`list[LayerCurves]`): Its sparse layers, by depth.
    """

    parameters: int
    itemsize: int
    layers: list[LayerCurves]

    @classmethod
    def from_dict(cls, values: Any) -> Spread:
        fields = read_object(values, "spread", cls.__dataclass_fields__)
        rows = read_list(fields["layers"], "spread.layers")
        layers = [LayerCurves.from_dict(row, f"spread.layers[{i}]") for i, row in enumerate(rows)]
        numbers = [layer.layer for layer in layers]
        if not layers or numbers != sorted(set(numbers)):
            raise ValueError(f"`spread.layers` should name decoder layers once, by depth, but names {numbers}.")
        parameters, itemsize = (read_whole(fields[name], f"spread.{name}") for name in ("parameters", "itemsize"))
        return cls(parameters, itemsize, layers)

    def solve(self, parameters: int, alike: bool = False, beside: bool = True) -> dict[int, Choice]:
        """Choose a form for each layer so that the model has at most so many parameters and its output changes least.

        The effects of layers are added up.

        Args:
            parameters (`int`): Parameters of the whole model.
            alike (`bool`, defaults to `False`): Whether all layers take the same form.
            beside (`bool`, defaults to `True`): Whether experts may stay with dense neurons beside them.

        Raises:
            ValueError: if the smallest forms do not fit.
        """
        options = self._options(alike, beside)
        least = self.smallest(alike, beside)
        if parameters < least:
            raise ValueError(
                f"The smallest model that this search can make has {least:,} parameters, {least / self.parameters:.3f} "
                f"of the sparse model's, more than the {parameters:,} asked for."
            )
        if alike:
            return self._solved_alike(options, parameters - self._rest)
        effects = {layer: [effect for effect, _ in own.values()] for layer, own in options.items()}
        costs = {layer: [size for _, size in own.values()] for layer, own in options.items()}
        chosen = cheapest(effects, costs, parameters - self._rest)
        return {layer: list(options[layer])[number] for layer, number in chosen.items()}

    def smallest(self, alike: bool = False, beside: bool = True) -> int:
        """Return the number of parameters of the smallest model, with the arguments of `solve`."""
        options = self._options(alike, beside)
        return self._rest + sum(min(size for _, size in own.values()) for own in options.values())

    @property
    def _rest(self) -> int:
        """The parameters outside of sparse blocks."""
        return self.parameters - sum(layer.parameters for layer in self.layers)

    def _options(self, alike: bool, beside: bool) -> dict[int, dict[Choice, tuple[float, int]]]:
        options = {layer.layer: layer.options() for layer in self.layers}
        if not beside:
            options = {layer: _without_mixtures(own) for layer, own in options.items()}
        return _alike(options) if alike else options

    def _solved_alike(self, options: Mapping[int, Mapping[Choice, tuple[float, int]]], left: int) -> dict[int, Choice]:
        def total(choice: Choice, what: int) -> float:
            return sum(own[choice][what] for own in options.values())

        fitting = [choice for choice in next(iter(options.values())) if total(choice, 1) <= left]
        best = min(fitting, key=lambda choice: total(choice, 0))
        return dict.fromkeys(options, best)

    def effect(self, chosen: Mapping[int, Choice]) -> float:
        """Return the estimated change of the model's output."""
        return sum(layer.options()[chosen[layer.layer]][0] for layer in self.layers)

    def size(self, chosen: Mapping[int, Choice]) -> int:
        """Return the number of parameters of the model in these forms."""
        saved = (layer.parameters - layer.options()[chosen[layer.layer]][1] for layer in self.layers)
        return self.parameters - sum(saved)


def _without_mixtures(own: Mapping[Choice, tuple[float, int]]) -> dict[Choice, tuple[float, int]]:
    return {choice: own[choice] for choice in own if not choice.routed or not choice.width}


def _alike(options: Mapping[int, Mapping[Choice, tuple[float, int]]]) -> dict[int, dict[Choice, tuple[float, int]]]:
    """Keep the forms that all layers may take."""
    common = set.intersection(*(set(own) for own in options.values()))
    return {layer: {choice: own[choice] for choice in own if choice in common} for layer, own in options.items()}
