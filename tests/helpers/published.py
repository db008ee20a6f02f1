"""Small checkpoints in the layouts in which large ones are published, and what their numbers stand for by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BitsAndBytesConfig, PreTrainedModel

from tests.helpers.tiny_models import tiny_model

Tensors = dict[str, Tensor]
Pair = tuple[Path, Path]  # a quantised checkpoint and the plain one
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
# Of DeepSeek-V3: what a shard holds is not sorted by layers.
SHARDS = 3

# --- numbers ---


def to_fp8(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A matrix in FP8 with a scale for each block, of which the last ones may be cut off."""
    rows, columns = (math.ceil(size / step) for size, step in zip(weight.shape, block, strict=True))
    codes, scales = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty(rows, columns)
    for i in range(rows):
        for j in range(columns):
            place = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            scales[i, j] = weight[place].float().abs().max() / 448
            codes[place] = (weight[place].float() / scales[i, j]).to(torch.float8_e4m3fn)
    return codes, scales


def from_fp8(codes: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """The same matrix by hand, in float64."""
    spread = scales.double().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return codes.double() * spread[: codes.shape[0], : codes.shape[1]]


def to_mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Experts' matrices `[E, in, out]` as `[E, out, in / 32, 16]` pairs of FP4 numbers, with exponents."""
    groups = weight.float().transpose(1, 2).unflatten(-1, (-1, 32))
    exponents = (groups.abs().amax(-1).clamp_min(1e-9) / 6).log2().ceil()
    scaled = groups / exponents.exp2()[..., None]
    codes = (scaled[..., None] - torch.tensor(E2M1)).abs().argmin(-1).to(torch.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4, (exponents + 127).to(torch.uint8)


def from_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """The same matrices by hand, in float64."""
    pairs = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2).long()
    numbers = torch.tensor(E2M1, dtype=torch.float64)[pairs]
    return (numbers * 2.0 ** (scales.double() - 127)[..., None]).flatten(-2).transpose(1, 2)


# --- files ---


def read(folder: Path) -> Tensors:
    """All tensors of a checkpoint."""
    return {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}


def write(folder: Path, tensors: Tensors, config: dict[str, Any], shards: int = 1) -> Path:
    """Write a checkpoint, in files to which the tensors are dealt like cards."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    names = [f"model-{i + 1:05d}-of-{shards:06d}.safetensors" for i in range(shards)]
    places = {key: names[i % shards] for i, key in enumerate(tensors)}
    for name in names:
        save_file({key: tensors[key] for key in tensors if places[key] == name}, folder / name, {"format": "pt"})
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def plain(folder: Path, model: PreTrainedModel, **fields: Any) -> Path:
    """A checkpoint as transformers saves it, with other fields in its config."""
    model.save_pretrained(folder)
    return write(folder, read(folder), config_of(folder) | fields)


def in_fp8(tensors: Tensors, block: tuple[int, int], is_plain: Callable[[str], bool]) -> tuple[Tensors, Tensors]:
    """Quantise the matrices of a checkpoint; also return what they stand for, in bfloat16."""
    found, meaning = {}, {}
    for key, tensor in tensors.items():
        if tensor.ndim != 2 or is_plain(key):
            found[key] = meaning[key] = tensor.contiguous()
            continue
        found[key], found[f"{key}_scale_inv"] = to_fp8(tensor, block)
        meaning[key] = from_fp8(found[key], found[f"{key}_scale_inv"], block).bfloat16()
    return found, meaning


# --- layouts ---


def deepseek_v3(folder: Path, block: int = 128, **sizes: Any) -> tuple[Path, Path]:
    """DeepSeek-V3's layout, and beside it the same in plain bfloat16 without the layer for multi-token prediction.

    Sigmoid routing in groups with a bias, latent attention, dense first layers, FP8 in blocks (here with blocks that
    are cut off, as those of kv_a_proj_with_mqa), and layer N, which predicts one more token.
    """
    defaults = {"hidden": 192, "expert_width": 160, "dense_width": 256, "num_layers": 5, "kv_rank": 24, "q_rank": 48}
    defaults |= {"groups": 4, "top_groups": 2, "num_experts": 8, "n_shared_experts": 1}
    model = tiny_model("deepseek_v3", dtype=torch.bfloat16, **{**defaults, **sizes})
    model.save_pretrained(folder)
    tensors, config = read(folder), config_of(folder)
    last = config["num_hidden_layers"] - 1  # which becomes layer N
    hidden, start = config["hidden_size"], f"model.layers.{last}."
    tensors |= {f"{start}{name}.weight": torch.rand(hidden).bfloat16() for name in ("enorm", "hnorm")}
    tensors[f"{start}eh_proj.weight"] = 0.1 * torch.randn(hidden, 2 * hidden).bfloat16()
    tensors[f"{start}shared_head.norm.weight"] = torch.rand(hidden).bfloat16()
    tensors[f"{start}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    tensors[f"{start}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    kept = ("embed_tokens", "head.", "norm", "mlp.gate.", "eh_proj")
    found, meaning = in_fp8(tensors, (block, block), lambda key: any(name in key for name in kept))
    config.pop("dtype", None)
    config |= {"num_hidden_layers": last, "num_nextn_predict_layers": 1, "torch_dtype": "bfloat16"}
    config["auto_map"] = {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModel": "modeling_deepseek.DeepseekV3Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    }
    quantised = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"}
    quantised["weight_block_size"] = [block, block]
    (folder / "model.safetensors").unlink()
    write(folder, found, config | {"quantization_config": quantised}, SHARDS)
    without = {key: tensor for key, tensor in meaning.items() if not key.startswith(start)}
    return folder, write(folder.with_name(f"{folder.name}-plain"), without, config)


def gpt_oss(folder: Path, **sizes: Any) -> tuple[Path, Path]:
    """gpt-oss's layout, whose config names no dtype, and beside it the same in plain bfloat16."""
    defaults = {"hidden": 64, "expert_width": 32, "dense_width": 32, "num_layers": 3, "heads": 2, "head_width": 32}
    model = tiny_model("gpt_oss", dtype=torch.bfloat16, **{**defaults, **sizes})
    model.save_pretrained(folder)
    tensors, config = read(folder), config_of(folder)
    config.pop("dtype", None)
    found, meaning = {}, {}
    for key, tensor in tensors.items():
        if key.endswith(("experts.gate_up_proj", "experts.down_proj")):
            found[f"{key}_blocks"], found[f"{key}_scales"] = (part.contiguous() for part in to_mxfp4(tensor))
            meaning[key] = from_mxfp4(found[f"{key}_blocks"], found[f"{key}_scales"]).bfloat16().contiguous()
        else:
            found[key] = meaning[key] = tensor
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    quantised = {"modules_to_not_convert": kept, "quant_method": "mxfp4"}
    write(folder, found, config | {"quantization_config": quantised})
    return folder, write(folder.with_name(f"{folder.name}-plain"), meaning, config | {"dtype": "bfloat16"})


def qwen_fp8(folder: Path, block: int = 16) -> tuple[Path, Path]:
    """The layout of Qwen3-30B-A3B-FP8: whole blocks, and a list of what is not quantised."""
    plain(folder, tiny_model("qwen3_moe", dtype=torch.bfloat16, num_layers=3, dense_width=48))
    config = config_of(folder)
    kept = ["lm_head", *(f"model.layers.{i}.mlp.gate" for i in range(3))]
    plain_names = ("mlp.gate.", "norm.", "embed", "lm_head")
    found, meaning = in_fp8(read(folder), (block, block), lambda key: any(name in key for name in plain_names))
    quantised = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [block] * 2}
    quantised["modules_to_not_convert"] = kept
    write(folder, found, config | {"quantization_config": quantised})
    return folder, write(folder.with_name(f"{folder.name}-plain"), meaning, config)


def static_fp8(folder: Path) -> tuple[Path, Path]:
    """FP8 with one scale per matrix, and scales of activations, which are of no use to plain weights."""
    plain(folder, tiny_model("mixtral", dtype=torch.bfloat16, num_layers=3))
    config, tensors = config_of(folder), read(folder)
    found, meaning = {}, {}
    for key, tensor in tensors.items():
        if tensor.ndim != 2 or not any(name in key for name in ("self_attn", ".w1.", ".w2.", ".w3.")):
            found[key] = meaning[key] = tensor
            continue
        scale = tensor.float().abs().max() / 448
        found[key] = (tensor.float() / scale).to(torch.float8_e4m3fn)
        found[f"{key}_scale_inv"] = scale
        found[key.replace(".weight", ".activation_scale")] = torch.tensor(0.5)
        meaning[key] = (found[key].double() * scale.double()).bfloat16()
    quantised = {"activation_scheme": "static", "quant_method": "fp8", "weight_block_size": None}
    write(folder, found, config | {"quantization_config": quantised})
    return folder, write(folder.with_name(f"{folder.name}-plain"), meaning, config)


def bitsandbytes(folder: Path, **kind: Any) -> tuple[Path, Path]:
    """A checkpoint of a model that bitsandbytes has quantised, and what it dequantises it to."""
    from transformers import AutoModelForCausalLM

    wide = {"hidden": 64, "heads": 2, "kv_heads": 1, "head_width": 64, "expert_width": 64, "shared_width": 64}
    tiny_model("qwen2_moe", dtype=torch.bfloat16, num_layers=3, dense_width=128, **wide).save_pretrained(folder)
    config = BitsAndBytesConfig(**kind)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    whole = AutoModelForCausalLM.from_pretrained(folder).dequantize(dtype=torch.bfloat16)
    other = tiny_model("qwen2_moe", dtype=torch.bfloat16, num_layers=3, dense_width=128, **wide)
    other.load_state_dict(whole.state_dict())
    return folder, plain(folder.with_name(f"{folder.name}-plain"), other)


def beside(folder: Path) -> Path:
    """A checkpoint whose decoder layer 0 is dense, with other layers that are called like decoder layers."""
    tiny_model("qwen2_moe", num_layers=4).save_pretrained(folder)
    tensors = read(folder)
    extra = {}
    for place in ("mtp.layers.0.", "visual.blocks.1.", "audio_tower.encoder.layers.2.", "model.layers.4."):
        extra |= {key.replace("model.layers.3.", place): tensors[key] + 1 for key in tensors if "layers.3." in key}
    fields = {"num_nextn_predict_layers": 1, "mtp_num_hidden_layers": 1}
    return write(folder, {**extra, **tensors}, config_of(folder) | fields)


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
QUANTISED: dict[str, Callable[[Path], Pair]] = {
    "deepseek_v3": deepseek_v3,
    "gpt_oss": gpt_oss,
    "qwen_fp8": qwen_fp8,
    "static_fp8": static_fp8,
    "nf4": partial(bitsandbytes, **NF4),
    "int8": partial(bitsandbytes, load_in_8bit=True),
}
