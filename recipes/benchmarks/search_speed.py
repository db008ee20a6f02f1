"""
How much faster the searches are than one forward pass of the model per candidate, measured in one run:

python recipes/benchmarks/search_speed.py

The naive searches do what Algorithms 1 and 2 say, literally: condense a candidate, run the whole model on all tokens,
compare outputs. Naive and fast must choose the same. A random model serves: speed does not depend on the weights.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

import cdmoe_plugin  # noqa: F401  (makes AutoConfig know "deepseek")
from cdmoe_plugin import CondenseConfig, search_plan
from cdmoe_plugin.condensed import fold, standing_in
from cdmoe_plugin.divergence import js_divergence
from cdmoe_plugin.report import format_table
from cdmoe_plugin.sparse import SparseBlock, find_sparse_blocks


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=64, help="routed experts per layer")
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--num_layers", type=int, default=9, help="decoder layers; the first is dense")
    parser.add_argument("--tokens", type=int, default=2048, help="calibration tokens, in sequences of --length")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--kept", type=int, default=4, help="experts K to keep")
    parser.add_argument("--condensed", type=int, default=4, help="layers that the layer search chooses")
    parser.add_argument("--naive_layers", type=int, default=1, help="sparse layers on which naive expert search is run")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def build_model(args: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "deepseek",
        vocab_size=1024,
        hidden_size=args.hidden_size,
        intermediate_size=4 * args.hidden_size,
        moe_intermediate_size=args.hidden_size // 2,
        num_hidden_layers=args.num_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=args.experts,
        n_shared_experts=2,
        num_experts_per_tok=6,
        first_k_dense_replace=1,
        initializer_range=0.1,
    )
    # The sparse model's fastest form, so that the naive search is not slow for want of it.
    return AutoModelForCausalLM.from_config(config, experts_implementation="grouped_mm").to(args.device).eval()


class NaiveSearch:
    """One forward pass of the whole model per candidate."""

    def __init__(self, model: Any, ids: torch.Tensor) -> None:
        self.model = model
        self.ids = ids
        self.blocks = {block.layer: block for block in find_sparse_blocks(model)}
        with ExitStack() as stack:
            routes = {i: stack.enter_context(block.recording_routes()) for i, block in self.blocks.items()}
            self.reference = self.hidden_states()
        self.gates = {i: self.mean_gates(*routes[i][0], block.num_experts) for i, block in self.blocks.items()}

    @staticmethod
    def mean_gates(experts: torch.Tensor, weights: torch.Tensor, number: int) -> dict[int, float]:
        chosen = {e: weights[experts == e] for e in range(number)}
        return {e: float(gates.double().mean()) for e, gates in chosen.items() if len(gates)}

    @torch.no_grad()
    def hidden_states(self) -> tuple[torch.Tensor, ...]:
        return self.model.model(input_ids=self.ids, output_hidden_states=True, use_cache=False).hidden_states

    def divergence(self, condensed: dict[int, list[int]], at: int) -> float:
        """Divergence of hidden state `at` with some layers condensed to some experts."""
        with ExitStack() as stack:
            for layer, experts in condensed.items():
                mlp = fold(self.blocks[layer], experts, [self.gates[layer][e] for e in experts])
                stack.enter_context(standing_in(self.model, self.blocks[layer], mlp))
            return float(js_divergence(self.reference[at], self.hidden_states()[at]).mean())

    def experts(self, block: SparseBlock, kept: int) -> list[int]:
        order: list[int] = []
        for _ in range(kept):
            rest = [e for e in self.gates[block.layer] if e not in order]
            scores = {e: self.divergence({block.layer: [*order, e]}, block.layer + 1) for e in sorted(rest)}
            order.append(min(scores, key=lambda e: (scores[e], e)))
        return order

    def layers(self, experts: dict[int, list[int]], number: int) -> list[int]:
        order: list[int] = []
        for _ in range(number):
            rest = [layer for layer in sorted(experts) if layer not in order]
            scores = {layer: self.divergence({i: experts[i] for i in [*order, layer]}, -1) for layer in rest}
            order.append(min(scores, key=lambda layer: (scores[layer], layer)))
        return order


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def main() -> None:
    args = parse_arguments()
    logging.set_verbosity_error()
    model = build_model(args)
    ids = torch.randint(1, 1024, (args.tokens // args.length, args.length), generator=torch.Generator().manual_seed(0))
    sparse = [block.layer for block in find_sparse_blocks(model)]
    options = {"batch_size": len(ids), "num_samples": len(ids), "max_length": args.length}
    config = CondenseConfig(layers=sparse, num_experts=args.kept, **options)
    both = CondenseConfig(num_layers=args.condensed, num_experts=args.kept, **options)

    naive = NaiveSearch(model, ids.to(args.device))
    search_plan(model, CondenseConfig(layers=sparse[:1], num_experts=1, **options), calibration=ids)  # warm-up
    fast, fast_experts = timed(lambda: search_plan(model, config, calibration=ids))
    experts = {layer.layer: layer.experts for layer in fast.layers}
    whole, fast_both = timed(lambda: search_plan(model, both, calibration=ids))
    fast_layers = fast_both - fast_experts

    some = sparse[len(sparse) // 2 :][: args.naive_layers]
    found, seconds = timed(lambda: {i: naive.experts(naive.blocks[i], args.kept) for i in some})
    naive_experts = seconds * len(sparse) / len(some)
    order, naive_layers = timed(lambda: naive.layers(experts, args.condensed))
    assert found == {layer: experts[layer] for layer in some}, "naive and fast search chose other experts"
    assert order == [layer.layer for layer in whole.layers], "naive and fast search chose other layers"

    where = (
        torch.cuda.get_device_name()
        if args.device == "cuda"
        else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    print(
        f"{where}; torch {torch.__version__}; {args.num_layers} layers, {args.experts} experts, hidden "
        f"{args.hidden_size}, {ids.numel()} tokens, K = {args.kept}, {args.condensed} layers condensed"
    )
    note = f"{len(some)} of {len(sparse)} layers timed: {seconds:.1f} s" if len(some) < len(sparse) else ""
    rows = [
        (
            "expert search",
            f"{naive_experts:.1f} s",
            f"{fast_experts:.2f} s",
            f"{naive_experts / fast_experts:.0f}x",
            note,
        ),
        ("layer search", f"{naive_layers:.1f} s", f"{fast_layers:.2f} s", f"{naive_layers / fast_layers:.1f}x", ""),
    ]
    print(format_table(["search", "one forward per candidate", "fast", "ratio", ""], rows))


if __name__ == "__main__":
    main()
