"""Quantised tensors of a checkpoint, dequantised when they are read.

A quantised weight lies on disk as several tensors, such as FP8 numbers and a scale for each block of them. `Packed`
puts them together by transformers' own operations, so that all who read a checkpoint see plain weights.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from .tensors import Unread

Parts = Mapping[str, Tensor]
# Number of stacked experts that are dequantised together: the codes of one byte become indices of four.
_AT_ONCE = 4


@dataclass(frozen=True)
class Packed:
    """A weight that is quantised on disk, read and dequantised when indexed, with the interface of `Unread`.

    Args:
        parts (`Mapping[str, Unread]`): The tensors on disk by the names that its format gives them.
        unpack (`Callable`): Makes the weight of these tensors, in a dtype.
        shape (`list[int]`): The shape of the weight.
        torch_dtype (`torch.dtype`): Its dtype when it is read.
        stacked (`bool`): Whether the first dimension of all parts is that of the experts.
    """

    parts: Mapping[str, Unread]
    unpack: Callable[[Parts, torch.dtype], Tensor]
    shape: list[int]
    torch_dtype: torch.dtype = torch.bfloat16
    stacked: bool = False

    @property
    def files(self) -> set[str]:
        """The files with its parts."""
        return {file for part in self.parts.values() for file in part.files}

    def get_shape(self) -> list[int]:
        return self.shape

    def get_dtype(self) -> str:
        return {torch.float32: "F32", torch.float16: "F16"}.get(self.torch_dtype, "BF16")

    def __getitem__(self, index: Any) -> Tensor:
        if index is not Ellipsis:
            raise IndexError("only a whole weight can be dequantised")
        if not self.stacked or self.shape[0] <= _AT_ONCE or any(part.rows for part in self.parts.values()):
            return self._unpacked()
        whole = torch.empty(self.shape, dtype=self.torch_dtype)
        for start in range(0, self.shape[0], _AT_ONCE):
            some = list(range(start, min(start + _AT_ONCE, self.shape[0])))
            whole[start : some[-1] + 1] = self.of_experts(some, self.shape[0])._unpacked()
        return whole

    def _unpacked(self) -> Tensor:
        return self.unpack({name: part[...] for name, part in self.parts.items()}, self.torch_dtype).detach()

    def to(self, dtype: torch.dtype) -> Packed:
        """Return the same weight in another dtype."""
        return replace(self, torch_dtype=dtype)

    def of_experts(self, experts: Sequence[int], count: int) -> Packed:
        """Select the rows of some of the `count` experts that this weight stacks."""
        parts = {name: part.of_experts(experts, count) for name, part in self.parts.items()}
        return replace(self, parts=parts, shape=[self.shape[0] // count * len(experts), *self.shape[1:]])


class Method(ABC):
    """A method of quantisation: the tensors that a weight has on disk, and how they become that weight.

    Args:
        values (`Mapping`): The checkpoint's `quantization_config`.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    @abstractmethod
    def part_of(self, key: str, tensors: Mapping[str, Unread]) -> tuple[str, str] | None:
        """Return the name of the quantised weight to which a tensor belongs, and which part of it the tensor is.

        Parts that are called "" are of no use. None if the tensor is not quantised.
        """

    @abstractmethod
    def shape(self, parts: Mapping[str, Unread]) -> list[int]:
        """Return the shape of the weight."""

    @abstractmethod
    def unpack(self, parts: Parts, dtype: torch.dtype) -> Tensor:
        """Make the weight of its parts."""

    def packed(self, parts: Mapping[str, Unread]) -> Packed:
        """Return the weight that these tensors become."""
        shape = self.shape(parts)
        stacked = len(shape) == 3 and all(part.shape[:1] == shape[:1] for part in parts.values())
        return Packed(parts, self.unpack, shape, stacked=stacked)


class Fp8(Method):
    """FP8 numbers, or two FP4 numbers in a byte, with a scale for each block, row or tensor."""

    # How scales are called beside "weight"; those of DeepSeek-V4 and Mistral Large 4 have other names.
    SCALES = ("weight_scale_inv", "scale", "qscale_weight")
    OF_ACTIVATIONS = ("activation_scale", "input_scale", "qscale_act")

    def part_of(self, key: str, tensors: Mapping[str, Unread]) -> tuple[str, str] | None:
        module, _, name = key.rpartition(".")
        stack = key.removesuffix("_scale_inv")  # stacked experts, not called "weight"
        if stack != key and _is_code(tensors.get(stack)):
            return stack, "scales"
        if name in (*self.SCALES, *self.OF_ACTIVATIONS) and _is_code(tensors.get(f"{module}.weight")):
            return f"{module}.weight", "scales" if name in self.SCALES else ""
        scales = [f"{key}_scale_inv", *(f"{module}.{scale}" for scale in self.SCALES if name == "weight")]
        return (key, "codes") if _is_code(tensors.get(key)) and any(scale in tensors for scale in scales) else None

    def shape(self, parts: Mapping[str, Unread]) -> list[int]:
        *rows, width = parts["codes"].shape
        return [*rows, 2 * width if _holds_pairs(parts["codes"].torch_dtype) else width]

    def unpack(self, parts: Parts, dtype: torch.dtype) -> Tensor:
        codes, scales = parts["codes"], parts["scales"]
        height, width = codes.shape[-2:]
        block = self.values.get("weight_block_size", (128, 128))
        if block is not None and scales.ndim > 1 and not _holds_pairs(codes.dtype):
            grid = (math.ceil(height / block[0]), math.ceil(width / block[1]))
            lacking = (0, -width % block[1], 0, -height % block[0])
            # The last block of a row or column may be cut off, as in DeepSeek-V3's kv_a_proj_with_mqa, [576, 7168] in
            # blocks of 128. transformers 5.23 divides the weight into equal parts instead and fails, or scales wrongly
            # (huggingface/transformers#36026).
            if tuple(scales.shape[-2:]) == grid and any(lacking):
                codes = nn.functional.pad(codes.view(torch.uint8), lacking).view(codes.dtype)
        module = nn.ParameterDict({"weight": torch.empty(0, dtype=dtype)})  # the operation makes a weight of this dtype
        found = Fp8Dequantize(None).convert(
            {"codes.weight": [codes], "codes.weight_scale_inv": [scales]}, model=module, full_layer_name="weight"
        )
        if block is not None and codes.shape != parts["codes"].shape:
            return found["codes.weight"][0][..., :height, :width]
        return found["codes.weight"][0]


class Mxfp4(Method):
    """Two FP4 numbers in a byte, with an exponent for each block of 32, of all experts of a layer."""

    def part_of(self, key: str, tensors: Mapping[str, Unread]) -> tuple[str, str] | None:
        weight, _, part = key.rpartition("_")
        both = {f"{weight}_blocks", f"{weight}_scales"}
        return (weight, part) if key in both <= tensors.keys() else None

    def shape(self, parts: Mapping[str, Unread]) -> list[int]:
        experts, rows, groups, width = parts["blocks"].shape
        return [experts, 2 * groups * width, rows]

    def unpack(self, parts: Parts, dtype: torch.dtype) -> Tensor:
        return convert_moe_packed_tensors(parts["blocks"], parts["scales"], dtype=dtype)


class FourBit(Method):
    """bitsandbytes' NF4 and FP4."""

    def part_of(self, key: str, tensors: Mapping[str, Unread]) -> tuple[str, str] | None:
        weight, dot, part = key.rpartition(".weight.")
        if dot:
            return f"{weight}.weight", part
        return (key, "codes") if f"{key}.absmax" in tensors else None

    def shape(self, parts: Mapping[str, Unread]) -> list[int]:
        from bitsandbytes.utils import unpack_tensor_to_dict

        state = next(part for name, part in parts.items() if name.startswith("quant_state."))
        return list(unpack_tensor_to_dict(state[...])["shape"])

    def unpack(self, parts: Parts, dtype: torch.dtype) -> Tensor:
        from bitsandbytes.functional import QuantState, dequantize_4bit

        codes = parts["codes"]
        state = {name: part for name, part in parts.items() if name != "codes"}
        return dequantize_4bit(codes, QuantState.from_dict(state, device=codes.device)).to(dtype)


class EightBit(Method):
    """bitsandbytes' LLM.int8()."""

    def part_of(self, key: str, tensors: Mapping[str, Unread]) -> tuple[str, str] | None:
        module, _, name = key.rpartition(".")
        if f"{module}.SCB" not in tensors:
            return None
        return {
            "weight": (key, "codes"),
            "SCB": (f"{module}.weight", "scales"),
            "weight_format": (f"{module}.weight", ""),
        }.get(name)

    def shape(self, parts: Mapping[str, Unread]) -> list[int]:
        return parts["codes"].shape

    def unpack(self, parts: Parts, dtype: torch.dtype) -> Tensor:
        from bitsandbytes.functional import int8_vectorwise_dequant

        return int8_vectorwise_dequant(parts["codes"], parts["scales"]).to(dtype)


def put_together(method: Method, tensors: Mapping[str, Unread]) -> dict[str, Unread | Packed]:
    """Put the parts of each quantised weight together.

    Args:
        method (`Method`): How weights are quantised.
        tensors (`Mapping[str, Unread]`): The tensors of a checkpoint by their names on disk.

    Returns:
        The weights by the names that they have in a checkpoint that is not quantised.
    """
    found: dict[str, Unread | Packed] = {}
    parts: dict[str, dict[str, Unread]] = {}
    for key, tensor in tensors.items():
        place = method.part_of(key, tensors)
        if place is None:
            found[key] = tensor
        elif place[1]:
            parts.setdefault(place[0], {})[place[1]] = tensor
    return found | {key: method.packed(each) for key, each in parts.items()}


def _is_code(tensor: Unread | None) -> bool:
    return tensor is not None and tensor.torch_dtype.itemsize == 1


def _holds_pairs(dtype: torch.dtype) -> bool:
    return dtype in (torch.int8, torch.uint8, getattr(torch, "float4_e2m1fn_x2", None))
