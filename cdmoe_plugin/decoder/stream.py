"""Decoders run one layer at a time on fixed batches.

Nothing here depends on the architecture: layers get the arguments that the model's own forward pass gives them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel
from transformers.utils import logging

from ..blocks import UnsupportedModelError, decoder_of, head_of, patched_forward
from ..calibration import TokenBatch
from ..checks import is_out_of_memory
from ..offload import in_memory, in_memory_copy, is_offloaded, is_on_disk
from .arguments import BatchArguments
from .layout import HeadStep, learn_layout
from .whole import LayerArguments, LayerOutput, layer_arguments, model_inputs, run_batch

logger = logging.get_logger(__name__)

# Tokens in one batch of several inputs of a layer: enough that reading its weights takes a negligible time.
_TOGETHER_TOKENS = {"cpu": 2**11, "cuda": 2**15}


class LayerStream:
    """A model's decoder as a sequence of layers over fixed token batches.

    Args:
        model (`PreTrainedModel`): A causal language model or its decoder, in eval mode (see `searching`).
        layers_path (`str`): Name of the list of decoder layers in the base model, such as "layers".
        batches (`list[TokenBatch]`): Right-padded token ids.
        memory (`int`, *optional*): Bytes for the arguments of layers (attention masks, rotary embeddings), which are
            computed again for batches beyond it.

    Raises:
        UnsupportedModelError: if running it layer by layer gives another output than the decoder's own forward pass.
    """

    def __init__(
        self, model: PreTrainedModel, layers_path: str, batches: Sequence[TokenBatch], memory: int | None = None
    ) -> None:
        self.model = model
        self.base = decoder_of(model)
        self.layers = cast(Any, model.base_model.get_submodule(layers_path))
        self.batches = list(batches)
        self._wide: list[HeadStep] | None = None
        self._together = max(_TOGETHER_TOKENS.values())  # 0 if some layer can only run one input at a time
        self._offloaded = [is_offloaded(layer) for layer in self.layers.children()]
        self._skipped: set[int] = set()
        self._finite: list[tuple[int, Tensor]] = []
        self._places: dict[tuple[int, torch.device], Tensor] = {}
        few = self.batches[0].truncate(rows=2, length=16)
        self.layout, expected = learn_layout(self.base, self.layers, lambda: run_batch(model, few))
        self._verify(few, expected)
        with_images = next((batch for batch in self.batches if batch.others), None)
        if with_images is not None:
            self._verify(with_images, run_batch(model, with_images))
        self._arguments = BatchArguments(model, self.layers, self.layout, memory)

    def __len__(self) -> int:
        return len(self.layers)

    @cached_property
    def embeddings(self) -> list[LayerOutput]:
        """The inputs of the first layer for all batches, kept in memory."""
        return [self.entering(batch) for batch in range(len(self.batches))]

    def entering(self, batch: int) -> LayerOutput:
        """Compute the input of the first layer for one of the batches."""
        return self._arguments.entering(self.batches[batch])

    @property
    def reading_dominates(self) -> bool:
        """Whether layers are read from the disk to a GPU, which takes longer than computing with them."""
        return self.entering(0)[0].device.type != "cpu" and any(map(is_on_disk, self.layers))

    def output_bytes(self, batches: Sequence[int]) -> int:
        """Return the mean size of a layer's output for one of these batches, in bytes, including gathered inputs."""
        parts = 1 if self.layout.gathered is None else 1 + len(self.layout.gathered.layers)
        return parts * sum(self.embeddings[batch][0].nbytes for batch in batches) // len(batches)

    def split(self, parts: Sequence[tuple[int, Sequence[int]]]) -> LayerStream:
        """Return a stream of the same model over parts of its batches, which is not verified again.

        Args:
            parts (`Sequence[tuple[int, Sequence[int]]]`): The batch and the rows of each new batch.
        """
        other = copy.copy(self)
        other._finite, other._places = [], {}
        own = [(self.batches[batch], rows) for batch, rows in parts]
        other.batches = [whole if len(rows) == len(whole.input_ids) else whole.rows(rows) for whole, rows in own]
        other.embeddings = [
            self.embeddings[batch] if other.batches[i] is self.batches[batch] else other.entering(i)
            for i, (batch, _) in enumerate(parts)
        ]
        return other

    @torch.no_grad()
    def run_layer(self, layer: int, entering: LayerOutput, batch: int) -> LayerOutput:
        """Run one decoder layer on its input for one of the batches. Call `check_finite` afterwards."""
        output = self.call_layer(layer, entering, batch)
        self._note(layer, output)
        return output

    def run_together(self, layer: int, inputs: Sequence[LayerOutput], batch: int) -> list[LayerOutput]:
        """Run one decoder layer on several inputs for one batch, as one larger batch if the layers support that.

        The layer's weights are then read only once, which saves time if there are few tokens.
        """
        hidden = inputs[0][0]
        most = _TOGETHER_TOKENS.get(hidden.device.type, _TOGETHER_TOKENS["cpu"])
        outputs: list[LayerOutput] = []
        while len(outputs) < len(inputs):
            number = max(1, min(self._together, most) // hidden.shape[:2].numel())
            some = inputs[len(outputs) : len(outputs) + number]
            joined = self._run_joined(layer, some, self._given(layer, batch)) if len(some) > 1 else None
            if joined is None:
                outputs += [self.run_layer(layer, entering, batch) for entering in some]
            else:
                for output in joined:
                    self._note(layer, output)
                outputs += joined
        return outputs

    @torch.no_grad()
    def _run_joined(self, layer: int, inputs: Sequence[LayerOutput], given: LayerArguments) -> list[LayerOutput] | None:
        """Run a layer on several inputs as one batch; return None if its arguments or the memory do not allow it."""
        number, rows = len(inputs), inputs[0][0].shape[0]
        try:
            joined = tuple(
                torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0] for parts in zip(*inputs, strict=True)
            )
            output = self._run(layer, joined, pytree.tree_map(lambda value: _repeated(value, rows, number), given))
        except (IndexError, MemoryError, RuntimeError, ValueError) as error:  # mismatched shapes, or out of memory
            self._together = number * inputs[0][0].shape[:2].numel() // 2 if is_out_of_memory(error) else 0
            fewer = "fewer" if self._together else "one"
            logger.warning_once(
                f"Decoder layer {layer} can't run {number} inputs at once and will run {fewer}: {error!r}"
            )
            return None
        parts = [part.chunk(number) if isinstance(part, Tensor) else (part,) * number for part in output]
        return list(zip(*parts, strict=True))

    def check_finite(self) -> None:
        """Check all layers' outputs since the last check. A separate step because it waits for the device.

        Raises:
            ValueError: naming the layer, if its output was not finite.
        """
        noted, self._finite = self._finite, []
        totals = torch.stack([total.to(noted[0][1].device) for _, total in noted]).tolist() if noted else []
        for (layer, _), total in zip(noted, totals, strict=True):
            if not math.isfinite(total):
                raise ValueError(_not_finite(f"The output of decoder layer {layer}"))

    def _note(self, layer: int, output: LayerOutput) -> None:
        """Note the sum of an output for `check_finite`: it is finite only if all values are."""
        hidden = output[0]
        self._finite.append((layer, hidden.sum(dtype=torch.promote_types(hidden.dtype, torch.float32))))

    def in_memory(self, layer: int) -> AbstractContextManager[None]:
        """Keep the weights of an offloaded decoder layer in memory, for several calls or to read them."""
        return in_memory(self.layers[layer]) if self._offloaded[layer] else nullcontext()

    @torch.no_grad()
    def call_layer(self, layer: int, entering: LayerOutput, batch: int) -> LayerOutput:
        """Run one decoder layer as `run_layer`, without the check for finite outputs."""
        return self._run(layer, entering, self._given(layer, batch))

    @contextmanager
    def skipping(self, layers: Iterable[int]) -> Iterator[None]:
        """Skip decoder layers inside the context: their output is their input."""
        added = set(layers) - self._skipped
        self._skipped |= added  # in place: streams of the same model share it
        try:
            yield
        finally:
            self._skipped -= added

    @torch.no_grad()
    def finish(self, output: LayerOutput) -> Tensor:
        """Compute the model's last hidden state (after the final norm) `[..., H]` from the last decoder layer's output.

        That output is `[..., H]`, or `[..., n, H]` with several residual streams, which the model's own modules after
        the last layer merge. Float32 stays float32, even if the model computes in half precision. If inputs of layers
        are gathered, `output` must contain them; otherwise its hidden states are enough.
        """
        hidden, leading = output[0], output[0].shape[:-2]
        if self.layout.streams:  # modules that collapse streams count dimensions from the front
            hidden = hidden.reshape(1, -1, *hidden.shape[-2:])
        for step in self.layout.head if hidden.dtype == self.model.dtype else self._wide_head():
            hidden = step(hidden, output[-1])
        if self.layout.cast:
            hidden = hidden.to(output[0].dtype)
        return hidden.reshape(*leading, -1) if self.layout.streams else hidden

    def _wide_head(self) -> list[HeadStep]:
        if self._wide is None:
            self._wide = [replace(step, module=in_memory_copy(step.module).float()) for step in self.layout.head]
        return self._wide

    @torch.no_grad()
    def logits(self, last_hidden: Tensor, batch: int) -> Tensor:
        """Compute logits `[B, S, V]` from a last hidden state `[B, S, H]`, with the model's own head.

        Raises:
            ValueError: if the model has no language-modelling head.
        """
        self.check_head()
        part: Any = head_of(self.model)
        # Without images: hidden states are given.
        text = replace(self.batches[batch], others={})

        def stand_in(*_args: Any, **_kwargs: Any) -> Any:
            return self.layout.output_class(last_hidden_state=last_hidden)

        with patched_forward(self.base, stand_in):
            return part(**model_inputs(self.model, text), use_cache=False).logits

    def check_head(self) -> None:
        """Check that the model has a language-modelling head.

        Raises:
            ValueError: if it is only a decoder.
        """
        if head_of(self.model) is None:
            raise ValueError(
                "`compare='logits'` and `metric='ppl'` need a model with a language-modelling head; this is only its "
                "decoder."
            )

    def valid(self, batch: int) -> Tensor:
        """Return the mask of a batch, `[B, S]` bool, False on padding."""
        return self.batches[batch].attention_mask.bool()

    def tokens(self, values: Tensor, batch: int) -> Tensor:
        """Select the tokens that are not padding from `[B, S, ...]`: `[T, ...]`, without waiting for the device."""
        return values.flatten(0, 1).index_select(0, self._valid_places(batch, values.device))

    def sequence_means(self, values: Tensor, batch: int) -> Tensor:
        """Compute each sequence's mean, `[B]`, of the values `[T]` of the tokens that `tokens` selects."""
        mask = self.batches[batch].attention_mask
        padded = values.new_zeros(mask.numel())
        padded[self._valid_places(batch, values.device)] = values
        return padded.view(mask.shape).sum(1) / mask.sum(1).to(values.device)

    def _valid_places(self, batch: int, device: torch.device) -> Tensor:
        places = self._places.get((batch, device))
        if places is None:
            places = self.valid(batch).flatten().nonzero().flatten().to(device)
            self._places[batch, device] = places
        return places

    def _given(self, layer: int, batch: int) -> LayerArguments:
        return self._arguments[self.batches[batch]][layer]

    def _run(self, layer: int, entering: LayerOutput, given: LayerArguments) -> LayerOutput:
        hidden, *others = entering if layer in self._skipped else self._run_alone(layer, entering, given)
        return (hidden if given.added is None else hidden + given.added.to(hidden.device), *others)

    def _run_alone(self, layer: int, entering: LayerOutput, given: LayerArguments) -> LayerOutput:
        args, kwargs, _ = given
        gathered = self.layout.gathered
        if gathered is not None:
            entering, stack = entering[:-1], entering[-1]
            args, kwargs = gathered.put(stack, args, kwargs)
        if len(entering) > 1:  # the input of the first layer, also if that is skipped, is hidden states alone
            kwargs = kwargs | {name: entering[index] for name, index in self.layout.carried.items()}
        # For the whole layer, not module by module: Dbrx's experts read the weights of another module.
        with self.in_memory(layer):
            output = self.layers[layer](entering[0], *args, **kwargs)
        results = output if isinstance(output, tuple) else (output,)
        return results if gathered is None else (*results, gathered.after(layer, stack, entering[0]))

    def _verify(self, batch: TokenBatch, expected: Tensor) -> None:
        calls, output = layer_arguments(self.model, self.layers, self.layout, batch)
        stores = [(n, v, len(v)) for call in calls for n, v in call.kwargs.items() if isinstance(v, MutableMapping)]
        with torch.no_grad():
            for layer, call in enumerate(calls):
                with self.in_memory(layer):
                    entering, output = output, self._run(layer, output, call)
                    if self._together and not self._joins(layer, entering, output, call):
                        self._together = 0
                self._note(layer, output)
        self.check_finite()
        filled = [name for name, store, size in stores if len(store) != size]
        shared = getattr(self.model.config.get_text_config(), "num_kv_shared_layers", 1)
        # Several variants of a layer would write to one place. transformers 5.17 fills it even if no layer reads it.
        if filled and shared:
            raise UnsupportedModelError(
                f"model type {self.model.config.model_type!r} can't be searched layer by layer: some of its layers "
                f"read values that others store in `{filled[0]}`. Applying a plan is supported."
            )
        again = self.finish(output)
        if not bool(torch.isfinite(again).all()):
            raise ValueError(_not_finite("The output of the final norm"))
        scale = float(expected.abs().max())
        if again.shape != expected.shape or not torch.allclose(again, expected, rtol=1e-2, atol=1e-3 * scale):
            with_images = " with images, only on text" if batch.others else ""
            raise UnsupportedModelError(
                f"model type {self.model.config.model_type!r} can't be searched layer by layer{with_images}: its "
                "decoder layers pass on more than hidden states, or the last one is followed by more than a chain of "
                "modules."
            )

    def _joins(self, layer: int, entering: LayerOutput, output: LayerOutput, call: LayerArguments) -> bool:
        """Return whether a layer computes the same for two inputs in one batch as for each alone."""
        small = (entering[0] / 2, *entering[1:])
        joined = self._run_joined(layer, [entering, small], call)
        largest = float(output[0].abs().max())
        if joined is None or not math.isfinite(largest):
            return False
        alone = self._run(layer, small, call)
        tolerance = 8 * torch.finfo(output[0].dtype).eps
        return all(
            one[0].shape == two[0].shape and torch.allclose(one[0], two[0], rtol=tolerance, atol=tolerance * largest)
            for one, two in zip(joined, (output, alone), strict=True)
        )


def _repeated(value: Any, rows: int, number: int) -> Any:
    """Repeat an argument of a layer for `number` joined batches, if it has a row for each sequence."""
    if not isinstance(value, Tensor) or value.ndim < 2 or value.shape[0] != rows:
        return value
    return value.repeat(number, *[1] * (value.ndim - 1))


def _not_finite(what: str) -> str:
    return f"{what} contains NaN or infinity. Check the checkpoint, and try dtype='float32' or 'bfloat16'."
