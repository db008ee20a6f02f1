"""What CD-MoE computes, written a second time: float64, one sequence after the other, whole forward passes.

Nothing here comes from the package, and nothing is clever: a candidate is tried by putting a module that adds the
shared expert and the gated experts one by one in the place of the sparse block, and by running the whole model again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

Ids = Sequence[int]
Choice = tuple[Sequence[int], Sequence[float]]  # experts and their gates
Glu = Callable[[Tensor, Tensor], Tensor]  # what is between the projections, of gate and up


# How a model type routes: scores, does the sum of a token's weights become 1, factor.
ROUTING: dict[str, tuple[str, Callable[[Any], bool], Callable[[Any], float]]] = {
    "qwen2_moe": ("softmax", lambda c: c.norm_topk_prob, lambda c: 1.0),
    "deepseek": ("softmax", lambda c: c.norm_topk_prob, lambda c: 1.0),
    "deepseek_v3": ("sigmoid", lambda c: c.norm_topk_prob, lambda c: c.routed_scaling_factor),
    "mixtral": ("softmax", lambda c: True, lambda c: 1.0),
    "laguna": ("sigmoid", lambda c: True, lambda c: c.moe_routed_scaling_factor),
}


class Search(NamedTuple):
    """A greedy search: what was chosen, distances with none, one, two of them, and of every candidate in every step."""

    order: list[int]
    scores: list[float]
    steps: list[dict[int, float]]


def close(divergences: Any) -> Any:
    """Divergences that are equal up to the rounding of float32: each is a small difference of terms near 1."""
    return pytest.approx(divergences, rel=1e-4, abs=5e-8)


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


def distance(metric: str, targets: list[Tensor], candidates: list[Tensor]) -> float:
    """Mean over sequences of the mean over their tokens."""
    per_token = [NAIVE_METRICS[metric](t, c) for t, c in zip(targets, candidates, strict=True)]
    return sum(float(tokens.sum()) / len(tokens) for tokens in per_token) / len(per_token)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return functional.silu(gate) * up


def clamped_swiglu(limit: float) -> Glu:
    return lambda gate, up: swiglu(gate.clamp(max=limit), up.clamp(-limit, limit))


def swiglu_clamped_after(limit: float) -> Glu:
    return lambda gate, up: functional.silu(gate).clamp(max=limit) * up.clamp(-limit, limit)


def gpt_oss_glu(limit: float, alpha: float) -> Glu:
    def glu(gate: Tensor, up: Tensor) -> Tensor:
        gate = gate.clamp(max=limit)
        return gate * torch.sigmoid(alpha * gate) * (1 + up.clamp(-limit, limit))

    return glu


def softcapped_swiglu(gate_cap: float, up_cap: float) -> Glu:
    return lambda g, u: gate_cap * torch.tanh(g / gate_cap) * torch.sigmoid(g) * up_cap * torch.tanh(u / up_cap)


def naive_glus(config: Any, layer: int) -> tuple[Glu, Glu]:
    """What routed experts and the shared one have between their projections."""
    kind = config.model_type
    if kind in ("gpt_oss", "openai_privacy_filter", "minimax_m3_vl_text"):
        if not hasattr(config, "swiglu_alpha"):  # transformers 5.17 has constants, whatever the config says
            return (gpt_oss_glu(7.0, 1.702),) * 2
        return (gpt_oss_glu(config.swiglu_limit, config.swiglu_alpha),) * 2
    if kind in ("glm5_next_text", "deepseek_v4"):
        return (clamped_swiglu(config.swiglu_limit),) * 2
    if kind == "hy_v4":
        return clamped_swiglu(config.swiglu_limit), swiglu
    if kind == "step3p5":
        return swiglu_clamped_after(config.swiglu_limits[layer]), swiglu_clamped_after(
            config.swiglu_limits_shared[layer]
        )
    if kind == "inkling2_text":
        return (softcapped_swiglu(config.mlp_gate_softcap, config.mlp_up_softcap),) * 2
    if kind in ("gemma4_text", "diffusion_gemma_text"):
        return (lambda gate, up: functional.gelu(gate, approximate="tanh") * up,) * 2
    act = getattr(functional, getattr(config, "hidden_act", None) or "silu")
    return (lambda gate, up: act(gate) * up,) * 2


def naive_expert(block: nn.Module, expert: int, x: Tensor, glu: Glu = swiglu) -> Tensor:
    """`E_i(x)` from the raw weights, which a few architectures stack in their own way."""
    if hasattr(block, "input_linear"):  # jetmoe: the projections are children of the block
        gate, up = (x @ block.input_linear.weight[expert].T).chunk(2, -1)
        return glu(gate, up) @ block.output_linear.weight[expert].T
    experts = getattr(block, "experts", block)  # gemma4: they are the block
    if hasattr(experts, "mlp"):  # dbrx: one on top of the other
        width = experts.mlp.w1.shape[0] // experts.num_experts
        gate, up, down = (getattr(experts.mlp, w)[expert * width :][:width] for w in ("w1", "v1", "w2"))
        return glu(x @ gate.T, x @ up.T) @ down
    if hasattr(experts, "up_proj"):  # nemotron: without gates, and some in latent space
        inner = functional.relu(block.fc1_latent_proj(x) @ experts.up_proj[expert].T).square()
        y = inner @ experts.down_proj[expert].T
        return y @ block.fc2_latent_proj.weight.T if hasattr(block.fc2_latent_proj, "weight") else y
    gate_up, down = experts.gate_up_proj[expert], experts.down_proj[expert]
    if gate_up.shape[0] == x.shape[-1] and down.shape[1] == x.shape[-1]:  # aria, gpt_oss: transposed
        gate_up, down = gate_up.T, down.T
    inner, width = x @ gate_up.T, len(gate_up) // 2
    if hasattr(experts, "gate_up_proj_bias"):
        inner = inner + experts.gate_up_proj_bias[expert]
    in_turn = type(experts).__name__ == "GptOssExperts"
    gate, up = (inner[..., ::2], inner[..., 1::2]) if in_turn else (inner[..., :width], inner[..., width:])
    y = glu(gate, up) @ down.T
    return y + experts.down_proj_bias[expert] if hasattr(experts, "down_proj_bias") else y


def naive_shared(block: nn.Module, owner: nn.Module, x: Tensor, glu: Glu = swiglu) -> Tensor:
    """`[sigmoid(w·x)] S(x)`, 0 without a shared expert; granite's decoder layer owns it, not the block."""
    names = ("shared_expert", "shared_experts", "shared_mlp")
    shared = next((m for h in (block, owner) for n in names if (m := getattr(h, n, None)) is not None), None)
    if shared is None:
        return torch.zeros_like(x)
    if hasattr(shared, "input_linear"):
        return shared.output_linear(glu(*shared.input_linear(x).chunk(2, -1)))
    if hasattr(shared, "gate_up_proj"):
        return shared.down_proj(glu(*shared.gate_up_proj(x).chunk(2, -1)))
    if not hasattr(shared, "gate_proj"):
        return shared.down_proj(functional.relu(shared.up_proj(x)).square())
    y = shared.down_proj(glu(shared.gate_proj(x), shared.up_proj(x)))
    if getattr(block, "shared_expert_combination_strategy", None) == "average":  # cohere2: of routed and shared
        y = y / 2
    return y * torch.sigmoid(block.shared_expert_gate(x)) if hasattr(block, "shared_expert_gate") else y


def naive_bias(block: nn.Module) -> Tensor | float:
    """What a block adds to its output for every token: jetmoe's bias, nemotron's of the map back from latent space."""
    bias = getattr(getattr(block, "fc2_latent_proj", block), "bias", None)
    return 0.0 if bias is None else bias


def naive_gated_expert(block: nn.Module, expert: int, gate: float, x: Tensor, glu: Glu = swiglu) -> Tensor:
    """`g E_i(x)`, or `E_i(g x)` where the block does that."""
    if type(block).__name__ == "Llama4TextMoe":
        return naive_expert(block, expert, gate * x, glu)
    return gate * naive_expert(block, expert, x, glu)


def naive_own_route(block: nn.Module, x: Tensor) -> list[tuple[int, float]] | None:
    """One token's experts and weights in blocks that do not call a module with these; None for all others."""
    kind = type(block).__name__
    if kind not in ("JetMoeMoE", "Llama4TextMoe"):
        return None
    router = block.router.layer if kind == "JetMoeMoE" else block.router
    values, experts = (router.weight @ x).topk(block.router.top_k)
    weights = values.softmax(0) if kind == "JetMoeMoE" else values.sigmoid()
    return list(zip(experts.tolist(), weights.tolist(), strict=True))


def naive_norm(block: nn.Module, y: Tensor) -> Tensor:
    """axk1 norms the sum of shared and routed experts in its block."""
    norm = getattr(block, "post_mlp_layernorm", None)
    return y if norm is None else norm.weight * y / (y.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()


def naive_block(
    x: Tensor,
    block: nn.Module,
    owner: nn.Module,
    choice: Choice,
    glu: Glu = swiglu,
    shared_glu: Glu = swiglu,
    **_of_router: Any,
) -> Tensor:
    """`shared + sum g_i E_i` for every token, normed where the block does that."""
    y = naive_shared(block, owner, x, shared_glu) + naive_bias(block)
    for expert, gate in zip(*choice, strict=True):
        y = y + naive_gated_expert(block, expert, gate, x, glu)
    return naive_norm(block, y)


# --- the model ---


def naive_double(model: PreTrainedModel) -> PreTrainedModel:
    """A float64 copy in eval mode with transformers' plain loop over experts."""
    double = copy.deepcopy(model).double().eval()
    for name, parameter in double.named_parameters():  # some modules compute in float32, whatever the model's dtype is
        if any(part in name for part in getattr(double, "_keep_in_fp32_modules_strict", None) or ()):
            parameter.data = parameter.data.float()
    double.set_experts_implementation("eager")
    return double


def decoder(model: PreTrainedModel) -> nn.Module:
    """Llama4ForCausalLM gives itself for its base model."""
    return model.model if type(model).__name__ == "Llama4ForCausalLM" else model.base_model


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    return getattr(decoder(model), "layers", None) or decoder(model).blocks


def is_sparse(module: nn.Module) -> bool:
    """Jetmoe's attention has experts, too; those of its block are no module of their own. Gemma4's are the block."""
    if type(module).__name__ == "Gemma4TextExperts":
        return True
    return hasattr(module, "input_linear" if type(module).__name__.startswith("JetMoe") else "experts")


def sparse_blocks(model: PreTrainedModel) -> dict[int, nn.Module]:
    layers = enumerate(layers_of(model))
    return {index: child for index, layer in layers for child in layer.children() if is_sparse(child)}


@contextmanager
def condensed(model: PreTrainedModel, choices: dict[int, Choice]) -> Iterator[None]:
    """The model with other things done by some sparse blocks, for a while; shared experts of layers stay there."""
    blocks = {index: block for index, block in sparse_blocks(model).items() if index in choices}
    for index, block in blocks.items():
        glu, shared_glu = naive_glus(model.config, index)
        forward = partial(naive_block, block=block, owner=block, choice=choices[index], glu=glu, shared_glu=shared_glu)
        returns_scores = type(block).__name__ == "Llama4TextMoe"
        block.forward = lambda x, *_, f=forward, t=returns_scores, **__: (f(x), None) if t else f(x)
    try:
        yield
    finally:
        for block in blocks.values():
            del block.forward


@torch.no_grad()
def watch(model: PreTrainedModel, sequences: Sequence[Ids], module: nn.Module) -> list[tuple[Any, Any]]:
    """What one module is given and gives, `[T, H]` each, for every sequence on its own."""
    seen = []
    with module.register_forward_hook(lambda _module, args, output: seen.append((args, output))):
        for ids in sequences:
            model(input_ids=torch.tensor([list(ids)]), use_cache=False)
    return [(args[0][0] if args else None, (y if isinstance(y, Tensor) else y[0])[0]) for args, y in seen]


def run(model: PreTrainedModel, sequences: Sequence[Ids], what: int | str) -> list[Tensor]:
    """Per sequence `[T, H]`: a decoder layer's output, the last "hidden" state (after the norm), or the "logits".

    Several residual streams of a layer lie side by side.
    """
    modules = {"hidden": decoder(model), "logits": model.get_output_embeddings()}
    seen = watch(model, sequences, modules[what] if what in modules else layers_of(model)[what])
    return [y.flatten(1) for _, y in seen]


def naive_condensed_forward(
    model: PreTrainedModel, sequences: Sequence[Ids], choices: dict[int, Choice]
) -> list[Tensor]:
    """Logits of the condensed model."""
    double = naive_double(model)
    with condensed(double, choices):
        return run(double, sequences, "logits")


# --- routing and gates ---


def naive_route(config: Any, router: nn.Module, x: Tensor) -> dict[int, float]:
    """The experts that one token is sent to, and what their outputs are multiplied with."""
    (function, normalises, scale), logits = ROUTING[config.model_type], router.weight.to(x.dtype) @ x
    scores = (torch.sigmoid(logits) if function == "sigmoid" else torch.softmax(logits, 0)).tolist()
    bias = getattr(router, "e_score_correction_bias", None)
    choice = scores if bias is None else [score + b for score, b in zip(scores, bias.tolist(), strict=True)]
    allowed = list(range(len(scores)))
    if getattr(config, "n_group", None):
        size = len(scores) // config.n_group
        groups = [allowed[i : i + size] for i in range(0, len(scores), size)]
        groups.sort(key=lambda group: -sum(sorted((choice[e] for e in group), reverse=True)[:2]))
        allowed = [e for group in groups[: config.topk_group] for e in group]
    best = sorted(allowed, key=lambda e: -choice[e])[: config.num_experts_per_tok]
    total = sum(scores[e] for e in best) if normalises(config) else 1.0
    return {e: scale(config) * scores[e] / total for e in best}


@torch.no_grad()
def naive_gates(model: PreTrainedModel, sequences: Sequence[Ids]) -> dict[int, dict[int, float]]:
    """Eq. 2 per sparse layer: the mean weight of every expert that any token chose.

    The weights are those of `naive_route`; that these make the block's own output is asserted on the way.
    """
    double = naive_double(model)
    gates = {}
    for index, block in sparse_blocks(double).items():
        collected: dict[int, list[float]] = {}
        for inputs, outputs in watch(double, sequences, block):
            for x, y in zip(inputs, outputs, strict=True):
                weights = naive_route(model.config, block.gate, x)
                for expert, weight in weights.items():
                    collected.setdefault(expert, []).append(weight)
                again = naive_block(x, block, block, (list(weights), list(weights.values())))
                torch.testing.assert_close(again, y, rtol=1e-5, atol=1e-6)
        gates[index] = {e: sum(values) / len(values) for e, values in sorted(collected.items())}
    return gates


# --- Algorithms 1 and 2 ---


def greedy(
    double: PreTrainedModel,
    sequences: Sequence[Ids],
    candidates: Sequence[int],
    num: int,
    metric: str,
    what: int | str,
    condense: Callable[[list[int]], dict[int, Choice]],
) -> Search:
    """Adds one candidate after the other; `condense` says what the model is with some of them chosen."""
    target = run(double, sequences, what)

    def score(chosen: list[int]) -> float:
        with condensed(double, condense(chosen)):
            return distance(metric, target, run(double, sequences, what))

    search = Search([], [score([])], [])
    for _ in range(num):
        step = {c: score([*search.order, c]) for c in candidates if c not in search.order}
        best = min(sorted(step), key=lambda c: step[c])
        search.order.append(best)
        search.scores.append(step[best])
        search.steps.append(step)
    return search


def naive_expert_search(
    model: PreTrainedModel, sequences: Sequence[Ids], gates: dict[int, dict[int, float]], num: int, metric: str
) -> dict[int, Search]:
    """Algorithm 1 for every sparse layer on its own."""
    double, found = naive_double(model), {}
    for layer, of in gates.items():
        what = "hidden" if layer == len(layers_of(double)) - 1 else layer
        condense = partial(lambda layer, of, experts: {layer: (experts, [of[e] for e in experts])}, layer, of)
        found[layer] = greedy(double, sequences, list(of), num, metric, what, condense)
    return found


def naive_layer_search(
    model: PreTrainedModel, sequences: Sequence[Ids], choices: dict[int, Choice], num: int, metric: str, compare: str
) -> Search:
    """Algorithm 2: `num` of the layers of `choices`."""
    double, candidates = naive_double(model), list(choices)
    return greedy(double, sequences, candidates, num, metric, compare, lambda layers: {i: choices[i] for i in layers})
