"""Tiny multimodal models whose text decoder is a Mixture of Experts, one per wrapper of transformers.

`WRAPPERS` lists model types that can be condensed; `image_inputs` gives them something to see.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.helpers.tiny_models import ROPE, _randomize, tiny_config

IMAGE, VIDEO, AUDIO = 120, 121, 122


@dataclass(frozen=True)
class Wrapper:
    """How to build one wrapper: its class, its text part, and the fields of its config."""

    model: str
    text: str
    vision: dict[str, Any] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)  # of the whole config
    of_text: dict[str, Any] = field(default_factory=dict)  # as for `tiny_config`
    pixels: Callable[[], dict[str, Any]] | None = None  # of one image, with the number of its `tokens`

    @property
    def model_class(self) -> type[PreTrainedModel]:
        return getattr(transformers, self.model)


def _qwen_pixels() -> dict[str, Any]:
    return {
        "pixel_values": torch.randn(16, 3 * 4 * 4, generator=_generator()),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "tokens": 16,
        "mm_token_type_ids": True,
    }


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def _square(size: int, tokens: int, count: int = 1) -> Callable[[], dict[str, Any]]:
    return lambda: {"pixel_values": torch.randn(count, 3, size, size, generator=_generator()), "tokens": tokens}


def _gemma_pixels() -> dict[str, Any]:
    places = torch.tensor([[x, y] for x in range(6) for y in range(6)])[None]
    return {
        "pixel_values": torch.rand(1, 36, 48, generator=_generator()),
        "image_position_ids": places,
        "tokens": 4,
        "mm_token_type_ids": True,
    }


def _glm_pixels() -> dict[str, Any]:
    return {
        "pixel_values": torch.randn(16, 3 * 2 * 4 * 4, generator=_generator()),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "tokens": 4,
        "mm_token_type_ids": True,
    }


_VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "depth": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
}
_QWEN_VISION = {
    **_VISION,
    "spatial_merge_size": 1,
    "temporal_patch_size": 1,
    "num_position_embeddings": 16,
}
_GLM_VISION = {
    **_VISION,
    "image_size": 16,
}
_PLAIN_VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 4,
    "image_size": 16,
}
_GEMMA_VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "patch_size": 4,
    "position_embedding_size": 16,
}
_SAM = {
    "hidden_size": 16,
    "output_channels": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 4,
    "mlp_ratio": 2.0,
    "mlp_dim": 32,
    "window_size": 2,
    "global_attn_indexes": [1],
    "downsample_channels": [16, 32],
    "scale": 16,
}
_IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO}
_MROPE = {"rope_parameters": {**ROPE, "mrope_section": [2, 1, 1]}}

WRAPPERS: dict[str, Wrapper] = {
    "qwen3_5_moe": Wrapper(
        "Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe_text", _QWEN_VISION, _IDS, pixels=_qwen_pixels
    ),
    "qwen3_vl_moe": Wrapper(
        "Qwen3VLMoeForConditionalGeneration",
        "qwen3_vl_moe_text",
        {**_QWEN_VISION, "deepstack_visual_indexes": [0, 1]},
        _IDS,
        _MROPE,
        _qwen_pixels,
    ),
    "gemma4": Wrapper(
        "Gemma4ForConditionalGeneration",
        "gemma4_text",
        _GEMMA_VISION,
        {**_IDS, "audio_config": None},
        pixels=_gemma_pixels,
    ),
    "llama4": Wrapper(
        "Llama4ForConditionalGeneration",
        "llama4_text",
        {
            **_PLAIN_VISION,
            "intermediate_size": 128,
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
        },
        {"image_token_index": IMAGE},
        pixels=_square(16, 4),
    ),
    "glm4v_moe": Wrapper("Glm4vMoeForConditionalGeneration", "glm4v_moe_text", _GLM_VISION, _IDS, pixels=_glm_pixels),
    "glm5_next": Wrapper(
        "Glm5NextForConditionalGeneration",
        "glm5_next_text",
        {**_GLM_VISION, "projection_intermediate_size": 32},
        _IDS,
        pixels=_glm_pixels,
    ),
    "qwen4_exp": Wrapper("Qwen4ExpForConditionalGeneration", "qwen4_exp_text", _QWEN_VISION, _IDS, pixels=_qwen_pixels),
    "qwen3_omni_moe_thinker": Wrapper(
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        "qwen3_omni_moe_text",
        {**_QWEN_VISION, "deepstack_visual_indexes": [0, 1]},
        {
            **_IDS,
            "audio_token_id": AUDIO,
            "vision_start_token_id": 117,
            "audio_start_token_id": 118,
            "audio_config": {
                "num_mel_bins": 8,
                "encoder_layers": 1,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 16,
                "d_model": 16,
                "output_dim": 32,
                "downsample_hidden_size": 8,
            },
        },
        _MROPE,
        _qwen_pixels,
    ),
    "aria": Wrapper(
        "AriaForConditionalGeneration",
        "aria_text",
        _PLAIN_VISION,
        {"image_token_index": IMAGE, "projector_patch_to_query_dict": {16: 4}},
        pixels=_square(16, 4),
    ),
    "kimi_k25": Wrapper(
        "Kimi_K25ForConditionalGeneration",
        "deepseek_v3",
        {**_PLAIN_VISION, "pos_emb_height": 4, "pos_emb_width": 4},
        {**_IDS, "projection_hidden_size": 32},
    ),
    "mistral_large4": Wrapper(
        "MistralLarge4ForConditionalGeneration",
        "mistral_large4_text",
        {**_PLAIN_VISION, "head_dim": 16},
        {"image_token_index": IMAGE},
    ),
    "inkling2": Wrapper(
        "Inkling2ForConditionalGeneration",
        "inkling2_text",
        {**_PLAIN_VISION, "projection_hidden_dim": 32, "text_hidden_size": 32, "posemb_grid_size": 4},
        {"image_token_id": IMAGE},
    ),
    "step3p7": Wrapper("Step3p7ForConditionalGeneration", "step3p5", _PLAIN_VISION, {"image_token_id": IMAGE}),
    "dots3_note": Wrapper(
        "Dots3NoteForConditionalGeneration",
        "dots3_note_text",
        {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "patch_size": 4,
            "moe_intermediate_size": 16,
            "mlp_layer_types": ["dense", "sparse"],
            "num_local_experts": 4,
            "adapter_in_dim": 32,
            "adapter_out_dim": 32,
            "per_layer_config": None,
        },
        {
            **_IDS,
            "audio_token_id": AUDIO,
            "audio_config": {
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "downsample_hidden_size": 4,
                "adapter_input_size": 16,
                "adapter_out_dim": 32,
            },
        },
    ),
    "deepseek_ocr2": Wrapper(
        "DeepseekOcr2ForConditionalGeneration",
        "deepseek_ocr2_text",
        {
            "sam_config": _SAM,
            "encoder_config": {
                "vocab_size": 16,
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
            },
        },
        {"image_token_id": IMAGE},
    ),
    "unlimited_ocr": Wrapper(
        "UnlimitedOcrForConditionalGeneration",
        "unlimited_ocr_text",
        {"sam_config": _SAM, "encoder_config": _PLAIN_VISION},
        {"image_token_id": IMAGE},
    ),
    "nemotron_h_omni": Wrapper(
        "NemotronH_Omni_Reasoning_V3",
        "nemotron_h",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "patch_size": 4,
            "image_size": 16,
            "max_img_size": 32,
            "patch_dim": 48,
            "video_patch_dim": 96,
            "video_temporal_patch_size": 2,
        },
        {"image_token_id": IMAGE, "vision_hidden_size": 32, "projector_hidden_size": 32},
    ),
    # wrappers for any text model
    "internvl": Wrapper(
        "InternVLForConditionalGeneration",
        "qwen3_moe",
        {**_PLAIN_VISION, "patch_size": [4, 4], "image_size": [16, 16]},
        {"image_token_id": IMAGE},
        pixels=_square(16, 4),
    ),
    "mistral3": Wrapper(
        "Mistral3ForConditionalGeneration",
        "mistral4",
        {**_PLAIN_VISION, "head_dim": 16, "model_type": "pixtral"},
        {"image_token_index": IMAGE},
    ),
    "llava": Wrapper(
        "LlavaForConditionalGeneration",
        "mixtral",
        {**_PLAIN_VISION, "model_type": "clip_vision_model"},
        {"image_token_index": IMAGE},
        pixels=_square(16, 16),
    ),
    "lfm2_vl": Wrapper(
        "Lfm2VlForConditionalGeneration",
        "lfm2_moe",
        {**_PLAIN_VISION, "model_type": "siglip2_vision_model", "num_patches": 16},
        {"image_token_id": IMAGE},
    ),
}


# Wrappers that can't be condensed as a whole, and a part of the reason.
REFUSED_WRAPPERS: dict[str, tuple[Wrapper, str]] = {
    "diffusion_gemma": (
        Wrapper(
            "DiffusionGemmaForBlockDiffusion",
            "diffusion_gemma_text",
            _GEMMA_VISION,
            {"image_token_id": IMAGE, "canvas_length": 8},
        ),
        "its experts belong to a second decoder",
    ),
    "ernie4_5_vl_moe": (
        Wrapper(
            "Ernie4_5_VLMoeForConditionalGeneration",
            "ernie4_5_vl_moe_text",
            {"hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "depth": 2, "patch_size": 4},
        ),
        "has several sets of experts",
    ),
    "minimax_m3_vl": (
        Wrapper(
            "MiniMaxM3SparseForConditionalGeneration",
            "minimax_m3_vl_text",
            _PLAIN_VISION,
            {"image_token_index": IMAGE, "video_token_index": VIDEO, "projector_hidden_size": 32},
        ),
        "fuses gate and up",
    ),
}


def _wrapper(model_type: str) -> Wrapper:
    return WRAPPERS[model_type] if model_type in WRAPPERS else REFUSED_WRAPPERS[model_type][0]


def wrapper_config(model_type: str, **of_text: Any) -> Any:
    """Return the tiny config of a wrapper; `of_text` are those of `tiny_config` for its text part."""
    wrapper = _wrapper(model_type)
    text = tiny_config(wrapper.text, **{**wrapper.of_text, **of_text}).to_dict()
    config_class: Any = wrapper.model_class.config_class
    return config_class(text_config=text, vision_config=dict(wrapper.vision), **wrapper.fields)


def tiny_wrapper(model_type: str, seed: int = 0, **of_text: Any) -> PreTrainedModel:
    """Return a tiny multimodal model in eval mode, with all weights drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _wrapper(model_type).model_class(wrapper_config(model_type, **of_text))
    _randomize(model, seed)
    return model.eval()


def image_inputs(model_type: str) -> dict[str, Tensor]:
    """Return the inputs of one sequence with an image in it, as the processor of the wrapper makes them."""
    pixels = WRAPPERS[model_type].pixels
    assert pixels is not None
    made = pixels()
    tokens, typed = made.pop("tokens"), made.pop("mm_token_type_ids", False)
    ids = torch.tensor([[5, 9, 12, *[IMAGE] * tokens, 33, 7, 60, 41, 88]])
    made |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return made | ({"mm_token_type_ids": (ids == IMAGE).long()} if typed else {})


def has_text_model(model_type: str) -> bool:
    """Whether transformers opens the text part of a wrapper as a model of its own."""
    return type(wrapper_config(model_type).get_text_config()) in AutoModelForCausalLM._model_mapping


@torch.no_grad()
def logits(model: PreTrainedModel, **inputs: Tensor) -> Tensor:
    return model(**inputs).logits
