"""The race of candidates: whoever is certainly not the best is dropped after a part of the calibration sequences."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from ..order import TIE, Key, least
from .variants import Condensed, LayerSearchData, ModelVariants

# Sequences before candidates are first dropped; they become twice as many from stage to stage.
_FIRST = 8
_GROWTH = 2
# The chance of a difference as large as the observed one, if a candidate were as good as the best.
_CHANCE = 1e-5


def variants_of(data: LayerSearchData) -> ModelVariants:
    """Return the variants of a model, which race if the config says so and there are sequences enough.

    They do not if each stage would read all layers from the disk again while a GPU waits.
    """
    sizes = _batch_sizes(data) if data.races and not data.stream.reading_dominates else []
    return Race(data, sizes) if sum(sizes) >= 2 * _FIRST else ModelVariants(data)


def _batch_sizes(data: LayerSearchData) -> list[int]:
    """Return the number of sequences of each batch, of all processes."""
    rows = [torch.tensor(float(len(batch.input_ids))) for batch in data.stream.batches]
    return [int(number) for number in data.processes.gathered(rows).tolist()]


class Race(ModelVariants):
    """The variants of a model, whose outputs are compared on one part of the sequences after the other.

    A divergence is a mean over sequences. After each stage, a variant is dropped if the mean of its paired difference
    to the best so far is too large for chance, see `in_the_race`. What is left in the end was measured on all
    sequences, as in a search without a race.

    Args:
        data (`LayerSearchData`): The data.
        sizes (`Sequence[int]`): The number of sequences of each batch, of all processes.
    """

    def __init__(self, data: LayerSearchData, sizes: Sequence[int]) -> None:
        self.stages = draw_stages(sizes, data.seed)
        self.most = max(sizes)
        mine = list(data.processes.mine(range(len(sizes))))
        # By stage, the first of its batches and the place and rows of each.
        self.parts = [
            [(place, rows) for place, batch in enumerate(mine) if (rows := sorted(r for b, r in stage if b == batch))]
            for stage in self.stages
        ]
        self.places = len(mine)
        # Of variants with one condensed layer, when measured on all sequences: values by batch and row.
        self.alone: dict[int, Tensor] = {}
        stream = data.stream.split([part for parts in self.parts for part in parts])
        super().__init__(replace(data, stream=stream, comparison=data.comparison.on(stream)))

    def least(
        self, variants: Mapping[Key, Condensed], tick: Callable[[int], object] = int, complete: bool = False
    ) -> tuple[Key, dict[Key, float]]:
        if complete or len(variants) == 1:
            return super().least(variants, tick)
        keys = sorted(variants)
        known, name = self.data.known, self._race_name(variants.values())
        if name in known:
            tick(self.steps)
            winner = keys[int(known[name])]
            return winner, {winner: known[self._name(variants[winner])]}
        found, work = self._measure(list(variants.values()), tick, drops=True)
        scores = {key: found[variant] for key, variant in variants.items() if variant in found}
        winner = least(scores)
        self._keep(found, work, **{name: keys.index(winner)})
        return winner, scores

    def _race_name(self, variants: Iterable[Condensed]) -> str:
        """Return a name for the winner of a race, by all that take part in it."""
        everyone = sorted(sorted(variant) for variant in variants)
        return f"{self.data.name} race {hashlib.sha256(repr(everyone).encode()).hexdigest()[:16]}"

    def _measure(
        self, variants: Sequence[Condensed], tick: Callable[[int], object], drops: bool = False
    ) -> tuple[dict[Condensed, float], float]:
        left, total_work, start, seen = list(variants), 0.0, 0, []
        shares = {variant: torch.zeros(()) for variant in variants}
        alone, total = self._alone(variants), sum(map(len, self.stages))
        for stage, parts in zip(self.stages, self.parts, strict=True):
            found = torch.zeros(self.places, len(left) * self.most + 1, dtype=torch.float64)
            batches = range(start, start + len(parts))
            start += len(parts)
            for (place, rows), (some, work) in zip(parts, self._shares(left, batches, tick), strict=True):
                found[place, :-1].view(len(left), self.most)[:, rows] = some.cpu()
                found[place, -1] += work.item()
            gathered = self.data.processes.gathered(list(found)).cpu()
            total_work += float(gathered[:, -1].sum())
            by_variant = gathered[:, :-1].unflatten(1, (len(left), self.most))
            shares = {variant: shares[variant] + by_variant[:, i] for i, variant in enumerate(left)}
            seen += stage
            if drops and len(left) > 1 and len(seen) < total:
                at = tuple(zip(*seen, strict=True))
                values = torch.stack([shares[variant][at] for variant in left])
                known = torch.stack([alone[variant][at] for variant in left]) if alone else None
                means = torch.stack([alone[variant].sum() / total for variant in left]) if alone else None
                kept = in_the_race(values, total, known, means)
                # The same in every process, whatever its processor.
                left = [left[i] for i in self.data.processes.agreed(kept)]
        if not drops:
            self.alone |= {layer: shares[v] for v in variants if len(v) == 1 for layer in v}
        return {variant: float(shares[variant].sum()) for variant in left}, total_work

    def _alone(self, variants: Sequence[Condensed]) -> dict[Condensed, Tensor] | None:
        """Return the values of what each variant adds to the others, condensed alone; None if they are not known."""
        added = {variant: variant.difference(frozenset.intersection(*variants)) for variant in variants}
        if not all(layers and layers <= self.alone.keys() for layers in added.values()):
            return None
        return {variant: sum((self.alone[i] for i in layers), torch.zeros(())) for variant, layers in added.items()}


def draw_stages(sizes: Sequence[int], seed: int) -> list[list[tuple[int, int]]]:
    """Draw the sequences of each stage of a race, as pairs of batch and row, independently of the processes."""
    rows = [(batch, row) for batch, size in enumerate(sizes) for row in range(size)]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    ends = [_FIRST]
    while 2 * _GROWTH * ends[-1] <= len(rows):
        ends.append(_GROWTH * ends[-1])
    return [[rows[i] for i in order[a:b]] for a, b in zip([0, *ends], [*ends, len(rows)], strict=True)]


def in_the_race(
    values: Tensor, total: int, known: Tensor | None = None, known_means: Tensor | None = None
) -> list[int]:
    """Find the variants that may still be the best, of all sequences, by values `[V, n]` of some of them.

    A variant is out if the mean of its paired difference to the best is above 0 by Student's t test, with the factor
    for drawing without replacement from a finite set, or if that of the regression estimate of the mean is (Cochran,
    Sampling Techniques, chapter 7).

    Args:
        values (`Tensor`): float64, the value of each variant for each of n sequences, drawn at random.
        total (`int`): The number of all sequences.
        known (`Tensor`, *optional*): float64 `[V, n]`, a related value of each variant and sequence, from which the
            regression predicts values.
        known_means (`Tensor`, *optional*): float64 `[V]`, the mean of these over all sequences.
    """
    number = values.shape[1]
    best = int(values.mean(1).argmin())
    tie = TIE * values[best].mean().abs()
    differences = values - values[best]
    means, errors = differences.mean(1), differences.std(1) * math.sqrt(1 / number - 1 / total)
    out = means > student_t(number - 1) * errors + tie
    if known is not None and known_means is not None:
        related = known - known[best]
        apart = related - related.mean(1, keepdim=True)
        squares = apart.square().sum(1).clamp_min(torch.finfo(apart.dtype).tiny)
        slopes = (apart * differences).sum(1) / squares
        too_high = related.mean(1) - (known_means - known_means[best])
        rest = differences - means[:, None] - slopes[:, None] * apart
        variances = rest.square().sum(1) / (number - 2) * (1 / number - 1 / total + too_high.square() / squares)
        out |= means - slopes * too_high > student_t(number - 2) * variances.sqrt() + tie
    return (~out).nonzero().flatten().tolist()


@cache
def student_t(freedom: int, chance: float = _CHANCE) -> float:
    """Return the value that a variable of Student's t distribution exceeds with some chance.

    Args:
        freedom (`int`): Degrees of freedom, at least 1.
        chance (`float`): The chance.
    """
    low, high = 0.0, 1.0
    while _tail(high, freedom) > chance:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _tail(middle, freedom) > chance else (low, middle)
    return high


def _tail(t: float, freedom: int) -> float:
    """Compute the chance of a value above t, by Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine = math.cos(angle)
    odd = freedom % 2
    term = cosine if odd else 1.0
    total = 0.0
    for power in range(2 + odd, freedom + 1, 2):
        total += term
        term *= cosine**2 * (power - 1) / power
    inner = math.sin(angle) * total
    return (1 - (2 / math.pi * (angle + inner) if odd else inner)) / 2
