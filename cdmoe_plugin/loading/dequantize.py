"""Checkpoints with quantised weights: dequantised while they are read, or refused.

Condensing adds up weights, for which it needs them as plain numbers. transformers would dequantise a whole checkpoint
at once, and save it under names of quantised weights (5.23); here the weights are plain for everyone who reads them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any

import torch
from transformers import AutoConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from .files import check_folder
from .packed import EightBit, FourBit, Fp8, Method, Mxfp4
from .places import Stored
from .tensors import Unread

_METHODS: dict[str, type[Method]] = {
    "mxfp4": Mxfp4,
    "fp8": Fp8,
    "mxfp8": Fp8,
    "bitsandbytes_4bit": FourBit,
    "bitsandbytes_8bit": EightBit,
}
_COPY = (
    'python -c "from transformers import AutoModelForCausalLM as M, {config} as C; '
    "M.from_pretrained({path!r}, quantization_config=C(dequantize=True), dtype='bfloat16')"
    ".save_pretrained('dequantised', save_original_format=False)\""
)
_GPTQ = (
    'python -c "from gptqmodel import GPTQModel; '
    "GPTQModel.export(model_id_or_path={path!r}, target_path='dequantised', format='hf')\""
)
# The library that reads a method's weights, and the command that dequantises a checkpoint with it, if there is one.
_OTHERS: dict[str, tuple[str, str | None]] = {
    "gptq": ("gptqmodel", _GPTQ),
    "awq": ("gptqmodel", None),
    "compressed-tensors": ("compressed-tensors", _COPY.replace("{config}", "CompressedTensorsConfig")),
    "metal": ("kernels", _COPY.replace("{config}", "MetalConfig")),
    "quark": ("amd-quark", None),
    "torchao": ("torchao", None),
    "hqq": ("hqq", None),
    "fbgemm_fp8": ("fbgemm-gpu-genai", None),
    "quanto": ("optimum-quanto", None),
    "auto-round": ("auto-round", None),
}


def find_method(config: Any, passed: Any, path: Any) -> tuple[str, Method] | None:
    """Decide how the weights of a checkpoint are dequantised.

    Args:
        config (`PreTrainedConfig`): The checkpoint's config.
        passed (`QuantizationConfigMixin` or `dict`, *optional*): The `quantization_config` for `from_pretrained`.
        path: The checkpoint, for messages.

    Returns:
        `tuple[str, Method]`: The method and its name, or None if the weights are not quantised.

    Raises:
        ValueError: if they are and can't be dequantised, or if `passed` would quantise them.
    """
    stored = _stored(config)
    if passed is not None and not _values(passed).get("dequantize"):
        if stored is None:
            raise ValueError(
                "Quantised weights can't be folded: condense first, save, and open the saved checkpoint with "
                "`quantization_config`."
            )
        raise ValueError(
            "`quantization_config` does not dequantise, and quantised weights can't be folded: leave it out, or set "
            f"`dequantize=True` in it. The weights of {path} are stored quantised ({_name(stored)}); they are "
            "dequantised while they are read if they can be."
        )
    if stored is None:
        return None
    name = _name(stored)
    if passed is not None and _name(passed) != name:
        raise ValueError(
            f"`quantization_config` is for {_name(passed)}, but the weights of {path} are stored quantised by {name}: "
            "leave it out."
        )
    if name not in _METHODS or (name.startswith("bitsandbytes") and not _installed("bitsandbytes")):
        raise ValueError(why_not(name, path))
    return name, _METHODS[name](_values(stored))


def why_not(method: str, path: Any) -> str:
    """Say why weights that are stored quantised can't be dequantised here, and what to do."""
    start = f"The weights of {path} are stored quantised ({method}), and condensing needs plain ones. "
    end = "Start from the checkpoint in 16 bit that was quantised."
    if method.startswith("bitsandbytes"):
        return f"{start}bitsandbytes, which dequantises them, is not installed: pip install bitsandbytes"
    if method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        return f"{start}transformers does not know this method, so that they can't be dequantised. {end}"
    library, command = _OTHERS.get(method, ("its library", None))
    if command is None:
        return f"{start}Neither transformers nor {library} can dequantise a checkpoint of this method. {end}"
    there = f"{library} is installed" if _installed(library) else f"{library} is not installed here"
    return (
        f"{start}Only {library} dequantises them, all at once ({there}). {end} Or make a dequantised copy, with "
        f"`pip install {library}` and: {command.format(path=str(path))}"
    )


def forget_quantisation(config: Any) -> None:
    """Remove the quantisation from a checkpoint's config, whose weights are dequantised while they are read."""
    for each in (config, config.get_text_config()):
        if hasattr(each, "quantization_config"):
            del each.quantization_config


def refuse_codes(stored: Mapping[str, Stored], dtypes: Mapping[str, torch.dtype], path: Any) -> None:
    """Refuse quantised numbers that would be read as if they were weights.

    Raises:
        ValueError: naming them.
    """
    codes = [
        key
        for key, each in stored.items()
        if isinstance(each.tensor, Unread) and each.place.known and dtypes[each.place.name].is_floating_point
        if each.tensor.torch_dtype.itemsize == 1
    ]
    if codes:
        raise ValueError(
            f"{path} has {len(codes)} quantised weights without scales, such as {codes[0]}: its config does not "
            "describe how it is quantised, or it was not written completely."
        )


def refuse_stored(path: str | os.PathLike, **hub: Any) -> None:
    """Refuse a checkpoint whose weights are stored quantised.

    Args:
        path (`str` or `os.PathLike`): Hub name or folder.
        **hub: Passed to `AutoConfig.from_pretrained`.

    Raises:
        ValueError: naming the method.
    """
    check_folder(path, hub)
    stored = _stored(AutoConfig.from_pretrained(path, **hub))
    if stored is not None:
        raise ValueError(
            f"The weights of {path} are stored quantised ({_name(stored)}), and `--dequantize` is false: leave it out, "
            "or start from a checkpoint in 16 bit."
        )


def _stored(config: Any) -> Any:
    found = (getattr(each, "quantization_config", None) for each in (config, config.get_text_config()))
    return next(filter(None, found), None)


def _values(quantisation: Any) -> Mapping[str, Any]:
    return quantisation if isinstance(quantisation, Mapping) else vars(quantisation)


def _name(quantisation: Any) -> str:
    values = _values(quantisation)
    for bits in ("4bit", "8bit"):
        if values.get(f"load_in_{bits}") or values.get(f"_load_in_{bits}"):
            return f"bitsandbytes_{bits}"
    method = values.get("quant_method")
    return str(getattr(method, "value", method))


def _installed(library: str) -> bool:
    try:
        distribution(library)
    except PackageNotFoundError:
        return False
    return True
