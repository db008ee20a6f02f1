"""Training of a single condensed layer against its target."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor
from transformers.utils import logging

from ...model.layers_cdmoe import CondensedMLP
from ...registry import REFITS
from .examples import Example, LayerExamples, RefitLayer
from .ridge import refit_down_proj

_TOKENS_PER_STEP = 1024
# Step size of Adam relative to the root mean square of a weight matrix.
_RELATIVE_RATE = 0.02
# Number of evaluations on held-out tokens; training ends after `_PATIENCE` evaluations without a lower error.
_CHECKS = 10
_PATIENCE = 3


@REFITS.register("distill", "all three projections by Adam, after down_proj", options=("refit_steps",))
def distill(mlp: CondensedMLP, examples: LayerExamples, refit_steps: int) -> RefitLayer:
    """Train one condensed layer with Adam, starting from its closed-form refit, with the memory of one block.

    The weights with the lowest error on held-out sequences are kept.

    Args:
        mlp (`CondensedMLP`): The folded layer, changed in place.
        examples (`LayerExamples`): Inputs and targets.
        refit_steps (`int`): Maximum number of steps.
    """
    solved = refit_down_proj(mlp, examples)
    student = copy.deepcopy(mlp).float()
    best, state = _held_out_error(student, examples), copy.deepcopy(student.state_dict())
    rms = {p: float(p.detach().square().mean().sqrt()) for p in student.parameters() if p.numel()}
    groups = [{"params": [p], "lr": _RELATIVE_RATE * size} for p, size in rms.items() if size > 0]
    if not groups:
        return solved
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / refit_steps)
    )
    every, worse = max(1, refit_steps // _CHECKS), 0
    draw = _Draw(examples)
    for step in logging.tqdm(range(1, refit_steps + 1), desc=f"Layer {examples.block.layer}", unit="step", leave=False):
        with torch.enable_grad():
            loss = weighted_error(student, draw())
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        schedule.step()
        if step % every == 0 or step == refit_steps:
            error = _held_out_error(student, examples)
            worse = 0 if error < best else worse + 1
            if error < best:
                best, state = error, copy.deepcopy(student.state_dict())
            if worse == _PATIENCE:
                break
    mlp.load_state_dict(state)
    return RefitLayer(solved.before, min(best, solved.after), solved.strength)


def weighted_error(mlp: CondensedMLP, example: Example) -> Tensor:
    """Compute the weighted squared error relative to the target's size, a scalar; before the layer's norm, if any."""
    error = (mlp.sum_of_experts(example.inputs.float()) - example.target).square().sum(-1)
    size = (example.target.square().sum(-1) * example.weights).sum().clamp_min(1e-30)
    return (error * example.weights).sum() / size


@torch.no_grad()
def _held_out_error(mlp: CondensedMLP, examples: LayerExamples) -> float:
    error, size = 0.0, 1e-30
    for batch in range(len(examples)):
        example = examples.held_out(batch)
        of_batch = float((example.target.square().sum(-1) * example.weights).sum())
        error, size = error + float(weighted_error(mlp, example)) * of_batch, size + of_batch
    return error / size


class _Draw:
    """An endless draw of random tokens, from one batch after the other in random order."""

    def __init__(self, examples: LayerExamples) -> None:
        self.examples = examples
        self.generator = torch.Generator().manual_seed(0)
        self.order: list[int] = []

    def __call__(self) -> Example:
        example = None
        while example is None or not len(example.inputs):
            if not self.order:
                self.order = torch.randperm(len(self.examples), generator=self.generator).tolist()
            example = self.examples.fit(self.order.pop())
        if len(example.inputs) <= _TOKENS_PER_STEP:
            return example
        rows = torch.randperm(len(example.inputs), generator=self.generator)[:_TOKENS_PER_STEP]
        return Example(*(part[rows.to(part.device)] for part in example))
