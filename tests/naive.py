"""What CD-MoE computes, written a second time: float64, one sequence after the other, whole forward passes.

Nothing here comes from the package, and nothing is clever: a candidate is tried by putting a module that adds the shared
expert and the gated experts one by one in the place of the sparse block, and by running the whole model again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

Ids = Sequence[int]
Choice = tuple[Sequence[int], Sequence[float]]  # experts and their gates
Distance = Callable[[list[Tensor], list[Tensor]], float]


@dataclass(frozen=True)
class Kind:
    """How one model type routes, and where its shared expert is."""

    scores: str  # "softmax" or "sigmoid"
    normalises: Callable[[Any], bool]  # does the sum of a token's weights become 1
    scale: Callable[[Any], float] = lambda config: 1.0
    shared: str | None = None
    shared_gate: str | None = None


KINDS = {
    "qwen2_moe": Kind("softmax", lambda c: c.norm_topk_prob, shared="shared_expert", shared_gate="shared_expert_gate"),
    "deepseek": Kind("softmax", lambda c: c.norm_topk_prob, shared="shared_experts"),
    "deepseek_v3": Kind("sigmoid", lambda c: c.norm_topk_prob, lambda c: c.routed_scaling_factor, "shared_experts"),
    "mixtral": Kind("softmax", lambda c: True),
    "laguna": Kind("sigmoid", lambda c: True, lambda c: c.moe_routed_scaling_factor, "shared_experts"),
}


@dataclass
class Search:
    """A greedy search: what was chosen, its distance, and the distance of every candidate in every step."""

    order: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    steps: list[dict[int, float]] = field(default_factory=list)


# --- distances ---


def naive_kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p‖q) of two distributions, 1e-10 added to both."""
    return sum((p[..., i] + 1e-10) * ((p[..., i] + 1e-10) / (q[..., i] + 1e-10)).log() for i in range(p.shape[-1]))


def naive_js(target: Tensor, candidate: Tensor) -> Tensor:
    """½ KL(p‖m) + ½ KL(q‖m) of the softmax over the last dimension."""
    p, q = target.double().softmax(-1), candidate.double().softmax(-1)
    m = (p + q) / 2
    return (naive_kl(p, m) + naive_kl(q, m)) / 2


NAIVE_METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "js": naive_js,
    "kl": lambda target, candidate: naive_kl(target.double().softmax(-1), candidate.double().softmax(-1)),
    "mse": lambda target, candidate: (target.double() - candidate.double()).pow(2).mean(-1),
}


def distance(metric: str) -> Distance:
    """Mean over sequences of the mean over their tokens."""

    def mean(targets: list[Tensor], candidates: list[Tensor]) -> float:
        per_token = [NAIVE_METRICS[metric](t, c) for t, c in zip(targets, candidates, strict=True)]
        return sum(float(tokens.sum()) / len(tokens) for tokens in per_token) / len(per_token)

    return mean


# --- the model ---


def naive_double(model: PreTrainedModel) -> PreTrainedModel:
    """A float64 copy in eval mode with transformers' plain loop over experts."""
    double = copy.deepcopy(model).double().eval()
    double.set_experts_implementation("eager")
    return double


def kind_of(model: PreTrainedModel) -> Kind:
    return KINDS[model.config.model_type]


def sparse_layers(model: PreTrainedModel) -> list[int]:
    return [i for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")]


def naive_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    g = x @ gate.T
    return (g * torch.sigmoid(g) * (x @ up.T)) @ down.T


def naive_expert(block: nn.Module, expert: int, x: Tensor) -> Tensor:
    gate_up, down = block.experts.gate_up_proj[expert], block.experts.down_proj[expert]
    width = len(gate_up) // 2
    return naive_mlp(x, gate_up[:width], gate_up[width:], down)


def naive_shared(block: nn.Module, kind: Kind, x: Tensor) -> Tensor:
    if kind.shared is None:
        return torch.zeros_like(x)
    shared = getattr(block, kind.shared)
    y = naive_mlp(x, shared.gate_proj.weight, shared.up_proj.weight, shared.down_proj.weight)
    if kind.shared_gate is not None:
        y = y * torch.sigmoid(x @ getattr(block, kind.shared_gate).weight.T)
    return y


class NaiveCondensed(nn.Module):
    """`shared + sum g_i E_i` for every token."""

    def __init__(self, block: nn.Module, kind: Kind, choice: Choice) -> None:
        super().__init__()
        self.block, self.kind, self.choice = block, kind, choice

    def forward(self, x: Tensor) -> Tensor:
        y = naive_shared(self.block, self.kind, x)
        for expert, gate in zip(*self.choice, strict=True):
            y = y + gate * naive_expert(self.block, expert, x)
        return y


@contextmanager
def condensed(model: PreTrainedModel, choices: dict[int, Choice]) -> Iterator[None]:
    """The model with some sparse blocks replaced, for a while."""
    blocks = {layer: model.model.layers[layer].mlp for layer in choices}
    for layer, choice in choices.items():
        model.model.layers[layer].mlp = NaiveCondensed(blocks[layer], kind_of(model), choice)
    try:
        yield
    finally:
        for layer, block in blocks.items():
            model.model.layers[layer].mlp = block


@torch.no_grad()
def run(model: PreTrainedModel, sequences: Sequence[Ids], what: int | str) -> list[Tensor]:
    """Per sequence `[T, H]`: the output of a decoder layer, the "hidden" state after the final norm, or the "logits"."""
    module = {"hidden": model.model.norm, "logits": model.lm_head}.get(what) or model.model.layers[what]
    seen = []
    hook = module.register_forward_hook(lambda _module, _args, output: seen.append(output))
    try:
        for ids in sequences:
            model(input_ids=torch.tensor([list(ids)]), use_cache=False)
    finally:
        hook.remove()
    return [(output[0] if isinstance(output, tuple) else output)[0] for output in seen]


def naive_condensed_forward(
    model: PreTrainedModel, sequences: Sequence[Ids], choices: dict[int, Choice]
) -> list[Tensor]:
    """Logits of the condensed model."""
    double = naive_double(model)
    with condensed(double, choices):
        return run(double, sequences, "logits")


# --- routing and gates ---


def naive_route(config: Any, router: nn.Module, kind: Kind, x: Tensor) -> dict[int, float]:
    """The experts that one token is sent to, and what their outputs are multiplied with."""
    logits = router.weight.double() @ x.double()
    scores = (torch.sigmoid(logits) if kind.scores == "sigmoid" else torch.softmax(logits, 0)).tolist()
    bias = getattr(router, "e_score_correction_bias", None)
    choice = scores if bias is None else [score + b for score, b in zip(scores, bias.tolist(), strict=True)]
    allowed = list(range(len(scores)))
    if getattr(config, "n_group", None):
        size = len(scores) // config.n_group
        groups = [allowed[i : i + size] for i in range(0, len(scores), size)]
        groups.sort(key=lambda group: -sum(sorted((choice[e] for e in group), reverse=True)[:2]))
        allowed = [e for group in groups[: config.topk_group] for e in group]
    best = sorted(allowed, key=lambda e: -choice[e])[: config.num_experts_per_tok]
    total = sum(scores[e] for e in best) if kind.normalises(config) else 1.0
    return {e: kind.scale(config) * scores[e] / total for e in best}


@torch.no_grad()
def naive_gates(model: PreTrainedModel, sequences: Sequence[Ids]) -> dict[int, dict[int, float]]:
    """Eq. 2 per sparse layer: the mean weight of every expert that any token chose.

    The weights are those of `naive_route`; that these make the block's own output is asserted on the way.
    """
    double, kind = naive_double(model), kind_of(model)
    gates = {}
    for layer in sparse_layers(double):
        block = double.model.layers[layer].mlp
        seen = []
        hook = block.register_forward_hook(lambda _module, args, output, seen=seen: seen.append((args[0], output)))
        run(double, sequences, "hidden")
        hook.remove()
        collected: dict[int, list[float]] = {}
        for inputs, outputs in seen:
            for x, y in zip(inputs[0], outputs[0], strict=True):
                weights = naive_route(model.config, block.gate, kind, x)
                again = naive_shared(block, kind, x[None])[0]
                for expert, weight in weights.items():
                    again = again + weight * naive_expert(block, expert, x[None])[0]
                    collected.setdefault(expert, []).append(weight)
                torch.testing.assert_close(again, y, rtol=1e-5, atol=1e-6)
        gates[layer] = {e: sum(values) / len(values) for e, values in sorted(collected.items())}
    return gates


# --- Algorithms 1 and 2 ---


def greedy(candidates: Sequence[int], number: int, score: Callable[[list[int]], float]) -> Search:
    search = Search()
    for _ in range(number):
        step = {c: score([*search.order, c]) for c in candidates if c not in search.order}
        best = min(sorted(step), key=lambda c: step[c])
        search.order.append(best)
        search.scores.append(step[best])
        search.steps.append(step)
    return search


def naive_expert_search(
    model: PreTrainedModel, sequences: Sequence[Ids], num_experts: int, metric: str = "js"
) -> dict[int, Search]:
    """Algorithm 1 for every sparse layer on its own; `scores` starts with the shared expert alone."""
    double, gates, measure = naive_double(model), naive_gates(model, sequences), distance(metric)
    found = {}
    for layer, layer_gates in gates.items():
        what = "hidden" if layer == len(double.model.layers) - 1 else layer
        target = run(double, sequences, what)

        def score(experts: list[int], layer: int = layer, what: Any = what, target: list[Tensor] = target) -> float:
            with condensed(double, {layer: (experts, [gates[layer][e] for e in experts])}):
                return measure(target, run(double, sequences, what))

        found[layer] = greedy(list(layer_gates), num_experts, score)
        found[layer].scores.insert(0, score([]))
    return found


def naive_layer_search(
    model: PreTrainedModel,
    sequences: Sequence[Ids],
    choices: dict[int, Choice],
    num_layers: int,
    metric: str = "js",
    compare: str = "hidden",
) -> Search:
    """Algorithm 2 over the layers of `choices`."""
    double, measure = naive_double(model), distance(metric)
    target = run(double, sequences, compare)

    def score(layers: list[int]) -> float:
        with condensed(double, {layer: choices[layer] for layer in layers}):
            return measure(target, run(double, sequences, compare))

    return greedy(list(choices), num_layers, score)
