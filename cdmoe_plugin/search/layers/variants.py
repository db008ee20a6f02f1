"""Variants of the model with some layers condensed, and the divergence of their outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...decoder.stream import LayerOutput, LayerStream
from ..processes import Processes
from .outputs import OutputComparison

# From a layer to the context in which it is condensed.
Condense = Callable[[int], AbstractContextManager[None]]
# The condensed decoder layers of one variant.
Condensed = frozenset[int]


@dataclass
class LayerSearchData:
    """The data for layer selection.

    Args:
        stream (`LayerStream`): The unmodified model on the calibration tokens.
        candidates (`list[int]`): Decoder layers that may be condensed.
        condense (`Callable`): Context manager in which a layer is condensed.
        comparison (`OutputComparison`): The distance of two outputs of the model.
        own_divergences (`dict[int, float]`): Divergence of each candidate's own output when it is condensed, measured
            by the expert search.
        cache_bytes (`int`): Memory for hidden states of variants that run together.
        token_weights (`list[Tensor]`): float32 `[T]` per batch, the weight of each valid token.
        entering (`Callable`): From a decoder layer, its input and a batch to the input `[B, S, H]` of the part that is
            replaced: the MLP sub-layer, or the whole layer for `trim_block`.
        processes (`Processes`): The processes of the search.
        known (`MutableMapping[str, float]`): Known divergences by name; new ones are added.
        name (`str`): Prefix of their names.
    """

    stream: LayerStream
    candidates: list[int]
    condense: Condense
    comparison: OutputComparison
    own_divergences: dict[int, float]
    cache_bytes: int
    token_weights: list[Tensor]
    entering: Callable[[int, LayerOutput, int], Tensor]
    processes: Processes = field(default_factory=Processes)
    known: MutableMapping[str, float] = field(default_factory=dict)
    name: str = "layers"


class ModelVariants:
    """The model with different sets of layers condensed, all run together, one decoder layer after the other.

    Variants that are equal up to some layer share its hidden states. Each layer's weights are needed only once for all
    variants, which saves most of the time if they are offloaded to disk.
    """

    def __init__(self, data: LayerSearchData) -> None:
        self.data = data
        self.target: list[Tensor] | None = None

    @property
    def steps(self) -> int:
        """The number of layer runs of a comparison: each layer once per batch, for any number of variants."""
        return len(self.data.stream) * len(self.data.stream.batches)

    def divergences(self, variants: Iterable[Condensed], tick: Callable[[int], object] = int) -> dict[Condensed, float]:
        """Measure the divergence of each variant's output from the unmodified model's.

        Args:
            variants (`Iterable[frozenset[int]]`): The condensed layers of each variant.
            tick (`Callable`): Called with the number of finished `steps` since the last call.

        Raises:
            ValueError: naming the layers, if a divergence is not finite.
        """
        variants = list(variants)
        known = self.data.known
        missing = [variant for variant in variants if self._name(variant) not in known]
        if missing:
            found = self._measure(missing, tick)
            for variant, divergence in found.items():
                _check_finite(divergence, variant)
            known.update({self._name(variant): divergence for variant, divergence in found.items()})
        else:
            tick(self.steps)
        return {variant: known[self._name(variant)] for variant in variants}

    def _name(self, variant: Condensed) -> str:
        return " ".join(map(str, [self.data.name, *sorted(variant)]))

    def _measure(self, variants: Sequence[Condensed], tick: Callable[[int], object]) -> dict[Condensed, float]:
        if self.target is None:
            self.target = [output for [output] in self._outputs([frozenset()], lambda _part: None)]
        distances = []
        for batch, outputs in enumerate(self._outputs(variants, tick)):
            apart = [self.data.comparison.distance(self.target[batch], output, batch) for output in outputs]
            distances.append(torch.stack(apart))
        return dict(zip(variants, self.data.processes.total(distances).tolist(), strict=True))

    def _outputs(self, variants: Sequence[Condensed], tick: Callable[[int], object]) -> Iterable[list[Tensor]]:
        """Yield the compared outputs of all variants batch by batch, as many batches at a time as fit in the cache."""
        stream = self.data.stream
        together = max(1, self.data.cache_bytes // (max(stream.output_bytes, 1) * (len(variants) + 1)))
        for start in range(0, len(stream.batches), together):
            batches = range(len(stream.batches))[start : start + together]
            hidden = self._run(variants, batches, tick)
            for batch in batches:
                last = [hidden[variant][batch] for variant in variants]
                yield [self.data.comparison.output(stream.finish(output), batch) for output in last]

    def _run(
        self, variants: Sequence[Condensed], batches: Sequence[int], tick: Callable[[int], object]
    ) -> dict[Condensed, dict[int, LayerOutput]]:
        """Compute the last layer's output of every variant, by batch."""
        stream = self.data.stream
        # By the layers condensed so far: all variants begin as one.
        hidden: dict[Condensed, dict[int, LayerOutput]] = {frozenset(): {b: stream.embeddings[b] for b in batches}}
        for layer in range(len(stream)):
            wanted = {frozenset(i for i in variant if i <= layer) for variant in variants}
            condensed = sorted((done for done in wanted if layer in done), key=sorted)
            sparse = sorted(wanted.difference(condensed), key=sorted)
            after: list[dict[int, LayerOutput]] = []
            with stream.in_memory(layer):
                if condensed:
                    with self.data.condense(layer):
                        after = _ran(stream, layer, [hidden[done - {layer}] for done in condensed])
                hidden = {done: hidden[done] for done in sparse}
                _ran(stream, layer, list(hidden.values()), in_place=True)
            hidden.update(zip(condensed, after, strict=True))
            tick(len(batches))
        stream.check_finite()
        return hidden


def _ran(
    stream: LayerStream, layer: int, inputs: Sequence[dict[int, LayerOutput]], in_place: bool = False
) -> list[dict[int, LayerOutput]]:
    """Run a layer on the inputs of several variants by batch, optionally replacing the inputs by the outputs."""
    outputs = inputs if in_place else [dict(hidden) for hidden in inputs]
    for batch in inputs[0] if inputs else ():
        found = stream.run_together(layer, [hidden[batch] for hidden in inputs], batch)
        for hidden, output in zip(outputs, found, strict=True):
            hidden[batch] = output
    return list(outputs)


def _check_finite(divergence: float, condensed: Condensed) -> None:
    if not math.isfinite(divergence):
        raise ValueError(
            f"With decoder layers {sorted(condensed)} condensed, the divergence of the model's output is {divergence}: "
            "the output contains NaN or infinity. Check the checkpoint, and try dtype='float32'."
        )
