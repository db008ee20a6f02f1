"""
The cost of condensing the largest open models, by arithmetic on their configs; nothing is measured:

python recipes/benchmarks/large_models.py

For each model: weights and the largest decoder layer in bfloat16, as they are in memory; the bytes of the checkpoint;
operations of the phases on 51,200 calibration tokens; and the minutes that these take on an H100 at 40% of its 989
TFLOP/s, or 67 in float64: with all layers in memory, and with layers on a disk that is read at 2 GB/s while the layer
before computes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import common
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cdmoe_plugin.blocks import find_sparse_blocks
from cdmoe_plugin.cards.tables import format_table
from cdmoe_plugin.condense.refit.neurons import CANDIDATES
from cdmoe_plugin.condense.refit.ridge import STRENGTHS
from cdmoe_plugin.search.spread.forms import MOST_NEURONS

# Architecture, fields of the published config, and bits per weight on disk.
MODELS: dict[str, tuple[str, dict[str, Any], float]] = {
    "DeepSeekMoE-16B": ("deepseek", common.DEEPSEEK_MOE_16B, 16),
    "DeepSeek-V3": (
        "deepseek_v3",
        {"hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61}
        | {"n_routed_experts": 256, "num_experts_per_tok": 8, "n_shared_experts": 1, "first_k_dense_replace": 3}
        | {"num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512}
        | {"vocab_size": 129280},
        8,
    ),
    "Qwen3-235B-A22B": (
        "qwen3_moe",
        {"hidden_size": 4096, "moe_intermediate_size": 1536, "intermediate_size": 12288, "num_hidden_layers": 94}
        | {"num_experts": 128, "num_experts_per_tok": 8, "num_attention_heads": 64, "num_key_value_heads": 4}
        | {"head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": False},
        16,
    ),
    "gpt-oss-120b": (
        "gpt_oss",
        {"hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 36, "num_local_experts": 128}
        | {"num_experts_per_tok": 4, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64}
        | {"vocab_size": 201088},
        4.25,
    ),
}
TOKENS, KEPT, CONDENSED, SHARE = 51_200, 6, 15, 1 / 3
# The share of the sequences on which a search for a size measures how much the output depends on each layer.
FEW = 0.32
OPERATIONS, WIDE, DISK = 0.4 * 989e12, 0.4 * 67e12, 2e9  # per second


@dataclass(frozen=True)
class Work:
    """The operations of a phase, how many of them are in float64, and how often it reads every layer.

    It reads them 0 times if it is not used with layers on disk.
    """

    operations: float
    reads: int
    wide: float = 0.0

    def cell(self, on_disk: float) -> str:
        """Format the operations, and the minutes with layers in memory and on disk, at least one."""
        memory = ((self.operations - self.wide) / OPERATIONS + self.wide / WIDE) / 60
        minutes = [max(1, memory), *([max(1, memory, self.reads * on_disk / DISK / 60)] if self.reads else [])]
        return "; ".join([f"{self.operations / 1e15:,.0f}", *(f"{each:,.0f} min" for each in minutes)])


@dataclass(frozen=True)
class Counts:
    """The parameters of a model: all, those of its largest layer, of one expert, and those that a token uses.

    Then numbers of decoder layers, sparse ones, experts, experts per token, neurons of an expert, shared neurons and
    features.
    """

    total: int
    largest: int
    expert: int
    active: int
    layers: int
    sparse: int
    experts: int
    top_k: int
    neurons: int
    shared: int
    hidden: int

    def phases(self) -> dict[str, Work]:
        """Count the phases of a search for `CONDENSED` of the layers, and of a refit of as many."""
        forward = 2.0 * self.active * TOKENS
        every = 2.0 * self.sparse * self.experts * self.expert * TOKENS  # each expert on each token
        # About 20 operations per entry of each candidate's output and round.
        compared = 20.0 * self.sparse * KEPT * self.experts * self.hidden * TOKENS
        # Candidates share the layers before the first one that differs: half of them, in the mean.
        rounds = [forward * (self.sparse - number) / 2 + forward for number in range(CONDENSED)]
        # After the first round: all on 8 of 100 sequences, a third on 8 more, a ninth on 16 more, one on the rest.
        shares = [0.08 + 0.08 * SHARE + 0.16 * SHARE**2 for _ in rounds[1:]]
        raced = sum(share * (whole - forward) + forward for share, whole in zip(shares, rounds[1:], strict=True))
        spread, width = self.spread(), KEPT * self.neurons + self.shared
        products = CONDENSED * width * (1.1 * width + 4.0 * self.hidden) * TOKENS
        some = self.shared + CANDIDATES * MOST_NEURONS
        activations = 8 * self.sparse * 4.0 * some * self.hidden * TOKENS
        return {
            "expert search": Work(forward + every + compared, 1),
            "layer search, race": Work(rounds[0] + raced, 0),
            "layer search, full": Work(sum(rounds), CONDENSED),
            # The model once, its experts and the candidates' activations once for each of 8 forms, and the model on a
            # few sequences once per layer.
            "search for a size": Work(forward * (9 + FEW * self.sparse / 2) + activations + spread, 2, spread),
            # The model once sparse and once condensed, and the sums of products of a ridge regression.
            "refit, down_proj": Work(2 * forward + products, 1, products),
        }

    def spread(self) -> float:
        """Count the operations in float64 for the errors of all forms of every sparse layer.

        See `cdmoe_plugin/search/spread/`: eighths of all experts stay, or none.
        """
        numbers = {round(self.experts * i / 8) for i in range(1, 8)}
        total = 0.0
        for routed in (0, *(number for number in numbers if number >= self.top_k)):
            left = (self.experts - routed) * self.neurons
            width = min(left, 3 * self.experts * self.neurons // 8, MOST_NEURONS)
            some = self.shared + min(CANDIDATES * width, left)
            width += self.shared
            # Products of the candidates' activations on four of five tokens, of the chosen ones' on the others.
            products = 0.8 * self.products(some) + 0.2 * self.products(width)
            choice = width**2 * (some - 2 / 3 * width) + (2 * some - width) * width * self.hidden
            fits = (len(STRENGTHS) + 1) * (5 / 3 * width**3 + 4.0 * width**2 * self.hidden)
            total += products * TOKENS + choice + fits
        return total * self.sparse

    def products(self, width: int) -> float:
        """Count the operations per token for one triangle of the products of activations, and those with the target."""
        return 1.1 * width**2 + 2.0 * width * self.hidden


def count(model_type: str, fields: dict[str, Any]) -> Counts:
    """Count a model's parameters from its config, without weights."""
    config = AutoConfig.for_model(model_type, **fields)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    blocks = find_sparse_blocks(model)
    block = blocks[-1]
    expert = sum(size(p) for p in block.experts.parameters()) // block.num_experts
    top_k = fields["num_experts_per_tok"]
    active = size(model.get_output_embeddings().weight) + sum(size(p) for p in model.model.layers.parameters())
    active -= len(blocks) * (block.num_experts - top_k) * expert
    layers = [sum(map(size, layer.parameters())) for layer in model.model.layers]
    return Counts(
        total=model.num_parameters(),
        largest=max(layers),
        expert=expert,
        active=active,
        layers=len(layers),
        sparse=len(blocks),
        experts=block.num_experts,
        top_k=top_k,
        neurons=block.intermediate_size,
        shared=block.shared_intermediate_size,
        hidden=config.hidden_size,
    )


def size(parameter: torch.Tensor) -> int:
    return parameter.numel()


def fits(counts: Counts) -> str:
    """Count the GPUs of 80 GB that hold the model in bfloat16, beside 10 GB for activations each."""
    return str(math.ceil(2 * counts.total / 70e9))


def rows(models: Iterable[str]) -> list[tuple[str, ...]]:
    """Format a row for each model."""
    found = []
    for name in models:
        model_type, fields, bits = MODELS[name]
        counts = count(model_type, fields)
        on_disk = counts.total * bits / 8
        cells = [
            f"{counts.total / 1e9:.0f} B",
            f"{2 * counts.total / 1e9:,.0f} GB",
            f"{2 * counts.largest / 1e9:.1f} GB",
        ]
        cells += [f"{on_disk / 1e9:,.0f} GB", fits(counts)]
        for work in counts.phases().values():
            cells.append(work.cell(on_disk))
        found.append((name, *cells))
    return found


def main() -> None:
    header = ["model", "parameters", "bfloat16", "largest layer", "checkpoint", "GPUs of 80 GB that hold it"]
    header += [*Counts(*[0] * 11).phases()]
    print("By arithmetic, not measured. Phases: 10^15 operations; minutes with layers in memory; on disk.\n")
    table = rows(MODELS)
    # Models as columns: the table is narrower.
    turned = list(zip(header, *table, strict=True))
    print(format_table(list(turned[0]), turned[1:]))


if __name__ == "__main__":
    main()
