"""Workarounds for layers of bitsandbytes in condensed models."""

from __future__ import annotations

from typing import Any

from transformers.utils import logging

logger = logging.get_logger(__name__)


def settle_bitsandbytes(model: Any) -> None:
    """Let a model with layers of bitsandbytes compute from its stored weights, and be saved: works around two bugs.

    On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks a 4-bit layer's weights at its first forward pass in eval mode.
    That fails unless `out_features % 32 == 0` and `in_features % 64 == 0`, which is never true of a gate per token (one
    row). Where it succeeds, the layer passes no gradient, `dequantize()` returns wrong weights and, without double
    quantisation, a saved checkpoint opens with wrong weights. So repacking is switched off.

    In transformers 5.17 to 5.23, a checkpoint that was opened quantised can't be saved again: saving tries to invert
    the conversion that reads quantised weights, which has no inverse and needs none.
    """
    if getattr(model, "quantization_method", None) != "bitsandbytes":
        return
    narrow = []
    for name, module in model.named_modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            if module.in_features % 64 in (16, 32, 48) and module.weight.device.type == "cpu":
                narrow.append(name)
    if narrow:
        logger.warning(
            f"The input widths of {len(narrow)} layers in 4 bit, such as {narrow[0]}, are not multiples of 64: "
            "bitsandbytes 0.50 computes wrong values from such weights on some CPUs. Use 8 bit, or name these layers "
            "in `llm_int8_skip_modules`."
        )
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is not None:
        model._weight_conversions = [conversion for conversion in conversions if _has_inverse(conversion)]


def repacked_layers(model: Any) -> list[str]:
    """List the 4-bit layers that a forward pass before `settle_bitsandbytes` has repacked."""
    weights = ((name, getattr(module, "weight", None)) for name, module in model.named_modules())
    states = ((name, getattr(weight, "quant_state", None)) for name, weight in weights)
    return [name for name, state in states if getattr(state, "packing_format_for_cpu", False)]


def _has_inverse(conversion: Any) -> bool:
    try:
        conversion.reverse_transform()
    except NotImplementedError:
        return False
    return True
