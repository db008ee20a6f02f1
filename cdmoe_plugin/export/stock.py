"""Export of a condensed model to a checkpoint of its base architecture, which opens without this package."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import logging

from ..atomic import replacing_files
from ..blocks.weights import UnsupportedModelError, read_gated_mlp
from ..calibration import Calibration, TokenBatch, calibration_for
from ..cards.card import is_someones_card, write_stock_card
from ..config import CondenseConfig
from ..decoder.stream import searching
from ..metrics.js import js_divergence
from ..model.layers_cdmoe import CondensedMLP
from ..model.lookup import condensed_layers
from ..model.modeling_cdmoe import CondensedModelMixin
from ..model.saving import MODELING_FILE
from ..offload import is_offloaded
from ..registry import EXPORT_TARGETS, ExportTarget
from .check import check_export, refuse_gates
from .stock_config import StockModel, stock_model_of

logger = logging.get_logger(__name__)

_WEIGHT_FILES = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
# Maximum difference of the last hidden states, relative to their norm, at half of the tokens: sums over a padded width
# are rounded in another order, and in half precision a token may then be routed to another expert.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
_HALF_TOLERANCE = 5e-2


@dataclass(frozen=True)
class StockExport:
    """The result of `export_stock`.

    Args:
        model_type (`str`): Model type of the checkpoint.
        fields (`dict[str, Any]`): Fields of the base architecture's config that differ from the sparse model's.
        dense_width (`int`, *optional*): Width of all dense MLPs; None if no layer was condensed.
        parameters (`int`): Parameters of the checkpoint, including zeros that pad narrower layers.
        parameters_before (`int`): Parameters of the condensed model.
        shared_gates (`dict[int, float]`): The constants that replace per-token gates of shared experts, by decoder
            layer; empty if the checkpoint is exact.
        divergence (`float`, *optional*): Jensen-Shannon divergence between the outputs of the condensed model and of
            the checkpoint, mean over the calibration tokens, in nats; None if the checkpoint is exact.
    """

    model_type: str
    fields: dict[str, Any] = field(default_factory=dict)
    dense_width: int | None = None
    parameters: int = 0
    parameters_before: int = 0
    shared_gates: dict[int, float] = field(default_factory=dict)
    divergence: float | None = None


def export_stock(
    model: PreTrainedModel,
    folder: str | os.PathLike,
    approximate: bool = False,
    *,
    config: CondenseConfig | None = None,
    calibration: Any = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_shard_size: int | str = "5GB",
) -> StockExport:
    """Write a model as a checkpoint of its base architecture, in which condensed layers are plain dense ones.

    transformers opens the checkpoint without this package, and so do other programs that read the same config fields.
    All dense layers of an architecture share one width there; narrower ones, and trimmed ones, are padded with neurons
    of weight zero, which changes only the order of rounding. A model with trimmed blocks has its base architecture
    already and is written unchanged. The model card names the base model and its license.

    Args:
        model (`PreTrainedModel`): A condensed or trimmed model in memory, on one device. It is not changed.
        folder (`str` or `os.PathLike`): Output folder, which must not have a condensed checkpoint in it. It is
            unchanged if the export is refused or fails.
        approximate (`bool`, defaults to `False`): Whether the per-token gate of a shared expert (Qwen1.5-MoE), which a
            dense layer does not have, may be replaced by its mean over the calibration tokens. The error is measured,
            logged and returned.
        config (`CondenseConfig`, *optional*): Number and length of the samples, batch size and seed; used for such
            gates only.
        calibration (*optional*): As in `search_plan`; used for such gates only.
        tokenizer (*optional*): As in `search_plan`; used for such gates only.
        max_shard_size (`int` or `str`, defaults to `"5GB"`): As in `save_pretrained`.

    Returns:
        `StockExport`: The description of the checkpoint.

    Raises:
        UnsupportedModelError: if a config of the base architecture can't mark exactly these layers as dense, or if the
            architecture's dense layers compute something else. The message names the field, the layers and what to do.
        ValueError: if the model can't be exported in the form in which it is loaded, if an exact export is not
            possible without `approximate`, or if the folder has a condensed checkpoint in it.
    """
    _check_request(model, folder)
    if not isinstance(model, CondensedModelMixin):
        count = model.num_parameters()
        written = StockExport(model.config.model_type, parameters=count, parameters_before=count)
        _write(model, model, written, folder, max_shard_size)
        return written
    described = stock_model_of(model)
    mlps = condensed_layers(model).items()
    gated = {layer: mlp.shared_expert_gate for layer, mlp in mlps if mlp.shared_expert_gate is not None}
    if not approximate:
        refuse_gates(sorted(gated), described.config.model_type)
    gates: dict[int, float] = {}
    divergence = None
    with searching(model):
        data = calibration_for(model, calibration, config or CondenseConfig(), tokenizer) if gated else None
        if data is not None:
            gates = _mean_gates(model, gated, data)
        stock = _build(model, described, gates)
        with _constant_gates(gated, gates):
            _check_same(model, stock)
        if data is not None:
            divergence = _divergence(model, stock, data)
            logger.warning(
                f"The per-token gates of the shared experts of {len(gates)} layers are constants in the export: the "
                f"mean JS divergence to the condensed model is {divergence:.3e} over {data.num_tokens} calibration "
                "tokens."
            )
    _warn_of_other_readers(described)
    written = StockExport(
        described.config.model_type,
        described.fields,
        described.width,
        stock.num_parameters(),
        model.num_parameters(),
        gates,
        divergence,
    )
    _write(model, stock, written, folder, max_shard_size)
    return written


def _write(
    model: PreTrainedModel,
    stock: PreTrainedModel,
    written: StockExport,
    folder: str | os.PathLike,
    max_shard_size: int | str,
) -> None:
    with replacing_files(folder, _WEIGHT_FILES, keep=is_someones_card) as staging:
        stock.save_pretrained(staging, max_shard_size=max_shard_size)
        write_stock_card(
            model,
            staging,
            model_type=written.model_type,
            parameters=written.parameters,
            fields=written.fields,
            dense_width=written.dense_width,
            shared_gates=written.shared_gates,
            divergence=written.divergence,
        )


def _check_request(model: PreTrainedModel, folder: str | os.PathLike) -> None:
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"`model` should be a loaded PreTrainedModel, but is a {type(model).__name__}. If it wraps a model (PEFT, "
            "DDP), pass the model inside, with its adapters merged."
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError("The model has adapters, which are not part of its layers: merge them before the export.")
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            "The model is quantised: export it without quantisation, and quantise the exported checkpoint on loading."
        )
    devices = {parameter.device for parameter in model.parameters()}
    if isinstance(model, CondensedModelMixin) and (is_offloaded(model) or len(devices) > 1):
        raise ValueError(
            f"The model's weights are on {sorted(map(str, devices))}: load it on one device, such as "
            "`device_map='cpu'`."
        )
    for name in (MODELING_FILE, "condense_plan.json"):
        if (Path(folder) / name).exists():
            raise ValueError(f"`folder` {folder} has a {name}: it is a condensed checkpoint. Choose another folder.")


def _warn_of_other_readers(described: StockModel) -> None:
    if hasattr(described.config, "first_k_dense_replace") and "first_k_dense_replace" not in described.fields:
        logger.warning(
            f"`mlp_layer_types` of the exported config names the dense layers {sorted(described.places)}, which its "
            f"`first_k_dense_replace` ({described.config.first_k_dense_replace}) can't. Programs that read only the "
            "latter will misread this checkpoint."
        )


def _mean_gates(model: PreTrainedModel, gated: Mapping[int, nn.Linear], data: Calibration) -> dict[int, float]:
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
            _outputs(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {layer: total / data.num_tokens for layer, total in sums.items()}


def _outputs(model: nn.Module, batch: TokenBatch) -> Tensor:
    """Compute the logits `[T, V]` (last hidden states without a head) of the tokens that are not padding."""
    if isinstance(model, PreTrainedModel) and model.get_output_embeddings() is None:
        model = model.base_model
    device = next(model.parameters()).device
    inputs = {"input_ids": batch.input_ids.to(device), "attention_mask": batch.attention_mask.to(device)}
    return model(**inputs, use_cache=False)[0][inputs["attention_mask"].bool()]


def _build(model: PreTrainedModel, described: StockModel, gates: Mapping[int, float]) -> PreTrainedModel:
    """Build the base architecture's model: its dense MLPs are new, all else is shared with the condensed model."""
    config = copy.deepcopy(described.config)
    config._attn_implementation = model.config._attn_implementation
    # Some modules draw random numbers when they are made, which must not change the caller's.
    with init_empty_weights(include_buffers=False), torch.random.fork_rng(devices=[]):
        stock = type(model)._base_class(config)  # type: ignore[attr-defined]
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


@contextmanager
def _constant_gates(gated: Mapping[int, nn.Linear], gates: Mapping[int, float]) -> Iterator[None]:
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


def _check_same(model: PreTrainedModel, stock: PreTrainedModel) -> None:
    """Compare the last hidden states of both on a few tokens, as equal classes and shapes do not imply the function."""
    batch = TokenBatch.random(model)
    expected, found = (_outputs(each.base_model, batch).double() for each in (model, stock))
    error = float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median())
    if not error <= _TOLERANCE.get(model.dtype, _HALF_TOLERANCE):
        raise UnsupportedModelError(
            f"model type {stock.config.model_type!r} computes something else in its dense layers: the last hidden "
            f"states have a relative difference of {error:.1e}. Keep the condensed checkpoint."
        )


def _divergence(model: PreTrainedModel, stock: PreTrainedModel, data: Calibration) -> float:
    total = 0.0
    for batch in data.batches:
        total += float(js_divergence(_outputs(model, batch), _outputs(stock, batch)).double().sum())
    return total / data.num_tokens


EXPORT_TARGETS.register(
    "stock", "a checkpoint of the base architecture, in which condensed layers are plain dense ones"
)(ExportTarget(check_export, export_stock))
