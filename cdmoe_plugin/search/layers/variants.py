"""Variants of the model with some layers condensed, and the divergence of their outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...decoder.stream import LayerStream
from ...decoder.whole import LayerOutput
from ...processes import Processes
from ..order import Key, least
from .outputs import OutputComparison

# From a layer to the context in which it is condensed.
Condense = Callable[[int], AbstractContextManager[None]]
# The condensed decoder layers of one variant.
Condensed = frozenset[int]
# Among the known values: how many tokens went through how many layers for the divergences, padding left out.
TOKEN_LAYERS = "token-layers"


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
        races (`bool`): Whether candidates race, see `race.Race`.
        seed (`int`): Seed of the race.
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
    races: bool = False
    seed: int = 0


class ModelVariants:
    """The model with different sets of layers condensed, all run together, one decoder layer after the other.

    Variants that are equal up to some layer share its hidden states. Each layer's weights are needed only once for all
    variants, which saves most of the time if they are offloaded to disk.
    """

    def __init__(self, data: LayerSearchData) -> None:
        self.data = data
        self.target: list[Tensor] | None = None
        # Batches whose work for the target is not counted yet.
        self._uncounted: set[int] = set()

    @property
    def steps(self) -> int:
        """The number of steps of a comparison: each layer once per batch, for any number of variants."""
        return len(self.data.stream) * len(self.data.stream.batches)

    def least(
        self, variants: Mapping[Key, Condensed], tick: Callable[[int], object] = int, complete: bool = False
    ) -> tuple[Key, dict[Key, float]]:
        """Find the variant whose output diverges least; ties go to the lower key, see `order.least`.

        Args:
            variants (`Mapping[Key, frozenset[int]]`): The condensed layers of each variant.
            tick (`Callable`): As in `divergences`.
            complete (`bool`, defaults to `False`): Whether to measure all variants on all sequences, in any case.

        Returns:
            The key of the variant, and the divergences of all variants that were measured on all sequences.
        """
        found = self.divergences(variants.values(), tick)
        scores = {key: found[variant] for key, variant in variants.items()}
        return least(scores), scores

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
            self._keep(*self._measure(missing, tick))
        else:
            tick(self.steps)
        return {variant: known[self._name(variant)] for variant in variants}

    def _keep(self, found: Mapping[Condensed, float], token_layers: float, **others: float) -> None:
        """Add divergences, the work that they took, and other values to the known ones, in one step."""
        for variant, divergence in found.items():
            _check_finite(divergence, variant)
        known = self.data.known
        named = {self._name(variant): divergence for variant, divergence in found.items()}
        known.update({**named, **others, TOKEN_LAYERS: known.get(TOKEN_LAYERS, 0.0) + token_layers})

    def _name(self, variant: Condensed) -> str:
        return " ".join(map(str, [self.data.name, *sorted(variant)]))

    def _measure(
        self, variants: Sequence[Condensed], tick: Callable[[int], object]
    ) -> tuple[dict[Condensed, float], float]:
        """Measure divergences, and the work that it takes, in token-layers."""
        parts = [
            torch.cat([shares.sum(1), work])
            for shares, work in self._shares(variants, range(len(self.data.stream.batches)), tick)
        ]
        *divergences, work = self.data.processes.total(parts).tolist()
        return dict(zip(variants, divergences, strict=True)), work

    def _shares(
        self, variants: Sequence[Condensed], batches: Sequence[int], tick: Callable[[int], object]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield by batch the shares `[V, B]` of all sequences in each variant's divergence, and the work `[1]`."""
        stream, comparison = self.data.stream, self.data.comparison
        runs = layer_runs(variants, len(stream))
        if self.target is None:
            whole = range(len(stream.batches))
            self.target = [output for [output] in self._outputs([frozenset()], whole, lambda _part: None)]
            self._uncounted = set() if TOKEN_LAYERS in self.data.known else set(whole)
        for batch, outputs in zip(batches, self._outputs(variants, batches, tick), strict=True):
            shares = torch.stack([comparison.shares(self.target[batch], output, batch) for output in outputs])
            work = runs + (len(stream) if batch in self._uncounted else 0)
            self._uncounted.discard(batch)
            yield shares, shares.new_tensor([work * float(stream.valid(batch).sum())])

    def _outputs(
        self, variants: Sequence[Condensed], batches: Sequence[int], tick: Callable[[int], object]
    ) -> Iterator[list[Tensor]]:
        """Yield the compared outputs of all variants batch by batch, as many batches at a time as fit in the cache."""
        stream = self.data.stream
        if not batches:
            return
        together = max(1, self.data.cache_bytes // (max(stream.output_bytes(batches), 1) * (len(variants) + 1)))
        for start in range(0, len(batches), together):
            some = batches[start : start + together]
            hidden = self._run(variants, some, tick)
            for batch in some:
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


def layer_runs(variants: Iterable[Condensed], num_layers: int) -> int:
    """Count the layers that are run for some variants of a model together: once where several are still equal."""
    return sum(len({frozenset(i for i in v if i <= layer) for v in variants}) for layer in range(num_layers))


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
