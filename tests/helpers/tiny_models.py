"""Tiny random-weight sparse MoE decoders of transformers, one per model type.

`ARCHITECTURES` lists the model types whose sparse block is a weighted sum of GLU experts, with or
without a shared expert; `REFUSED` lists sparse model types that compute something else.
Ask `available` whether the
installed transformers has a type.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any, Literal

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

Group = Literal["shared", "layer_shared", "gated", "none", "multimodal", "refused"]

FIRST_DENSE = (1, 2, 3)
ALL = (0, 1, 2, 3)


@dataclass(frozen=True)
class TinyArch:
    """How to build one model type, and what to expect of the default build."""

    model: str
    group: Group
    sparse_layers: tuple[int, ...]
    block: str  # the sparse block's name in a decoder layer; "" is the layer itself
    inputs_embeds: bool  # forward(input_ids=...) is broken
    # of config fields, or of sizes by their names in ALIASES; a tuple is repeated over the layers
    overrides: dict[str, Any]

    @property
    def causal_lm(self) -> bool:
        return self.model.endswith("ForCausalLM")

    @property
    def model_class(self) -> type[PreTrainedModel]:
        return getattr(transformers, self.model)

    @property
    def config_class(self) -> type[PreTrainedConfig]:
        # from the model, as not every text backbone's config class is exported
        return self.model_class.config_class


# Our name of a size, its default, and the fields by which config classes call it.
_SIZES: dict[str, tuple[int | float, str]] = {
    "vocab": (128, "vocab_size vocab_size_per_layer_input unpadded_vocab_size"),
    "hidden": (32, "hidden_size d_model ffn_config.hidden_size"),
    "num_layers": (4, "num_hidden_layers n_layers num_layers"),
    "heads": (4, "num_attention_heads n_heads swa_num_attention_heads"),
    "kv_heads": (2, "num_key_value_heads swa_num_key_value_heads attn_config.kv_n_heads"),
    "head_width": (8, "head_dim swa_head_dim kv_channels"),
    "num_experts": (
        8,
        "num_experts n_routed_experts num_local_experts moe_num_experts ffn_config.moe_num_experts",
    ),
    "top_k": (2, "num_experts_per_tok moe_topk moe_k top_k_experts ffn_config.moe_top_k"),
    "groups": (1, "n_group"),
    "top_groups": (1, "topk_group"),
    "expert_width": (16, "moe_intermediate_size expert_ffn_hidden_size ffn_config.ffn_hidden_size"),
    "shared_width": (
        24,
        "shared_expert_intermediate_size shared_experts_intermediate_size share_expert_dim "
        "shared_intermediate_size moe_shared_expert_intermediate_size",
    ),
    "dense_width": (
        40,
        "intermediate_size intermediate_size_mlp dense_intermediate_size ffn_hidden_size "
        "prefix_dense_intermediate_size",
    ),
    "max_positions": (128, "max_position_embeddings max_seq_len"),
    # neither is 1, so that leaving it out shows
    "routed_scale": (
        1.5,
        "routed_scaling_factor router_scaling_factor route_scale moe_routed_scaling_factor moe_router_scaling_factor",
    ),
    "residual_scale": (0.7, "residual_multiplier"),
    "kv_rank": (8, "kv_lora_rank"),
    "q_rank": (8, "q_lora_rank"),
    "rope_dim": (4, "qk_rope_head_dim"),
    "nope_dim": (4, "qk_nope_head_dim"),
    "v_dim": (8, "v_head_dim"),
    "index_heads": (2, "index_n_heads indexer_n_heads"),
    "index_dim": (8, "index_head_dim indexer_head_dim"),
    "linear_heads": (2, "linear_num_key_heads linear_num_value_heads linear_num_heads"),
    "linear_dim": (8, "linear_key_head_dim linear_value_head_dim linear_head_dim"),
    "pad": (0, "pad_token_id"),
    "bos": (1, "bos_token_id"),
    "eos": (2, "eos_token_id"),
}
ALIASES = {name: (default, tuple(names.split())) for name, (default, names) in _SIZES.items()}

# Multi-head latent attention has one key/value head per query head.
MLA = {"kv_heads": 4}
MLA_SLIDING = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 8,
    "swa_kv_lora_rank": 8,
    "swa_head_dim": 8,
    "swa_qk_nope_head_dim": 4,
    "swa_v_head_dim": 8,
}
LINEAR_AND_FULL = {"layer_types": ("linear_attention", "full_attention")}
CONV_AND_FULL = {"layer_types": ("conv", "full_attention")}
GRANITE_HYBRID = {**LINEAR_AND_FULL, "mamba_n_heads": 4, "mamba_d_state": 8}
JAMBA = {
    "attn_layer_period": 3,
    "attn_layer_offset": 1,
    "mamba_d_state": 8,
    "use_mamba_kernels": False,
}
QWEN4 = {
    **LINEAR_AND_FULL,
    "hc_lowrank": 4,
    "indexer_kv_heads": 1,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}
# both have no usable default
DBRX = {"attn_config.clip_qkv": 8.0, "attn_config.rope_theta": 10000.0}
GEMMA4 = {"enable_moe_block": True, "global_head_dim": 8, "hidden_size_per_layer_input": 8}
NEMOTRON = {
    "num_layers": 6,
    "layers_block_type": ("mamba", "moe", "attention", "moe", "mlp", "moe"),
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "ssm_state_size": 8,
    "n_groups": 2,
}
# some experts are chosen by token ids; attention over compressed tokens in all ways, within a few tokens
DEEPSEEK4 = {
    "mlp_layer_types": ("hash_moe", "moe"),
    "layer_types": ("sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"),
    "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
    "sliding_window": 8,
    "o_groups": 2,
    "o_lora_rank": 4,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def _arch(
    model: str,
    group: Group,
    sparse_layers: tuple[int, ...] = FIRST_DENSE,
    block: str = "mlp",
    inputs_embeds: bool = False,
    **overrides: Any,
) -> TinyArch:
    return TinyArch(model, group, sparse_layers, block, inputs_embeds, overrides)


ARCHITECTURES: dict[str, TinyArch] = {
    # one block adds routed and shared experts
    "afmoe": _arch("AfmoeForCausalLM", "shared"),
    "aria_text": _arch("AriaTextForCausalLM", "shared", ALL),
    "axk1": _arch("AXK1ForCausalLM", "shared", **MLA),
    "axk2": _arch("AXK2ForCausalLM", "shared", gated_norm_rank=4, **MLA),
    "bailing_hybrid": _arch("BailingHybridForCausalLM", "shared", groups=2, layer_group_size=2, **MLA),
    "cohere2_moe": _arch("Cohere2MoeForCausalLM", "shared", num_shared_experts=1, logit_scale=1.0),
    "deepseek_v2": _arch("DeepseekV2ForCausalLM", "shared", **MLA),
    "deepseek_v3": _arch("DeepseekV3ForCausalLM", "shared", groups=2, **MLA),
    "deepseek_v32": _arch("DeepseekV32ForCausalLM", "shared", **MLA),
    "dots1": _arch("Dots1ForCausalLM", "shared", n_shared_experts=1),
    "dots3_note_text": _arch("Dots3NoteForCausalLM", "shared", **MLA, **MLA_SLIDING),
    "ernie4_5_moe": _arch("Ernie4_5_MoeForCausalLM", "shared"),
    "exaone_moe": _arch("ExaoneMoeForCausalLM", "shared"),
    "flint": _arch("FlintForCausalLM", "shared"),
    "glm4_moe": _arch("Glm4MoeForCausalLM", "shared"),
    "glm4_moe_lite": _arch("Glm4MoeLiteForCausalLM", "shared", **MLA),
    "glm_moe_dsa": _arch("GlmMoeDsaForCausalLM", "shared", **MLA),
    "hunyuan_v1_moe": _arch("HunYuanMoEV1ForCausalLM", "shared", ALL),
    "hy_v3": _arch("HYV3ForCausalLM", "shared"),
    "kimi_linear": _arch("KimiLinearForCausalLM", "shared", **MLA, **LINEAR_AND_FULL),
    "kolibri1": _arch("Kolibri1ForCausalLM", "shared", ALL),
    "laguna": _arch("LagunaForCausalLM", "shared"),
    "mistral4": _arch("Mistral4ForCausalLM", "shared", **MLA),
    "llama4_text": _arch("Llama4ForCausalLM", "shared", FIRST_DENSE, "feed_forward"),
    "nemotron_h": _arch("NemotronHForCausalLM", "shared", (1, 3, 5), "mixer", **NEMOTRON),
    "solar_open": _arch("SolarOpenForCausalLM", "shared", ALL),
    "hy_v4": _arch("HYV4ForCausalLM", "shared", swiglu_limit=0.3, **MLA),
    "minimax_m3_vl_text": _arch("MiniMaxM3VLForCausalLM", "shared", swiglu_limit=0.3),
    "deepseek_v4": _arch("DeepseekV4ForCausalLM", "shared", ALL, swiglu_limit=0.3, **DEEPSEEK4),
    # the decoder layer owns the shared expert and adds it to the block's output
    "granitemoeshared": _arch("GraniteMoeSharedForCausalLM", "layer_shared", ALL, "block_sparse_moe"),
    "granitemoehybrid": _arch("GraniteMoeHybridForCausalLM", "layer_shared", ALL, "block_sparse_moe", **GRANITE_HYBRID),
    "granitemoe_swa": _arch("GraniteMoeSWAForCausalLM", "layer_shared", ALL, "block_sparse_moe"),
    # the shared expert has a sigmoid gate of its own
    "qwen2_moe": _arch("Qwen2MoeForCausalLM", "gated"),
    "qwen3_next": _arch("Qwen3NextForCausalLM", "gated", **LINEAR_AND_FULL),
    "qwen3_5_moe_text": _arch("Qwen3_5MoeForCausalLM", "gated", ALL, **LINEAR_AND_FULL),
    "qwen4_exp_text": _arch("Qwen4ExpForCausalLM", "gated", ALL, **QWEN4),
    # no shared expert
    "beam": _arch("BeamForCausalLM", "none", groups=2),
    "dbrx": _arch("DbrxForCausalLM", "none", ALL, "ffn", **DBRX),
    "flex_olmo": _arch("FlexOlmoForCausalLM", "none", ALL),
    "granitemoe": _arch("GraniteMoeForCausalLM", "none", ALL, "block_sparse_moe"),
    "jamba": _arch("JambaForCausalLM", "none", (1, 3), "feed_forward", **JAMBA),
    "jetmoe": _arch("JetMoeForCausalLM", "none", ALL),
    "lfm2_moe": _arch("Lfm2MoeForCausalLM", "none", FIRST_DENSE, "feed_forward", **CONV_AND_FULL),
    "mellum": _arch("MellumForCausalLM", "none"),
    "mimo_v2_flash": _arch("MiMoV2FlashForCausalLM", "none"),
    "minimax": _arch("MiniMaxForCausalLM", "none", ALL, mlp_alpha_factor=1.2, mlp_beta_factor=0.7),
    "minimax_m2": _arch("MiniMaxM2ForCausalLM", "none", ALL),
    "mixtral": _arch("MixtralForCausalLM", "none", ALL),
    "olmoe": _arch("OlmoeForCausalLM", "none", ALL),
    "phimoe": _arch("PhimoeForCausalLM", "none", ALL),
    "qwen3_moe": _arch("Qwen3MoeForCausalLM", "none"),
    # experts and router are the decoder layer's own, apart from its dense MLP
    "gemma4_text": _arch("Gemma4ForCausalLM", "none", ALL, "experts", **GEMMA4),
    "gpt_oss": _arch("GptOssForCausalLM", "none", ALL, swiglu_limit=0.3),
    "inkling2_text": _arch("Inkling2ForCausalLM", "none", ALL, mlp_gate_softcap=0.3, mlp_up_softcap=0.5),
    # text backbones without a causal language model class
    "deepseek_ocr2_text": _arch("DeepseekOcr2TextModel", "multimodal"),
    "unlimited_ocr_text": _arch("UnlimitedOcrTextModel", "multimodal"),
    "glm4v_moe_text": _arch(
        "Glm4vMoeTextModel",
        "multimodal",
        head_dim=8,
        rope_parameters={**ROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]},
    ),
    "mistral_large4_text": _arch("MistralLarge4TextModel", "multimodal", **MLA),
    "qwen3_vl_moe_text": _arch("Qwen3VLMoeTextModel", "multimodal"),
    "qwen3_omni_moe_text": _arch("Qwen3OmniMoeThinkerTextModel", "multimodal"),
    "qwen3_omni_moe_talker_text": _arch(
        "Qwen3OmniMoeTalkerModel",
        "multimodal",
        ALL,
        inputs_embeds=True,
        shared_expert_intermediate_size=24,
    ),
    "glm5_next_text": _arch("Glm5NextTextModel", "multimodal", swiglu_limit=0.3, rope_dim=0, **MLA, **LINEAR_AND_FULL),
    "step3p5": _arch(
        "Step3p7TextModel",
        "multimodal",
        sliding_window=16,
        swiglu_limits=(0.3,),
        swiglu_limits_shared=(0.2,),
    ),
    "diffusion_gemma_text": _arch("DiffusionGemmaEncoderTextModel", "multimodal", ALL, "experts", global_head_dim=8),
    "openai_privacy_filter": _arch("OpenAIPrivacyFilterModel", "multimodal", ALL, swiglu_limit=0.3),
}

REFUSED: dict[str, TinyArch] = {
    "inkling_text": _arch("InklingForCausalLM", "refused", logits_mup_width_multiplier=1.0),
    "longcat_flash": _arch("LongcatFlashForCausalLM", "refused", ALL, zero_expert_num=2, head_dim=4, **MLA),
    "muse_spark_text": _arch("MuseSparkTextModel", "refused", moe_hidden_size=24),
    "ernie4_5_vl_moe_text": _arch(
        "Ernie4_5_VLMoeTextModel",
        "refused",
        moe_intermediate_size=[16, 16],
        rope_parameters={**ROPE, "mrope_section": [1, 1, 2]},
    ),
    "doge": _arch("DogeForCausalLM", "refused", ALL, is_moe=True, num_experts=16),
    "zaya": _arch("ZayaForCausalLM", "refused", ALL, top_k=1, router_hidden_size=16),
}


def _entry(model_type: str) -> TinyArch:
    return ARCHITECTURES.get(model_type) or REFUSED[model_type]


def available(model_type: str) -> bool:
    """Whether the installed transformers has this model type."""
    return hasattr(transformers, _entry(model_type).model)


def _dense_fields(dense: int, num_layers: int) -> dict[str, Any]:
    return {
        "first_k_dense_replace": dense,
        "num_dense_layers": dense,
        "moe_layer_start_index": dense,
        "mlp_only_layers": list(range(dense)),
        "moe_layers": list(range(dense, num_layers)),
        "mlp_layer_types": ["dense"] * dense + ["sparse"] * (num_layers - dense),
    }


def tiny_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    """The tiny config of a model type.

    An override is a name of `ALIASES`, `dense_layers` (how many of the first layers are dense,
    by default 1) or a field of the config. A name of the first two kinds does nothing in a type
    that has no such field.
    """
    arch = _entry(model_type)
    given = {**arch.overrides, **overrides}
    sizes = {name: given.pop(name, default) for name, (default, _) in ALIASES.items()}
    fields = _dense_fields(given.pop("dense_layers", 1), sizes["num_layers"])
    for name, (_, aliases) in ALIASES.items():
        fields.update(dict.fromkeys(aliases, sizes[name]))

    declared = signature(arch.config_class).parameters
    fields = {name: fields[name] for name in fields if name.split(".")[0] in declared}
    if fields.keys().isdisjoint(ALIASES["expert_width"][1]):
        fields["intermediate_size"] = sizes["expert_width"]

    kwargs: dict[str, Any] = {}
    for name, value in {**fields, **given}.items():
        if isinstance(value, tuple):
            value = [value[i % len(value)] for i in range(sizes["num_layers"])]
        outer, _, inner = name.rpartition(".")
        (kwargs.setdefault(outer, {}) if outer else kwargs)[inner] = value
    return arch.config_class(**kwargs)


def tiny_model(
    model_type: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedModel:
    """A model of `tiny_config` in eval mode, with all weights drawn from `seed`."""
    config = tiny_config(model_type, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _entry(model_type).model_class._from_config(config, dtype=dtype)
    for name, parameter in model.named_parameters():  # as from_pretrained does
        if any(part in name for part in getattr(model, "_keep_in_fp32_modules_strict", None) or ()):
            parameter.data = parameter.data.float()
    _randomize(model, seed)
    return model.eval()


@torch.no_grad()
def _randomize(model: PreTrainedModel, seed: int) -> None:
    """Random values everywhere, so that a weight or buffer that is left out shows.

    What starts as a constant (norms, biases, scales) or as something special (decays) is varied
    around it. Biases of the choice of experts get little, or they alone would choose.
    """
    generator = torch.Generator().manual_seed(seed)
    tied = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in tied:
            continue
        tied.add(id(tensor))
        if name.endswith("tid2eid"):  # the experts of each token id
            tensor.random_(0, model.config.n_routed_experts, generator=generator)
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        constant = bool((tensor == tensor.flatten()[0]).all())
        if any(bias in name for bias in ("correction_bias", "expert_bias", "balancing_bias")):
            tensor.copy_(tensor.float() + 0.05 * noise)
        elif constant or tensor.ndim < 2 or name.endswith("A_log"):
            tensor.copy_(tensor.float() + 0.2 * noise)
        elif isinstance(tensor, torch.nn.Parameter):  # other buffers are computed from the config
            tensor.copy_(0.15 * noise)


def random_ids(n: int = 8, length: int = 24, vocab: int = 128, seed: int = 0) -> list[list[int]]:
    """`n` lists of token ids, the first `length` long, the next ones shorter by one each."""
    rng = random.Random(seed)
    return [[rng.randrange(3, vocab) for _ in range(length - i % length)] for i in range(n)]


def tiny_inputs(model: PreTrainedModel, ids: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """Keyword arguments for the model's forward: token ids padded on the right, and their mask."""
    width = max(map(len, ids))
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids])
    tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in ids])
    if _entry(model.config.model_type.removeprefix("cdmoe_")).inputs_embeds:
        return {"inputs_embeds": model.get_input_embeddings()(tokens), "attention_mask": mask}
    return {"input_ids": tokens, "attention_mask": mask}
