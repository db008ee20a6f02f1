"""The comparison of a condensed and an exported model on a few tokens, as equal shapes do not imply the function."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..blocks.weights import UnsupportedModelError
from ..calibration import TokenBatch
from ..checks import is_out_of_memory
from .stock_config import REFUSALS

# Maximum difference of the last hidden states, relative to their norm, at half of the tokens: sums over a padded width
# are rounded in another order, and in half precision a token may then be routed to another expert.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
_HALF_TOLERANCE = 5e-2


# The same for the logits of two dense models, the largest of all tokens: nothing is routed.
_DENSE_TOLERANCE = 1e-4
# Config fields with the reach of local attention, in tokens.
_WINDOWS = ("sliding_window", "attention_chunk_size")


class OtherFunctionError(UnsupportedModelError):
    """The exported model would compute something else than the condensed one."""


def outputs(model: nn.Module, batch: TokenBatch, **more: Tensor) -> Tensor:
    """Compute the logits `[T, V]` (last hidden states without a head) of the tokens that are not padding."""
    if isinstance(model, PreTrainedModel) and model.get_output_embeddings() is None:
        model = model.base_model
    device = next(model.parameters()).device
    inputs = {"input_ids": batch.input_ids.to(device), "attention_mask": batch.attention_mask.to(device)}
    return model(**inputs, **more, use_cache=False)[0][inputs["attention_mask"].bool()]


def check_same(model: PreTrainedModel, stock: PreTrainedModel) -> None:
    """Compare the last hidden states of both on a few tokens, as equal classes and shapes do not imply the function."""
    batch = TokenBatch.random(model)
    expected, found = (outputs(each.base_model, batch).double() for each in (model, stock))
    error = float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median())
    if not error <= _TOLERANCE.get(model.dtype, _HALF_TOLERANCE):
        raise UnsupportedModelError(
            f"model type {stock.config.model_type!r} computes something else in its dense layers: the last hidden "
            f"states have a relative difference of {error:.1e}. Keep the condensed checkpoint."
        )


def check_dense_sibling(model: PreTrainedModel, sibling: PreTrainedModel) -> None:
    """Compare the logits of a condensed model and its dense sibling.

    Short texts would not show windows of attention, or rotary embeddings and scales that depend on the position, so
    both are also compared with windows of a few tokens and at the last positions.

    Raises:
        OtherFunctionError: if they differ.
    """
    batch = TokenBatch.random(model)
    length = batch.input_ids.shape[1]
    last = int(getattr(model.config, "max_position_embeddings", 0) or 0) - length
    positions = torch.arange(length).expand_as(batch.input_ids) + max(last, 0)
    far = {"position_ids": positions.to(next(model.parameters()).device)}
    takes = all("position_ids" in signature(each.forward).parameters for each in (model, sibling))
    places: dict[str, dict[str, Any]] = {"": {}, " at the last positions": far if takes else {}}
    for where, more in places.items():
        with ExitStack() as stack:
            if where:
                for each in (model, sibling):
                    stack.enter_context(_short_windows(each.config, length // 4))
            expected, found = (_running(each, batch, **more).double() for each in (model, sibling))
        errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
        wide = model.dtype in _TOLERANCE
        error = float(errors.max() if wide else errors.median())
        if not error <= (_DENSE_TOLERANCE if wide else _HALF_TOLERANCE):
            raise OtherFunctionError(
                f"model type {sibling.config.model_type!r} has the same weights but computes something else: the "
                f"logits{where} have a relative difference of {error:.1e}"
            )
    for name in _WINDOWS:
        one, other = (getattr(each.config, name, None) or None for each in (model, sibling))
        if other != one and (other is not None or _is_local(model.config)):
            raise OtherFunctionError(
                f"`{name}` of model type {sibling.config.model_type!r} would be {other} instead of {one}"
            )


def _running(model: PreTrainedModel, batch: TokenBatch, **more: Tensor) -> Tensor:
    try:
        return outputs(model, batch, **more)
    except REFUSALS as error:
        if is_out_of_memory(error):
            raise
        raise OtherFunctionError(
            f"model type {model.config.model_type!r} has these weights but does not run on token ids ({error})"
        ) from error


def _is_local(config: Any) -> bool:
    """Return whether a config gives some layers attention within a window."""
    kinds = getattr(config, "layer_types", None)
    return kinds is None or any("full" not in str(kind) for kind in kinds)


@contextmanager
def _short_windows(config: Any, tokens: int) -> Iterator[None]:
    """Shorten the windows of a model's attention inside the context."""
    before = {name: value for name in _WINDOWS if isinstance(value := vars(config).get(name), int) and value > tokens}
    try:
        vars(config).update(dict.fromkeys(before, tokens))
        yield
    finally:
        vars(config).update(before)
