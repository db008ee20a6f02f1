"""The dense sibling of a fully condensed model: a dense architecture of transformers with the same weights.

No table says which architecture that is. Configs of dense architectures get the values of the condensed model's config
by name, build their model on the meta device, and names and shapes of all weights are compared. The function is
compared later, on tokens, as equal shapes do not imply it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.utils import logging

from ..blocks.weights import UnsupportedModelError, has_stacked_weights, read_gated_mlp
from ..checks import is_out_of_memory
from ..model.layers_cdmoe import CondensedMLP
from .stock_config import REFUSALS, Mismatch, StockModel, check_dense, dense_sources, weights_of

# Dense decoders, those that most engines read first. Those whose name begins like the model's own are tried before.
CANDIDATES = (
    *("llama", "mistral", "qwen2", "qwen3", "granite", "granite_swa", "ernie4_5", "cohere", "cohere2", "olmo", "olmo2"),
    *("olmo3", "hunyuan_v1_dense", "glm", "glm4", "gemma", "gemma2", "gemma3_text", "phi3", "seed_oss", "smollm3"),
    *("exaone4", "lfm2", "ministral", "ministral3", "helium", "youtu", "qwen3_5_text"),
)
_HEADS = {
    "ForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "ForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "ForTokenClassification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "ForQuestionAnswering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
}
# Fields of a checkpoint, not of a model's sizes and constants.
_OF_CHECKPOINT = {"condense_config", "auto_map", "architectures", "model_type", "transformers_version", "dtype"}
ADVICE = 'Keep the condensed checkpoint, or try the targets "stock" and "top_k" of `cdmoe export --to`.'


class Sibling:
    """A dense architecture whose weights have the names and shapes of a condensed model's.

    Args:
        model_class (`type[PreTrainedModel]`): Its class, with the same head.
        described (`StockModel`): Its config, and the places of its MLPs.
    """

    def __init__(self, model_class: type[PreTrainedModel], described: StockModel) -> None:
        self.model_class = model_class
        self.described = described


def siblings_of(model: Any) -> Iterator[Sibling]:
    """Yield the dense architectures with the weights of a fully condensed model, the likeliest first.

    Nothing is computed, and no weight is read.

    Args:
        model (`PreTrainedModel`): A condensed model; it may be on the meta device.

    Raises:
        UnsupportedModelError: if there is none, with the reason and the nearest architecture.
    """
    base_type = type(model)._base_class.config_class.model_type
    what = f"model type {base_type!r} has no dense sibling"
    sources = sources_of_dense(model)
    suffix = next((suffix for suffix in _HEADS if type(model)._base_class.__name__.endswith(suffix)), None)
    if suffix is None or model.config.get_text_config() is not model.config:
        raise UnsupportedModelError(f"{what}: the decoder is part of a larger model, or has no head. {ADVICE}")
    found, reasons = False, {}
    for name in _in_order(base_type):
        class_name = _HEADS[suffix].get(name)
        if name == base_type or name not in CONFIG_MAPPING or class_name is None:
            continue
        try:
            with _quiet():
                sibling = _sibling(model, name, getattr(transformers, class_name), sources)
        except Mismatch as error:
            reasons[name] = str(error)
        else:
            found = True
            yield sibling
    if not found:
        nearest = min(reasons, key=lambda name: (_differing(reasons[name]), CANDIDATES.index(name)))
        raise UnsupportedModelError(f"{what}: with the nearest, {nearest!r}, {reasons[nearest]}. {ADVICE}")


def sources_of_dense(model: Any) -> dict[int, nn.Module]:
    """Return the dense MLPs of a fully condensed model by decoder layer.

    Raises:
        UnsupportedModelError: if layers are sparse still, or if a condensed layer is more than a gated MLP.
    """
    refuse_sparse_layers(model)
    sources = dense_sources(model, model.config.condense_config["condensed_layers"])
    for layer, source in sources.items():
        if not isinstance(source, CondensedMLP):
            continue
        forms = {source.gated_activation["form"], source.shared_gated_activation["form"]}
        if forms != {"plain"}:
            raise UnsupportedModelError(
                f"The MLP of decoder layer {layer} has the gated activation {sorted(forms - {'plain'})[0]!r}, which no "
                f"dense architecture has. {ADVICE}"
            )
        if source.norm_name is not None:
            raise UnsupportedModelError(f"The MLP of decoder layer {layer} has a norm, {source.norm_name}. {ADVICE}")
    return sources


def refuse_sparse_layers(model: Any) -> None:
    """Refuse a condensed model that has sparse layers still.

    Raises:
        UnsupportedModelError: naming the layers.
    """
    specs: dict[str, Any] = model.config.condense_config["condensed_layers"]
    path = next(iter(specs.values()))["module"].rsplit(".", 2)[0]
    sparse = [
        index
        for index, layer in enumerate(model.base_model.get_submodule(path).children())
        if any(has_stacked_weights(part) for part in layer.modules())
    ]
    if sparse:
        raise UnsupportedModelError(
            f"The decoder layers {sparse} are sparse still: a dense model has none, so all sparse layers would have to "
            'be condensed. The target "stock" of `cdmoe export --to` may be able to mark single layers as dense.'
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' warnings of fields that an architecture does not know; most candidates do not match."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _in_order(base_type: str) -> list[str]:
    def alike(name: str) -> int:
        pairs = zip(name, base_type, strict=False)
        length = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        return length if length > 1 else 0

    return sorted(CANDIDATES, key=lambda name: (-alike(name), CANDIDATES.index(name)))


def _sibling(model: Any, name: str, model_class: type[PreTrainedModel], sources: dict[int, nn.Module]) -> Sibling:
    """Build a dense architecture on the meta device with a condensed model's sizes, and compare their weights."""
    weights = {layer: weights_of(source) for layer, source in sources.items()}
    width = max(1, *(0 if each is None else each.up.shape[0] for each in weights.values()))
    biased = any(each is not None and each.biased for each in weights.values())
    values = _values(model, CONFIG_MAPPING[name], width, biased)
    try:
        config = CONFIG_MAPPING[name].from_dict(json.loads(json.dumps(values)))
        with torch.device("meta"):
            sketch = model_class(config)
    except REFUSALS as error:
        if is_out_of_memory(error):
            raise
        raise Mismatch(f"the config is refused: {error}") from error
    own = model.config.to_dict()
    changed = {key: value for key, value in config.to_dict().items() if key in own and own[key] != value}
    fields = {key: value for key, value in changed.items() if key not in _OF_CHECKPOINT}
    return Sibling(model_class, StockModel(config, fields, width, _places(model, sketch, sources, width)))


def _values(model: Any, config_class: Any, width: int, biased: bool) -> dict[str, Any]:
    """Collect the config fields of a dense architecture from a condensed model."""
    config = model.config
    declared = set(config_class().to_dict()) - _OF_CHECKPOINT
    values = {name: getattr(config, name) for name in declared if hasattr(config, name)}
    state = {name: tensor.shape for name, tensor in model.state_dict().items() if ".self_attn." in name}
    query = next((shape for name, shape in state.items() if name.endswith("q_proj.weight")), None)
    windowed = any("sliding" in str(kind) for kind in getattr(config, "layer_types", None) or [])
    found = {
        "intermediate_size": width,
        "mlp_bias": biased,
        "attention_bias": any(name.endswith("q_proj.bias") for name in state),
        "head_dim": getattr(config, "head_dim", None) or (query[0] // config.num_attention_heads if query else None),
        "layer_types": getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers,
        "use_sliding_window": windowed,
        "sliding_window": getattr(config, "sliding_window", None) or None,
        "block_auto_adjust_ff_dim": False,  # lfm2 would round the width
    }
    values |= {name: value for name, value in found.items() if name in declared and value is not None}
    if "sliding_window" in declared:
        values["sliding_window"] = found["sliding_window"]
    return values


def _places(
    model: PreTrainedModel, sketch: PreTrainedModel, sources: dict[int, nn.Module], width: int
) -> dict[int, tuple[str, str]]:
    """Compare names and shapes of all weights; return the old and new names of the MLPs by decoder layer."""
    specs: dict[str, Any] = model.config.condense_config["condensed_layers"]
    names = {id(module): name for name, module in model.base_model.named_modules()}
    places, inside = {}, []
    for layer, source in sources.items():
        parent, _, name = names[id(source)].rpartition(".")
        inside += [f"{parent}.{each}." for each in (name, *specs.get(str(layer), {"omitted": []})["omitted"])]
        try:
            children = sketch.base_model.get_submodule(parent).named_children()
        except AttributeError as error:
            raise Mismatch(f"there would be no {parent}") from error
        dense = {child: module for child, module in children if read_gated_mlp(module) is not None}
        if len(dense) != 1:
            raise Mismatch(f"decoder layer {layer} would have the gated MLPs {sorted(dense)} instead of one")
        place, module = next(iter(dense.items()))
        check_dense(layer, source, module, width)
        places[layer] = (names[id(source)], f"{parent}.{place}")
        inside.append(f"{parent}.{place}.")

    def shapes(whole: PreTrainedModel) -> dict[str, tuple[int, ...]]:
        prefix = "" if whole.base_model is whole else f"{whole.base_model_prefix}."
        within = tuple(prefix + name for name in inside)
        return {name: tuple(t.shape) for name, t in whole.state_dict().items() if not name.startswith(within)}

    expected, found = shapes(model), shapes(sketch)
    wrong = [name for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name)]
    if wrong:
        name = wrong[0]
        old, new = (each.get(name) for each in (expected, found))
        raise Mismatch(
            f"{len(wrong)} weights differ, such as {name}: {list(new) if new else 'nothing'} instead of "
            f"{list(old) if old else 'nothing'}"
        )
    return places


def _differing(reason: str) -> int:
    """Return the number of differing weights that a reason names; a config that is refused comes last."""
    first = reason.split(" ", 1)[0]
    return int(first) if first.isdecimal() else 10**9
