"""Export of a fully condensed model to its base architecture with K experts that every token chooses alike.

With a router of zeros, every expert of a layer has the same constant weight. The condensed MLP is cut into experts of
the base architecture's width, whose down projections are divided by that weight. This is exact, keeps gates per token,
and needs no config field for dense layers.
"""

from __future__ import annotations

import copy
import json
import os
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..autocast import without_autocast
from ..blocks import SparseBlock, UnsupportedModelError, describe_sparse_blocks, probe_blocks
from ..checks import is_out_of_memory
from ..config import CondenseConfig
from ..decoder.whole import searching
from ..model.layers_cdmoe import CondensedMLP
from ..model.lookup import condensed_layers
from ..model.modeling_cdmoe import CondensedModelMixin
from ..plan import CondensePlan
from ..registry import EXPORT_TARGETS, ExportTarget
from .check import sketch_fully
from .checkpoint import ExportReport, check_model, write_checkpoint
from .compare import OtherFunctionError, check_dense_sibling
from .fewer_experts import EXPERTS
from .siblings import refuse_sparse_layers
from .stock_config import ADVICE, CONDENSED_FIELDS, REFUSALS

# Config fields with the number of experts that a token chooses, and of groups of experts.
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
_GROUPS = ("n_group", "topk_group", "num_expert_group")


@without_autocast
def export_top_k(
    model: PreTrainedModel, folder: str | os.PathLike, *, max_shard_size: int | str = "5GB"
) -> ExportReport:
    """Write a fully condensed model as a checkpoint of its base architecture with as many experts as a token chooses.

    The largest number of experts that a condensed layer kept becomes the number of experts, K, and of those that each
    token chooses. Routers are zeros, so that all weigh the same; missing experts are zeros. The logits are compared
    before anything is written.

    Args:
        model (`PreTrainedModel`): A condensed model in memory, on one device. It is not changed.
        folder (`str` or `os.PathLike`): Output folder, which must not have a condensed checkpoint in it. It is
            unchanged if the export is refused or fails.
        max_shard_size (`int` or `str`, defaults to `"5GB"`): As in `save_pretrained`.

    Returns:
        `ExportReport`: The description of the checkpoint.

    Raises:
        UnsupportedModelError: if layers are sparse still, or if the architecture with K experts computes something
            else. The message names the reason.
        ValueError: if the model is not condensed or can't be exported in the form in which it is loaded, or if the
            folder has a condensed checkpoint in it.
    """
    check_model(model, folder)
    if not isinstance(model, CondensedModelMixin):
        raise ValueError(f"The model, a {type(model).__name__}, is not condensed.")
    config, fields = _config_of(model)
    with searching(model):
        exported = _build(model, config)
        try:
            check_dense_sibling(model, exported)
        except OtherFunctionError as error:
            raise UnsupportedModelError(f"{error}. {ADVICE}") from error
    written = ExportReport(
        exported.config.model_type,
        fields,
        parameters=exported.num_parameters(),
        parameters_before=model.num_parameters(),
    )
    write_checkpoint(model, exported, written, folder, max_shard_size)
    return written


def check_top_k(
    model_name_or_path: str | os.PathLike,
    request: CondensePlan | CondenseConfig,
    approximate: bool = False,
    **hub: Any,
) -> None:
    """Check that the result of a plan or a search can be exported by `export_top_k`; see `check_export`.

    Raises:
        UnsupportedModelError: naming the layers that would be sparse still, or the config field.
        ValueError: if the request does not fit the model.
    """
    fits_top_k(sketch_fully(model_name_or_path, request, True, hub))


def fits_top_k(model: Any) -> None:
    """Check that a fully condensed model, which may be on the meta device, fits in its base architecture.

    Raises:
        UnsupportedModelError: with the reason.
    """
    _blocks_of(model, _sketch(type(model)._base_class, _config_of(model)[0]))


def _write(
    model: PreTrainedModel, folder: str | os.PathLike, approximate: bool = False, **options: Any
) -> ExportReport:
    if approximate:
        raise ValueError("`approximate` does nothing here: the top-K form keeps gates per token. Leave it out.")
    return export_top_k(model, folder, max_shard_size=options.get("max_shard_size", "5GB"))


def _config_of(model: Any) -> tuple[Any, dict[str, Any]]:
    """Return the base architecture's config with K experts, and its changed fields."""
    refuse_sparse_layers(model)
    config, base_type = model.config, type(model)._base_class.config_class.model_type
    values = {name: value for name, value in config.to_dict().items() if name not in CONDENSED_FIELDS}
    base_class = type(model)._base_class
    read = base_class.config_class.from_dict
    blocks = describe_sparse_blocks(_sketch(base_class, read(_plain(values))))
    widths = {block.layer: block.intermediate_size for block in blocks}
    mlps = condensed_layers(model).items()
    routed = {layer: mlp.up_proj.out_features - mlp.shared_intermediate_size for layer, mlp in mlps}
    number = max([1, *(-(-width // widths[layer]) for layer, width in routed.items())])
    fields = {name: number for name in (*EXPERTS, *_CHOSEN) if isinstance(values.get(name), int)}
    if not set(fields) & set(EXPERTS) or not set(fields) & set(_CHOSEN):
        raise UnsupportedModelError(f"The config of model type {base_type!r} has no number of experts. {ADVICE}")
    fields |= {name: 1 for name in _GROUPS if isinstance(values.get(name), int)}
    return read(_plain(values | fields)), fields


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of the values of a config as a file would give them."""
    copied: dict[str, Any] = json.loads(json.dumps(values))
    return copied


def _mlps(model: Any) -> dict[int, CondensedMLP]:
    return condensed_layers(model)


def _sketch(base_class: Any, config: Any) -> PreTrainedModel:
    """Build the base architecture's model without weights, and with its buffers."""
    try:
        with init_empty_weights(include_buffers=False), torch.random.fork_rng(devices=[]):
            return base_class(copy.deepcopy(config))
    except REFUSALS as error:
        if is_out_of_memory(error):
            raise
        raise UnsupportedModelError(
            f"model type {config.model_type!r} refuses so few experts: {error}. {ADVICE}"
        ) from error


def _blocks_of(model: Any, exported: PreTrainedModel) -> dict[int, SparseBlock]:
    """Return the sparse blocks of the exported model by decoder layer, after all other weights were compared.

    Raises:
        UnsupportedModelError: if weights outside of the blocks differ, or if a block can't hold a condensed MLP.
    """
    blocks = {block.layer: block for block in describe_sparse_blocks(exported)}
    specs: dict[str, Any] = model.config.condense_config["condensed_layers"]
    what = f"model type {exported.config.model_type!r} can't hold this condensed model"
    if {str(layer) for layer in blocks} != set(specs):
        raise UnsupportedModelError(f"{what}: its sparse layers would be {sorted(blocks)}. {ADVICE}")
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    inside = []
    for block in blocks.values():
        if block.experts_features != block.hidden_size:
            raise UnsupportedModelError(f"{what}: its experts work on {block.experts_features} features. {ADVICE}")
        layer = block.path.rpartition(".")[0]
        spec = specs[str(block.layer)]
        inside += [f"{prefix}{layer}.{name}." for name in (*block.places(None), *spec["omitted"])]

    def shapes(whole: PreTrainedModel) -> dict[str, tuple[int, ...]]:
        state = whole.state_dict().items()
        return {name: tuple(tensor.shape) for name, tensor in state if not name.startswith(tuple(inside))}

    if (one := shapes(model)) != (other := shapes(exported)):
        wrong = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
        raise UnsupportedModelError(f"{what}: {wrong[0]} differs, and {len(wrong) - 1} weights more. {ADVICE}")
    return blocks


def _build(model: Any, config: Any) -> PreTrainedModel:
    """Build the base architecture's model with the weights of a condensed one."""
    config._attn_implementation = model.config._attn_implementation
    exported = _sketch(type(model)._base_class, config)
    blocks = _blocks_of(model, exported)
    own = {name: tensor.shape for name, tensor in exported.state_dict().items()}
    shared = {name: tensor for name, tensor in model.state_dict().items() if own.get(name) == tensor.shape}
    exported.load_state_dict(shared, strict=False, assign=True)
    like = next(model.parameters())
    strict = getattr(type(exported), "_keep_in_fp32_modules_strict", None) or ()
    for name, parameter in list(exported.named_parameters()):
        if parameter.is_meta:
            dtype = torch.float32 if any(part in name for part in strict) else like.dtype
            _set(exported, name, _constant(name, parameter, dtype, like.device))
    for name, buffer in exported.named_buffers():
        if "bias" in name.rpartition(".")[2] and any(f"{block.path}." in name for block in blocks.values()):
            buffer.zero_()
    exported.tie_weights()
    exported.to(like.device).eval()
    probe_blocks(exported, list(blocks.values()))
    mlps = condensed_layers(model)
    for layer, block in blocks.items():
        if layer in mlps:  # the others are trimmed, and zeros
            _fill(block, mlps[layer])
    if hasattr(model, "generation_config"):
        exported.generation_config = copy.deepcopy(model.generation_config)
    return exported


def _constant(name: str, like: Tensor, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """Make a parameter of the new blocks: matrices and biases of zeros, and scales of ones."""
    scale = like.ndim < 2 and "bias" not in name.rpartition(".")[2]
    make = torch.ones if scale else torch.zeros
    return nn.Parameter(make(like.shape, dtype=dtype, device=device))


def _set(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, parameter)


def _fill(block: SparseBlock, mlp: CondensedMLP) -> None:
    """Cut a condensed MLP into the shared expert and the routed experts of a block with a router of zeros."""
    first = mlp.shared_intermediate_size
    shared = block.shared_weights()
    if shared is not None and first:
        _put(shared, mlp, slice(0, first), 1.0, block.shared_scale)
    if block.shared_gate is not None and mlp.shared_expert_gate is not None:
        block.shared_gate.weight.copy_(mlp.shared_expert_gate.weight)
    stacked, weights = block.expert_weights(), _weights(block)
    into, out = block.split_gates(weights)
    for expert in range(block.num_experts):
        columns = slice(first, min(first + block.intermediate_size, mlp.intermediate_size))
        first = max(first, columns.stop)
        factor = float(out[expert]) * block.routed_scale
        _put(stacked.of(expert), mlp, columns, 1.0 if into is None else float(into[expert]), factor)
    bias, total = mlp.down_proj.bias, block.output_bias()
    if bias is None:
        return
    if total is not None:
        total.copy_(bias)
    elif stacked.down_bias is not None:
        stacked.down_bias[0].copy_(bias.float() / (float(out[0]) * block.routed_scale))
    elif shared is not None and shared.down_bias is not None:
        shared.down_bias.copy_(bias.float() / block.shared_scale)


def _put(target: Any, mlp: CondensedMLP, columns: slice, into: float, out: float) -> None:
    """Copy some neurons of a condensed MLP, divided by the factors of an expert's input and output."""
    width = columns.stop - columns.start
    pairs = ((target.up, target.up_bias, mlp.up_proj), (target.gate, target.gate_bias, mlp.gate_proj))
    for weight, bias, linear in pairs:
        if linear is not None:
            weight[:width] = (linear.weight[columns].float() / into).to(weight.dtype)
            if bias is not None and linear.bias is not None:
                bias[:width] = linear.bias[columns]
    target.down[:, :width] = (mlp.down_proj.weight[:, columns].float() / out).to(target.down.dtype)


def _weights(block: SparseBlock) -> Tensor:
    """Measure the weights `[K]` that the router of a block gives its experts, the same for every token.

    Raises:
        UnsupportedModelError: if tokens do not choose all experts with the same weights.
    """
    calls: list[Any] = []
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 8, block.hidden_size, generator=generator).to(device=block.device, dtype=block.dtype)
    with block.dispatch.watch(calls.append):
        block.dispatch.block(x)
    experts, weights = calls[0].routing
    every = weights.new_zeros(len(weights), block.num_experts).scatter_add(1, experts, weights)
    if experts.shape[1] != block.num_experts or not (every == every[0]).all() or not (every[0] > 0).all():
        raise UnsupportedModelError(
            f"The router of decoder layer {block.layer} does not give all {block.num_experts} experts constant "
            f"weights when it is zero. {ADVICE}"
        )
    return every[0].double()


EXPORT_TARGETS.register(
    "top_k", "the base architecture with K experts that every token chooses alike, if all sparse layers are condensed"
)(ExportTarget(check_top_k, _write))
