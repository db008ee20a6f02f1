"""Trimming written a second time: hooks on the real model, one sequence after the other."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cdmoe_plugin import CondensedLayer, CondensePlan
from tests.helpers.naive import Ids, distance, layers_of, naive_double, run, sparse_blocks, watch


def trim_plan(form: str, layers: Sequence[int]) -> CondensePlan:
    return CondensePlan([CondensedLayer(layer, [], []) for layer in layers], form=form)


@contextmanager
def trimmed_by_hand(model: PreTrainedModel, form: str, layers: Sequence[int]) -> Iterator[None]:
    """The whole model with hooks: an MLP's output becomes zeros, or a decoder layer gives back what it was given."""

    def nothing(_module: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, tuple):  # and what the router gave
            return torch.zeros_like(output[0]), *output[1:]
        return torch.zeros_like(output)

    def skip(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    with ExitStack() as stack:
        for index in layers:
            layer = layers_of(model)[index]
            if form == "trim_block":
                stack.callback(layer.register_forward_hook(skip, with_kwargs=True).remove)
                continue
            for module in (sparse_blocks(model)[index], getattr(layer, "shared_mlp", None)):
                if module is not None:
                    stack.callback(module.register_forward_hook(nothing).remove)
        yield


@torch.no_grad()
def first_output(model: PreTrainedModel, ids: Sequence[Ids]) -> list[Tensor]:
    """Logits (hidden states without a head) of every sequence on its own."""
    return [model(input_ids=torch.tensor([list(row)]), use_cache=False)[0][0] for row in ids]


def by_hand(model: PreTrainedModel, form: str, layers: Sequence[int], ids: Sequence[Ids]) -> list[Tensor]:
    model = copy.deepcopy(model)
    with trimmed_by_hand(model, form, layers):
        return first_output(model, ids)


def naive_similarities(model: PreTrainedModel, sequences: Sequence[Ids], form: str) -> dict[int, float]:
    """Mean over sequences of the mean over tokens of the cosine between what enters and what leaves, in float64."""
    double, found = naive_double(model), {}
    for index in sparse_blocks(double):
        layer = layers_of(double)[index]
        entrance = layer if form == "trim_block" else layer.post_attention_layernorm
        entering = [x for x, _ in watch(double, sequences, entrance)]
        leaving = [y for _, y in watch(double, sequences, layer)]
        means = []
        for x, y in zip(entering, leaving, strict=True):
            # Several residual streams lie side by side.
            pairs = zip(x.flatten(1), y.flatten(1), strict=True)
            cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in pairs]
            means.append(sum(cosines) / len(cosines))
        found[index] = sum(means) / len(means)
    return found


def naive_greedy(
    model: PreTrainedModel, sequences: Sequence[Ids], form: str, num: int
) -> tuple[list[int], list[float], dict[int, float]]:
    """Algorithm 2 with dropped MLPs or layers as candidates: order, scores, and scores of the first round."""
    double = naive_double(model)
    target = run(double, sequences, "hidden")
    order: list[int] = []
    scores: list[float] = []
    rounds = []
    for _ in range(num):
        tried = {}
        for layer in sparse_blocks(double):
            if layer not in order:
                with trimmed_by_hand(double, form, [*order, layer]):
                    tried[layer] = distance("js", target, run(double, sequences, "hidden"))
        order.append(min(sorted(tried), key=lambda layer: tried[layer]))
        scores.append(tried[order[-1]])
        rounds.append(tried)
    return order, scores, rounds[0]
