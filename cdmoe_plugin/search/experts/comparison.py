"""The divergence of a sparse layer's output when only some of its experts are kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from ...decoder.record import LayerCall
from ...decoder.tails import AffineTail, Tail, as_it_is
from .data import SparseLayerData

logger = logging.get_logger(__name__)

# Elements of expert outputs that are computed at a time, and of candidates that are compared at a time: small enough
# for a CPU's cache, and large enough for a GPU.
_COMPUTE_ELEMENTS = 2**26
_COMPARE_ELEMENTS = {"cpu": 2**19, "cuda": 2**26}
# The elements of a layer's expert outputs from which it pays to compile the comparison, which takes seconds: one kernel
# that reads the outputs once, instead of a dozen.
_FUSED_ELEMENTS = {"cpu": 2**27, "cuda": 0}


def divergences(
    metric: Callable[[Tensor, Tensor], Tensor],
    target: Tensor,
    offset: Tensor,
    slope: float,
    base: Tensor,
    outputs: Tensor,
    gates: Tensor,
) -> Tensor:
    """Compute the divergence of a layer's output with each expert added, float32 `[N, t]`.

    Args:
        metric (`Callable`): From `registry.METRICS`.
        target (`Tensor`): The layer's output, float32 `[t, H]`.
        offset (`Tensor`), slope (`float`): The layer's output is `offset + slope * y`, `[t, H]`.
        base (`Tensor`): y without the expert, float32 `[t, H]`.
        outputs (`Tensor`): Outputs of the experts, `[N, t, H]` in the model's dtype.
        gates (`Tensor`): Their gates, float32 `[N, 1, 1]`.
    """
    y = torch.addcmul(base, outputs.float(), gates)
    return metric(target, torch.add(offset, y, alpha=slope))


@cache
def fused_divergences() -> Callable[..., Tensor]:
    """Compile `divergences` for any number of tokens, with a fallback for machines without a compiler."""
    from torch._dynamo.exc import TorchDynamoException  # takes seconds to import

    compiled = torch.compile(divergences, dynamic=True)
    works = True

    def run(*args: Any) -> Tensor:
        nonlocal works
        if works:
            try:
                return compiled(*args)
            except TorchDynamoException as error:
                works = False
                logger.warning(f"The comparison of experts can't be compiled here and is slower: {error}")
        return divergences(*args)

    return run


class LayerComparison:
    """The divergences of a layer's output (means over sequences of means over tokens) as experts are added."""

    def __init__(self, data: SparseLayerData) -> None:
        self.data = data
        self.calls = [list(_split(call, data)) for call in data.calls]
        self.gates = data.factors.to(data.block.device, torch.float32)[:, None, None]
        elements = data.block.num_experts * sum(call.inputs.numel() for call in data.calls)
        self.compare = divergences
        if elements >= _FUSED_ELEMENTS.get(data.block.device.type, math.inf):
            self.compare = fused_divergences()
        left = data.cache_bytes
        for chunk in self._chunks():
            size = chunk.inputs.numel() * chunk.inputs.element_size() * data.block.num_experts
            chunk.cached = size <= left
            left -= size if chunk.cached else 0

    def keep(self, expert: int) -> None:
        """Add an expert to the kept ones."""
        for chunk in self._chunks():
            chunk.pending.append(expert)

    def _chunks(self) -> Iterator[_Chunk]:
        return (chunk for chunks in self.calls for chunk in chunks)

    def without(self) -> float:
        """Compute the divergence with the shared expert alone. Call it before `keep`."""
        return self._total(lambda chunk, rows: self._divergence(chunk, rows, chunk.base[rows][None]), 1)[0]

    def with_each(self) -> list[float]:
        """Compute the divergence with each expert of the layer added to the kept ones; NaN for non-candidates."""

        def added(chunk: _Chunk, rows: slice) -> Tensor:
            outputs = self._outputs(chunk)[:, rows]
            if isinstance(chunk.tail, AffineTail) and chunk.tail.finish is as_it_is:
                tail = chunk.tail.part(rows)
                given = (chunk.target[rows], tail.offset, tail.slope, chunk.base[rows], outputs, self.gates)
                return self.compare(self.data.metric, *given)
            return self._divergence(chunk, rows, torch.addcmul(chunk.base[rows], outputs.float(), self.gates))

        return self._total(added, self.data.block.num_experts)

    def along(self, experts: Sequence[int]) -> list[float]:
        """Compute the divergence with none of these experts, the first, the first two, ... Call it before `keep`."""
        chosen = list(experts)
        if not chosen:
            return [self.without()]

        def nested(chunk: _Chunk, rows: slice) -> Tensor:
            if chunk.sums is None:
                gated = self.data.expert_outputs(chunk.inputs, chosen).float() * self.gates[chosen]
                chunk.sums = torch.cat([torch.zeros_like(gated[:1]), gated.cumsum(0)])
            return self._divergence(chunk, rows, chunk.base[rows] + chunk.sums[:, rows])

        return self._total(nested, len(chosen) + 1)

    def _divergence(self, chunk: _Chunk, rows: slice, y: Tensor) -> Tensor:
        return self.data.metric(chunk.target[rows], chunk.tail(y, rows))

    @torch.no_grad()
    def _total(self, per_token: Callable[[_Chunk, slice], Tensor], number: int) -> list[float]:
        """Sum over the tokens of all calls, for some candidates, without waiting for the device before the end."""
        return self.data.processes.total([self._of_call(chunks, per_token, number) for chunks in self.calls]).tolist()

    def _of_call(self, chunks: Sequence[_Chunk], per_token: Callable[[_Chunk, slice], Tensor], number: int) -> Tensor:
        parts = []
        for chunk in chunks:
            for rows in chunk.windows(number):
                parts.append(per_token(chunk, rows).double() @ chunk.token_weights[rows].double())
            if not chunk.cached:
                chunk.outputs = None
            chunk.sums = None
        return torch.stack(parts).sum(0)

    def _outputs(self, chunk: _Chunk) -> Tensor:
        if chunk.outputs is None:
            chunk.outputs = self.data.expert_outputs(chunk.inputs)
        for expert in chunk.pending:
            chunk.base.add_(chunk.outputs[expert].float(), alpha=float(self.data.factors[expert]))
        chunk.pending.clear()
        return chunk.outputs


@dataclass
class _Chunk:
    """Some tokens of a layer: their inputs, the sum of the experts kept so far, and the target."""

    inputs: Tensor  # [t, H]
    base: Tensor  # float32 [t, H], sum of the shared and the kept experts
    target: Tensor  # float32 [t, H'], the sparse layer's output
    tail: Tail
    token_weights: Tensor  # float32 [t]
    step: int  # tokens of one candidate to compare at once; 0 for all tokens
    cached: bool = False
    outputs: Tensor | None = None  # [N, t, H]
    sums: Tensor | None = None  # float32 [K + 1, t, H], sums of the first gated experts of an order being compared
    pending: list[int] = field(default_factory=list)  # kept, but not yet added to `base`

    def windows(self, number: int) -> Iterator[slice]:
        """Split the tokens into parts small enough to compare so many candidates at once."""
        step = max(1, self.step // number)
        if not self.step or step >= len(self.inputs):
            yield slice(None)
            return
        for start in range(0, len(self.inputs), step):
            yield slice(start, start + step)


def _split(call: LayerCall, data: SparseLayerData) -> Iterator[_Chunk]:
    tokens, hidden_size = call.inputs.shape
    width = data.block.num_experts * hidden_size
    size, step = tokens, 0
    if call.tail.divisible:
        size = max(1, _COMPUTE_ELEMENTS // width)
        compared = hidden_size * call.tail.streams
        step = max(1, _COMPARE_ELEMENTS.get(call.inputs.device.type, _COMPARE_ELEMENTS["cpu"]) // compared)
    for start in range(0, tokens, size):
        rows = slice(None) if size >= tokens else slice(start, start + size)
        inputs = call.inputs[rows]
        yield _Chunk(
            inputs=inputs,
            base=data.block.shared_output(inputs),
            target=call.tail(call.target[rows], rows),
            tail=call.tail.part(rows),
            token_weights=call.token_weights[rows],
            step=step,
        )
