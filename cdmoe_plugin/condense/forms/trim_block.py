"""Block Trimming (He et al. 2024, arXiv 2406.15786): whole decoder layers are dropped."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...blocks import SparseBlock, UnsupportedModelError, decoder_of, layers_path
from ...calibration import TokenBatch
from ...checks import is_out_of_memory
from ...decoder.stream import LayerStream
from ...decoder.whole import LayerOutput, searching
from ...model.dequantized import forget_quantiser
from ...model.extra import settle_layers
from ...model.modeling_cdmoe import silence_router_loss
from ...model.router_requests import answer_router_requests
from ...naming import leave_base
from ...plan import CondensedLayer, CondensePlan
from ..apply import own_config
from .fewer_layers import Remaining, without_layers
from .form import Form
from .patterns import broken_patterns, describe_broken


class TrimBlock(Form):
    """A baseline of the paper: whole decoder layers are dropped.

    The model keeps its class and is saved as a checkpoint of its own architecture with fewer layers.
    """

    name = "trim_block"

    def check(
        self, model: PreTrainedModel, blocks: Sequence[SparseBlock], layers: Sequence[int] | None, num_layers: int = 1
    ) -> None:
        path = layers_path(blocks)
        total = len(model.base_model.get_submodule(path))  # type: ignore[arg-type]
        if model.config.get_text_config() is not model.config:
            raise UnsupportedModelError(
                f"model type {model.config.model_type!r} can't do without decoder layers: they are part of a "
                "multimodal model. Use another `form`, or `text_only=True` if the architecture has a text model."
            )
        if layers is not None or num_layers >= total:
            without_layers(model, path, range(total) if layers is None else layers)
            return
        # A search may choose any layer: drop each sparse one alone.
        for block in blocks:
            try:
                without_layers(model, path, [block.layer])
            except UnsupportedModelError as error:
                raise UnsupportedModelError(f"{error} Choose layers that can be dropped with `layers`.") from error

    def variant(self, stream: LayerStream, block: SparseBlock, kept: CondensedLayer) -> AbstractContextManager[None]:
        return stream.skipping([block.layer])

    def entering(self, stream: LayerStream, block: SparseBlock, inputs: LayerOutput, batch: int) -> Tensor:
        return inputs[0]

    def apply(
        self,
        model: PreTrainedModel,
        blocks: Sequence[SparseBlock],
        plan: CondensePlan,
        mlps: Mapping[int, nn.Module] | None = None,
    ) -> None:
        """Drop the decoder layers of a plan and set `model.condense_plan` and `model.broken_patterns`.

        The result is checked on a few tokens against the whole model with these layers skipped. A `UserWarning` names
        the config fields whose pattern over the layers is broken, which some engines will misread.
        """
        path = layers_path(blocks)
        total = len(model.base_model.get_submodule(path))  # type: ignore[arg-type]
        dropped = sorted(layer.layer for layer in plan.layers)
        remaining = without_layers(model, path, dropped)
        broken = broken_patterns(own_config(model), total, dropped)
        with searching(model):
            batch = TokenBatch.random(model)
            expected = _skipping(LayerStream(model, path, [batch]), dropped)
            with _unless_refused(model, path, remaining):
                _check(
                    model, batch, expected, f"{model.config.model_type!r} can't do without its decoder layers {dropped}"
                )
        forget_quantiser(model)
        settle_layers(model)
        if all(block.layer in dropped for block in blocks):
            silence_router_loss(model)
            answer_router_requests(model)
        leave_base(model, "trimmed")
        if type(model).__module__.startswith("transformers."):
            vars(model.config).pop("auto_map", None)  # it names files that saving does not copy
        _renumber_device_map(model, path, remaining.kept)
        vars(model)["condense_plan"] = plan
        # A model may be trimmed again: a pattern that was broken before stays so.
        vars(model)["broken_patterns"] = getattr(model, "broken_patterns", {}) | broken
        if broken:
            # A warning of Python, as the loggers of transformers are often silenced.
            warnings.warn(describe_broken(broken, dropped, total), UserWarning, stacklevel=2)

    def sketch(
        self,
        model: PreTrainedModel,
        blocks: Sequence[SparseBlock],
        kept: Mapping[int, int],
        routed: Mapping[int, list[int]] | None = None,
    ) -> None:
        layers: Any = model.base_model.get_submodule(layers_path(blocks))
        for layer in sorted(kept, reverse=True):
            del layers[layer]


def _skipping(stream: LayerStream, dropped: Sequence[int]) -> Tensor:
    """Compute the last hidden state of the whole model with some of its layers skipped."""
    state = stream.embeddings[0]
    with stream.skipping(dropped):
        for layer in range(len(stream)):
            state = stream.run_layer(layer, state, 0)
    return stream.finish(state)


def _check(model: PreTrainedModel, batch: TokenBatch, expected: Tensor, what: str) -> None:
    """Check the last hidden state of a model on a batch, also with a cache, which may need a kind of layer."""
    base: Any = decoder_of(model)
    device = next(model.get_input_embeddings().parameters()).device
    inputs = {"input_ids": batch.input_ids.to(device), "attention_mask": batch.attention_mask.to(device)}
    scale = float(expected.abs().max())
    for use_cache in (False, True):
        try:
            found = base(**inputs, use_cache=use_cache).last_hidden_state.to(expected.device)
        except (ValueError, TypeError, IndexError, KeyError, AttributeError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            raise UnsupportedModelError(f"model type {what}: the remaining layers do not run ({error}).") from error
        if not torch.allclose(found, expected, rtol=1e-2, atol=1e-3 * scale):
            raise UnsupportedModelError(f"model type {what}: the remaining layers compute something else.")


@contextmanager
def _unless_refused(model: PreTrainedModel, path: str, remaining: Remaining) -> Iterator[None]:
    """Drop the layers, and restore everything if the context raises."""
    parent_path, _, name = path.rpartition(".")
    parent = model.base_model.get_submodule(parent_path)
    layers: Any = getattr(parent, name)
    config = vars(own_config(model))
    before = dict(config)
    attributes = []
    try:
        setattr(parent, name, nn.ModuleList([layers[i] for i in remaining.kept]).train(layers.training))
        # Not by `setattr`, which may validate one field before the others have changed.
        config.update(remaining.fields)
        for module_name, attribute, value in remaining.attributes:
            module = model.get_submodule(module_name)
            attributes.append((module, attribute, getattr(module, attribute)))
            setattr(module, attribute, value)
        yield
    except BaseException:
        setattr(parent, name, layers)
        config.update(before)
        for module, attribute, value in attributes:
            setattr(module, attribute, value)
        raise


def _renumber_device_map(model: PreTrainedModel, path: str, kept: Sequence[int]) -> None:
    """Rename the modules in `hf_device_map`, which transformers and accelerate read on saving and training."""
    devices: Any = getattr(model, "hf_device_map", None)
    if not devices:
        return
    pattern = re.compile(rf"((?:^|.*\.){re.escape(path)}\.)(\d+)((?:\..*)?)")
    place = {old: new for new, old in enumerate(kept)}
    renumbered = {}
    for name, device in devices.items():
        match = pattern.fullmatch(name)
        if match is None:
            renumbered[name] = device
        elif int(match[2]) in place:
            renumbered[f"{match[1]}{place[int(match[2])]}{match[3]}"] = device
    vars(model)["hf_device_map"] = renumbered
