"""What the shapes of a model say of its costs: parameters, weights that are read, floating-point operations.

Nothing here looks at weights: a model on the meta device does. Counts are what has to be read and computed at least,
each weight once per forward pass; attention is counted as multi-head or grouped-query attention with a full cache.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from cdmoe_plugin.blocks import SparseBlock, describe_sparse_blocks


def expected_experts(num_experts: int, top_k: int, tokens: int) -> float:
    """How many of N experts T tokens choose together if each draws k of them: `N * (1 - (1 - k/N)^T)` in the mean."""
    return num_experts * (1 - (1 - top_k / num_experts) ** tokens)


@dataclass(frozen=True)
class SparseCounts:
    """One sparse layer, in parameters.

    Args:
        num_experts (`int`): Routed experts N.
        top_k (`int`): Experts k of a token.
        expert (`int`): One routed expert.
        shared (`int`): The shared expert, its gate included; 0 without one.
        router (`int`): All else in the sparse block.
    """

    num_experts: int
    top_k: int
    expert: int
    shared: int
    router: int

    @property
    def per_token(self) -> int:
        """Parameters that a token is multiplied with."""
        return self.router + self.shared + self.top_k * self.expert


@dataclass(frozen=True)
class Work:
    """What one forward pass has to do.

    Args:
        flops (`float`): Floating-point operations of matrix products, two per multiplication.
        weights (`float`): Parameters to be read.
        cache (`float`): Keys and values to be read, or written by a prefill, in numbers.
    """

    flops: float
    weights: float
    cache: float

    def bytes_read(self, itemsize: int) -> float:
        return (self.weights + self.cache) * itemsize


@dataclass(frozen=True)
class ModelCounts:
    """A model's parameters, by how they are used.

    Args:
        hidden_size (`int`): Features of a token.
        embedding (`int`): The input embedding; a token reads one row.
        head (`int`): The output head.
        tied (`bool`): Whether the head is the input embedding.
        matrices (`int`): Matrices that every token is multiplied with: attention, dense MLPs, condensed ones.
        vectors (`int`): Norms and biases.
        sparse (`dict[int, SparseCounts]`): Sparse layers by their index.
        attention_width (`int`): Attention heads times their width, summed over layers.
        cache_width (`int`): Numbers that the cache keeps of a token.
    """

    hidden_size: int
    embedding: int
    head: int
    tied: bool
    matrices: int
    vectors: int
    sparse: Mapping[int, SparseCounts]
    attention_width: int
    cache_width: int

    @property
    def total(self) -> int:
        """All parameters; a head that is the embedding counts once."""
        layers = sum(s.router + s.shared + s.num_experts * s.expert for s in self.sparse.values())
        return self.embedding + (0 if self.tied else self.head) + self.matrices + self.vectors + layers

    @property
    def active(self) -> int:
        """Parameters that one token reads, with logits: also what decoding one sequence reads per step."""
        return round(self.weights_read(1))

    def condensed(self, layers: Collection[int], experts: int) -> ModelCounts:
        """The counts once `layers` are condensed to the shared and `experts` routed experts.

        Raises:
            ValueError: if a layer is not sparse, or has fewer experts.
        """
        for layer in layers:
            if layer not in self.sparse:
                raise ValueError(f"Layer {layer} is not sparse; sparse are {sorted(self.sparse)}.")
            if not 0 <= experts <= self.sparse[layer].num_experts:
                raise ValueError(f"Layer {layer} has {self.sparse[layer].num_experts} experts, not {experts}.")
        dense = sum(self.sparse[layer].shared + experts * self.sparse[layer].expert for layer in layers)
        rest = {layer: counts for layer, counts in self.sparse.items() if layer not in layers}
        return replace(self, matrices=self.matrices + dense, sparse=rest)

    def weights_read(self, tokens: int, touched: Mapping[int, float] | None = None) -> float:
        """Parameters that a forward pass of `tokens` tokens reads, each once.

        Args:
            touched (`Mapping[int, float]`, *optional*): How many experts the tokens choose together, by layer; by
                default what is expected of uniform routing.
        """
        read: float = tokens * self.hidden_size + self.head + self.matrices + self.vectors
        for layer, s in self.sparse.items():
            experts = expected_experts(s.num_experts, s.top_k, tokens) if touched is None else touched[layer]
            read += s.router + s.shared + experts * s.expert
        return read

    def flops(self, tokens: int, pairs: float, logits: int) -> float:
        """Floating-point operations of matrix products.

        Args:
            tokens (`int`): Tokens that go through the layers.
            pairs (`float`): Pairs of a query and a key that are compared, per layer and head.
            logits (`int`): Tokens whose logits are computed.
        """
        per_token = self.matrices + sum(s.per_token for s in self.sparse.values())
        return 2.0 * tokens * per_token + 2.0 * logits * self.head + 4.0 * pairs * self.attention_width

    def prefill(self, batch: int, length: int) -> Work:
        """One forward pass over `batch` sequences of `length` tokens, with logits of each one's last token."""
        tokens = batch * length
        flops = self.flops(tokens, pairs=tokens * (length + 1) / 2, logits=batch)
        return Work(flops, self.weights_read(tokens), float(tokens * self.cache_width))

    def step(self, batch: int, context: float) -> Work:
        """One decoding step of `batch` sequences; `context` counts the tokens that each one sees, its own included."""
        flops = self.flops(batch, pairs=batch * context, logits=batch)
        return Work(flops, self.weights_read(batch), batch * context * self.cache_width)


def count_model(model: Any) -> ModelCounts:
    """Counts a sparse causal language model, on whatever device.

    Raises:
        UnsupportedModelError: if it has no sparse layers that can be condensed.
        ValueError: if its config does not say how many experts a token is sent to.
    """
    blocks = describe_sparse_blocks(model)
    config = model.config.get_text_config()
    top_k = getattr(config, "num_experts_per_tok", None)
    if not top_k:
        raise ValueError(f"The config of model type {config.model_type!r} has no `num_experts_per_tok`.")
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    sparse = {block.layer: _count_block(block, top_k) for block in blocks}
    apart = {id(embedding), id(head)}
    for block in blocks:
        apart |= {id(p) for module in (block.module, block.shared) if module is not None for p in module.parameters()}
    rest = [p for p in model.parameters() if id(p) not in apart]
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return ModelCounts(
        hidden_size=config.hidden_size,
        embedding=embedding.numel(),
        head=head.numel(),
        tied=head is embedding,
        matrices=sum(p.numel() for p in rest if p.ndim > 1),
        vectors=sum(p.numel() for p in rest if p.ndim == 1),
        sparse=sparse,
        attention_width=config.num_hidden_layers * heads * width,
        cache_width=config.num_hidden_layers * 2 * kv_heads * width,
    )


def _count_block(block: SparseBlock, top_k: int) -> SparseCounts:
    def parameters(*modules: nn.Module | None) -> dict[int, int]:
        return {id(p): p.numel() for module in modules if module is not None for p in module.parameters()}

    shared = parameters(block.shared, block.shared_gate)
    experts = parameters(block.experts)
    router = {key: n for key, n in parameters(block.module).items() if key not in shared and key not in experts}
    return SparseCounts(
        num_experts=block.num_experts,
        top_k=top_k,
        expert=sum(experts.values()) // block.num_experts,
        shared=sum(shared.values()),
        router=sum(router.values()),
    )
