"""What the alternatives to the greedy searches compute, written a second time: float64, one expert after the other.

Like `naive`, none of it comes from the package.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.helpers.naive import (
    Choice,
    Ids,
    condensed,
    distance,
    layers_of,
    naive_double,
    naive_expert,
    naive_route,
    run,
    sparse_blocks,
    watch,
)

Scores = dict[int, float]  # by expert, or by layer


def order_of(scores: Scores, highest: bool = False) -> list[int]:
    """By score, then by index."""
    return sorted(scores, key=lambda index: (-scores[index] if highest else scores[index], index))


def matrices(block: nn.Module, expert: int) -> list[Tensor]:
    """Gate, up and down of one expert; up and down where there are no gates."""
    if hasattr(block.experts, "up_proj"):
        return [block.experts.up_proj[expert], block.experts.down_proj[expert]]
    gate_up, down = block.experts.gate_up_proj[expert], block.experts.down_proj[expert]
    half = len(gate_up) // 2
    return [gate_up[:half], gate_up[half:], down]


def naive_l1(double: PreTrainedModel, _sequences: Sequence[Ids], layer: int) -> Scores:
    block = sparse_blocks(double)[layer]
    parts = {expert: matrices(block, expert) for expert in range(len(block.experts.down_proj))}
    return {e: sum(abs(v) for m in own for v in m.flatten().tolist()) for e, own in parts.items()}


def naive_alpha(matrix: Tensor) -> float:
    """Eq. 4 with the threshold at the smallest eigenvalue of the fullest of 100 bins in log λ."""
    values = np.sort(torch.linalg.svdvals(matrix.detach().double()).numpy() ** 2)
    counts, edges = np.histogram(np.log(values), bins=100)
    peak = int(np.argmax(counts))
    threshold = next(i for i, value in enumerate(values) if np.log(value) >= edges[peak] - 1e-12)
    tail = values[threshold + 1 :]
    return 1 + len(tail) / sum(math.log(value / values[threshold]) for value in tail)


def naive_pl_alpha_hill(double: PreTrainedModel, _sequences: Sequence[Ids], layer: int) -> Scores:
    block = sparse_blocks(double)[layer]
    parts = {expert: matrices(block, expert) for expert in range(len(block.experts.down_proj))}
    return {e: sum(map(naive_alpha, own)) / len(own) for e, own in parts.items()}


@torch.no_grad()
def visits(double: PreTrainedModel, sequences: Sequence[Ids], layer: int) -> dict[int, list[tuple[float, Tensor]]]:
    """For every expert the gates and inputs of the tokens that chose it."""
    block = sparse_blocks(double)[layer]
    found: dict[int, list[tuple[float, Tensor]]] = {}
    for inputs, _ in watch(double, sequences, block):
        for x in inputs:
            for expert, gate in naive_route(double.config, block.gate, x).items():
                found.setdefault(expert, []).append((gate, x))
    return found


def naive_frequency(double: PreTrainedModel, sequences: Sequence[Ids], layer: int) -> Scores:
    return {expert: -len(tokens) for expert, tokens in visits(double, sequences, layer).items()}


@torch.no_grad()
def naive_reap(double: PreTrainedModel, sequences: Sequence[Ids], layer: int) -> Scores:
    block = sparse_blocks(double)[layer]
    return {
        expert: -sum(gate * math.hypot(*naive_expert(block, expert, x).tolist()) for gate, x in tokens) / len(tokens)
        for expert, tokens in visits(double, sequences, layer).items()
    }


@torch.no_grad()
def naive_d_optimal(
    double: PreTrainedModel, sequences: Sequence[Ids], layer: int, gates: Scores, number: int
) -> list[int]:
    """Every candidate is tried in every round, and the whole determinant computed again."""
    block = sparse_blocks(double)[layer]
    vectors = {}
    for expert, gate in gates.items():
        parts = []
        for inputs, _ in watch(double, sequences, block):
            share = 1 / len(inputs) / len(sequences)
            parts += [math.sqrt(share) * gate * naive_expert(block, expert, x) for x in inputs]
        vectors[expert] = torch.cat(parts)
    ridge = 1e-4 * sum(float(v @ v) for v in vectors.values()) / len(vectors)

    def log_det(chosen: list[int]) -> float:
        gram = torch.stack([torch.stack([vectors[i] @ vectors[j] for j in chosen]) for i in chosen])
        return float(torch.logdet(gram + ridge * torch.eye(len(chosen), dtype=torch.float64)))

    order: list[int] = []
    for _ in range(number):
        order.append(max((e for e in sorted(gates) if e not in order), key=lambda e: log_det([*order, e])))
    return order


NAIVE_SCORES: dict[str, Callable[[PreTrainedModel, Sequence[Ids], int], Scores]] = {
    "l1": naive_l1,
    "pl_alpha_hill": naive_pl_alpha_hill,
    "frequency": naive_frequency,
    "reap": naive_reap,
}


def naive_expert_order(
    model: PreTrainedModel, sequences: Sequence[Ids], method: str, layer: int, gates: Scores, number: int
) -> list[int]:
    """The experts that a method other than greedy and random keeps; `gates` are the candidates'."""
    double = naive_double(model)
    if method == "d_optimal":
        return naive_d_optimal(double, sequences, layer, gates, number)
    scores = NAIVE_SCORES[method](double, sequences, layer)
    return [expert for expert in order_of(scores) if expert in gates][:number]


def naive_own_divergences(
    model: PreTrainedModel, sequences: Sequence[Ids], metric: str, layer: int, choice: Choice
) -> list[float]:
    """Divergence of one layer's own output with none of its kept experts, with the first, with the first two, ..."""
    double = naive_double(model)
    what = "hidden" if layer == len(layers_of(double)) - 1 else layer
    target, found = run(double, sequences, what), []
    for number in range(len(choice[0]) + 1):
        with condensed(double, {layer: (choice[0][:number], choice[1][:number])}):
            found.append(distance(metric, target, run(double, sequences, what)))
    return found


@torch.no_grad()
def naive_perplexities(model: PreTrainedModel, sequences: Sequence[Ids]) -> list[float]:
    """By transformers' own loss, of each sequence on its own."""
    ids = [torch.tensor([list(sequence)]) for sequence in sequences]
    return [math.exp(float(model(input_ids=x, labels=x, use_cache=False).loss)) for x in ids]


def naive_distance(
    model: PreTrainedModel, sequences: Sequence[Ids], choices: dict[int, Choice], metric: str, compare: str
) -> float:
    """How far the output of the model is from the unmodified one's when some layers are condensed."""
    double = naive_double(model)

    def look() -> Any:
        return naive_perplexities(double, sequences) if metric == "ppl" else run(double, sequences, compare)

    before = look()
    with condensed(double, choices):
        after = look()
    if metric == "ppl":
        return sum(abs(a - b) for a, b in zip(after, before, strict=True)) / len(sequences)
    return distance(metric, before, after)
