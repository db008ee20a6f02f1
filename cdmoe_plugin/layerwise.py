"""Runs a decoder one layer at a time on fixed batches, and takes single layers apart at their sparse block.

Nothing here knows an architecture: a layer's arguments are those that the model's own forward pass gives it, and what
a layer does around its block is found by running it again with everything before the block played back.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from .calibration import TokenBatch
from .sparse import Routing, SparseBlock, UnsupportedModelError, patched_forward

# What one decoder layer hands to the next: hidden states `[B, S, H]`, and in a few architectures more (the token choice
# of a sparse attention that several layers share).
State = tuple[Any, ...]


class LayerStream:
    """A model's decoder as a sequence of layers over fixed token batches.

    Args:
        model (`PreTrainedModel`): A causal language model or its decoder, in eval mode (see `searching`).
        layers_path (`str`): Name of the list of decoder layers in the base model, such as "layers".
        batches (`list[TokenBatch]`): Right-padded token ids.

    Raises:
        UnsupportedModelError: if layer by layer the decoder does not give what its own forward pass gives.
    """

    def __init__(self, model: PreTrainedModel, layers_path: str, batches: Sequence[TokenBatch]) -> None:
        self.model = model
        self.base: Any = model.base_model
        self.layers: Any = self.base.get_submodule(layers_path)
        self.batches = list(batches)
        # What every layer returns (0: a tensor alone), where its extra results go in the next layer's call, and what
        # follows the last layer: learnt from one real forward pass.
        self._num_results = 0
        self._carried: dict[str, int] = {}
        self._head: list[nn.Module] = []
        self._wide: list[nn.Module] | None = None
        self._learn_form()
        captured = [self._capture(batch) for batch in self.batches]
        self._calls = [calls for calls, _ in captured]
        self.embeddings = [state for _, state in captured]

    def __len__(self) -> int:
        return len(self.layers)

    @torch.no_grad()
    def run_layer(self, layer: int, state: State, batch: int) -> State:
        """What one decoder layer makes of its input, for one of the batches.

        Raises:
            ValueError: naming the layer, if its output is not finite.
        """
        output = self.call_layer(layer, state, batch)
        _check_finite(output[0], f"The output of decoder layer {layer}")
        return output

    @torch.no_grad()
    def call_layer(self, layer: int, state: State, batch: int) -> State:
        """As `run_layer`, for what need not be finite."""
        return self._run(layer, state, *self._calls[batch][layer])

    @torch.no_grad()
    def finish(self, hidden: Tensor) -> Tensor:
        """The model's last hidden state (after the final norm) for the output of the last decoder layer, `[..., H]`.

        Float32 is kept float32, also where the model computes in half precision.
        """
        for module in self._head if hidden.dtype == self.model.dtype else self._wide_head():
            hidden = module(hidden)
        return hidden

    def _wide_head(self) -> list[nn.Module]:
        if self._wide is None:
            self._wide = [copy.deepcopy(module).float() for module in self._head]
        return self._wide

    @torch.no_grad()
    def logits(self, last_hidden: Tensor, batch: int) -> Tensor:
        """What the model's own language-modelling head makes of a last hidden state `[B, S, H]`: `[B, S, V]`."""
        if self.base is self.model:
            raise ValueError(
                "`compare='logits'` needs a model with a language-modelling head; this is only its decoder."
            )
        ids, mask = self._inputs(self.batches[batch])

        def stand_in(*_args: Any, **_kwargs: Any) -> Any:
            return self._output_class(last_hidden_state=last_hidden)

        with patched_forward(self.base, stand_in):
            return self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits

    def valid(self, batch: int) -> Tensor:
        """`[B, S]` bool: which positions of a batch are no padding."""
        return self.batches[batch].attention_mask.bool()

    def _run(self, layer: int, state: State, args: tuple[Any, ...], kwargs: dict[str, Any]) -> State:
        if layer > 0:
            kwargs = kwargs | {name: state[index] for name, index in self._carried.items()}
        output = self.layers[layer](state[0], *args, **kwargs)
        return output if isinstance(output, tuple) else (output,)

    def _inputs(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        device = self.base.get_input_embeddings().weight.device
        if device.type == "meta":  # offloaded; accelerate's hooks move the ids
            device = torch.device("cpu")
        return batch.input_ids.to(device), batch.attention_mask.to(device)

    def _forward(self, batch: TokenBatch) -> Any:
        ids, mask = self._inputs(batch)
        with torch.no_grad():
            return self.base(input_ids=ids, attention_mask=mask, use_cache=False)

    def _capture(self, batch: TokenBatch) -> tuple[list[Any], State]:
        """Arguments that the model gives each layer, and the input of the first, without computing any layer."""
        calls: list[Any] = [None] * len(self.layers)
        first: list[Tensor] = []

        def stub(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden, args, kwargs = _split_hidden(args, kwargs)
                calls[index] = (args, kwargs)
                first.append(hidden)
                return (hidden,) + (None,) * (self._num_results - 1) if self._num_results else hidden

            return forward

        with ExitStack() as stack:
            for index, layer in enumerate(self.layers):
                stack.enter_context(patched_forward(layer, stub(index)))
            self._forward(batch)
        return calls, (first[0],)

    def _learn_form(self) -> None:
        """One real forward pass on a few tokens: what layers return, what follows the last, and that it adds up."""
        few = self.batches[0].truncate(rows=2, length=16)
        outputs: list[Any] = []
        inputs: list[dict[str, Any]] = []
        events: list[tuple[nn.Module, Any, Any]] = []

        def note_layer(_module: nn.Module, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
            inputs.append(kwargs)
            outputs.append(output)

        def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            events.append((module, args[0] if args else None, output))

        with ExitStack() as stack:
            for layer in self.layers:
                stack.callback(layer.register_forward_hook(note_layer, with_kwargs=True).remove)
            for child in self.base.children():
                stack.callback(child.register_forward_hook(note).remove)
            output = self._forward(few)
        self._output_class = type(output)
        if isinstance(outputs[0], tuple):
            self._num_results = len(outputs[0])
            self._carried = _handed_on(outputs, inputs)
        hidden = outputs[-1][0] if self._num_results else outputs[-1]
        for module, argument, result in events:
            if argument is hidden:
                self._head.append(module)
                hidden = result
        self._verify(few, output.last_hidden_state)

    def _verify(self, batch: TokenBatch, expected: Tensor) -> None:
        calls, state = self._capture(batch)
        with torch.no_grad():
            for layer, call in enumerate(calls):
                state = self._run(layer, state, *call)
                _check_finite(state[0], f"The output of decoder layer {layer}")
        again = self.finish(state[0])
        _check_finite(again, "The output of the final norm")
        scale = float(expected.abs().max())
        if again.shape != expected.shape or not torch.allclose(again, expected, rtol=1e-2, atol=1e-3 * scale):
            raise UnsupportedModelError(
                f"model type {self.model.config.model_type!r} can't be searched layer by layer: its decoder layers "
                "pass on more than hidden states, or more than a chain of modules follows the last one."
            )


@dataclass
class LayerCall:
    """One decoder layer on one batch, taken apart at its sparse block; T counts the tokens that are no padding.

    Args:
        inputs (`Tensor`): What the block saw, `[T, H]` in the model's dtype.
        target (`Tensor`): What block (and shared expert) gave, float32 `[T, H]`.
        routing (`Routing`): What the router decided for the T tokens.
        tail (`Tail`): From a stand-in for `target`, float32 `[..., T, H]`, to the layer's output, float32.
        token_weights (`Tensor`): float32 `[T]`, weight of each token in a mean over sequences of means over tokens.
    """

    inputs: Tensor
    target: Tensor
    routing: Routing
    tail: Tail
    token_weights: Tensor


class LayerRecorder:
    """Runs one decoder layer on batches and takes it apart at its sparse block."""

    def __init__(self, stream: LayerStream, block: SparseBlock) -> None:
        self.stream = stream
        self.block = block
        self.owner = stream.layers[block.layer]
        own = {id(block.module), id(block.shared) if block.shared_name else None}
        self.others = [child for child in self.owner.children() if id(child) not in own]

    @torch.no_grad()
    def record(self, state: State, batch: int, token_weights: Tensor) -> tuple[LayerCall, State]:
        """Runs the layer on its input for a batch; returns the parts and what it hands to the next layer."""
        seen: dict[str, Any] = {"block": None, "shared": None}
        before: dict[int, list[Any]] = {id(child): [] for child in self.others}

        def on_block(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            seen["block"] = (args[0], output)

        def on_other(module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            if seen["block"] is None:
                before[id(module)].append(output)

        def on_shared(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
            seen["shared"] = output

        with ExitStack() as stack:
            stack.callback(self.block.module.register_forward_hook(on_block).remove)
            for child in self.others:
                stack.callback(child.register_forward_hook(on_other).remove)
            if self.block.shared_name and self.block.shared is not None:
                stack.callback(self.block.shared.register_forward_hook(on_shared).remove)
            routes = stack.enter_context(self.block.recording_routes())
            output = self.stream.run_layer(self.block.layer, state, batch)
        block_input, target = seen["block"]
        target = target.float() if seen["shared"] is None else target.float() + seen["shared"].float()
        valid = self.stream.valid(batch).to(target.device)
        playback = _Playback(self, state, batch, before)
        routing = Routing(*(part.view(*valid.shape, -1)[valid] for part in routes[0]))
        call = LayerCall(
            inputs=block_input[valid],
            target=target[valid],
            routing=routing,
            tail=playback.tail(target, output[0], valid),
            token_weights=token_weights.to(target.device),
        )
        return call, output


class _Playback:
    """A decoder layer's forward with all that came before the block played back, in float32."""

    def __init__(self, recorder: LayerRecorder, state: State, batch: int, before: dict[int, list[Any]]) -> None:
        self.recorder = recorder
        self.state = (state[0].float(), *state[1:])
        self.batch = batch
        self.before = {key: pytree.tree_map(_float, outputs) for key, outputs in before.items()}

    def __call__(self, y: Tensor) -> Tensor:
        """The layer's output for `y` `[B, S, H]` in place of what its block (and shared expert) gives."""
        recorder = self.recorder
        with ExitStack() as stack:
            for child in recorder.others:
                outputs = iter(self.before[id(child)])
                stack.enter_context(patched_forward(child, _play(outputs, child.forward)))
            stack.enter_context(patched_forward(recorder.block.module, lambda *_, **__: y))
            if recorder.block.shared_name and recorder.block.shared is not None:
                nothing = torch.zeros_like(y)
                stack.enter_context(patched_forward(recorder.block.shared, lambda *_, **__: nothing))
            return recorder.stream.call_layer(recorder.block.layer, self.state, self.batch)[0]

    def tail(self, target: Tensor, output: Tensor, valid: Tensor) -> Tail:
        """What the layer makes of its block's output, on valid tokens; nearly always `offset + slope * y`."""
        again = self(target)
        precision = 8 * torch.finfo(output.dtype).eps
        if not torch.allclose(again, output.float(), rtol=precision, atol=precision * float(output.abs().max())):
            raise UnsupportedModelError(
                f"decoder layer {self.recorder.block.layer} ({type(self.recorder.owner).__name__}) does more with its "
                "block than can be played back."
            )
        offset = self(torch.zeros_like(target))
        # A random stand-in as large as the rest of the sum tells a norm behind the block from a plain addition.
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(target.shape, generator=generator).to(target) * offset.std().clamp_min(1e-3)
        change = self(noise) - offset
        if change.shape == noise.shape:
            slope = float((change * noise).sum(dtype=torch.float64) / noise.square().sum(dtype=torch.float64))
            if (change - slope * noise).norm() <= 1e-4 * change.norm():
                return AffineTail(offset[valid], 1.0 if abs(slope - 1.0) < 1e-5 else slope)
        return PlaybackTail(self, valid)


class AffineTail:
    """A decoder layer that adds its block's output to what it has: `offset + slope * y`."""

    divisible = True

    def __init__(self, offset: Tensor, slope: float) -> None:
        self.offset = offset  # [T, H]
        self.slope = slope

    def __call__(self, y: Tensor, rows: slice = slice(None)) -> Tensor:
        """The layer's output for `y` `[..., t, H]`, the `rows` of the T tokens."""
        return torch.add(self.offset[rows], y, alpha=self.slope)


class PlaybackTail:
    """A decoder layer that does more with its block's output (a norm, several residual streams): run each time."""

    divisible = False

    def __init__(self, playback: _Playback, valid: Tensor) -> None:
        self.playback = playback
        self.valid = valid

    def __call__(self, y: Tensor, rows: slice = slice(None)) -> Tensor:
        """The layer's output `[..., T, H']` for `y` `[..., T, H]` of all T tokens."""
        assert rows == slice(None)
        results = []
        for candidate in y.reshape(-1, *y.shape[-2:]):
            padded = torch.zeros(*self.valid.shape, y.shape[-1], device=y.device)
            padded[self.valid] = candidate
            results.append(self.playback(padded)[self.valid])
        return torch.stack(results).reshape(*y.shape[:-2], *results[0].shape)


Tail = AffineTail | PlaybackTail


def _play(outputs: Iterator[Any], live: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        try:
            return next(outputs)
        except StopIteration:
            return live(*args, **kwargs)

    return forward


def _float(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _check_finite(values: Tensor, what: str) -> None:
    if not bool(torch.isfinite(values).all()):
        raise ValueError(
            f"{what} contains NaN or infinity. Check the checkpoint, and try dtype='float32' or 'bfloat16'."
        )


def _handed_on(outputs: list[tuple[Any, ...]], inputs: list[dict[str, Any]]) -> dict[str, int]:
    """Which keyword arguments of a layer are extra results of the layer before it, by position in these."""
    carried = {}
    for results, kwargs in zip(outputs, inputs[1:], strict=False):
        for index, result in enumerate(results[1:], start=1):
            carried.update({k: index for k, v in kwargs.items() if isinstance(v, Tensor) and v is result})
    return carried


def _split_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    if args:
        return args[0], args[1:], kwargs
    kwargs = dict(kwargs)
    return kwargs.pop("hidden_states"), args, kwargs


@contextmanager
def searching(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode without gradients, and the modes as they were afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
