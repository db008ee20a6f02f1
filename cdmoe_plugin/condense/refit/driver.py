"""The refit of a plan's condensed layers, one after the other, by depth."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ...blocks import SparseBlock, layers_path
from ...calibration import Calibration
from ...config import CondenseConfig
from ...decoder.stream import LayerStream
from ...decoder.whole import searching
from ...model.layers_cdmoe import CondensedMLP
from ...offload import offload_like
from ...plan import CondensedLayer
from ...processes import Processes
from ...registry import MIXED_REFITS, REFIT_NEURONS, REFITS
from ..mixed import mix
from ..place import standing_in
from .examples import HELD_OUT_EVERY, LayerExamples, RefitLayer, held_out_error
from .gates import fit_token_gates
from .neurons import NeuronChoice
from .states import HiddenStates

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState

logger = logging.get_logger(__name__)

# See `LayerExamples`.
TARGETS = ("model", "block")
# Calibration tokens per neuron of a layer: fewer than the first overfit, more than the second help little.
_FEW_TOKENS, _ENOUGH_TOKENS = 10, 30


def check_refit(config: CondenseConfig) -> None:
    """Check the fields of a config for refitting.

    Raises:
        ValueError: naming the field and the values that exist.
    """
    if config.refit is not None:
        REFITS.of(config)
    REFIT_NEURONS.of(config)
    if config.refit is None and config.refit_neurons != "experts":
        raise ValueError(
            f"`refit_neurons` is {config.refit_neurons!r}, which needs a `refit`: set it to "
            f"{' or '.join(map(repr, REFITS))}."
        )
    if config.refit is None and config.gates_tokens:
        raise ValueError(
            f"`gates` is {config.gates!r}, which needs a `refit`: set it to {' or '.join(map(repr, REFITS))}."
        )
    if config.refit_target not in TARGETS:
        raise ValueError(f"`refit_target` is {config.refit_target!r}, but only {', '.join(map(repr, TARGETS))} exist.")


def check_calibration(calibration: Calibration, blocks: Sequence[SparseBlock], routed: Mapping[int, int]) -> None:
    """Check that there are sequences to hold out, and warn if there are few tokens for the width of the layers.

    Args:
        calibration (`Calibration`): Tokens to fit on.
        blocks (`Sequence[SparseBlock]`): The model's sparse blocks.
        routed (`Mapping[int, int]`): Number of kept routed neurons by decoder layer.

    Raises:
        ValueError: if the calibration data has too few sequences.
    """
    if calibration.num_samples < HELD_OUT_EVERY:
        raise ValueError(
            f"`refit` holds out every {HELD_OUT_EVERY}th calibration sample for validation, but {calibration.source} "
            f"has {calibration.num_samples} samples: use at least {HELD_OUT_EVERY}, or `refit=None`."
        )
    width, tokens = _width(blocks, routed), calibration.num_tokens
    if tokens < _FEW_TOKENS * width:
        logger.warning_once(
            f"`refit` fits layers with {width:,} neurons to {tokens:,} calibration tokens, {tokens / width:.1f} for "
            f"each neuron: use at least {_ENOUGH_TOKENS * width:,}, with more or longer samples (`num_samples='auto'`, "
            "`max_length`)."
        )


def enough_tokens(config: CondenseConfig, blocks: Sequence[SparseBlock], routed: Mapping[int, int]) -> int:
    """Return the number of calibration tokens for a refit of layers with so many routed neurons; 0 without one."""
    return 0 if config.refit is None else _ENOUGH_TOKENS * _width(blocks, routed)


def _width(blocks: Sequence[SparseBlock], routed: Mapping[int, int]) -> int:
    """Return the number of neurons of the widest layer, with those of the shared expert."""
    return max((b.shared_intermediate_size + routed[b.layer] for b in blocks if b.layer in routed), default=0)


def trains_experts(config: CondenseConfig) -> bool:
    """Return whether the refit also trains the experts that stay behind their router."""
    return config.refit is not None and config.refit in MIXED_REFITS


def refit_layers(
    model: PreTrainedModel,
    blocks: Sequence[SparseBlock],
    layers: Sequence[CondensedLayer],
    config: CondenseConfig,
    calibration: Calibration,
    accelerator: Accelerator | PartialState | None = None,
) -> tuple[dict[int, nn.Module], dict[int, RefitLayer]]:
    """Fold and fit the layers of a plan, without changing the model.

    Args:
        model (`PreTrainedModel`): The sparse model.
        blocks (`Sequence[SparseBlock]`): Its sparse blocks.
        layers (`Sequence[CondensedLayer]`): The layers to condense.
        config (`CondenseConfig`): `refit` with its options, `refit_neurons`, `refit_target` and `cache_memory`.
        calibration (`Calibration`): Tokens to fit on.
        accelerator (`Accelerator` or `PartialState`, *optional*): Processes that share the calibration batches. All
            return the same.

    Returns:
        The condensed MLPs, or a `MixedLayer` where experts stay behind the router, and the errors of their fits, by
        decoder layer.

    Raises:
        ValueError: if there are too few calibration sequences, or fewer batches than processes.
    """
    mixed = [layer.layer for layer in layers if layer.routed is not None]
    if mixed and config.gates_tokens:
        raise ValueError(
            f"`gates` is {config.gates!r}, but experts of the decoder layers {mixed} stay behind their router, beside "
            "neurons that have no gates per token: set it to 'mean'."
        )
    by_layer = {block.layer: block for block in blocks}
    chosen = {layer.layer: layer for layer in layers}
    routed = {layer.layer: layer.dense_neurons(by_layer[layer.layer].intermediate_size) for layer in layers}
    if mixed and not trains_experts(config) and not _width([by_layer[layer] for layer in chosen], routed):
        logger.warning(
            f"`refit={config.refit!r}` has nothing to fit: the plan's layers have no dense neurons and no shared "
            "expert. 'distill' trains the experts that stay."
        )
    check_calibration(calibration, blocks, routed)
    processes = Processes(accelerator, len(calibration.batches))
    mlps: dict[int, nn.Module] = {}
    fits: dict[int, RefitLayer] = {}
    with searching(model), torch.no_grad():
        memory = config.cache_bytes // 6  # half of it is for the examples
        stream = LayerStream(model, layers_path(blocks), processes.mine(calibration.batches), memory)
        original = HiddenStates(map(stream.entering, range(len(stream.batches))), memory)
        condensed: HiddenStates | None = None  # the same as `original` before the first condensed layer
        for layer in logging.tqdm(range(max(chosen) + 1), desc="Refit", unit="layer"):
            with stream.in_memory(layer):
                if layer in chosen and condensed is None:
                    condensed = HiddenStates(original, memory)
                if condensed is None or config.refit_target == "model":
                    _run(stream, layer, original)
                if condensed is None:
                    continue
                if layer in chosen:
                    block, goals = by_layer[layer], original if config.refit_target == "model" else None
                    beside = None if chosen[layer].routed is None else mix(block, chosen[layer])
                    examples = LayerExamples(
                        stream, block, condensed, goals, config.cache_bytes // 2, processes, beside
                    )
                    mlps[layer], fits[layer] = _fitted(chosen[layer], examples, config)
                    processes.send(0, *mlps[layer].state_dict().values())
                    logger.info(
                        f"Decoder layer {layer}: held-out error {fits[layer].before:.3g} -> {fits[layer].after:.3g}"
                    )
                    with standing_in(model, block, mlps[layer]):
                        _run(stream, layer, condensed)
                else:
                    _run(stream, layer, condensed)
            if layer in chosen:
                offload_like(mlps[layer], by_layer[layer].module, f"condensed-{layer}")
    return mlps, fits


def _fitted(kept: CondensedLayer, examples: LayerExamples, config: CondenseConfig) -> tuple[nn.Module, RefitLayer]:
    """Fit a layer: a condensed MLP, or one with experts behind its router."""
    if examples.beside is None:
        return _fitted_dense(kept, examples, config)
    whole = trains_experts(config)
    mlp, fit = _fitted_dense(kept, examples, replace(config, refit=next(iter(REFITS))) if whole else config)
    mixed = mix(examples.block, kept, mlp)
    if whole:
        done = MIXED_REFITS.of(config)(mixed, examples.of_whole_layer())
        fit = replace(fit, before=done.before, after=done.after)
    return mixed, fit


def _fitted_dense(
    kept: CondensedLayer, examples: LayerExamples, config: CondenseConfig
) -> tuple[CondensedMLP, RefitLayer]:
    """Choose the neurons and gates of a layer, fold and fit it. Whole experts, only folded, stay if they are better."""
    block = examples.block
    beside = examples.beside is not None
    gated = config.gates_tokens and kept.dense_neurons(block.intermediate_size) > 0
    gates = fit_token_gates(examples) if gated else None
    refit, choice = REFITS.of(config), REFIT_NEURONS.of(config)(kept, examples, gates)
    mlp = choice.fold(block, beside)
    if not mlp.intermediate_size and beside:
        return mlp, RefitLayer(1.0, 1.0)
    if choice.neurons is None and not gated:
        return mlp, refit(mlp, examples)
    own, whole = (None if choice.neurons is None else each.counts(block) for each in (choice, _whole(kept)))
    if kept.width is not None:
        return mlp, replace(refit(mlp, examples), neurons=own, gated=gated)
    folded = _whole(kept).fold(block, beside)
    before = held_out_error(copy.deepcopy(folded).float(), examples)
    fit = refit(mlp, examples)
    if fit.after < before:
        return mlp, replace(fit, before=before, neurons=own, gated=gated)
    return folded, RefitLayer(before, before, neurons=whole)


def _whole(kept: CondensedLayer) -> NeuronChoice:
    return NeuronChoice(kept.experts, kept.gates)


def _run(stream: LayerStream, layer: int, states: HiddenStates) -> None:
    """Replace the inputs of a layer by its outputs."""
    for batch, entering in enumerate(states):
        states[batch] = stream.run_layer(layer, entering, batch)
    stream.check_finite()
