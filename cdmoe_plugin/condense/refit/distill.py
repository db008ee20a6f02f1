"""Training of a single condensed or mixed layer against its target."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn
from transformers.utils import logging

from ...model.layers_cdmoe import CondensedMLP
from ...registry import MIXED_REFITS, REFITS
from ..mixed import MixedLayer
from .examples import Example, LayerExamples, RefitLayer, held_out_error, size_of, squared_error
from .ridge import refit_down_proj

_TOKENS_PER_STEP = 1024
# Step size of Adam relative to the root mean square of a weight matrix. It does not decay: the weights of the best
# evaluation are kept in any case, and with a cosine the model's divergence was 9 to 25% higher on two small models.
_RELATIVE_RATE = 0.05
# Number of evaluations on held-out tokens; training ends after `_PATIENCE` evaluations without a lower error.
_CHECKS = 10
_PATIENCE = 3


@REFITS.register(
    "distill", "all three projections, and experts behind a router, by Adam, after down_proj", options=("refit_steps",)
)
def distill(mlp: CondensedMLP, examples: LayerExamples, refit_steps: int) -> RefitLayer:
    """Train one condensed layer with Adam, starting from its closed-form refit, with the memory of one block.

    The weights with the lowest error on held-out sequences are kept. Several processes share the tokens of each step.

    Args:
        mlp (`CondensedMLP`): The folded layer, changed in place.
        examples (`LayerExamples`): Inputs and targets.
        refit_steps (`int`): Maximum number of steps.
    """
    solved = refit_down_proj(mlp, examples)
    student = copy.deepcopy(mlp).float()
    error = _train(student, list(student.parameters()), examples, refit_steps)
    mlp.load_state_dict(student.state_dict())
    return RefitLayer(solved.before, min(error, solved.after), solved.strength)


@MIXED_REFITS.register("distill", "the experts that stay, their router and the dense part", options=("refit_steps",))
def distill_mixed(layer: MixedLayer, examples: LayerExamples, refit_steps: int) -> RefitLayer:
    """Train a layer with experts behind its router; the experts, the router and the dense part.

    Float32 copies of the experts, their gradients and Adam's two moments are in memory meanwhile, 16 bytes for each
    parameter.

    Args:
        layer (`MixedLayer`): The layer, changed in place. Its dense part is fitted already.
        examples (`LayerExamples`): Inputs and targets of the whole layer.
        refit_steps (`int`): Maximum number of steps.
    """
    student = copy.deepcopy(layer).float()
    trained = student.own_parameters()
    before = held_out_error(student, examples)
    after = _train(student, list(trained.values()), examples, refit_steps)
    own = layer.own_parameters()
    with torch.no_grad():
        for name, parameter in trained.items():
            own[name].copy_(parameter)
    return RefitLayer(before, after)


def _train(
    student: CondensedMLP | MixedLayer, parameters: Sequence[nn.Parameter], examples: LayerExamples, steps: int
) -> float:
    """Train parameters of a float32 layer, and return its best held-out error, whose weights it then has."""
    best, kept = held_out_error(student, examples), [p.detach().clone() for p in parameters]
    rms = [float(p.detach().square().mean().sqrt()) if p.numel() else 0.0 for p in parameters]
    groups = [{"params": [p], "lr": _RELATIVE_RATE * size} for p, size in zip(parameters, rms, strict=True) if size]
    if not groups:
        return best
    optimizer = torch.optim.Adam(groups)
    processes = examples.processes
    every, worse = max(1, steps // _CHECKS), 0
    draw = _Draw(examples)
    for step in logging.tqdm(range(1, steps + 1), desc=f"Layer {examples.block.layer}", unit="step", leave=False):
        with torch.enable_grad():
            example = draw()
            loss = squared_error(student, Example(*map(processes.part, example))) / size_of(example)
            optimizer.zero_grad()
            loss.backward()
        processes.add_up(*(p.grad for p in parameters if p.grad is not None))
        optimizer.step()
        if step % every == 0 or step == steps:
            error = held_out_error(student, examples)
            worse = 0 if error < best else worse + 1
            if error < best:
                best, kept = error, [p.detach().clone() for p in parameters]
            if worse == _PATIENCE:
                break
    with torch.no_grad():
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)
    return best


class _Draw:
    """An endless draw of random tokens, from one batch after the other in random order, alike in every process."""

    def __init__(self, examples: LayerExamples) -> None:
        self.examples = examples
        self.numbers = examples.numbers_to_fit()
        self.generator = torch.Generator().manual_seed(0)
        self.order: list[int] = []

    def __call__(self) -> Example:
        number = 0
        while not number:
            if not self.order:
                self.order = torch.randperm(len(self.numbers), generator=self.generator).tolist()
            batch = self.order.pop()
            number = self.numbers[batch]
        rows = torch.arange(number)
        if number > _TOKENS_PER_STEP:
            rows = torch.randperm(number, generator=self.generator)[:_TOKENS_PER_STEP]
        return self.examples.drawn(batch, rows)
