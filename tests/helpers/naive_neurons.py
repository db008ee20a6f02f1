"""The choice of neurons for a refit, written a second time: float64, one neuron after the other, nothing clever.

Regressors are columns of a matrix with one row for each token, and what a regressor explains is subtracted from all
others (Gram and Schmidt). Like `naive`, none of it comes from the package.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.helpers.naive import Glu, naive_glus

Routes = list[dict[int, float]]  # by token: its experts and their weights


class Neurons(NamedTuple):
    """The routed neurons of one layer, N * I of them: how they see a token, and what they add to the output."""

    activations: Tensor  # [T, N * I], float64
    down: Tensor  # [H, N * I]
    width: int


def naive_neurons(model: PreTrainedModel, block: Any, layer: int, x: Tensor) -> Neurons:
    """All routed neurons for tokens `x` `[T, H]`, of blocks with a weight `gate_up_proj` and `down_proj`."""
    glu, experts = naive_glus(model.config, layer)[0], block.experts
    seen = [naive_activations(experts, expert, x, glu) for expert in range(len(experts.down_proj))]
    transposed = type(experts).__name__ == "GptOssExperts"
    downs = [down.double().T if transposed else down.double() for down in experts.down_proj]
    return Neurons(torch.cat(seen, 1), torch.cat(downs, 1), seen[0].shape[1])


def naive_activations(experts: Any, expert: int, x: Tensor, glu: Glu) -> Tensor:
    """`[T, I]` of one expert."""
    gate_up = experts.gate_up_proj[expert].double()
    if type(experts).__name__ == "GptOssExperts":  # transposed, with biases, gate and up in turn
        inner = x.double() @ gate_up + experts.gate_up_proj_bias[expert].double()
        return glu(inner[:, ::2], inner[:, 1::2])
    return glu(*(x.double() @ gate_up.T).chunk(2, -1))


def naive_energies(neurons: Neurons, routes: Routes) -> list[float]:
    """By neuron: the sum of gate² · activation² · ‖down column‖² over the tokens that chose its expert."""
    energies = [0.0] * neurons.down.shape[1]
    sizes = [float(column.square().sum()) for column in neurons.down.T]
    for token, route in enumerate(routes):
        for expert, gate in route.items():
            for j in range(expert * neurons.width, (expert + 1) * neurons.width):
                energies[j] += gate**2 * float(neurons.activations[token, j]) ** 2 * sizes[j]
    return energies


def most(energies: list[float], number: int) -> list[int]:
    """The indices of the highest ones, in ascending order."""
    return sorted(sorted(range(len(energies)), key=lambda j: (-energies[j], j))[:number])


def naive_least_squares(
    columns: Tensor, target: Tensor, weights: Tensor, given: int, number: int, together: int = 1
) -> list[int]:
    """The columns after the `given` ones that forward orthogonal least squares chooses, counted from the first.

    The ridge is as many further rows as there are columns. `together` columns are chosen one by one from the
    `2 * together` best of each round.
    """
    roots = weights.double().sqrt()[:, None]
    a, y = columns.double() * roots, target.double() * roots
    ridge = (1e-3 * a.square().sum(0).mean()).sqrt()
    left = torch.cat([a, ridge * torch.eye(a.shape[1], dtype=torch.float64)])
    y = torch.cat([y, torch.zeros(a.shape[1], y.shape[1], dtype=torch.float64)])

    def without(matrix: Tensor, j: int) -> Tensor:
        direction = matrix[:, j] / matrix[:, j].norm()
        return matrix - torch.outer(direction, direction @ matrix)

    def gain(matrix: Tensor, j: int) -> float:
        return float(((matrix[:, j] / matrix[:, j].norm()) @ y).square().sum())

    for j in range(given):
        left = without(left, j)
    chosen: list[int] = []
    while len(chosen) < number:
        few = min(together, number - len(chosen))
        others = [j for j in range(given, a.shape[1]) if j not in chosen]
        pool = sorted(others, key=lambda j: -gain(left, j))[: 2 * few]
        inside, taken = left, []
        for _ in range(few):
            best = max((j for j in pool if j not in taken), key=lambda j: gain(inside, j))
            taken.append(best)
            inside = without(inside, best)
        left, chosen = inside, chosen + taken
    return sorted(j - given for j in chosen)
