"""The model as layers are condensed one after the other, and how far its output moves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from torch import Tensor

from ..layerwise import LayerStream, State
from .outputs import OutputComparison

# What a candidate layer does while it stands condensed in the model.
Condense = Callable[[int], AbstractContextManager[None]]


@dataclass
class LayerSearchData:
    """Everything that layer selection may look at.

    Args:
        stream (`LayerStream`): The unmodified model on the calibration tokens.
        candidates (`list[int]`): Decoder layers that may be condensed.
        condense (`Callable`): Context manager that puts the condensed form of a layer in its place.
        comparison (`OutputComparison`): How far two outputs of the model are apart.
        own_divergences (`dict[int, float]`): Divergence of each candidate's own output once it is condensed, as the
            expert search measured it.
        cache_bytes (`int`): Memory for hidden states that are kept at layer boundaries.
        token_weights (`list[Tensor]`): float32 `[T]` per batch, the weight of each valid token.
        entering (`Callable`): For a decoder layer, its input and a batch: the hidden states `[B, S, H]` that enter what
            is replaced there, the MLP sub-layer or (where blocks are trimmed) the whole layer.
        known (`MutableMapping[str, float]`): Divergences that need not be computed again, and where new ones go.
        name (`str`): How their names begin there.
    """

    stream: LayerStream
    candidates: list[int]
    condense: Condense
    comparison: OutputComparison
    own_divergences: dict[int, float]
    cache_bytes: int
    token_weights: list[Tensor]
    entering: Callable[[int, State, int], Tensor]
    known: MutableMapping[str, float] = field(default_factory=dict)
    name: str = "layers"


class ModelPath:
    """The best model so far as hidden states at layer boundaries, as many of them as the memory budget allows."""

    def __init__(self, data: LayerSearchData) -> None:
        self.data = data
        self.chosen: list[int] = []
        stream = data.stream
        bytes_per_boundary = sum(s[0].numel() * s[0].element_size() for s in stream.embeddings)
        kept = max(1, data.cache_bytes // bytes_per_boundary)
        # Boundary 0 costs nothing: it is the embeddings, which the stream holds anyway.
        self.stride = max(1, -(-len(stream) // kept))
        self.boundaries: list[dict[int, State]] = [{0: state} for state in stream.embeddings]
        self._fill(0)
        self.target = [self._output(batch, *self._nearest(batch, len(stream))) for batch in self._batches()]

    def score(self, layer: int) -> float:
        """How far the output is from the unmodified model's with one more layer condensed.

        A candidate is run from the boundary just below it, where nothing differs yet from the best model so far.

        Raises:
            ValueError: naming the layer, if that is not finite.
        """
        name = " ".join(map(str, [self.data.name, *self.chosen, layer]))
        if name not in self.data.known:
            self.data.known[name] = _finite(self._distance(layer), layer)
        return self.data.known[name]

    def choose(self, layer: int) -> None:
        """Condenses a layer for good: all boundaries above it change."""
        self.chosen.append(layer)
        for kept in self.boundaries:
            for boundary in [b for b in kept if b > layer]:
                del kept[boundary]
        self._fill(layer)

    def _distance(self, layer: int) -> float:
        total = 0.0
        for batch in self._batches():
            output = self._output(batch, *self._nearest(batch, layer), extra=layer)
            total += self.data.comparison.distance(self.target[batch], output, batch)
        return total

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
        return self.data.comparison.output(self.data.stream.finish(state[0]), batch)

    def _batches(self) -> range:
        return range(len(self.data.stream.batches))


def _finite(divergence: float, layer: int) -> float:
    if not math.isfinite(divergence):
        raise ValueError(
            f"With decoder layer {layer} condensed, the divergence of the model's output is {divergence}: the output "
            "contains NaN or infinity. Check the checkpoint, and try dtype='float32'."
        )
    return divergence
