"""Numerical checks that a sparse block computes the formula of `SparseBlock`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import is_out_of_memory
from .block import SparseBlock
from .dispatch import RoutedCall, Routing, hidden_of, patched_forward
from .quirks import known_quirks
from .reasons import arguments_of
from .weights import UnsupportedModelError


def probe_block(block: SparseBlock) -> None:
    """Check on a few random tokens that a block computes the formula of `SparseBlock`, and measure its two scales."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device=block.device, dtype=dtype)

    x = random(1, 4, block.hidden_size, dtype=block.dtype)
    with torch.no_grad():
        _probe_routing(block, x)
        _probe_sum(block, x, random)
        _probe_experts(block, x[0], random)
        shared = block.shared_weights()
        if block.shared is not None and shared is not None:
            reason = f"its shared expert is not {block.hidden_act}(gate) * up"
            _compare(block.shared(x)[0], shared(x[0], block.glu(shared=True)), reason)


def _probe_routing(block: SparseBlock, x: Tensor) -> None:
    calls: list[RoutedCall | None] = []
    handle = block.dispatch.watch(calls.append)
    try:
        with block.dispatch.giving(torch.zeros_like(block.enter(x))):
            output = block.dispatch.block(x)
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise UnsupportedModelError(f"its block needs more than hidden states ({error})") from error
    finally:
        handle.remove()
    if len(calls) != 1 or calls[0] is None:
        raise UnsupportedModelError("its experts are not called with the routed indices and weights of each token")
    _note_output(block, output, calls[0])
    if not isinstance(output, Tensor) and not any(quirk.of_output(output, calls[0]) for quirk in block.quirks):
        state = [f"`{name}`" for name in arguments_of(block.module)[1:]]
        passed = f", and takes {', '.join(state)} from the layer before" if state else ""
        raise UnsupportedModelError(f"its block returns more than hidden states{passed}")
    if int(calls[0].routing.experts.max()) >= block.router_experts:
        raise UnsupportedModelError("its router can choose experts that have no weights (identity or empty experts)")
    _compare(calls[0].inputs, block.enter(x), "its experts do not have the inputs of the block")


def _note_output(block: SparseBlock, output: Any, call: RoutedCall) -> None:
    """Add the quirks that show in the output, unless a block that was reloaded has them already."""
    found = (cls.of_output(output, call) for cls in known_quirks() if cls not in map(type, block.quirks))
    block.quirks = (*block.quirks, *filter(None, found))


def _probe_sum(block: SparseBlock, x: Tensor, random: Callable[..., Tensor]) -> None:
    """Check that the block adds given outputs of its routed and shared experts, up to constant factors."""
    in_block = block.shared is not None and len(block.summands) == 1
    shape = (1, x.shape[1], block.hidden_size)
    features = block.experts_features
    # The experts' own dtype if a linear map follows them, otherwise float32.
    nothing = torch.zeros(1, x.shape[1], features, dtype=x.dtype, device=x.device)
    dtype = torch.float32 if block.leave(nothing) is nothing else x.dtype
    bias, norm_module = block.output_bias(), block.norm

    def run(routed: Tensor, shared: Tensor, gate: Tensor, norm: bool = False) -> Tensor:
        with ExitStack() as stack:
            put_in = partial(_put_in, stack)
            stack.enter_context(block.dispatch.giving(routed))
            if in_block:
                put_in(block.shared, lambda h, *_, **__: shared.reshape(h.shape).clone())  # some blocks add in place
                put_in(block.shared_gate, lambda h, *_, **__: gate.reshape(*h.shape[:-1], 1))
            if not norm:
                put_in(norm_module, lambda h: h)
            output = hidden_of(block.dispatch.block(x)).float()
            return output if bias is None or norm else output - bias.float()

    zero = torch.zeros(shape, device=x.device)
    nothing = nothing.to(dtype)
    open_gate = torch.full((1, x.shape[1], 1), 50.0, device=x.device)
    routed, shared = random(1, x.shape[1], features, dtype=dtype), random(*shape)
    gate = random(1, x.shape[1], 1)
    lifted = block.leave(routed).float()
    # A block's rounding to half precision averages out over many random values.
    block.routed_scale = _factor(run(routed, zero, open_gate), lifted)
    if block.split_gates(gate)[0] is not None and block.routed_scale != 1.0:
        raise UnsupportedModelError("its router's weights multiply the experts' inputs, and a factor their outputs")
    block.shared_scale = _factor(run(nothing, shared, open_gate), shared) if in_block else 1.0
    weight = torch.sigmoid(gate) if block.shared_gate is not None else 1.0
    expected = block.routed_scale * lifted + (block.shared_scale * weight * shared if in_block else 0.0)
    tolerance = 1e-5 if block.dtype == torch.float32 else 1e-2
    reason = "its block does more than add shared and routed experts"
    _compare(run(routed, shared, gate), expected, reason, tolerance)
    if norm_module is not None:
        expected = expected if bias is None else expected + bias.float()
        normed = norm_module(expected.to(block.dtype))
        _compare(run(routed, shared, gate, norm=True), normed, f"{reason}, and norm the sum", tolerance)


def _put_in(stack: ExitStack, module: nn.Module | None, forward: Callable[..., Tensor]) -> None:
    if module is not None:
        stack.enter_context(patched_forward(module, forward))


def _factor(output: Tensor, values: Tensor) -> float:
    """Fit the constant c of `output = c * values`; exactly 1 if it is 1 up to rounding."""
    factor = float((output.double() * values.double()).sum() / values.double().square().sum())
    return 1.0 if abs(factor - 1.0) < 1e-3 else factor


def _probe_experts(block: SparseBlock, x: Tensor, random: Callable[..., Tensor]) -> None:
    weights = block.expert_weights()
    apply_gate = getattr(block.experts, "_apply_gate", None)
    if apply_gate is not None and not weights.ungated:
        # Far from zero, where a clamp would show.
        z = random(8, 2 * block.intermediate_size, dtype=block.dtype) * 50
        gate, up = z.chunk(2, -1) if getattr(block.experts, "is_concatenated", True) else (z[:, ::2], z[:, 1::2])
        _compare(apply_gate(z), block.glu()(gate, up), f"its experts are not {block.hidden_act}(gate) * up")
    features = block.enter(x)
    index = torch.stack([torch.arange(len(x)), torch.arange(len(x)) + 1], dim=1) % block.num_experts
    index = index.to(x.device)
    gates = random(*index.shape).abs().to(x.dtype)
    into, out = block.split_gates(gates)
    into = torch.ones_like(gates) if into is None else into
    inputs = features.repeat_interleave(2, 0)[:, None] * into.flatten()[:, None, None]
    outputs = weights.of(index.flatten())(inputs, block.glu())[:, 0].unflatten(0, index.shape)
    expected = (outputs.float() * out.float()[..., None]).sum(1)
    if block.dispatch.runs_block:
        expected = expected * block.routed_scale + block.shared_output(x)
    actual = block.dispatch.run(features, Routing(index, gates))
    _compare(actual, expected, f"its experts are not {block.hidden_act}(gate) * up")


def _compare(actual: Tensor, expected: Tensor, reason: str, tolerance: float | None = None) -> None:
    if tolerance is None:
        half = min(torch.finfo(actual.dtype).bits, torch.finfo(expected.dtype).bits) < 32
        tolerance = 5e-2 if half else 1e-4
    actual, expected = actual.float().reshape(expected.shape), expected.float()
    error = (actual - expected).norm() / expected.norm().clamp_min(1e-12)
    if error.isnan():
        raise UnsupportedModelError("its output is NaN: check the checkpoint's weights")
    if not error <= tolerance:
        raise UnsupportedModelError(f"{reason} (relative difference {error:.1e})")
