"""A plain model built from a condensed one: its dense MLPs are new, all else is shared."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ..blocks.weights import read_gated_mlp
from ..calibration import calibration_for
from ..config import CondenseConfig
from ..decoder.whole import searching
from ..model.layers_cdmoe import CondensedMLP
from ..model.lookup import condensed_layers
from .check import refuse_gates
from .checkpoint import ExportReport, write_checkpoint
from .compare import check_same
from .gates import constant_gates, mean_gates, measure_gates
from .stock_config import StockModel


class GateData(NamedTuple):
    """The data for constants that replace per-token gates of shared experts; see `export_stock`."""

    approximate: bool = False
    config: CondenseConfig | None = None
    calibration: Any = None
    tokenizer: PreTrainedTokenizerBase | None = None


def write_plain(
    model: PreTrainedModel,
    folder: str | os.PathLike,
    model_class: Any,
    described: StockModel,
    gate_data: GateData,
    max_shard_size: int | str,
    check: Callable[[PreTrainedModel, PreTrainedModel], None] = check_same,
) -> ExportReport:
    """Write a condensed model as a plain one of another class, after both were compared.

    Args:
        model (`PreTrainedModel`): The condensed model, which is not changed.
        folder (`str` or `os.PathLike`): Output folder.
        model_class (`type[PreTrainedModel]`): The class of the plain model.
        described (`StockModel`): Its config, and the places of its dense MLPs.
        gate_data (`GateData`): The data for constants that replace per-token gates.
        max_shard_size (`int` or `str`): As in `save_pretrained`.
        check (`Callable`): Raises an error if the two models do not compute the same.

    Raises:
        UnsupportedModelError: if layers have per-token gates that may not be replaced, or if the check fails.
    """
    mlps = condensed_layers(model).items()
    gated = {layer: mlp.shared_expert_gate for layer, mlp in mlps if mlp.shared_expert_gate is not None}
    if not gate_data.approximate:
        refuse_gates(sorted(gated), described.config.model_type)
    gates: dict[int, float] = {}
    divergence = None
    with searching(model):
        _, config, calibration, tokenizer = gate_data
        data = calibration_for(model, calibration, config or CondenseConfig(), tokenizer) if gated else None
        if data is not None:
            gates = mean_gates(model, gated, data)
        plain = build_dense(model, model_class, described, gates)
        with constant_gates(gated, gates):
            check(model, plain)
        if data is not None:
            divergence = measure_gates(model, plain, data)
    written = ExportReport(
        described.config.model_type,
        described.fields,
        described.width,
        plain.num_parameters(),
        model.num_parameters(),
        gates,
        divergence,
    )
    write_checkpoint(model, plain, written, folder, max_shard_size)
    return written


def build_dense(
    model: PreTrainedModel, model_class: Any, described: StockModel, gates: Mapping[int, float]
) -> PreTrainedModel:
    """Build a model whose weights are those of a condensed one, outside of its dense MLPs under the same names."""
    config = copy.deepcopy(described.config)
    config._attn_implementation = model.config._attn_implementation
    # Some modules draw random numbers when they are made, which must not change the caller's.
    with init_empty_weights(include_buffers=False), torch.random.fork_rng(devices=[]):
        stock = model_class(config)
    for layer, (source_name, target_name) in described.places.items():
        source = model.base_model.get_submodule(source_name)
        like = next(source.parameters(), next(model.parameters()))
        parent_name, _, name = target_name.rpartition(".")
        parent = stock.base_model.get_submodule(parent_name)
        target = getattr(parent, name).to(like.dtype).to_empty(device=like.device)
        _fill(target, source, gates.get(layer))
        setattr(parent, name, target)
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    inside = tuple(f"{prefix}{target}." for _, target in described.places.values())
    names = {name for name in stock.state_dict() if not name.startswith(inside)}
    stock.load_state_dict({n: t for n, t in model.state_dict().items() if n in names}, strict=False, assign=True)
    stock.tie_weights()
    if hasattr(model, "generation_config"):
        stock.generation_config = copy.deepcopy(model.generation_config)
    return stock.to(next(model.parameters()).device).eval()


def _fill(target: nn.Module, source: nn.Module, gate: float | None) -> None:
    """Copy a gated MLP into a wider one, with zeros for missing neurons or a trimmed MLP."""
    for parameter in target.parameters():
        parameter.zero_()
    wide, weights = read_gated_mlp(target), read_gated_mlp(source)
    if wide is None or weights is None:
        return
    width = weights.gate.shape[0]
    for new, old in ((wide.gate, weights.gate), (wide.up, weights.up)):
        new[:width] = old
    wide.down[:, :width] = weights.down
    if gate is not None and isinstance(source, CondensedMLP):
        columns = slice(0, source.shared_intermediate_size)
        wide.down[:, columns] = (weights.down[:, columns].float() * gate).to(wide.down.dtype)
    for bias, before in ((wide.gate_bias, weights.gate_bias), (wide.up_bias, weights.up_bias)):
        if bias is not None and before is not None:
            bias[:width] = before
    if wide.down_bias is not None and weights.down_bias is not None:
        wide.down_bias.copy_(weights.down_bias)
