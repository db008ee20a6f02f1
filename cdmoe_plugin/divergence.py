"""How far two outputs are apart, token by token."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

# Added to probabilities inside each KL divergence, as in the published code of CD-MoE.
EPSILON = 1e-10


def js_divergence(target: Tensor, candidate: Tensor) -> Tensor:
    """Jensen-Shannon divergence of the softmax over the last dimension, in nats (CD-MoE, section 3.2).

    Args:
        target (`Tensor`): Scores `[..., H]`; anything under float32 is computed in float32.
        candidate (`Tensor`): Scores `[..., H]`, broadcast against `target`.

    Returns:
        `Tensor`: `½ KL(p‖m) + ½ KL(q‖m)`, `m = ½(p + q)`, of shape `[...]`.
    """
    p, log_p = _probabilities(target)
    q, log_q = _probabilities(candidate)
    log_m = (p + q).log_().sub_(math.log(2))
    # KL in differences of logarithms: sums of p·log p and of q·log q would cancel to noise.
    q.mul_(log_q.sub_(log_m))
    return q.add_(p * log_m.neg_().add_(log_p)).sum(-1).mul_(0.5)


def kl_divergence(target: Tensor, candidate: Tensor) -> Tensor:
    """Kullback-Leibler divergence `KL(p‖q)` of the softmax over the last dimension, in nats; shapes as above."""
    p, log_p = _probabilities(target)
    _, log_q = _probabilities(candidate)
    return log_q.neg_().add_(log_p).mul_(p).sum(-1)


def mean_squared_error(target: Tensor, candidate: Tensor) -> Tensor:
    """Squared difference, averaged over the last dimension; shapes as in `js_divergence`."""
    return (_wide(candidate) - _wide(target)).square_().mean(-1)


METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "js": js_divergence,
    "kl": kl_divergence,
    "mse": mean_squared_error,
}


@torch.no_grad()
def perplexities(logits: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Perplexity of each sequence: exp of the mean negative log-likelihood of all its tokens but the first.

    Args:
        logits (`Tensor`): `[B, S, V]`; computed in float32 or wider.
        input_ids (`Tensor`): `[B, S]`.
        attention_mask (`Tensor`): `[B, S]`, 0 on padding at the right end.

    Returns:
        `Tensor`: float64 `[B]` on the device of `logits`; 1 for a sequence of one token, which predicts nothing.
    """
    targets = input_ids[:, 1:].to(logits.device)
    counted = attention_mask[:, 1:].to(logits.device, torch.float64)
    # Row by row: logits are as wide as the vocabulary.
    losses = [cross_entropy(_wide(row[:-1]), ids, reduction="none") for row, ids in zip(logits, targets, strict=True)]
    sums = (torch.stack(losses).double() * counted).sum(1)
    return (sums / counted.sum(1).clamp_min(1)).exp()


def _probabilities(scores: Tensor) -> tuple[Tensor, Tensor]:
    p = torch.softmax(_wide(scores), dim=-1).add_(EPSILON)
    return p, p.log()


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
