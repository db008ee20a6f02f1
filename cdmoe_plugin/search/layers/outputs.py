"""What the layer search compares: the model's output, before and after layers are condensed."""

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
        select (`Callable`): From a last hidden state to what is compared, from `registry.COMPARE`.
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


class SequenceComparison:
    """Absolute difference of a number per calibration sequence, averaged (CD-MoE, section 4.4).

    Args:
        stream (`LayerStream`): The model, with a language-modelling head.
        num_sequences (`int`): Calibration sequences, those of other processes included.
        measure (`Callable`): A number per sequence, from `registry.MODEL_METRICS`.
    """

    def __init__(self, stream: LayerStream, num_sequences: int, measure: SequenceMetric) -> None:
        self.stream = stream
        self.num_sequences = num_sequences
        self.measure = measure

    def output(self, last: Tensor, batch: int) -> Tensor:
        """The number of each sequence, float64 `[B]`."""
        tokens = self.stream.batches[batch]
        return self.measure(self.stream.logits(last, batch), tokens.input_ids, tokens.attention_mask)

    def distance(self, target: Tensor, output: Tensor, batch: int) -> Tensor:
        return (output - target).abs().sum() / self.num_sequences


@COMPARE.register("hidden", "the last hidden state after the final norm", "the published code of CD-MoE")
def last_hidden(_stream: LayerStream, last: Tensor, _batch: int) -> Tensor:
    """The last hidden state after the final norm, which the published code compares."""
    return last


@COMPARE.register("logits", "the output of the language-modelling head")
def logits(stream: LayerStream, last: Tensor, batch: int) -> Tensor:
    """The logits, which is how the paper's text may be read ("the output of the final model layer")."""
    return stream.logits(last, batch)


def layer_metric(name: str) -> TokenMetric:
    """The metric on one layer's output: js, as in the paper, where `name` is defined on the model's output only."""
    return js_divergence if name in MODEL_METRICS else METRICS.lookup(name)


def compare_outputs(
    metric: str, compare: str, stream: LayerStream, token_weights: list[Tensor], num_sequences: int
) -> OutputComparison:
    """The comparison that a config's `metric` and `compare` mean; what needs the logits takes them in any case."""
    if metric in MODEL_METRICS:
        return SequenceComparison(stream, num_sequences, MODEL_METRICS[metric])
    return TokenComparison(stream, token_weights, METRICS.lookup(metric), COMPARE[compare])


def needs_head(metric: str, compare: str) -> bool:
    """Whether a comparison needs a language-modelling head."""
    return metric in MODEL_METRICS or compare == "logits"
