"""Random models of DeepSeekMoE's form, and the device that search_speed.py and inference_speed.py run on."""

from __future__ import annotations

import platform
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

import cdmoe_plugin  # noqa: F401  (makes AutoConfig know "deepseek")


@dataclass(frozen=True)
class Sizes:
    """Sizes of a DeepSeekMoE-like model, named as in its config."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    n_routed_experts: int
    n_shared_experts: int = 2
    num_experts_per_tok: int = 6
    first_k_dense_replace: int = 1

    def scaled(self, hidden_size: int) -> Sizes:
        """Another hidden size, and the MLPs, the vocabulary and the number of heads in proportion to it.

        Widths are multiples of 8, as grouped matrix products want them.
        """

        def in_proportion(width: int) -> int:
            return max(8, round(width * hidden_size / self.hidden_size / 8) * 8)

        return replace(
            self,
            vocab_size=in_proportion(self.vocab_size),
            hidden_size=hidden_size,
            intermediate_size=in_proportion(self.intermediate_size),
            moe_intermediate_size=in_proportion(self.moe_intermediate_size),
            num_attention_heads=max(1, self.num_attention_heads * hidden_size // self.hidden_size),
        )

    def changed(
        self, hidden_size: int | None = None, num_layers: int | None = None, experts: int | None = None
    ) -> Sizes:
        """These sizes, but what is given; see `scaled` for the hidden size.

        Raises:
            ValueError: naming the size that can't be.
        """
        sizes = self if hidden_size is None else self.scaled(hidden_size)
        if num_layers is not None:
            sizes = replace(sizes, num_hidden_layers=num_layers)
        if experts is not None:
            sizes = replace(sizes, n_routed_experts=experts)
        if sizes.hidden_size % (2 * sizes.num_attention_heads):
            raise ValueError(
                f"`hidden_size` is {sizes.hidden_size}, which {sizes.num_attention_heads} attention heads of an even "
                "width can't share: use a power of two."
            )
        if sizes.num_hidden_layers <= sizes.first_k_dense_replace:
            raise ValueError(f"`num_layers` is {sizes.num_hidden_layers}, but the first layer is dense: use 2 or more.")
        if sizes.n_routed_experts < sizes.num_experts_per_tok:
            raise ValueError(
                f"`experts` is {sizes.n_routed_experts}, but each token is sent to {sizes.num_experts_per_tok} of them."
            )
        return sizes

    def config(self, **more: Any) -> Any:
        """The config of such a model; `more` are other fields of it."""
        sizes = {name: getattr(self, name) for name in self.__dataclass_fields__}
        kv_heads = self.num_attention_heads
        return AutoConfig.for_model(
            "deepseek", **{**sizes, "num_key_value_heads": kv_heads, "bos_token_id": 0, "eos_token_id": 0, **more}
        )


DEEPSEEK_MOE_16B = Sizes(
    vocab_size=102400,
    hidden_size=2048,
    intermediate_size=10944,
    moe_intermediate_size=1408,
    num_hidden_layers=28,
    num_attention_heads=16,
    n_routed_experts=64,
)


def build_model(config: Any, device: torch.device, dtype: torch.dtype, **options: Any) -> Any:
    """A model with random weights, made where it is used and in the dtype that it is used in; for evaluation.

    Args:
        **options: For `AutoModelForCausalLM.from_config`.
    """
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, **options).eval()


def random_ids(vocab_size: int, sequences: int, length: int) -> torch.Tensor:
    """Token ids `[sequences, length]`, int64, the same on every machine; 0 is left out, as it may mean padding."""
    return torch.randint(1, vocab_size, (sequences, length), generator=torch.Generator().manual_seed(0))


def default_device() -> torch.device:
    """The accelerator where there is one, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def synchronize(device: torch.device) -> None:
    """Waits until all that was started on a device is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def memory_of(device: torch.device) -> Any:
    """The module of torch that counts what is allocated on a device (`torch.cuda` and the like); None if none does."""
    module = torch.get_device_module(device)
    return module if hasattr(module, "max_memory_allocated") else None


def where(device: torch.device) -> str:
    """What figures must be read with: the device by name, and the versions of torch and transformers."""
    if device.type == "cpu":
        name = f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)"
    else:
        name_of = getattr(torch.get_device_module(device), "get_device_name", lambda d: d.type)
        name = name_of(device)
    return f"{name}; torch {torch.__version__}; transformers {transformers.__version__}"
