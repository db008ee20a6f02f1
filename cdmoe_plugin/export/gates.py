"""Per-token gates of shared experts, replaced by constants where a checkpoint has no place for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..calibration import Calibration
from ..metrics.js import js_divergence
from .compare import outputs

logger = logging.get_logger(__name__)


def mean_gates(model: PreTrainedModel, gated: Mapping[int, nn.Linear], data: Calibration) -> dict[int, float]:
    """Compute the mean gate of the shared expert over the calibration tokens, by decoder layer."""
    sums = dict.fromkeys(gated, 0.0)
    mask = torch.ones(0)

    def record(layer: int, output: Tensor) -> None:
        values = torch.sigmoid(output).double().reshape(-1)
        sums[layer] += float(values[mask.to(values.device).bool().reshape(-1)].sum())

    handles = [
        gate.register_forward_hook(lambda _m, _a, output, layer=layer: record(layer, output))
        for layer, gate in gated.items()
    ]
    try:
        for batch in data.batches:
            mask = batch.attention_mask
            outputs(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {layer: total / data.num_tokens for layer, total in sums.items()}


@contextmanager
def constant_gates(gated: Mapping[int, nn.Linear], gates: Mapping[int, float]) -> Iterator[None]:
    """Replace the per-token gates of condensed MLPs by constants inside the context."""
    handles = []
    for layer, gate in gates.items():
        logit = torch.logit(torch.tensor(gate, dtype=torch.float64))
        hook = lambda _m, _a, output, logit=logit: torch.full_like(output, float(logit))  # noqa: E731
        handles.append(gated[layer].register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def measure_gates(model: PreTrainedModel, exported: PreTrainedModel, data: Calibration) -> float:
    """Measure and log the mean divergence between the outputs of the condensed and the exported model, in nats."""
    total = 0.0
    for batch in data.batches:
        total += float(js_divergence(outputs(model, batch), outputs(exported, batch)).double().sum())
    divergence = total / data.num_tokens
    logger.warning(
        "The per-token gates of the shared experts are constants in the export: the mean JS divergence to the "
        f"condensed model is {divergence:.3e} over {data.num_tokens} calibration tokens."
    )
    return divergence
