"""
How much faster the searches are than one forward pass of the model per candidate, measured in one run:

python recipes/benchmarks/search_speed.py

and how long the searches take at DeepSeekMoE-16B's sizes, for a GPU with 80 GB:

python recipes/benchmarks/search_speed.py --preset deepseek-moe-16b

The naive searches do what Algorithms 1 and 2 say, literally: condense a candidate, run the whole model on all tokens,
compare outputs. Naive and fast must choose the same. A random model serves: speed does not depend on the weights.
Options that are given win over the preset's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from speed_models import (
    DEEPSEEK_MOE_16B,
    Sizes,
    build_model,
    default_device,
    memory_of,
    random_ids,
    synchronize,
    where,
)
from transformers.utils import logging

from cdmoe_plugin import CondenseConfig, search_plan
from cdmoe_plugin.blocks import SparseBlock, find_sparse_blocks
from cdmoe_plugin.cards.tables import format_table
from cdmoe_plugin.condense.fold import fold
from cdmoe_plugin.condense.place import standing_in
from cdmoe_plugin.metrics.js import js_divergence
from cdmoe_plugin.search.check import check_config

SMALL = Sizes(
    vocab_size=1024,
    hidden_size=256,
    intermediate_size=1024,
    moe_intermediate_size=128,
    num_hidden_layers=9,
    num_attention_heads=4,
    n_routed_experts=64,
)
PRESETS: dict[str, dict[str, Any]] = {
    "small": {
        "sizes": SMALL,
        "tokens": 2048,
        "length": 256,
        "kept": 4,
        "condensed": 4,
        "naive_layers": 1,
        "batch_size": 8,
        "initializer_range": 0.1,  # so that layers make a difference at this width
    },
    "deepseek-moe-16b": {
        "sizes": DEEPSEEK_MOE_16B,
        "tokens": 51200,
        "length": 512,
        "kept": 6,
        "condensed": 15,
        "naive_layers": 0,
        "batch_size": 8,
        "initializer_range": 0.02,
    },
}


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--preset", choices=list(PRESETS), default="small", help="what all other options are by default"
    )
    parser.add_argument("--experts", type=int, help="routed experts per layer")
    parser.add_argument("--hidden_size", type=int, help="other widths are in proportion")
    parser.add_argument("--num_layers", type=int, help="decoder layers; the first is dense")
    parser.add_argument("--tokens", type=int, help="calibration tokens, in sequences of --length")
    parser.add_argument("--length", type=int)
    parser.add_argument("--batch_size", type=int, help="sequences per forward pass")
    parser.add_argument("--cache_memory", default=CondenseConfig().cache_memory, help="see CondenseConfig")
    parser.add_argument("--kept", type=int, help="experts K to keep")
    parser.add_argument("--condensed", type=int, help="layers that the layer search chooses")
    parser.add_argument(
        "--naive_layers", type=int, help="sparse layers on which naive expert search is run; 0: no naive search at all"
    )
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--dtype", help="by default bfloat16 for deepseek-moe-16b on an accelerator, else float32")
    preset = parser.parse_known_args(given)[0].preset
    parser.set_defaults(**PRESETS[preset])
    args = parser.parse_args(given)
    on_cpu = args.device.type == "cpu"
    args.dtype = getattr(torch, args.dtype or ("float32" if on_cpu or preset == "small" else "bfloat16"))
    return args


class NaiveSearch:
    """One forward pass of the whole model per candidate."""

    def __init__(self, model: Any, ids: torch.Tensor) -> None:
        self.model = model
        self.ids = ids
        self.blocks = {block.layer: block for block in find_sparse_blocks(model)}
        with ExitStack() as stack:
            routes = {i: stack.enter_context(block.recording()) for i, block in self.blocks.items()}
            self.reference = self.hidden_states()
        self.gates = {i: self.mean_gates(*routes[i].routing, block.num_experts) for i, block in self.blocks.items()}

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


def timed(device: torch.device, function: Callable[[], Any]) -> tuple[Any, float, str]:
    """What a function returns, its seconds, and the most memory in use during it; empty on a CPU."""
    memory = memory_of(device)
    if memory is not None:
        memory.reset_peak_memory_stats(device)
    start = time.perf_counter()
    result = function()
    synchronize(device)
    seconds = time.perf_counter() - start
    peak = "" if memory is None else f"{memory.max_memory_allocated(device) / 1e9:.1f} GB"
    return result, seconds, peak


def main(given: Sequence[str] | None = None) -> None:
    args = parse_arguments(given)
    logging.set_verbosity_error()
    sizes = args.sizes.changed(args.hidden_size, args.num_layers, args.experts)
    # The sparse model's fastest form, so that the naive search is not slow for want of it.
    model = build_model(
        sizes.config(initializer_range=args.initializer_range),
        args.device,
        args.dtype,
        experts_implementation="grouped_mm",
    )
    ids = random_ids(sizes.vocab_size, args.tokens // args.length, args.length)
    blocks = find_sparse_blocks(model)
    sparse = [block.layer for block in blocks]
    options = {
        "batch_size": args.batch_size,
        "num_samples": len(ids),
        "max_length": args.length,
        "cache_memory": args.cache_memory,
    }
    config = CondenseConfig(layers=sparse, num_experts=args.kept, **options)
    both = CondenseConfig(num_layers=args.condensed, num_experts=args.kept, **options)
    check_config(both, blocks)

    naive = NaiveSearch(model, ids.to(args.device)) if args.naive_layers else None
    search_plan(model, CondenseConfig(layers=sparse[:1], num_experts=1, **options), calibration=ids)  # warm-up
    fast, fast_experts, experts_peak = timed(args.device, lambda: search_plan(model, config, calibration=ids))
    whole, fast_both, both_peak = timed(args.device, lambda: search_plan(model, both, calibration=ids))
    fast_layers = fast_both - fast_experts  # the same search of experts, and the layers' after it

    print(
        f"{where(args.device)}; {str(args.dtype).removeprefix('torch.')}; {sizes.num_hidden_layers} layers, "
        f"{sizes.n_routed_experts} experts, hidden {sizes.hidden_size}, {ids.numel()} tokens, K = {args.kept}, "
        f"{args.condensed} layers condensed"
    )
    if naive is None:
        times = [f"{seconds:.2f} s" for seconds in (fast_experts, fast_layers)]
        rows: list[tuple[str, ...]] = list(
            zip(("expert search", "layer search"), times, (experts_peak, both_peak), strict=True)
        )
        print(format_table(["search", "time", "peak memory"], rows))
        return

    experts = {layer.layer: layer.experts for layer in fast.layers}
    some = sparse[len(sparse) // 2 :][: args.naive_layers]
    found, seconds, _ = timed(args.device, lambda: {i: naive.experts(naive.blocks[i], args.kept) for i in some})
    naive_experts = seconds * len(sparse) / len(some)
    order, naive_layers, _ = timed(args.device, lambda: naive.layers(experts, args.condensed))
    assert found == {layer: experts[layer] for layer in some}, "naive and fast search chose other experts"
    assert order == [layer.layer for layer in whole.layers], "naive and fast search chose other layers"
    note = f"{len(some)} of {len(sparse)} layers timed: {seconds:.1f} s" if len(some) < len(sparse) else ""
    rows = [
        (
            "expert search",
            f"{naive_experts:.1f} s",
            f"{fast_experts:.2f} s",
            f"{naive_experts / fast_experts:.0f}x",
            experts_peak,
            note,
        ),
        (
            "layer search",
            f"{naive_layers:.1f} s",
            f"{fast_layers:.2f} s",
            f"{naive_layers / fast_layers:.1f}x",
            both_peak,
            "",
        ),
    ]
    print(format_table(["search", "one forward per candidate", "fast", "ratio", "peak memory", ""], rows))


if __name__ == "__main__":
    main()
