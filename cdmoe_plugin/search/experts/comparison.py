"""How far a sparse layer's output moves when only some of its experts are kept."""

from __future__ import annotations

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

# Expert outputs are computed for so many numbers at a time, and candidates compared for so many: the second is small
# enough for a CPU's cache, and large enough for a GPU.
_COMPUTE_ELEMENTS = 2**26
_COMPARE_ELEMENTS = {"cpu": 2**19, "cuda": 2**26}
# Devices on which a compiled comparison pays: one kernel that reads the outputs once, in place of a dozen.
_FUSED = {"cuda"}


def divergences(
    metric: Callable[[Tensor, Tensor], Tensor],
    target: Tensor,
    offset: Tensor,
    slope: float,
    base: Tensor,
    outputs: Tensor,
    gates: Tensor,
) -> Tensor:
    """Divergence of a layer's output with each expert added, float32 `[N, t]`.

    Args:
        metric (`Callable`): From `registry.METRICS`.
        target (`Tensor`): The layer's output, float32 `[t, H]`.
        offset (`Tensor`), slope (`float`): The layer gives `offset + slope * y`, `[t, H]`.
        base (`Tensor`): y without the expert, float32 `[t, H]`.
        outputs (`Tensor`): Of the experts, `[N, t, H]` in the model's dtype.
        gates (`Tensor`): float32 `[N, 1, 1]`.
    """
    y = torch.addcmul(base, outputs.float(), gates)
    return metric(target, torch.add(offset, y, alpha=slope))


@cache
def fused_divergences() -> Callable[..., Tensor]:
    """`divergences`, compiled for any number of tokens; as it is where the machine has no compiler for it."""
    from torch._dynamo.exc import TorchDynamoException  # seconds to import

    compiled = torch.compile(divergences, dynamic=True)
    works = True

    def run(*args: Any) -> Tensor:
        nonlocal works
        if works:
            try:
                return compiled(*args)
            except TorchDynamoException as error:
                works = False
                logger.warning(f"The comparison of experts can't be compiled here, and is slower without: {error}")
        return divergences(*args)

    return run


class LayerComparison:
    """Divergences of a layer's output (means over sequences of means over tokens) when experts are added to it."""

    def __init__(self, data: SparseLayerData) -> None:
        self.data = data
        self.calls = [list(_split(call, data)) for call in data.calls]
        self.gates = data.factors.to(data.block.device, torch.float32)[:, None, None]
        left = data.cache_bytes
        for chunk in self._chunks():
            size = chunk.inputs.numel() * chunk.inputs.element_size() * data.block.num_experts
            chunk.cached = size <= left
            left -= size if chunk.cached else 0

    def keep(self, expert: int) -> None:
        """Adds an expert for good."""
        for chunk in self._chunks():
            chunk.pending.append(expert)

    def _chunks(self) -> Iterator[_Chunk]:
        return (chunk for chunks in self.calls for chunk in chunks)

    def without(self) -> float:
        """Divergence with the shared expert alone; to be asked before any expert is kept."""
        return self._total(lambda chunk, rows: self._divergence(chunk, rows, chunk.base[rows][None]))[0]

    def with_each(self) -> list[float]:
        """Divergence with each expert of the layer added to the kept ones; NaN for those that are no candidates."""

        def added(chunk: _Chunk, rows: slice) -> Tensor:
            outputs = self._outputs(chunk)[:, rows]
            if isinstance(chunk.tail, AffineTail) and chunk.tail.finish is as_it_is:
                run = fused_divergences() if outputs.device.type in _FUSED else divergences
                tail = chunk.tail.part(rows)
                return run(
                    self.data.metric, chunk.target[rows], tail.offset, tail.slope, chunk.base[rows], outputs, self.gates
                )
            return self._divergence(chunk, rows, torch.addcmul(chunk.base[rows], outputs.float(), self.gates))

        return self._total(added)

    def along(self, experts: Sequence[int]) -> list[float]:
        """Divergence with none of these experts, with the first, with the first two, ...; before any is kept."""
        chosen = list(experts)
        if not chosen:
            return [self.without()]

        def nested(chunk: _Chunk, rows: slice) -> Tensor:
            if chunk.sums is None:
                gated = self.data.expert_outputs(chunk.inputs, chosen).float() * self.gates[chosen]
                chunk.sums = torch.cat([torch.zeros_like(gated[:1]), gated.cumsum(0)])
            return self._divergence(chunk, rows, chunk.base[rows] + chunk.sums[:, rows])

        return self._total(nested)

    def _divergence(self, chunk: _Chunk, rows: slice, y: Tensor) -> Tensor:
        """`[..., t]` for `y` `[..., t, H]` in place of what the block gives."""
        return self.data.metric(chunk.target[rows], chunk.tail(y, rows))

    @torch.no_grad()
    def _total(self, per_token: Callable[[_Chunk, slice], Tensor]) -> list[float]:
        """Sums over the tokens of all calls. Nothing here waits for the device before all is computed."""
        return self.data.processes.total([self._of_call(chunks, per_token) for chunks in self.calls]).tolist()

    def _of_call(self, chunks: Sequence[_Chunk], per_token: Callable[[_Chunk, slice], Tensor]) -> Tensor:
        parts = []
        for chunk in chunks:
            for rows in chunk.windows():
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
    """Some tokens of a layer: their inputs, what is kept so far, and what it is compared with."""

    inputs: Tensor  # [t, H]
    base: Tensor  # float32 [t, H], shared expert and kept experts
    target: Tensor  # float32 [t, H'], the sparse layer's output
    tail: Tail
    token_weights: Tensor  # float32 [t]
    step: int  # tokens to compare at once
    cached: bool = False
    outputs: Tensor | None = None  # [N, t, H]
    sums: Tensor | None = None  # float32 [K + 1, t, H], of the first gated experts of an order, while it is compared
    pending: list[int] = field(default_factory=list)  # kept, but not in `base` yet

    def windows(self) -> Iterator[slice]:
        """The tokens in parts small enough to compare all candidates at once."""
        if self.step >= len(self.inputs):
            yield slice(None)
            return
        for start in range(0, len(self.inputs), self.step):
            yield slice(start, start + self.step)


def _split(call: LayerCall, data: SparseLayerData) -> Iterator[_Chunk]:
    tokens, hidden_size = call.inputs.shape
    width = data.block.num_experts * hidden_size
    size, step = tokens, tokens
    if call.tail.divisible:
        size = max(1, _COMPUTE_ELEMENTS // width)
        compared = width * call.tail.streams
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
