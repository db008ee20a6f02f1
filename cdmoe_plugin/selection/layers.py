"""Layer selection (Algorithm 2): which sparse layers are condensed, and in which order."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers.utils import logging

from ..layerwise import LayerStream, State
from . import least

# What a candidate layer does while it stands condensed in the model.
Condense = Callable[[int], AbstractContextManager[None]]


@dataclass
class LayerSearchData:
    """Everything that layer selection may look at.

    Args:
        stream (`LayerStream`): The unmodified model on the calibration tokens.
        candidates (`list[int]`): Decoder layers that may be condensed.
        condense (`Callable`): Context manager that puts the condensed form of a layer in its place.
        metric (`Callable`): Divergence per token of two outputs, from `divergence.METRICS`.
        output (`Callable`): From the last hidden state `[B, S, H]` of a batch to what is compared, from `COMPARE`.
        token_weights (`list[Tensor]`): float32 `[T]` per batch, the weight of each valid token.
        cache_bytes (`int`): Memory for hidden states that are kept at layer boundaries.
        entering (`Callable`): For a decoder layer, its input and a batch: the hidden states `[B, S, H]` that enter what
            is replaced there, the MLP sub-layer or (where blocks are trimmed) the whole layer.
        known (`MutableMapping[str, float]`): Divergences that need not be computed again, and where new ones go.
    """

    stream: LayerStream
    candidates: list[int]
    condense: Condense
    metric: Callable[[Tensor, Tensor], Tensor]
    output: Callable[[LayerStream, Tensor, int], Tensor]
    token_weights: list[Tensor]
    cache_bytes: int
    entering: Callable[[int, State, int], Tensor]
    known: MutableMapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerOrder:
    """Layers in the order of their selection.

    Args:
        layers (`list[int]`): The chosen decoder layers.
        scores (`list[float]`): Divergence of the model's output once the first, the first two, ... are condensed.
        rounds (`list[dict[int, float]]`): Divergence of every candidate in every round; the first round is each layer
            on its own (Figure 1).
        similarities (`dict[int, float]`, *optional*): Cosine similarities by candidate, where they were ranked by them;
            nothing else was measured then.
    """

    layers: list[int]
    scores: list[float]
    rounds: list[dict[int, float]] = field(default_factory=list)
    similarities: dict[int, float] | None = None


def greedy_layers(data: LayerSearchData, num_layers: int) -> LayerOrder:
    """Adds, one after the other, the layer whose condensation changes the model's output least (CD-MoE, Algorithm 2).

    Outputs are compared with the unmodified model's. A candidate is run from the boundary just below it, where
    nothing differs yet from the best model so far. Ties go to the lower index.
    """
    order = LayerOrder([], [])
    path = _Path(data)
    target = path.outputs()
    steps = sum(len(data.candidates) - i for i in range(num_layers))
    with logging.tqdm(total=steps, desc="Layer search", unit="candidate") as progress:
        for _ in range(num_layers):
            scores = {}
            for layer in data.candidates:
                if layer in order.layers:
                    continue
                name = "layers " + " ".join(map(str, [*order.layers, layer]))
                if name not in data.known:
                    data.known[name] = _finite(path.divergence(layer, target), layer)
                scores[layer] = data.known[name]
                progress.update()
            best = least(scores)
            order.layers.append(best)
            order.scores.append(scores[best])
            order.rounds.append(scores)
            if len(order.layers) < num_layers:
                path.choose(best)
    return order


def similar_layers(data: LayerSearchData, num_layers: int) -> LayerOrder:
    """Ranks layers once, those first whose output is most like their input (He et al. 2024, arXiv 2406.15786).

    A layer's similarity is the mean over sequences of the mean over tokens of the cosine between what enters it and
    what leaves it (the residual included) in the unmodified model, computed in float64. Ties go to the lower index.
    """
    similarities: dict[int, float] = {}
    states = list(data.stream.embeddings)
    for layer in logging.tqdm(range(max(data.candidates) + 1), desc="Layer similarities", unit="layer"):
        outputs = [data.stream.run_layer(layer, state, batch) for batch, state in enumerate(states)]
        if layer in data.candidates:
            name = f"similarity {layer}"
            if name not in data.known:
                data.known[name] = _similarity(data, layer, states, outputs)
            similarities[layer] = data.known[name]
        states = outputs
    left = {layer: -similarity for layer, similarity in similarities.items()}
    order: list[int] = []
    for _ in range(num_layers):
        order.append(least(left))
        del left[order[-1]]
    return LayerOrder(order, [], similarities=similarities)


def _similarity(data: LayerSearchData, layer: int, states: list[State], outputs: list[State]) -> float:
    total = 0.0
    for batch, (state, output) in enumerate(zip(states, outputs, strict=True)):
        leaving = output[0].flatten(2)  # a few architectures have several residual streams
        entering = data.entering(layer, state, batch).flatten(2)
        valid = data.stream.valid(batch).to(leaving.device)
        cosines = cosine_similarity(entering[valid].double(), leaving[valid].double(), dim=-1)
        total += float(cosines @ data.token_weights[batch].to(cosines))
    return total


LAYER_SELECTIONS: dict[str, Callable[[LayerSearchData, int], LayerOrder]] = {
    "greedy": greedy_layers,
    "similarity": similar_layers,
}


def last_hidden(_stream: LayerStream, last: Tensor, _batch: int) -> Tensor:
    """The last hidden state after the final norm, which the published code compares."""
    return last


def logits(stream: LayerStream, last: Tensor, batch: int) -> Tensor:
    """The logits, which is how the paper's text may be read ("the output of the final model layer")."""
    return stream.logits(last, batch)


COMPARE: dict[str, Callable[[LayerStream, Tensor, int], Tensor]] = {"hidden": last_hidden, "logits": logits}


class _Path:
    """The best model so far as hidden states at layer boundaries, as many of them as the memory budget allows."""

    def __init__(self, data: LayerSearchData) -> None:
        self.data = data
        self.chosen: set[int] = set()
        stream = data.stream
        bytes_per_boundary = sum(s[0].numel() * s[0].element_size() for s in stream.embeddings)
        kept = max(1, data.cache_bytes // bytes_per_boundary)
        # Boundary 0 costs nothing: it is the embeddings, which the stream holds anyway.
        self.stride = max(1, -(-len(stream) // kept))
        self.boundaries: list[dict[int, State]] = [{0: state} for state in stream.embeddings]
        self._fill(0)

    def outputs(self) -> list[Tensor]:
        """What is compared, on valid tokens, for the model without a candidate; one `[T, H]` per batch."""
        return [self._output(batch, *self._nearest(batch, len(self.data.stream))) for batch in self._batches()]

    def divergence(self, layer: int, target: list[Tensor]) -> float:
        """Divergence from `target` with one more layer condensed."""
        total = 0.0
        for batch in self._batches():
            output = self._output(batch, *self._nearest(batch, layer), extra=layer)
            weights = self.data.token_weights[batch].to(output.device, torch.float64)
            total += float(_per_token(self.data.metric, target[batch], output).double() @ weights)
        return total

    def choose(self, layer: int) -> None:
        """Condenses a layer for good: all boundaries above it change."""
        self.chosen.add(layer)
        for kept in self.boundaries:
            for boundary in [b for b in kept if b > layer]:
                del kept[boundary]
        self._fill(layer)

    def _fill(self, start: int) -> None:
        for batch in self._batches():
            for boundary, state in self._run(batch, *self._nearest(batch, start)):
                if boundary % self.stride == 0:
                    self.boundaries[batch][boundary] = state

    def _nearest(self, batch: int, boundary: int) -> tuple[int, State]:
        start = max(b for b in self.boundaries[batch] if b <= boundary)
        return start, self.boundaries[batch][start]

    def _run(self, batch: int, start: int, state: State, extra: int | None = None) -> Iterator[tuple[int, State]]:
        """The boundaries above `start`, one after the other."""
        for layer in range(start, len(self.data.stream)):
            condensed = layer in self.chosen or layer == extra
            with self.data.condense(layer) if condensed else nullcontext():
                state = self.data.stream.run_layer(layer, state, batch)
            yield layer + 1, state

    def _output(self, batch: int, start: int, state: State, extra: int | None = None) -> Tensor:
        for _boundary, after in self._run(batch, start, state, extra):
            state = after
        stream = self.data.stream
        output = self.data.output(stream, stream.finish(state[0]), batch)
        return output[stream.valid(batch).to(output.device)]

    def _batches(self) -> range:
        return range(len(self.data.stream.batches))


def _finite(divergence: float, layer: int) -> float:
    if not math.isfinite(divergence):
        raise ValueError(
            f"With decoder layer {layer} condensed, the divergence of the model's output is {divergence}: the output "
            "contains NaN or infinity. Check the checkpoint, and try dtype='float32'."
        )
    return divergence


def _per_token(metric: Callable[[Tensor, Tensor], Tensor], target: Tensor, output: Tensor) -> Tensor:
    # Logits are as wide as the vocabulary: a few rows at a time.
    rows = max(1, 2**24 // target.shape[-1])
    parts = [metric(t, o) for t, o in zip(target.split(rows), output.split(rows), strict=True)]
    return torch.cat(parts)
