"""The refit of a plan's condensed layers, one after the other, by depth."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from ...blocks import SparseBlock, layers_path
from ...calibration import Calibration
from ...config import CondenseConfig
from ...decoder.stream import LayerOutput, LayerStream, searching
from ...model.layers_cdmoe import CondensedMLP
from ...offload import offload_like
from ...plan import CondensedLayer
from ...registry import REFITS
from ..fold import fold
from ..place import standing_in
from .examples import HELD_OUT_EVERY, LayerExamples, RefitLayer

logger = logging.get_logger(__name__)

# See `LayerExamples`.
TARGETS = ("model", "block")


def check_refit(config: CondenseConfig) -> None:
    """Check the fields of a config for refitting.

    Raises:
        ValueError: naming the field and the values that exist.
    """
    if config.refit is not None:
        REFITS.of(config)
    if config.refit_target not in TARGETS:
        raise ValueError(f"`refit_target` is {config.refit_target!r}, but only {', '.join(map(repr, TARGETS))} exist.")


def check_calibration(calibration: Calibration) -> None:
    """Check that there are sequences to hold out.

    Raises:
        ValueError: if the calibration data has too few sequences.
    """
    if calibration.num_samples < HELD_OUT_EVERY:
        raise ValueError(
            f"`refit` holds out every {HELD_OUT_EVERY}th calibration sample for validation, but {calibration.source} "
            f"has {calibration.num_samples} samples: use at least {HELD_OUT_EVERY}, or `refit=None`."
        )


def refit_layers(
    model: PreTrainedModel,
    blocks: Sequence[SparseBlock],
    layers: Sequence[CondensedLayer],
    config: CondenseConfig,
    calibration: Calibration,
) -> tuple[dict[int, CondensedMLP], dict[int, RefitLayer]]:
    """Fold and fit the layers of a plan, without changing the model.

    Args:
        model (`PreTrainedModel`): The sparse model.
        blocks (`Sequence[SparseBlock]`): Its sparse blocks.
        layers (`Sequence[CondensedLayer]`): The layers to condense.
        config (`CondenseConfig`): `refit` with its options, `refit_target` and `cache_memory`.
        calibration (`Calibration`): Tokens to fit on.

    Returns:
        The condensed MLPs and the errors of their fits, by decoder layer.

    Raises:
        ValueError: if there are too few calibration sequences.
    """
    check_calibration(calibration)
    refit = REFITS.of(config)
    by_layer = {block.layer: block for block in blocks}
    chosen = {layer.layer: layer for layer in layers}
    mlps: dict[int, CondensedMLP] = {}
    fits: dict[int, RefitLayer] = {}
    with searching(model), torch.no_grad():
        stream = LayerStream(model, layers_path(blocks), calibration.batches)
        condensed = original = list(stream.embeddings)
        for layer in logging.tqdm(range(max(chosen) + 1), desc="Refit", unit="layer"):
            with stream.in_memory(layer):
                alike = condensed is original
                needs_original = config.refit_target == "model" or alike
                outputs = _run(stream, layer, original) if needs_original else original
                if layer in chosen:
                    block = by_layer[layer]
                    mlp = fold(block, chosen[layer].experts, chosen[layer].gates)
                    goals: list[Tensor] | None = None
                    if config.refit_target == "model":
                        goals = [given[0] for given in outputs]
                    examples = LayerExamples(stream, block, condensed, goals, config.cache_bytes)
                    fits[layer] = refit(mlp, examples)
                    mlps[layer] = mlp
                    logger.info(
                        f"Decoder layer {layer}: held-out error {fits[layer].before:.3g} -> {fits[layer].after:.3g}"
                    )
                    with standing_in(model, block, mlp):
                        condensed = _run(stream, layer, condensed)
                else:
                    condensed = outputs if alike else _run(stream, layer, condensed)
            if layer in chosen:
                offload_like(mlps[layer], by_layer[layer].module, f"condensed-{layer}")
            original = outputs  # unused once the unmodified model is no longer needed
    return mlps, fits


def _run(stream: LayerStream, layer: int, inputs: list[LayerOutput]) -> list[LayerOutput]:
    outputs = [stream.run_layer(layer, given, i) for i, given in enumerate(inputs)]
    stream.check_finite()
    return outputs
