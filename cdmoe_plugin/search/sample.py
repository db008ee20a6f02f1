"""The numbers of calibration tokens of a search and of a refit, which needs more."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import replace

from ..blocks import SparseBlock
from ..calibration import PAPER_TOKENS, Calibration, collate
from ..condense.refit import enough_tokens
from ..config import CondenseConfig
from ..plan import CondensePlan
from .budget import experts_per_layer

# The length of the paper's samples.
_LENGTH = 512


def routed_neurons(
    config: CondenseConfig, blocks: Sequence[SparseBlock], plan: CondensePlan | None = None
) -> dict[int, int]:
    """Count the routed neurons that each layer of a plan keeps, or each one that a search by a config may choose."""
    widths = {block.layer: block.intermediate_size for block in blocks}
    if plan is not None:
        return {row.layer: row.dense_neurons(widths.get(row.layer, 0)) for row in plan.layers}
    layers = config.layers or list(widths)
    return {layer: k * widths.get(layer, 0) for layer, k in experts_per_layer(config, layers, blocks).items()}


def refit_tokens(config: CondenseConfig, blocks: Sequence[SparseBlock], plan: CondensePlan | None = None) -> int:
    """Count the tokens that are enough to refit the layers of a plan, or those that a search may choose."""
    return enough_tokens(config, blocks, routed_neurons(config, blocks, plan))


def search_sample(calibration: Calibration, config: CondenseConfig) -> Calibration:
    """Draw a sample of the paper's size from the calibration data of a refit. Without one, the search uses all of it.

    Sequences are cut to 512 tokens, or to more if there are fewer than 100. Those with images are taken whole.

    Args:
        calibration (`Calibration`): All tokens.
        config (`CondenseConfig`): `refit`, `batch_size` and `seed`.
    """
    if config.refit is None or calibration.num_tokens <= PAPER_TOKENS:
        return calibration
    if any(batch.others for batch in calibration.batches):
        return _whole(calibration, config.seed)
    length = max(_LENGTH, -(-PAPER_TOKENS // calibration.num_samples))
    places = [(batch, row) for batch in calibration.batches for row in range(len(batch.input_ids))]
    random.Random(config.seed).shuffle(places)
    drawn: list[list[int]] = []
    left = PAPER_TOKENS
    for batch, row in places:
        ids = batch.input_ids[row][batch.attention_mask[row].bool()][: min(length, left)].tolist()
        if len(ids) >= 2:
            drawn.append(ids)
        left -= len(ids)
        if not left:
            break
    return collate(drawn, calibration.source, config.batch_size, calibration.pad)


def _whole(calibration: Calibration, seed: int) -> Calibration:
    """Draw whole batches, each of one sequence with its images."""
    order = random.Random(seed).sample(range(len(calibration.batches)), len(calibration.batches))
    drawn: list[int] = []
    tokens = 0
    for place in order:
        if tokens >= PAPER_TOKENS:
            break
        drawn.append(place)
        tokens += int(calibration.batches[place].attention_mask.sum())
    drawn.sort()
    return replace(
        calibration,
        batches=[calibration.batches[place] for place in drawn],
        num_samples=len(drawn),
        num_tokens=tokens,
        fingerprint=hashlib.sha256(f"{calibration.fingerprint} {drawn}".encode()).hexdigest(),
    )
