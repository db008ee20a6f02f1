"""Says of each claim of the paper whether it holds in the CSV of paper_tables.py."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

from paper_results import Results, Setting

Curve = dict[int, dict[int, float]]  # values by number of layers and seed


@dataclass(frozen=True)
class Claim:
    """A claim, by which metric it was judged, and the verdict with its numbers."""

    text: str
    metric: str
    verdict: str
    numbers: str


def main_metrics(results: Results) -> list[str]:
    """What claims are judged by: the average accuracy and the held-out loss, where they were measured."""
    metrics = {metric for _, metric in results.rows}
    accuracy = ["accuracy"] if any(metric.startswith("accuracy:") for metric in metrics) else []
    return [*accuracy, *(["loss"] if "loss" in metrics else [])]


def curve(results: Results, part: str, method: str, metric: str) -> Curve:
    """A metric of a method. "accuracy" is the average over tasks, "memory" the ratio to the sparse model's bytes."""
    by_cell: dict[tuple[int, int], dict[str, float]] = {}
    for row in results.of(part):
        if row.cell.method == method:
            by_cell.setdefault((row.cell.setting.layers, row.cell.setting.seed), {})[row.metric] = row.value
    found: Curve = {}
    for (layers, seed), known in by_cell.items():
        values = _pick(results, known, metric)
        if values is not None:
            found.setdefault(layers, {})[seed] = values
    return found


def _pick(results: Results, known: dict[str, float], metric: str) -> float | None:
    if metric == "memory":
        return known["weight_bytes"] / results.known(Setting())["weight_bytes"] if "weight_bytes" in known else None
    if metric == "accuracy":
        tasks = [value for name, value in known.items() if name.startswith("accuracy:")]
        return statistics.fmean(tasks) if tasks else None
    return known.get(metric)


def accuracy_error(results: Results) -> float:
    """Standard error of the average accuracy over questions: a difference below it means nothing."""
    errors = [value for name, value in results.known(Setting()).items() if name.startswith("accuracy_error:")]
    return math.sqrt(sum(error**2 for error in errors)) / len(errors) if errors else 0.0


def judge(text: str, metric: str, differences: Curve, error: float) -> Claim | None:
    """The verdict on differences in favour of the claim, by number of layers and seed.

    Numbers of layers at which nothing differs (all layers are condensed, say) tell nothing, and are left out.
    """
    if not differences:
        return None
    differences = {n: seeds for n, seeds in differences.items() if any(seeds.values())}
    if not differences:
        return Claim(text, metric, "within the spread", "equal everywhere")
    common = set.intersection(*(set(seeds) for seeds in differences.values()))
    by_seed = [statistics.fmean(differences[n][s] for n in differences) for s in sorted(common)]
    if not by_seed:
        return None
    mean = statistics.fmean(by_seed)
    wide = max(error, statistics.stdev(by_seed) if len(by_seed) > 1 else 0.0)
    verdict = "within the spread" if abs(mean) <= wide else ("holds" if mean > 0 else "does not hold")
    factor, digits = (100, 1) if metric == "accuracy" else (1, 4)
    budgets = ", ".join(
        f"L{n} {factor * statistics.fmean(seeds.values()):+.{digits}f}" for n, seeds in sorted(differences.items())
    )
    known = "" if len(by_seed) > 1 else "; one seed" + ("" if wide else ", no spread known")
    plus_minus = f" ± {factor * wide:.{digits}f}" if wide else ""
    return Claim(text, metric, verdict, f"{factor * mean:+.{digits}f}{plus_minus} ({budgets}{known})")


def advantage(one: Curve, other: Curve, metric: str) -> Curve:
    """How much better one is than the other: accuracy should be high, loss low."""
    sign = -1 if metric == "loss" else 1
    pairs = {n: {s: sign * (one[n][s] - other[n][s]) for s in one[n] if s in other[n]} for n in one if n in other}
    return {n: seeds for n, seeds in pairs.items() if seeds}


def average(curves: list[Curve]) -> Curve:
    """The mean of several methods."""
    curves = [each for each in curves if each]
    if not curves:
        return {}
    layers = set.intersection(*(set(each) for each in curves))
    found: Curve = {}
    for n in layers:
        seeds = set.intersection(*(set(each[n]) for each in curves))
        found[n] = {s: statistics.fmean(each[n][s] for each in curves) for s in seeds}
    return found


# (claim, table, the better ones, the worse ones)
COMPARISONS = (
    ("greedy experts beat random ones", "table2", ("greedy",), ("random",)),
    ("greedy experts beat statistical ones (PL Alpha Hill, L1)", "table2", ("greedy",), ("pl_alpha_hill", "l1")),
    ("statistical experts beat random ones (the paper: hardly)", "table2", ("pl_alpha_hill", "l1"), ("random",)),
    ("greedy layers beat global ones", "table3", ("greedy",), ("global",)),
    ("global layers beat local ones", "table3", ("global",), ("local",)),
    ("calibration on texts beats that on the tasks' questions", "figure5", ("texts",), ("questions",)),
)


# (table or figure, how its methods' names begin, share of the accuracy that the paper keeps at 9 of 27 layers)
KEPT = (("table1", "CD-MoE", 0.9), ("figure3", "LM+SFT", 0.98))


def claims(results: Results, second: Results | None = None) -> list[Claim]:
    """All claims of the paper that the rows allow to judge; `second`: rows of another model."""
    found: list[Claim | None] = []
    for metric in main_metrics(results):
        error = accuracy_error(results) if metric == "accuracy" else 0.0
        for text, part, better, worse in COMPARISONS:
            one, other = (average([curve(results, part, m, metric) for m in methods]) for methods in (better, worse))
            found.append(judge(text, metric, advantage(one, other, metric), error))
        found += [judge(text, metric, given, error) for text, given in _js(results, metric)]
        found += [judge(text, metric, given, error) for text, given in _table1(results, metric)]
        found += [judge(text, metric, given, error) for text, given in _figure3(results, metric)]
    found += [_kept(results, part, name, share) for part, name, share in KEPT]
    found.append(_ends(results))
    if second is not None:
        found += _second(second)
    return [claim for claim in found if claim is not None]


def _second(results: Results) -> Iterator[Claim | None]:
    """What is said of the first model's Table 1, of the second (Figure 4)."""
    for metric in main_metrics(results):
        error = accuracy_error(results) if metric == "accuracy" else 0.0
        for text, given in _table1(results, metric):
            yield judge(f"second model: {text}", metric, given, error)


def _js(results: Results, metric: str) -> Iterator[tuple[str, Curve]]:
    """JS is said to be best at many layers: the upper half of those at which anything differs."""
    for other in ("ppl", "kl"):
        one, two = (curve(results, "table4", name, metric) for name in ("js", other))
        differing = {n: seeds for n, seeds in advantage(one, two, metric).items() if any(seeds.values())}
        many = sorted(differing)[len(differing) // 2 :]
        # All that are equal, where nothing differs: that is an answer as well.
        given = {n: differing[n] for n in many} or advantage(one, two, metric)
        yield f"JS beats {other.upper()} at many layers", given


def without_and_with_experts(results: Results, part: str, name: str) -> tuple[str | None, str | None]:
    """The two methods of a part whose names begin like this: with the shared experts alone, and with routed ones."""
    methods = [m for m in dict.fromkeys(row.cell.method for row in results.of(part)) if m.startswith(f"{name} E(")]
    without = next((m for m in methods if m.endswith("+0)")), None)
    return without, next((m for m in methods if m != without), None)


def _figure3(results: Results, metric: str) -> Iterator[tuple[str, Curve]]:
    """What recovery wins back, and from where."""

    def of(part: str, method: str) -> Curve:
        return curve(results, part, method, metric)

    without, with_experts = without_and_with_experts(results, "figure3", "LM+SFT")
    for method in filter(None, (without, with_experts)):
        before = method.replace("LM+SFT", "CD-MoE")
        yield (
            f"{method} beats {before} at as many layers",
            advantage(of("figure3", method), of("table1", before), metric),
        )
    if with_experts:
        alone = with_experts.removeprefix("LM+")
        text = f"{with_experts} beats {alone}, fine-tuning alone"
        yield text, advantage(of("figure3", with_experts), of("figure3", alone), metric)
    if without and with_experts:
        text = f"after recovery, routed experts help: {with_experts} beats {without}"
        yield text, advantage(of("figure3", with_experts), of("figure3", without), metric)


def _kept(results: Results, part: str, name: str, share: float) -> Claim | None:
    """Whether this share of the sparse accuracy is kept at a third of the layers, or the next number above that."""
    layers = {row.metric for row in results.of("figure1")}  # one for every sparse layer
    _, method = without_and_with_experts(results, part, name)
    sparse = _pick(results, results.known(Setting()), "accuracy")
    if not layers or method is None or not sparse:
        return None
    accuracy = curve(results, part, method, "accuracy")
    n = min((n for n in accuracy if 3 * n >= len(layers)), default=None)
    if n is None:
        return None
    ahead = {n: {seed: value - share * sparse for seed, value in accuracy[n].items()}}
    text = f"{method} keeps {share:.0%} of the accuracy at a third of the layers"
    claim = judge(text, "accuracy", ahead, accuracy_error(results))
    costs = (_first(curve(results, part, method, cost)).get(n) for cost in ("memory", "speedup"))
    memory, speed = ("?" if cost is None else f"{cost:.2f}" for cost in costs)
    kept = statistics.fmean(accuracy[n].values()) / sparse
    numbers = f"{kept:.1%} at L{n} of {len(layers)}, with {memory} of the memory and {speed} times the speed"
    return claim and replace(claim, numbers=f"{numbers}; beyond {share:.0%} by {claim.numbers}")


def _table1(results: Results, metric: str) -> Iterator[tuple[str, Curve]]:
    without, with_experts = without_and_with_experts(results, "table1", "CD-MoE")
    curves = {m: curve(results, "table1", m, metric) for m in (without, with_experts) if m}
    if without and with_experts:
        text = "routed experts help: E(shared+K) beats E(shared+0)"
        yield text, advantage(curves[with_experts], curves[without], metric)
    for method in filter(None, (without, with_experts)):
        for baseline in ("Layer Trimming", "Block Trimming"):
            trimmed = curve(results, "table1", baseline, metric)
            yield f"{method} beats {baseline} at as many layers", advantage(curves[method], trimmed, metric)
            for cost, name in (("memory", "memory"), ("speedup", "speed")):
                given = at_same_cost(results, method, baseline, metric, cost)
                yield f"{method} beats {baseline} at the same {name}", given
                if cost == "memory" and len(given) > 1:
                    text = f"the more layers, the more {method} is ahead of {baseline} at the same memory"
                    yield text, growth(given)


def growth(advantages: Curve) -> Curve:
    """How much larger an advantage is at most layers than at fewest."""
    few, many = min(advantages), max(advantages)
    return {many: {s: advantages[many][s] - advantages[few][s] for s in advantages[many] if s in advantages[few]}}


def at_same_cost(results: Results, method: str, baseline: str, metric: str, cost: str) -> Curve:
    """Advantages over a baseline, which is interpolated at the method's cost, with the sparse model as its start."""
    values, costs = curve(results, "table1", method, metric), _first(curve(results, "table1", method, cost))
    theirs, their_costs = curve(results, "table1", baseline, metric), _first(curve(results, "table1", baseline, cost))
    sparse = _pick(results, results.known(Setting()), metric)
    found: Curve = {}
    for n in values:
        for seed, value in values[n].items():
            points = [(their_costs[m], theirs[m][seed]) for m in theirs if m in their_costs and seed in theirs[m]]
            other = interpolate(sorted([(1.0, sparse or 0.0), *points]), costs[n]) if n in costs else None
            if other is not None:
                found.setdefault(n, {})[seed] = other - value if metric == "loss" else value - other
    return found


def _first(costs: Curve) -> dict[int, float]:
    return {n: statistics.fmean(seeds.values()) for n, seeds in costs.items()}


def interpolate(points: list[tuple[float, float]], x: float) -> float | None:
    """The line through the points at `x`; None beyond them."""
    for (a, low), (b, high) in pairwise(points):
        if a <= x <= b:
            return low if a == b else low + (high - low) * (x - a) / (b - a)
    return None


def _ends(results: Results) -> Claim | None:
    """First and last layer against the median of those between, as logarithm of the ratio."""
    by_seed: dict[int, dict[int, float]] = {}
    for row in results.of("figure1"):
        by_seed.setdefault(row.cell.setting.seed, {})[int(row.metric.rsplit("_", 1)[1])] = row.value
    ratios = []
    for layers in by_seed.values():
        first, *middle, last = (layers[n] for n in sorted(layers))
        if middle:
            ratios.append((first / statistics.median(middle), last / statistics.median(middle), max(middle)))
    if not ratios:
        return None
    logs = [math.log(min(first, last)) for first, last, _ in ratios]
    mean, wide = statistics.fmean(logs), statistics.stdev(logs) if len(logs) > 1 else 0.0
    verdict = "within the spread" if abs(mean) <= wide else ("holds" if mean > 0 else "does not hold")
    numbers = " and ".join(f"{statistics.fmean(r[i] for r in ratios):.1f} times" for i in (0, 1))
    text = "the first and the last layer matter more than those between (median)"
    return Claim(text, "divergence", verdict, f"first and last: {numbers} the median; {len(ratios)} seed(s)")
