"""The sensitivity of a model: the change of its output by an error of one layer."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...blocks import SparseBlock, head_of
from ...calibration import TokenBatch
from ...condense.place import standing_in
from ...decoder.stream import LayerStream
from ...metrics.js import js_divergence
from ...metrics.kl import kl_divergence
from ...model.layers_cdmoe import CondensedMLP
from ...processes import Processes
from ..layers.variants import LayerSearchData, ModelVariants

# Sequences on which the change of the output is measured: many layers run on them, and the order is soon clear.
_SEQUENCES = 32
# Values of logits that are compared at a time.
_ELEMENTS = 2**24


def few_batches(batches: list[TokenBatch], processes: int) -> list[TokenBatch]:
    """Select batches with about 32 sequences, evenly: they may be in the order of their length."""
    each = max(1, round(sum(len(batch.input_ids) for batch in batches) / len(batches)))
    number = min(len(batches), max(processes, -(-_SEQUENCES // each)))
    return [batches[i * len(batches) // number] for i in range(number)]


def output_changes(
    stream: LayerStream,
    blocks: Mapping[int, SparseBlock],
    condensed: Mapping[int, CondensedMLP],
    cache_bytes: int,
    processes: Processes,
    known: MutableMapping[str, float],
) -> dict[int, float]:
    """Measure the change of the model's output when each layer alone is condensed.

    Args:
        stream (`LayerStream`): The model on this process's share of `few_batches`.
        blocks (`dict[int, SparseBlock]`): The layers' sparse blocks.
        condensed (`dict[int, CondensedMLP]`): Their condensed forms; those of layers that are known may be missing.
        cache_bytes (`int`): Memory for hidden states of variants that run together.
        processes (`Processes`): The processes, which share the few batches.
        known (`MutableMapping[str, float]`): Known values by name, such as "change 3"; new ones are added.

    Returns:
        `dict[int, float]`: The Kullback-Leibler divergence of the model's predictions, in nats; without a
        language-modelling head, the Jensen-Shannon divergence of the last hidden states.
    """

    def condense(layer: int) -> AbstractContextManager[None]:
        return standing_in(stream.model, blocks[layer], condensed[layer])

    sequences = int(processes.total([torch.tensor(len(batch.input_ids)) for batch in stream.batches]))
    data = LayerSearchData(
        stream=stream,
        candidates=sorted(blocks),
        condense=condense,
        comparison=_PredictionComparison(stream, sequences),
        own_divergences={},
        cache_bytes=cache_bytes,
        token_weights=[],
        entering=lambda _layer, state, _batch: state[0],
        processes=processes,
        known=known,
        name="change",
    )
    found = ModelVariants(data).divergences([frozenset([layer]) for layer in blocks])
    return {layer: divergence for [layer], divergence in found.items()}


@dataclass(frozen=True)
class _PredictionComparison:
    """The mean divergence of predictions, which are computed for one variant at a time, as they are large."""

    stream: LayerStream
    num_sequences: int

    def output(self, last: Tensor, batch: int) -> Tensor:
        return last

    def shares(self, target: Tensor, output: Tensor, batch: int) -> Tensor:
        outputs, metric = (target, output), js_divergence
        if head_of(self.stream.model) is not None:
            outputs, metric = (self.stream.logits(target, batch), self.stream.logits(output, batch)), kl_divergence
        rows = max(1, _ELEMENTS // outputs[0].shape[-1])
        pairs = zip(*(self.stream.tokens(each, batch).split(rows) for each in outputs), strict=True)
        apart = torch.cat([metric(*pair).double() for pair in pairs])
        return self.stream.sequence_means(apart, batch) / self.num_sequences

    def on(self, stream: LayerStream) -> _PredictionComparison:
        return replace(self, stream=stream)
