"""Models that were dequantised when they were loaded, freed from all that remembers how they were quantised."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

_MARKS = ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit")


def forget_quantiser(model: PreTrainedModel) -> None:
    """Let a model be saved under the names of plain weights, which is what it has.

    transformers (5.23) reverts the conversions by which a checkpoint was loaded when it saves. Among them are those
    that dequantised it, which can't be reverted: the names become those of quantised weights ("down_proj_blocks").
    """
    for name in _MARKS:
        vars(model).pop(name, None)
    vars(model.config).pop("_is_quantized", None)
    conversions = vars(model).get("_weight_conversions")
    if conversions is not None:
        plain = [_plain(conversion) for conversion in conversions]
        vars(model)["_weight_conversions"] = [conversion for conversion in plain if conversion is not None]


def _plain(conversion: Any) -> Any:
    """Return a conversion of the same weights without quantisation; None if there is nothing else to convert."""
    operations = getattr(conversion, "operations", [])
    others = [operation for operation in operations if getattr(operation, "hf_quantizer", None) is None]
    if len(others) == len(operations):
        return conversion
    if not others:
        return None
    # Beside each weight there are its scales; transformers 5.15 to 5.18 ended the patterns with "$".
    sources = [source.removesuffix("$") for source in conversion._original_source_patterns]
    sources = [source for source in sources if source.endswith(".weight")]
    plain = type(conversion)(sources, list(conversion._original_target_patterns), operations=others)
    plain.scope_prefix, plain.base_model_prefix = conversion.scope_prefix, conversion.base_model_prefix
    return plain
