"""The text decoder inside a model, which may be a whole multimodal one."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.module import _forward_unimplemented
from transformers import PreTrainedModel

from .weights import UnsupportedModelError


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return the text decoder of a model: the model inside it, or itself, that owns the list of decoder layers.

    A vision or audio tower is none, although it has layers, too.

    Raises:
        UnsupportedModelError: if there is none.
    """
    return _parts_around_decoder(model)[-1]


def body_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return the part of a model that maps all of its inputs to hidden states of the text decoder.

    It is the base model, or the decoder of a text model that is its own base (llama4), or, in a few multimodal models,
    a part with a head.
    """
    decoder = decoder_of(model)
    if model.base_model is model and model.config is decoder.config:
        return decoder
    runs = (part for part in _parts_around_decoder(model) if _has_forward(part))
    return next(part for part in runs if part is not model or model.base_model is model)


def head_of(model: PreTrainedModel) -> PreTrainedModel | None:
    """Return the part of a model that computes logits of its text decoder; None if it is only a decoder."""
    runs = (part for part in _parts_around_decoder(model) if _has_forward(part))
    return next((part for part in runs if part.get_output_embeddings() is not None), None)


def decoder_layers(model: PreTrainedModel) -> str:
    """Return the name of the list of decoder layers in the base model, such as "language_model.layers".

    Raises:
        UnsupportedModelError: if there is none.
    """
    decoder = decoder_of(model)
    layers = _layers(decoder)
    return next(name for name, module in model.base_model.named_modules() if module is layers)


def _parts_around_decoder(model: PreTrainedModel) -> list[PreTrainedModel]:
    """List the models inside a model that contain its text decoder, from the model itself to the decoder."""
    text_config = model.config.get_text_config()
    models = [(name, part) for name, part in model.named_modules() if isinstance(part, PreTrainedModel)]
    # By its model type, as configs are copied.
    owners = [
        name for name, part in models if part.config.model_type == text_config.model_type and _layers(part) is not None
    ]
    if len(owners) != 1:
        found = f"several text decoders ({', '.join(owners)})" if owners else "no list of decoder layers"
        raise UnsupportedModelError(
            f"model type {model.config.model_type!r} ({type(model).__name__}) can't be condensed: it has {found}."
        )
    name = owners[0]
    return [part for outer, part in models if outer == "" or f"{name}.".startswith(f"{outer}.")]


def _layers(part: PreTrainedModel) -> nn.ModuleList | None:
    """Return the longest list of modules among a model's children; others hold a few modules for prediction."""
    lists = (child for child in part.children() if isinstance(child, nn.ModuleList))
    return max(lists, key=len, default=None)


def _has_forward(part: PreTrainedModel) -> bool:
    return type(part).forward is not _forward_unimplemented
