"""The config of the base architecture with which a condensed model's layers are dense.

Architectures mark dense layers in different ways, and many can mark only some sets of layers, or none. To be sure, the
edited config builds the model on the meta device, which is compared with the condensed one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedModel

from ..blocks.weights import GatedWeights, UnsupportedModelError, has_stacked_weights, read_gated_mlp
from ..checks import is_out_of_memory
from ..model.layers_cdmoe import CondensedMLP, Trimmed
from .dense_markers import Marker, markers_of

# Config fields that may be the width of dense MLPs.
_WIDTH_FIELDS = (
    "dense_intermediate_size",
    "intermediate_size_mlp",
    "shared_intermediate_size",
    "intermediate_size",
)
# Errors that configs, and the models built from them, raise for fields that they do not support.
REFUSALS = (StrictDataclassError, ValueError, TypeError, LookupError, AttributeError, RuntimeError)
# Fields that only a condensed config has, or in which it differs.
CONDENSED_FIELDS = ("condense_config", "auto_map", "architectures", "model_type")
ADVICE = "Keep the condensed checkpoint, which opens with `import cdmoe_plugin` or `trust_remote_code=True`."


@dataclass(frozen=True)
class StockModel:
    """The description of a condensed model in its base architecture.

    Args:
        config (`PreTrainedConfig`): The base architecture's own config.
        fields (`dict[str, Any]`): Its changed fields, with their new values.
        width (`int`): Width of all dense MLPs.
        places (`dict[int, tuple[str, str]]`): Dense MLPs by decoder layer: their name in the condensed base model, and
            that in the exported one.
    """

    config: Any
    fields: dict[str, Any]
    width: int
    places: dict[int, tuple[str, str]]


class Mismatch(Exception):
    """The reason why a config does not build the expected model."""


def stock_model_of(model: Any) -> StockModel:
    """Find the config of the base architecture that builds a condensed model with plain dense layers.

    Nothing is computed, and no weight is read.

    Args:
        model (`PreTrainedModel`): A condensed model.

    Raises:
        UnsupportedModelError: if there is none, naming the field, the layers and the reason.
    """
    specs: dict[str, Any] = model.config.condense_config["condensed_layers"]
    config = model.config
    base_type = type(model)._base_class.config_class.model_type
    what = f"the config of model type {base_type!r} can't describe this condensed model"
    if config.get_text_config() is not config:
        raise UnsupportedModelError(f"{what}: the decoder is part of a larger model. {ADVICE}")
    sources = dense_sources(model, specs)
    dense = set(sources)
    width = max(1, *(0 if w is None else w.gate.shape[0] for w in map(weights_of, sources.values())))
    total = config.num_hidden_layers
    reasons = []
    for marker in markers_of(config):
        update = marker.update(config, dense, total)
        named = " and ".join(f"`{name}`" for name in marker.fields)
        if update is None:
            reasons.append(
                f"{named} can only mark {marker.possible} as dense, {_missing_layers(marker, config, dense)}"
            )
            continue
        for fields in _with_widths(config, update, width):
            try:
                stock = sketch_with(model, fields)
                places = _compare(model, stock, specs, sources, width)
                changed = {name: v for name, v in fields.items() if getattr(config, name) != v}
                return StockModel(stock.config, changed, width, places)
            except Mismatch as error:
                reasons.append(f"with {named} changed, {error}")
    if not reasons:
        reasons = ["it has no field for dense layers"]
    raise UnsupportedModelError(f"{what}: {'; '.join(dict.fromkeys(reasons))}. {ADVICE}")


def _missing_layers(marker: Marker, config: Any, dense: set[int]) -> str:
    total = config.num_hidden_layers
    found = f"but the dense layers would be {sorted(dense)} of {total}"
    for more in (set(range(max(dense) + 1)), set(range(total))):
        if marker.update(config, more, total) is not None:
            return f"{found}: {sorted(more - dense)} would have to be dense too"
    return found


def sketch_with(model: Any, fields: dict[str, Any]) -> PreTrainedModel:
    """Build the base architecture's model on the meta device, from a file with these config fields."""
    config = model.config
    values = {name: value for name, value in config.to_dict().items() if name not in CONDENSED_FIELDS}
    values |= {config.attribute_map.get(name, name): value for name, value in fields.items()}
    base_class = type(model)._base_class
    try:
        with torch.device("meta"):
            return base_class(base_class.config_class.from_dict(json.loads(json.dumps(values))))
    except REFUSALS as error:
        if is_out_of_memory(error):
            raise
        raise Mismatch(f"it is refused: {error}") from error


def _with_widths(config: Any, update: dict[str, Any], width: int) -> Iterator[dict[str, Any]]:
    """Yield the changed fields with the width of dense MLPs in each field that may be it, and without a new width."""
    for name in _WIDTH_FIELDS:
        if isinstance(getattr(config, name, None), int):
            yield {**update, name: width}
    yield update


def dense_sources(model: PreTrainedModel, specs: dict[str, Any]) -> dict[int, nn.Module]:
    """Find the dense MLPs by decoder layer: the condensed ones, and those that were always dense."""
    base: nn.Module = model.base_model
    layers_path, _, name = next(iter(specs.values()))["module"].rsplit(".", 2)
    sources: dict[int, nn.Module] = {}
    for index, layer in enumerate(base.get_submodule(layers_path).children()):
        spec = specs.get(str(index))
        module = base.get_submodule(spec["module"]) if spec else getattr(layer, name, None)
        if isinstance(module, (CondensedMLP, Trimmed)) or (isinstance(module, nn.Module) and _is_dense(module)):
            sources[index] = module
    return sources


def _is_dense(module: nn.Module) -> bool:
    return read_gated_mlp(module) is not None and not any(has_stacked_weights(part) for part in module.modules())


def weights_of(module: nn.Module) -> GatedWeights | None:
    """Return views of the weights of a dense MLP; None if it was trimmed."""
    return None if isinstance(module, Trimmed) else read_gated_mlp(module)


def _compare(
    model: PreTrainedModel, stock: PreTrainedModel, specs: dict[str, Any], sources: dict[int, nn.Module], width: int
) -> dict[int, tuple[str, str]]:
    """Check that `stock` is the condensed model with dense MLPs of one width; return their old and new names."""
    names = {id(module): name for name, module in model.base_model.named_modules()}
    candidates = {}
    for layer, source in sources.items():
        parent, _, name = names[id(source)].rpartition(".")
        others = specs.get(str(layer), {"omitted": []})["omitted"]
        candidates[layer] = [f"{parent}.{each}" for each in (name, *others)]
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    inside = tuple(f"{prefix}{name}." for each in candidates.values() for name in each)

    def kinds(whole: nn.Module) -> dict[str, str]:
        return {name: _kind(part) for name, part in whole.named_modules() if not f"{name}.".startswith(inside)}

    def shapes(whole: nn.Module) -> dict[str, str]:
        tensors = whole.state_dict().items()
        return {name: f"{list(tensor.shape)}" for name, tensor in tensors if not name.startswith(inside)}

    refuse_differing(kinds(model), kinds(stock))
    places = {
        layer: (names[id(source)], _dense_place(stock, layer, source, candidates[layer], width))
        for layer, source in sources.items()
    }
    refuse_differing(shapes(model), shapes(stock))
    return places


def _kind(module: nn.Module) -> str:
    return getattr(type(module), "_base_class", type(module)).__name__


def refuse_differing(expected: dict[str, str], found: dict[str, str]) -> None:
    """Compare two descriptions of all modules but the dense MLPs."""
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise Mismatch(f"{name} would be {found.get(name, 'nothing')} instead of {expected.get(name, 'nothing')}")


def _dense_place(stock: PreTrainedModel, layer: int, source: nn.Module, candidates: list[str], width: int) -> str:
    """Find the name of the only dense MLP in a decoder layer of the stock model."""
    found = {}
    for name in candidates:
        try:
            found[name] = stock.base_model.get_submodule(name)
        except AttributeError:
            continue
    where = f"decoder layer {layer}"
    dense = {name: weights for name, module in found.items() if (weights := read_gated_mlp(module)) is not None}
    if len(found) != 1 or not dense:
        raise Mismatch(f"{where} would have {[type(m).__name__ for m in found.values()]} instead of one dense MLP")
    name = next(iter(dense))
    check_dense(layer, source, found[name], width)
    return name


def check_dense(layer: int, source: nn.Module, target: nn.Module, width: int) -> None:
    """Check that a module of another model has the weights of a condensed layer's MLP, padded to a width.

    Raises:
        Mismatch: with the reason.
    """
    weights, where = read_gated_mlp(target), f"decoder layer {layer}"
    if weights is None:
        raise Mismatch(f"{where} would have a {type(target).__name__}, which is no gated MLP")
    if isinstance(source, CondensedMLP) and source.norm_name is not None:
        raise Mismatch(f"the dense MLP of {where} would have no {source.norm_name}")
    own, given = sum(p.numel() for p in target.parameters()), weights_of(source)
    if own != sum(part.numel() for part in (*weights.matrices, *weights[3:]) if part is not None):
        raise Mismatch(f"{where} would have a {type(target).__name__}, which is more than a gated MLP")
    if weights.gate.shape[0] != width:
        raise Mismatch(f"the MLP of {where} would be {weights.gate.shape[0]} wide instead of {width}")
    for before, after in zip((given or weights)[3:], weights[3:], strict=True):
        if before is not None and after is None:
            raise Mismatch(f"the MLP of {where} would have no biases")
    if isinstance(source, CondensedMLP) and not _same_activation(source, target):
        raise Mismatch(f"the MLP of {where} would have another activation than {_kind(source.act_fn)}")


def _same_activation(source: CondensedMLP, target: nn.Module) -> bool:
    """Return whether a module has the same activation, or no visible one; its output is checked later."""
    acts = [getattr(target, name, None) for name in ("act_fn", "activation_fn", "activation", "act")]
    modules = [act for act in acts if isinstance(act, nn.Module)]
    return not modules or type(modules[0]) is type(source.act_fn)
