"""What the layer search compares: the model's output, before and after layers are condensed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from ...decoder.stream import LayerStream
from ...divergence import METRICS, js_divergence, perplexities
from ...registry import lookup

TokenMetric = Callable[[Tensor, Tensor], Tensor]


class OutputComparison(Protocol):
    """How far a model's output is from that of the unmodified model."""

    def output(self, last: Tensor, batch: int) -> Tensor:
        """What is compared, from the last hidden state `[B, S, H]` (after the final norm) of a batch."""

    def distance(self, target: Tensor, output: Tensor, batch: int) -> Tensor:
        """A batch's share of the distance between two outputs, float64 `[]`; the distance is the sum over batches."""


class TokenComparison:
    """A divergence per token: the mean over sequences of the mean over a sequence's tokens.

    Args:
        stream (`LayerStream`): The model.
        token_weights (`list[Tensor]`): float32 `[T]` per batch, the weight of each valid token.
        metric (`Callable`): Divergence per token of two outputs `[T, H]`.
        select (`Callable`): From a last hidden state to what is compared, from `COMPARE`.
    """

    def __init__(
        self,
        stream: LayerStream,
        token_weights: list[Tensor],
        metric: TokenMetric,
        select: Callable[[LayerStream, Tensor, int], Tensor],
    ) -> None:
        self.stream = stream
        self.token_weights = token_weights
        self.metric = metric
        self.select = select

    def output(self, last: Tensor, batch: int) -> Tensor:
        """`[T, H]` (or `[T, V]`) of the valid tokens."""
        return self.stream.tokens(self.select(self.stream, last, batch), batch)

    def distance(self, target: Tensor, output: Tensor, batch: int) -> Tensor:
        weights = self.token_weights[batch].to(output.device, torch.float64, non_blocking=True)
        # Logits are as wide as the vocabulary: a few rows at a time.
        rows = max(1, 2**24 // target.shape[-1])
        parts = [self.metric(t, o) for t, o in zip(target.split(rows), output.split(rows), strict=True)]
        return torch.cat(parts).double() @ weights


class PerplexityComparison:
    """Absolute difference of each calibration sequence's perplexity, averaged (CD-MoE, section 4.4).

    Args:
        stream (`LayerStream`): The model, with a language-modelling head.
        num_sequences (`int`): Calibration sequences, those of other processes included.
    """

    def __init__(self, stream: LayerStream, num_sequences: int) -> None:
        self.stream = stream
        self.num_sequences = num_sequences

    def output(self, last: Tensor, batch: int) -> Tensor:
        """Perplexity of each sequence, float64 `[B]`."""
        tokens = self.stream.batches[batch]
        return perplexities(self.stream.logits(last, batch), tokens.input_ids, tokens.attention_mask)

    def distance(self, target: Tensor, output: Tensor, batch: int) -> Tensor:
        return (output - target).abs().sum() / self.num_sequences


def last_hidden(_stream: LayerStream, last: Tensor, _batch: int) -> Tensor:
    """The last hidden state after the final norm, which the published code compares."""
    return last


def logits(stream: LayerStream, last: Tensor, batch: int) -> Tensor:
    """The logits, which is how the paper's text may be read ("the output of the final model layer")."""
    return stream.logits(last, batch)


COMPARE: dict[str, Callable[[LayerStream, Tensor, int], Tensor]] = {"hidden": last_hidden, "logits": logits}

# Metrics that are no mean over tokens, and that only the output of the whole model has.
MODEL_METRICS: dict[str, Callable[[LayerStream, int], OutputComparison]] = {"ppl": PerplexityComparison}


def all_metrics() -> Mapping[str, object]:
    """Every metric that a config may name."""
    return {**METRICS, **MODEL_METRICS}


def layer_metric(name: str) -> TokenMetric:
    """The metric on one layer's output: js, as in the paper, where `name` is defined on the model's output only."""
    return js_divergence if name in MODEL_METRICS else lookup(METRICS, name, "metric")


def compare_outputs(
    metric: str, compare: str, stream: LayerStream, token_weights: list[Tensor], num_sequences: int
) -> OutputComparison:
    """The comparison that a config's `metric` and `compare` mean; perplexity goes by the model's head in any case."""
    if metric in MODEL_METRICS:
        return MODEL_METRICS[metric](stream, num_sequences)
    return TokenComparison(stream, token_weights, lookup(METRICS, metric, "metric"), COMPARE[compare])


def needs_head(metric: str, compare: str) -> bool:
    """Whether a comparison needs a language-modelling head."""
    return metric in MODEL_METRICS or compare == "logits"
