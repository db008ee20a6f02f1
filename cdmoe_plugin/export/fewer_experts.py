"""The config of the base architecture with fewer experts and a wider shared expert, for models of mixed layers.

All sparse layers must have kept the same number of experts. As for dense layers, the edited config builds the model on
the meta device, which is compared with the condensed one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedModel

from ..blocks import SparseBlock, UnsupportedModelError, describe_sparse_blocks
from ..model.lookup import condensed_layers, has_mixed_layers
from .stock_config import (
    ADVICE,
    Mismatch,
    StockModel,
    check_dense,
    refuse_differing,
    sketch_with,
    stock_model_of,
)

# Config fields with the number of experts, the number of shared experts, and the width of all shared experts together.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_SHARED = ("n_shared_experts", "num_shared_experts", "num_shared_expert", "moe_num_shared_experts")
_SHARED_WIDTH = ("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "shared_intermediate_size")


def stock_form_of(model: Any) -> StockModel:
    """Find the config of the base architecture that builds a condensed model: with dense layers or with fewer experts.

    Raises:
        UnsupportedModelError: if there is none, with the reason.
    """
    return fewer_experts_of(model) if has_mixed_layers(model) else stock_model_of(model)


def fewer_experts_of(model: Any) -> StockModel:
    """Find the config of the base architecture that builds a model of mixed layers.

    Nothing is computed, and no weight is read. The shared experts of a config that counts them are padded to a multiple
    of their width.

    Args:
        model (`PreTrainedModel`): A condensed model with layers that keep experts behind their routers.

    Raises:
        UnsupportedModelError: if there is none, with the reason.
    """
    specs: dict[str, Any] = model.config.condense_config["condensed_layers"]
    base_type = type(model)._base_class.config_class.model_type
    what = f"the config of model type {base_type!r} can't describe this condensed model"
    numbers = {int(layer): spec["num_routed"] for layer, spec in specs.items() if spec.get("form") == "mixed"}
    if len(numbers) < len(specs) or len(set(numbers.values())) > 1:
        kept = {int(layer): numbers.get(int(layer), 0) for layer in specs}
        raise UnsupportedModelError(
            f"{what}: it has one number of experts for all sparse layers, but decoder layers keep {kept} of them. Use "
            f"`exportable='stock'` or the same `num_routed` in all sparse layers. {ADVICE}"
        )
    if model.config.get_text_config() is not model.config:
        raise UnsupportedModelError(f"{what}: the decoder is part of a larger model. {ADVICE}")
    number = next(iter(numbers.values()))
    widths = [mlp.intermediate_size for mlp in condensed_layers(model).values()]
    reasons = []
    for fields in _candidates(model.config, number, max(widths, default=0)):
        try:
            stock = sketch_with(model, fields)
            width, places = _compare(model, stock, max(widths, default=0))
        except Mismatch as error:
            reasons.append(f"with {' and '.join(f'`{name}`' for name in fields)} changed, {error}")
            continue
        changed = {name: value for name, value in fields.items() if getattr(model.config, name) != value}
        return StockModel(stock.config, changed, width, places)
    reasons = reasons or ["it has no field with the number of experts"]
    raise UnsupportedModelError(f"{what}: {'; '.join(dict.fromkeys(reasons))}. {ADVICE}")


def _candidates(config: Any, number: int, width: int) -> Iterator[dict[str, Any]]:
    """Yield changed fields: the number of experts, with every field that may be that of a wider shared expert."""
    experts = {name: number for name in EXPERTS if isinstance(getattr(config, name, None), int)}
    if not experts:
        return
    for name in _SHARED_WIDTH:
        if isinstance(getattr(config, name, None), int):
            yield {**experts, name: width}
    for name in _SHARED:
        own = getattr(config, name, None)
        each = getattr(config, "moe_intermediate_size", None) or getattr(config, "intermediate_size", None)
        if isinstance(own, int) and isinstance(each, int):
            yield {**experts, name: -(-width // each)}
    yield experts


def _compare(model: PreTrainedModel, stock: PreTrainedModel, width: int) -> tuple[int, dict[int, tuple[str, str]]]:
    """Check that `stock` is the model with shared experts of one width; return it, and their names in both."""
    mlps, names = condensed_layers(model), {id(part): name for name, part in model.base_model.named_modules()}
    blocks = {block.layer: block for block in describe_sparse_blocks(stock)}
    if set(map(str, blocks)) != set(model.config.condense_config["condensed_layers"]):
        raise Mismatch(f"its sparse layers would be {sorted(blocks)}")
    own = {id(part): name for name, part in stock.base_model.named_modules()}
    places = {}
    for layer, mlp in mlps.items():
        width = max(width, _checked_width(blocks[layer], mlp))
        places[layer] = (names[id(mlp)], own[id(blocks[layer].shared)])
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    inside = tuple(f"{prefix}{name}." for pair in places.values() for name in pair)

    def shapes(whole: PreTrainedModel) -> dict[str, str]:
        tensors = whole.state_dict().items()
        return {name: f"{list(tensor.shape)}" for name, tensor in tensors if not name.startswith(inside)}

    refuse_differing(shapes(model), shapes(stock))
    return width, places


def _checked_width(block: SparseBlock, mlp: Any) -> int:
    """Return the width of a block's shared expert, in which the dense part of a layer must fit."""
    if block.shared is None:
        raise Mismatch(f"decoder layer {block.layer} would have no shared expert for the dense neurons")
    width = block.shared_intermediate_size
    if width < mlp.intermediate_size:
        raise Mismatch(f"the shared expert of decoder layer {block.layer} would be {width} wide")
    check_dense(block.layer, mlp, block.shared, width)
    return width
