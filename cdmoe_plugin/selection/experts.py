"""Expert selection (Algorithm 1): which routed experts a condensed layer keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..layerwise import LayerCall
from ..sparse import SparseBlock

# Expert outputs are computed for so many numbers at a time, and candidates compared for so many: the second is small
# enough for a CPU's cache, and large enough for a GPU.
_COMPUTE_ELEMENTS = 2**26
_COMPARE_ELEMENTS = {"cpu": 2**19, "cuda": 2**26}


@dataclass
class SparseLayerData:
    """Everything that expert selection may look at in one sparse layer.

    Args:
        block (`SparseBlock`): The sparse block.
        calls (`list[LayerCall]`): The layer on all calibration batches.
        gates (`Tensor`): float64 `[N]`, the constant gates; NaN for an expert that is no candidate.
        metric (`Callable`): Divergence per token of two outputs, from `divergence.METRICS`.
        finish (`Callable`): What the model does to the layer's output before it is compared: nothing, but the final
            norm for the last decoder layer (as in the published code).
        cache_bytes (`int`): Memory for expert outputs that are kept between rounds.
    """

    block: SparseBlock
    calls: list[LayerCall]
    gates: Tensor
    metric: Callable[[Tensor, Tensor], Tensor]
    finish: Callable[[Tensor], Tensor]
    cache_bytes: int

    @property
    def candidates(self) -> list[int]:
        """Experts that at least one token chose."""
        return [int(i) for i in torch.nonzero(~self.gates.isnan()).flatten()]


@dataclass(frozen=True)
class ExpertOrder:
    """The experts of one layer in the order of their selection.

    Args:
        experts (`list[int]`): The kept experts.
        scores (`list[float]`): Divergence with none of them, with the first, with the first two, ...
        steps (`list[dict[int, float]]`): Divergence of every candidate in every round.
    """

    experts: list[int]
    scores: list[float]
    steps: list[dict[int, float]] = field(default_factory=list)


def greedy_experts(data: SparseLayerData, num_experts: int) -> ExpertOrder:
    """Adds, one after the other, the expert that brings the layer's output nearest (CD-MoE, Algorithm 1).

    Each expert's output is computed once and the rounds only add and compare; what does not fit into `cache_bytes`
    is computed again in each round, with the same result. Ties go to the lower index.
    """
    comparison = _Comparison(data)
    experts: list[int] = []
    scores = [comparison.add([None])[0]]
    steps: list[dict[int, float]] = []
    for _ in range(num_experts):
        rest = [expert for expert in data.candidates if expert not in experts]
        steps.append(dict(zip(rest, comparison.add(rest), strict=True)))
        best = min(rest, key=lambda expert: (steps[-1][expert], expert))
        experts.append(best)
        scores.append(steps[-1][best])
        comparison.keep(best)
    return ExpertOrder(experts, scores, steps)


EXPERT_SELECTIONS: dict[str, Callable[[SparseLayerData, int], ExpertOrder]] = {"greedy": greedy_experts}


class _Comparison:
    """Divergences of a layer's output when experts are added to those that are kept."""

    def __init__(self, data: SparseLayerData) -> None:
        self.data = data
        self.kept: list[int] = []
        self.chunks = [chunk for call in data.calls for chunk in _split(call, data)]
        left = data.cache_bytes
        for chunk in self.chunks:
            size = chunk.inputs.numel() * chunk.inputs.element_size() * data.block.num_experts
            chunk.cached = size <= left
            left -= size if chunk.cached else 0

    def keep(self, expert: int) -> None:
        """Adds an expert for good."""
        for chunk in self.chunks:
            if chunk.outputs is not None:
                chunk.base.add_(chunk.outputs[expert].float(), alpha=float(self.data.gates[expert]))
            else:
                chunk.stale.append(expert)

    @torch.no_grad()
    def add(self, candidates: Sequence[int | None]) -> list[float]:
        """Divergence with each candidate added, a mean over sequences of means over tokens.

        `[None]` stands for the shared expert alone, before any expert is kept.
        """
        if not candidates:
            return []
        device = self.chunks[0].base.device
        total = torch.zeros(len(candidates), dtype=torch.float64, device=device)
        for chunk in self.chunks:
            if candidates[0] is not None:
                self._prepare(chunk)
            outputs = chunk.outputs
            for rows in chunk.windows(len(candidates)):
                if outputs is None or candidates[0] is None:
                    y = chunk.base[rows][None]
                else:
                    y = torch.addcmul(
                        chunk.base[rows],
                        outputs[list(candidates), rows].float(),
                        self.data.gates[list(candidates)].to(device, torch.float32)[:, None, None],
                    )
                divergence = self.data.metric(chunk.target[rows], self.data.finish(chunk.tail(y, rows)))
                total += divergence.double() @ chunk.token_weights[rows].double()
            if not chunk.cached:
                chunk.outputs = None
        return total.tolist()

    def _prepare(self, chunk: _Chunk) -> None:
        if chunk.outputs is None:
            chunk.outputs = self.data.block.expert_outputs(chunk.inputs)
        for expert in chunk.stale:
            chunk.base.add_(chunk.outputs[expert].float(), alpha=float(self.data.gates[expert]))
        chunk.stale.clear()


@dataclass
class _Chunk:
    """Some tokens of a layer: their inputs, what is kept so far, and what it is compared with."""

    inputs: Tensor  # [t, H]
    base: Tensor  # float32 [t, H]
    target: Tensor  # float32 [t, H'], the sparse layer's output
    tail: Callable[..., Tensor]
    token_weights: Tensor  # float32 [t]
    divisible: bool
    num_experts: int
    cached: bool = False
    outputs: Tensor | None = None  # [N, t, H]
    stale: list[int] = field(default_factory=list)

    def windows(self, candidates: int) -> Iterator[slice]:
        """Parts of the tokens, small enough to compare all candidates at once."""
        tokens = len(self.inputs)
        if not self.divisible:
            yield slice(None)
            return
        budget = _COMPARE_ELEMENTS.get(self.inputs.device.type, _COMPARE_ELEMENTS["cpu"])
        step = max(1, budget // (candidates * self.base.shape[-1]))
        for start in range(0, tokens, step):
            yield slice(start, start + step)


def _split(call: LayerCall, data: SparseLayerData) -> Iterator[_Chunk]:
    tokens, hidden_size = call.inputs.shape
    size = max(1, _COMPUTE_ELEMENTS // (data.block.num_experts * hidden_size)) if call.tail.divisible else tokens
    for start in range(0, tokens, size):
        rows = slice(start, start + size) if call.tail.divisible else slice(None)
        yield _Chunk(
            inputs=call.inputs[rows],
            base=data.block.shared_output(call.inputs[rows]),
            target=data.finish(call.tail(call.target[rows], rows)),
            tail=_shifted(call, start) if call.tail.divisible else call.tail,
            token_weights=call.token_weights[rows],
            divisible=call.tail.divisible,
            num_experts=data.block.num_experts,
        )


def _shifted(call: LayerCall, start: int) -> Callable[..., Tensor]:
    return lambda y, rows: call.tail(y, slice(start + (rows.start or 0), start + (rows.start or 0) + y.shape[-2]))
