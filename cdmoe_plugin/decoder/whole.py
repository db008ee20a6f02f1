"""Forward passes of a whole model, which may be multimodal, around its text decoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from ..blocks import UnsupportedModelError, body_of, decoder_of, patched_forward
from ..calibration import TokenBatch
from ..checks import is_out_of_memory
from .layout import DecoderLayout, split_hidden

# The input of the next decoder layer: hidden states `[B, S, H]` (or several residual streams, `[B, S, n, H]`), and in a
# few architectures more: the token choice of a sparse attention that several layers share, or (last) the gathered
# inputs of earlier layers.
LayerOutput = tuple[Any, ...]


class LayerArguments(NamedTuple):
    """The arguments that a model gives one of its decoder layers, other than hidden states.

    Args:
        args (`tuple`), kwargs (`dict`): By place and by name.
        added (`Tensor`, *optional*): `[B, S, H]`, added to the layer's output: features of images (qwen3_vl_moe).
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    added: Tensor | None = None


@contextmanager
def searching(model: PreTrainedModel) -> Iterator[None]:
    """Put a model in eval mode without gradients inside the context, and restore the modes of all modules."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def last_hidden_state(model: PreTrainedModel, **inputs: Any) -> Tensor:
    """Run a model without its head and return the last hidden state `[B, S, H]` of its text decoder.

    Args:
        model (`PreTrainedModel`): The model; a multimodal one takes images, too.
        **inputs: Arguments of its forward.
    """
    body = body_of(model)
    found: list[Tensor] = []

    def keep(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        found.append(output.last_hidden_state)

    with ExitStack() as stack, torch.no_grad():
        stack.callback(decoder_of(model).register_forward_hook(keep).remove)
        head = body.get_output_embeddings()
        if head is not None:  # of a body that has one: its logits are not needed
            stack.enter_context(patched_forward(head, lambda hidden: hidden[..., :0]))
        body(**inputs)
    if len(found) != 1:
        raise UnsupportedModelError(
            f"model type {model.config.model_type!r} can't be searched layer by layer: it runs its text decoder "
            f"{len(found)} times for one forward pass."
        )
    return found[0]


def model_inputs(model: PreTrainedModel, batch: TokenBatch) -> dict[str, Tensor]:
    """Return a batch as arguments of a model's forward, on the device of its embeddings, without a cache."""
    embeddings: Any = decoder_of(model).get_input_embeddings()
    device = embeddings.weight.device
    if device.type == "meta":  # offloaded; accelerate's hooks move the ids
        device = torch.device("cpu")
    named = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, **batch.others}
    return {name: value.to(device, model.dtype if value.is_floating_point() else None) for name, value in named.items()}


def run_batch(model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """Run a model on a batch and return the last hidden state `[B, S, H]` of its text decoder.

    Raises:
        ValueError: if the model can't read the batch's images.
    """
    try:
        return last_hidden_state(model, **model_inputs(model, batch), use_cache=False)
    except (ValueError, TypeError, IndexError, KeyError, AttributeError, RuntimeError) as error:
        if not batch.others or is_out_of_memory(error) or isinstance(error, UnsupportedModelError):
            raise
        raise ValueError(
            f"The calibration data has the columns {['input_ids', *batch.others]}, which {type(model).__name__} can't "
            f"read: each row should be the output of its processor for one sequence ({error})."
        ) from error


def layer_arguments(
    model: PreTrainedModel, layers: Sequence[nn.Module], layout: DecoderLayout, batch: TokenBatch
) -> tuple[list[LayerArguments], LayerOutput]:
    """Return the arguments that a model gives each decoder layer, and the input of the first, without running layers.

    Args:
        model (`PreTrainedModel`): The whole model.
        layers (`Sequence[nn.Module]`): Its decoder layers.
        layout (`DecoderLayout`): The layout of its decoder.
        batch (`TokenBatch`): The batch. With images, the model's other parts run on them.
    """
    calls: list[LayerArguments] = []
    first: list[LayerOutput] = []
    returned: list[Tensor] = []
    num_results, gathered = layout.num_results, layout.gathered

    def stub(*args: Any, **kwargs: Any) -> Any:
        hidden, args, kwargs = split_hidden(args, kwargs)
        # Layers run many times; some models pass a cache to fill even with `use_cache=False`.
        kwargs = {name: None if isinstance(value, Cache) else value for name, value in kwargs.items()}
        if not first:
            first.append((hidden,) if gathered is None else (hidden, gathered.of(args, kwargs)))
        elif batch.others and hidden is not returned[-1]:
            calls[-1] = calls[-1]._replace(added=hidden)
        calls.append(
            LayerArguments(args, kwargs) if gathered is None else LayerArguments(*gathered.put(None, args, kwargs))
        )
        # Zeros show what a model adds to the output of a layer.
        returned.append(torch.zeros_like(hidden) if batch.others else hidden)
        return (returned[-1],) + (None,) * (num_results - 1) if num_results else returned[-1]

    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(patched_forward(layer, stub))
        run_batch(model, batch)
    return calls, first[0]
