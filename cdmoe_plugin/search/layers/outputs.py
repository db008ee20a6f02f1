"""The comparison of the model's outputs before and after layers are condensed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
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

    def shares(self, target: Tensor, output: Tensor, batch: int) -> Tensor:
        """Compute each sequence's share of the distance of two outputs, float64 `[B]`.

        The shares of all sequences of all batches add up to the distance.
        """

    def on(self, stream: LayerStream) -> OutputComparison:
        """Return this comparison for the same sequences in other batches."""


@dataclass(frozen=True)
class TokenComparison:
    """The mean over sequences of the mean divergence over a sequence's tokens.

    Args:
        stream (`LayerStream`): The model.
        num_sequences (`int`): Number of calibration sequences of all processes.
        metric (`Callable`): Divergence per token of two outputs `[T, H]`.
        select (`Callable`): From a last hidden state to the compared output, from `registry.COMPARE`.
    """

    stream: LayerStream
    num_sequences: int
    metric: TokenMetric
    select: Callable[[LayerStream, Tensor, int], Tensor]

    def output(self, last: Tensor, batch: int) -> Tensor:
        return self.stream.tokens(self.select(self.stream, last, batch), batch)

    def shares(self, target: Tensor, output: Tensor, batch: int) -> Tensor:
        # Logits are as wide as the vocabulary: a few rows at a time.
        rows = max(1, 2**24 // target.shape[-1])
        parts = [self.metric(t, o) for t, o in zip(target.split(rows), output.split(rows), strict=True)]
        return self.stream.sequence_means(torch.cat(parts).double(), batch) / self.num_sequences

    def on(self, stream: LayerStream) -> TokenComparison:
        return replace(self, stream=stream)


@dataclass(frozen=True)
class SequenceComparison:
    """The mean absolute difference of a value per calibration sequence (CD-MoE, section 4.4).

    Args:
        stream (`LayerStream`): The model, with a language-modelling head.
        num_sequences (`int`): Number of calibration sequences of all processes.
        measure (`Callable`): The value of each sequence, from `registry.MODEL_METRICS`.
    """

    stream: LayerStream
    num_sequences: int
    measure: SequenceMetric

    def output(self, last: Tensor, batch: int) -> Tensor:
        tokens = self.stream.batches[batch]
        return self.measure(self.stream.logits(last, batch), tokens.input_ids, tokens.attention_mask)

    def shares(self, target: Tensor, output: Tensor, batch: int) -> Tensor:
        return (output - target).abs() / self.num_sequences

    def on(self, stream: LayerStream) -> SequenceComparison:
        return replace(self, stream=stream)


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


def compare_outputs(metric: str, compare: str, stream: LayerStream, num_sequences: int) -> OutputComparison:
    """Make the comparison for a config's `metric` and `compare`; metrics on the model's output ignore `compare`."""
    if metric in MODEL_METRICS:
        return SequenceComparison(stream, num_sequences, MODEL_METRICS[metric])
    return TokenComparison(stream, num_sequences, METRICS.lookup(metric), COMPARE[compare])


def needs_head(metric: str, compare: str) -> bool:
    """Return whether a comparison needs a language-modelling head."""
    return metric in MODEL_METRICS or compare == "logits"
