"""DeepSeekMoE (`model_type` "deepseek", the architecture of DeepSeekMoE-16B) for transformers 5.

A Llama decoder in which, from some layer on, routed experts and shared experts that process every
token replace the MLP. Checkpoints of the original release open without conversion.

A copy of this file is saved beside the weights of condensed models, for `trust_remote_code=True` where the
package is not installed: it imports only torch, transformers and `modeling_cdmoe`, which is copied too.
"""

import sys
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.conversion_mapping import (
    USER_REGISTERED_MAPPINGS,
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.models.olmoe.modeling_olmoe import OlmoeModel
from transformers.models.qwen2_moe.configuration_qwen2_moe import Qwen2MoeConfig
from transformers.models.qwen2_moe.modeling_qwen2_moe import (
    Qwen2MoeExperts,
    Qwen2MoeForCausalLM,
    Qwen2MoeMLP,
    Qwen2MoePreTrainedModel,
    Qwen2MoeTopKRouter,
)
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME
from transformers.utils.output_capturing import OutputRecorder

from .modeling_cdmoe import ClassFactory, CondensedModelMixin


class DeepseekConfig(LlamaConfig):
    """Configuration of a DeepSeekMoE model.

    The `config.json` of the original release is supported (`rope_theta`, `rope_scaling`,
    `torch_dtype`), with its defaults. Fields that are not listed here are those of [`LlamaConfig`].

    Args:
        moe_intermediate_size (`int`, *optional*, defaults to 1407):
            Width of one routed expert, and of one shared expert.
        n_routed_experts (`int`, *optional*):
            Number of routed experts of a sparse layer, also called `num_experts`. All layers are
            dense if `None`.
        n_shared_experts (`int`, *optional*):
            Number of shared experts of a sparse layer, stored as one MLP of their total width. No
            shared experts if `None`.
        num_experts_per_tok (`int`, *optional*):
            Number of routed experts per token.
        first_k_dense_replace (`int`, *optional*, defaults to 0):
            Number of dense layers before the first sparse one.
        moe_layer_freq (`int`, *optional*, defaults to 1):
            After those, only layers whose index is a multiple of this number are sparse.
        norm_topk_prob (`bool`, *optional*, defaults to `False`):
            Whether the weights of the chosen experts, if more than one, are scaled to sum to 1.
        scoring_func (`str`, *optional*, defaults to `"softmax"`):
            Function from router logits to expert weights. Only `"softmax"` is supported.
        aux_loss_alpha (`float`, *optional*, defaults to 0.001):
            Coefficient of the load-balancing loss, also called `router_aux_loss_coef`. The loss is
            added only if `output_router_logits` is set.
        seq_aux (`bool`, *optional*, defaults to `True`):
            Without effect, for compatibility with the original's files: the load-balancing loss is
            that of transformers' other MoEs, over the batch rather than per sequence.
        output_router_logits (`bool`, *optional*, defaults to `False`):
            Whether to return the router logits, and with them the load-balancing loss.
    """

    model_type = "deepseek"
    auto_map: ClassVar[dict[str, str]] = {}  # TRL 1.16 reads it from every config class that transformers lacks
    attribute_map = {
        "num_experts": "n_routed_experts",
        "router_aux_loss_coef": "aux_loss_alpha",
    }
    # Taken from Qwen2-MoE because the styles differ between releases of transformers
    base_model_tp_plan = {
        **Qwen2MoeConfig.base_model_tp_plan,
        "layers.*.mlp.shared_experts.gate_proj": "colwise",
        "layers.*.mlp.shared_experts.up_proj": "colwise",
        "layers.*.mlp.shared_experts.down_proj": "rowwise",
    }
    base_model_ep_plan = Qwen2MoeConfig.base_model_ep_plan

    vocab_size: int = 102400
    num_hidden_layers: int = 30
    bos_token_id: int | None = 100000
    eos_token_id: int | list[int] | None = 100001
    moe_intermediate_size: int = 1407
    n_routed_experts: int | None = None
    n_shared_experts: int | None = None
    num_experts_per_tok: int | None = None
    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1
    norm_topk_prob: bool = False
    scoring_func: str = "softmax"
    aux_loss_alpha: float = 0.001
    seq_aux: bool = True
    output_router_logits: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        # Saving does not copy the code files named by an original checkpoint, so the entry would be
        # wrong. If this file is itself such a copy, the entry stays.
        if not type(self).__module__.startswith(TRANSFORMERS_DYNAMIC_MODULE_NAME):
            kwargs.pop("auto_map", None)
        super().__post_init__(**kwargs)
        if self.scoring_func != "softmax":
            raise ValueError(f"`scoring_func` must be 'softmax', got {self.scoring_func!r}")
        self.validate()  # as transformers' own configurations do when they are made

    def is_sparse_layer(self, layer_idx: int) -> bool:
        """Return whether a decoder layer has routed experts rather than a plain MLP.

        Args:
            layer_idx (`int`): Index of the decoder layer, from 0.
        """
        return (
            self.n_routed_experts is not None
            and layer_idx >= self.first_k_dense_replace
            and layer_idx % self.moe_layer_freq == 0
        )


class DeepseekTopKRouter(Qwen2MoeTopKRouter):
    """The router: a softmax over all experts in float32, then the largest `num_experts_per_tok`.

    The original adds 1e-20 to the sum by which it divides the chosen weights. That sum is at least
    `num_experts_per_tok / n_routed_experts`, so the addition changes nothing in float32.

    Args:
        config (`DeepseekConfig`): Configuration of the model.
    """

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__(config)
        # A single expert keeps its probability instead of the constant 1
        self.norm_topk_prob = config.norm_topk_prob and self.top_k > 1


class DeepseekSparseMoeBlock(nn.Module):
    """A sparse block: routed experts, plus shared experts that process every token with weight 1.

    Args:
        config (`DeepseekConfig`): Configuration of the model.
    """

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        self.gate = DeepseekTopKRouter(config)
        self.experts = Qwen2MoeExperts(config)
        self.shared_experts = None
        if config.n_shared_experts:
            self.shared_experts = Qwen2MoeMLP(
                config, intermediate_size=config.n_shared_experts * config.moe_intermediate_size
            )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Apply the block.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`):
                Output of the layer's second norm.

        Returns:
            `torch.Tensor` of the same shape.
        """
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, top_k_weights, top_k_index = self.gate(tokens)
        output = self.experts(tokens, top_k_index, top_k_weights)
        if self.shared_experts is not None:
            output = output + self.shared_experts(tokens)
        return output.reshape(hidden_states.shape)


class DeepseekDecoderLayer(LlamaDecoderLayer):
    """A Llama decoder layer with a sparse block if [`~DeepseekConfig.is_sparse_layer`].

    Args:
        config (`DeepseekConfig`): Configuration of the model.
        layer_idx (`int`): Index of the layer.
    """

    def __init__(self, config: DeepseekConfig, layer_idx: int) -> None:
        # Skip `LlamaDecoderLayer.__init__`, which would build an MLP that is replaced here
        super(LlamaDecoderLayer, self).__init__()
        self.hidden_size = config.hidden_size
        self.self_attn = LlamaAttention(config, layer_idx)
        mlp_class = DeepseekSparseMoeBlock if config.is_sparse_layer(layer_idx) else Qwen2MoeMLP
        self.mlp = mlp_class(config)  # type: ignore[assignment]
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class DeepseekPreTrainedModel(Qwen2MoePreTrainedModel):
    """The supported features and weight initialisation, mostly those of Qwen2-MoE."""

    config: DeepseekConfig  # type: ignore[assignment]
    _no_split_modules = ["DeepseekDecoderLayer"]
    _can_record_outputs = {
        "router_logits": OutputRecorder(DeepseekTopKRouter, index=0),
        "hidden_states": DeepseekDecoderLayer,
        "attentions": LlamaAttention,
    }

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers looks for the decorator of the experts class in this module's source, does
        # not find it, and would silently run the experts one after the other.
        return True


class DeepseekModel(DeepseekPreTrainedModel):
    """The decoder without a head.

    Args:
        config (`DeepseekConfig`): Configuration of the model.
    """

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([DeepseekDecoderLayer(config, idx) for idx in range(config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    # OLMoE's forward uses exactly the parts above: a plain causal decoder that returns MoE outputs
    forward = OlmoeModel.forward


class DeepseekForCausalLM(DeepseekPreTrainedModel, GenerationMixin):
    """The decoder with a language modelling head.

    Args:
        config (`DeepseekConfig`): Configuration of the model.
    """

    _tied_weights_keys = Qwen2MoeForCausalLM._tied_weights_keys
    _tp_plan = Qwen2MoeForCausalLM._tp_plan
    _pp_plan = Qwen2MoeForCausalLM._pp_plan
    _fsdp_plan = Qwen2MoeForCausalLM._fsdp_plan

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__(config)
        self.model = DeepseekModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.router_aux_loss_coef = config.router_aux_loss_coef
        self.num_experts = config.num_experts
        self.num_experts_per_tok = config.num_experts_per_tok
        self.post_init()

    forward = Qwen2MoeForCausalLM.forward

    @staticmethod
    def create_masks_for_generate(*args: Any, **kwargs: Any) -> Any:
        """Make a single mask. Qwen2-MoE has one for each type of attention; here, attention is always full."""
        masks = create_masks_for_generate(*args, **kwargs)
        return masks["full_attention"] if isinstance(masks, dict) else masks


class DeepseekForSequenceClassification(GenericForSequenceClassification, DeepseekPreTrainedModel):
    """The decoder with a classification head on the last token.

    Args:
        config (`DeepseekConfig`): Configuration of the model.
    """

    def __init__(self, config: DeepseekConfig) -> None:
        # Skip the generic `__init__`, which makes the decoder with `AutoModel`: that does not know
        # this class if the file is opened as custom code
        super(GenericForSequenceClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.model = DeepseekModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()


class DeepseekForTokenClassification(GenericForTokenClassification, DeepseekPreTrainedModel):
    """The decoder with a classification head on every token.

    Args:
        config (`DeepseekConfig`): Configuration of the model.
    """

    def __init__(self, config: DeepseekConfig) -> None:
        super(GenericForTokenClassification, self).__init__(config)  # as above
        self.num_labels = config.num_labels
        self.model = DeepseekModel(config)
        self.dropout = nn.Dropout(0.1)
        self.score = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()


# Checkpoints store the experts of a layer one by one, modules store them fused. transformers
# converts between the two on load and on save, for custom code only if its model type is
# registered. This file may be imported again as a copy beside weights: the first mapping stays.
if DeepseekConfig.model_type not in USER_REGISTERED_MAPPINGS:
    register_checkpoint_conversion_mapping(
        DeepseekConfig.model_type, get_checkpoint_conversion_mapping("qwen2_moe"), overwrite=True
    )

__all__ = [
    "DeepseekConfig",
    "DeepseekForCausalLM",
    "DeepseekForSequenceClassification",
    "DeepseekForTokenClassification",
    "DeepseekModel",
    "DeepseekPreTrainedModel",
]


# For `config.json` beside a copy of this file; the package has its condensed classes in `classes`.
_condensed = ClassFactory(__name__, CondensedModelMixin)


def __getattr__(name: str) -> Any:
    """Make `CDMoEDeepseek<X>` for the class `Deepseek<X>`."""
    return _condensed.by_name(name, sys.modules[__name__])
