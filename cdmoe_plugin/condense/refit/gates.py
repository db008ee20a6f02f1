"""Gates per token for the experts of a refitted layer, from the choices of its router."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..fold import TokenGates
from .examples import LayerExamples

# Each with one pass over the tokens.
_STEPS = 8
# Relative to the mean square of an input.
_RIDGE = 1e-3


@torch.no_grad()
def fit_token_gates(examples: LayerExamples) -> TokenGates:
    """Fit a gate per token for every routed expert: `sigmoid(w · x + b)`, the probability that the router chooses it.

    These are logistic regressions on the layer's inputs, regardless of the kind of router. All experts share one
    curvature, which no likelihood exceeds, so that each step increases it (Böhning 1992, Ann. Inst. Statist. Math. 44).
    Few steps also keep weights small where the choice is a linear function of the inputs.

    Args:
        examples (`LayerExamples`): The layer on all calibration batches; held-out sequences are not used.

    Returns:
        `TokenGates`: Those of all N experts, float64.
    """
    block, size = examples.block, examples.block.hidden_size + 1
    products = torch.zeros(size, size, dtype=torch.float64, device=block.device)
    chosen = products.new_zeros(block.num_experts)
    for inputs, choices in _choices(examples):
        products.addmm_(inputs.T, inputs)
        chosen += choices.sum(0)
    examples.processes.add_up(products, chosen)
    tokens = products[-1, -1].clone()
    products.diagonal().add_(_RIDGE * products.diagonal().mean())
    curvature = torch.linalg.cholesky(products / 4)
    mean = (chosen + 0.5) / (tokens + 1)  # never 0 or 1
    weight = products.new_zeros(block.num_experts, size)
    weight[:, -1] = torch.logit(mean)
    for _ in range(_STEPS):
        gradient = torch.zeros_like(weight)
        for inputs, choices in _choices(examples):
            gradient.addmm_((choices - torch.sigmoid(inputs @ weight.T)).T, inputs)
        examples.processes.add_up(gradient)
        weight += torch.cholesky_solve(gradient.T, curvature).T
    return TokenGates(weight[:, :-1], weight[:, -1], mean)


def _choices(examples: LayerExamples) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs with a constant 1, `[T, H + 1]`, and whether they choose each expert, `[T, N]`, both float64."""
    for batch in range(len(examples)):
        for inputs, experts in examples.choices_to_fit(batch):
            chosen = torch.zeros(len(inputs), examples.block.num_experts, dtype=torch.float64, device=inputs.device)
            ones = torch.ones_like(inputs[:, :1])
            yield torch.cat([inputs, ones], 1).double(), chosen.scatter_(1, experts, 1.0)
