"""The comparison of the model's outputs before and after layers are condensed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ...decoder.stream import LayerStream
from ...metrics.js import js_divergence
from ...registry import COMPARE, METRICS, MODEL_METRICS

TokenMetric = Callable[[Tensor, Tensor], Tensor]
# From logits `[B, S, V]`, token ids and attention mask to `[B]`.
SequenceMetric = Callable[[Tensor, Tensor, Tensor], Tensor]


class OutputComparison(Protocol):
    """The distance of a model's output from that of the unmodified model."""

    def output(self, last: Tensor, batch: int) -> Tensor:
        """Compute the compared values from the last hidden state `[B, S, H]` (after the final norm) of a batch."""

    def distance(self, target: Tensor, output: Tensor, batch: int) -> Tensor:
        """Compute a batch's share of the distance of two outputs, float64 `[]`; batches add up to the distance."""


class TokenComparison:
    """The mean over sequences of the mean divergence over a sequence's tokens.

    Args:
        stream (`LayerStream`): The model.
        token_weights (`list[Tensor]`): float32 `[T]` per batch, the weight of each valid token.
        metric (`Callable`): Divergence per token of two outputs `[T, H]`.
        select (`Callable`): From a last hidden state to the compared output, from `registry.COMPARE`.
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
        return self.stream.tokens(self.select(self.stream, last, batch), batch)

    def distance(self, target: Tensor, output: Tensor, batch: int) -> Tensor:
        weights = self.token_weights[batch].to(output.device, torch.float64, non_blocking=True)
        # Logits are as wide as the vocabulary: a few rows at a time.
        rows = max(1, 2**24 // target.shape[-1])
        parts = [self.metric(t, o) for t, o in zip(target.split(rows), output.split(rows), strict=True)]
        return torch.cat(parts).double() @ weights


class SequenceComparison:
    """The mean absolute difference of a value per calibration sequence (CD-MoE, section 4.4).

    Args:
        stream (`LayerStream`): The model, with a language-modelling head.
        num_sequences (`int`): Number of calibration sequences of all processes.
        measure (`Callable`): The value of each sequence, from `registry.MODEL_METRICS`.
    """

    def __init__(self, stream: LayerStream, num_sequences: int, measure: SequenceMetric) -> None:
        self.stream = stream
        self.num_sequences = num_sequences
        self.measure = measure

    def output(self, last: Tensor, batch: int) -> Tensor:
        tokens = self.stream.batches[batch]
        return self.measure(self.stream.logits(last, batch), tokens.input_ids, tokens.attention_mask)

    def distance(self, target: Tensor, output: Tensor, batch: int) -> Tensor:
        return (output - target).abs().sum() / self.num_sequences


@COMPARE.register("hidden", "the last hidden state after the final norm", "the published code of CD-MoE")
def last_hidden(_stream: LayerStream, last: Tensor, _batch: int) -> Tensor:
    """Select the last hidden state after the final norm, which the published code compares."""
    return last


@COMPARE.register("logits", "the output of the language-modelling head")
def logits(stream: LayerStream, last: Tensor, batch: int) -> Tensor:
    """Compute the logits, another reading of the paper's "the output of the final model layer"."""
    return stream.logits(last, batch)


def layer_metric(name: str) -> TokenMetric:
    """Return the metric for one layer's output: js, as in the paper, if `name` applies to the model's output only."""
    return js_divergence if name in MODEL_METRICS else METRICS.lookup(name)


def compare_outputs(
    metric: str, compare: str, stream: LayerStream, token_weights: list[Tensor], num_sequences: int
) -> OutputComparison:
    """Make the comparison for a config's `metric` and `compare`; metrics on the model's output ignore `compare`."""
    if metric in MODEL_METRICS:
        return SequenceComparison(stream, num_sequences, MODEL_METRICS[metric])
    return TokenComparison(stream, token_weights, METRICS.lookup(metric), COMPARE[compare])


def needs_head(metric: str, compare: str) -> bool:
    """Return whether a comparison needs a language-modelling head."""
    return metric in MODEL_METRICS or compare == "logits"
