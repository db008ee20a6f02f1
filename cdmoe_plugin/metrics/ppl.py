"""The perplexity of the whole model."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..registry import MODEL_METRICS
from .probabilities import wide


@MODEL_METRICS.register(
    "ppl",
    "absolute difference of each sequence's perplexity; for the layer search only, the expert search uses js",
    "CD-MoE, section 4.4",
)
@torch.no_grad()
def perplexities(logits: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Compute the perplexity of each sequence: exp of the mean negative log-likelihood of all tokens but the first.

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
    losses = [cross_entropy(wide(row[:-1]), ids, reduction="none") for row, ids in zip(logits, targets, strict=True)]
    sums = (torch.stack(losses).double() * counted).sum(1)
    return (sums / counted.sum(1).clamp_min(1)).exp()
