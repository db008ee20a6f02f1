"""
The searches against one forward pass of the model per candidate, measured in one run:

python recipes/benchmarks/search_speed.py

the layer search alone with as many layers as DeepSeekMoE-16B has, at a small width:

python recipes/benchmarks/search_speed.py --preset layers

and how long the searches take at DeepSeekMoE-16B's sizes, for a GPU with 80 GB:

python recipes/benchmarks/search_speed.py --preset deepseek-moe-16b

The naive searches follow Algorithms 1 and 2 literally: condense a candidate, run the whole model on all tokens, compare
outputs. All must choose the same. The layer search runs as a race and in full; its work is the number of decoder layers
that are run, times tokens. The model is random: the speed of a full search does not depend on the weights, that of a
race does. Options that are given override the preset's.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import common
import torch
from transformers.utils import logging

from cdmoe_plugin import CondenseConfig, CondensePlan, search_plan
from cdmoe_plugin.blocks import SparseBlock, find_sparse_blocks
from cdmoe_plugin.cards.tables import format_table
from cdmoe_plugin.condense.fold import fold
from cdmoe_plugin.condense.place import standing_in
from cdmoe_plugin.config import LAYER_SEARCHES
from cdmoe_plugin.metrics.js import js_divergence
from cdmoe_plugin.search.check import check_config

SMALL = {
    **common.DEEPSEEK_MOE_16B,
    **{"vocab_size": 1024, "hidden_size": 256, "intermediate_size": 1024, "moe_intermediate_size": 128},
    **{"num_hidden_layers": 9, "num_attention_heads": 4},
}
LAYERS = {
    **common.DEEPSEEK_MOE_16B,
    **{"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 64},
    **{"num_attention_heads": 4, "n_routed_experts": 8, "num_experts_per_tok": 2},
}
# The larger initializer range makes layers differ at this width.
PRESETS: dict[str, dict[str, Any]] = {
    "small": {"sizes": SMALL, "initializer_range": 0.1, "tokens": 2048, "length": 256, "kept": 4, "condensed": 4}
    | {"naive_layers": 1},
    "layers": {"sizes": LAYERS, "initializer_range": 0.08, "tokens": 4096, "length": 64, "kept": 2, "condensed": 15}
    | {"naive_layers": 0, "expert_selection": "frequency", "unequal": True},
    "deepseek-moe-16b": {"sizes": common.DEEPSEEK_MOE_16B, "initializer_range": 0.02, "tokens": 51200, "length": 512}
    | {"kept": 6, "condensed": 15, "naive_layers": 0, "naive": False},
}


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_model_arguments(parser)
    common.add_device_arguments(parser)
    add = parser.add_argument
    add("--preset", choices=list(PRESETS), default="small", help="sizes of the model and defaults of other options")
    add("--tokens", type=int, help="calibration tokens, in sequences of --length (2048; deepseek-moe-16b: 51200)")
    add("--length", type=int, help="tokens per sequence (256; deepseek-moe-16b: 512)")
    add("--batch_size", type=int, default=8, help="sequences per forward pass")
    add("--cache_memory", default=CondenseConfig().cache_memory, help="memory for results that a search keeps")
    add("--kept", type=int, help="experts K to keep (4; deepseek-moe-16b: 6)")
    add("--condensed", type=int, help="layers that the layer search chooses (4; deepseek-moe-16b: 15)")
    add("--naive_layers", type=int, help="sparse layers of the naive expert search (1; otherwise 0)")
    add("--naive", action=argparse.BooleanOptionalAction, help="run the naive layer search (not: deepseek-moe-16b)")
    parser.set_defaults(naive=True, expert_selection="greedy", unequal=False)
    parser.set_defaults(**PRESETS[parser.parse_known_args(given)[0].preset])
    args = parser.parse_args(given)
    wide = args.device.type != "cpu" and args.preset != "small"
    args.dtype = getattr(torch, args.dtype or ("bfloat16" if wide else "float32"))
    return args


class NaiveSearch:
    """One forward pass of the whole model per candidate."""

    def __init__(self, model: Any, ids: torch.Tensor) -> None:
        self.model, self.ids = model, ids
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
        """Compare hidden state `at` with that of the model whose layers are condensed to these experts."""
        with ExitStack() as stack:
            for layer, experts in condensed.items():
                mlp = fold(self.blocks[layer], experts, [self.gates[layer][e] for e in experts])
                stack.enter_context(standing_in(self.model, self.blocks[layer], mlp))
            return float(js_divergence(self.reference[at], self.hidden_states()[at]).mean())

    def experts(self, block: SparseBlock, kept: int) -> list[int]:
        """Choose experts by Algorithm 1."""
        order: list[int] = []
        for _ in range(kept):
            rest = sorted(set(self.gates[block.layer]) - set(order))
            scores = {e: self.divergence({block.layer: [*order, e]}, block.layer + 1) for e in rest}
            order.append(min(scores, key=lambda e: (scores[e], e)))
        return order

    def layers(self, experts: dict[int, list[int]], number: int) -> list[int]:
        """Choose layers by Algorithm 2."""
        order: list[int] = []
        for _ in range(number):
            rest = sorted(set(experts) - set(order))
            scores = {layer: self.divergence({i: experts[i] for i in [*order, layer]}, -1) for layer in rest}
            order.append(min(scores, key=lambda layer: (scores[layer], layer)))
        return order


def make_unequal(model: Any) -> None:
    """Scale the experts of each layer by another factor: layers of a trained model differ more than random ones."""
    with torch.no_grad():
        for block in find_sparse_blocks(model):
            block.module.experts.down_proj.mul_(0.5 + 2 * ((7 * block.layer) % 27) / 27)


def main(given: Sequence[str] | None = None) -> None:
    args = parse_arguments(given)
    logging.set_verbosity_error()
    fields = {"initializer_range": args.initializer_range}
    shape = common.deepseek_config(args.sizes, args.hidden_size, args.num_layers, args.experts, **fields)
    # The fastest implementation, so that the naive search is not slow for lack of it.
    model = common.build_model(shape, args.device, args.dtype, experts_implementation="grouped_mm")
    if args.unequal:
        make_unequal(model)
    ids = common.random_ids(shape.vocab_size, args.tokens // args.length, args.length)
    blocks = find_sparse_blocks(model)
    sparse = [block.layer for block in blocks]
    own = {"batch_size": args.batch_size, "num_samples": len(ids), "max_length": args.length}
    own |= {"cache_memory": args.cache_memory, "expert_selection": args.expert_selection}
    only_experts = CondenseConfig(layers=sparse, num_experts=args.kept, **own)
    both = CondenseConfig(num_layers=args.condensed, num_experts=args.kept, **own)
    check_config(both, blocks)

    def timed(config: CondenseConfig) -> tuple[CondensePlan, float, int | None]:
        return common.timed(args.device, lambda: search_plan(model, config, calibration=ids))

    timed(CondenseConfig(layers=sparse[:1], num_experts=1, **own))  # warm-up
    found, seconds, peak = timed(only_experts)
    rows: list[dict[str, Any]] = [{"search": "expert search", "seconds": seconds, "peak_memory_bytes": peak}]
    experts = {layer.layer: layer.experts for layer in found.layers}
    orders = []
    for name in LAYER_SEARCHES:
        plan, whole, peak = timed(replace(both, layer_search=name))
        # Each begins with the search of experts.
        row = {"search": f"layer search, {name}", "seconds": whole - seconds, "peak_memory_bytes": peak}
        rows.append(row | {"token_layers": plan.token_layers})
        orders.append([layer.layer for layer in plan.layers])
    if args.naive or args.naive_layers:
        naive = NaiveSearch(model, ids.to(args.device))
        some = sparse[len(sparse) // 2 :][: args.naive_layers]
        same, naive_experts, _ = common.timed(
            args.device, lambda: {i: naive.experts(naive.blocks[i], args.kept) for i in some}
        )
        if same != {i: experts[i] for i in some}:
            raise RuntimeError("The naive search chose other experts than `search_plan`.")
        if some:
            rows[0] |= {"naive_seconds": naive_experts * len(sparse) / len(some), "naive_layers_timed": len(some)}
    if args.naive:
        order, naive_layers, _ = common.timed(args.device, lambda: naive.layers(experts, args.condensed))
        orders.append(order)
        runs = 1 + sum(len(sparse) - number for number in range(args.condensed))
        work = {"naive_seconds": naive_layers, "naive_token_layers": runs * shape.num_hidden_layers * ids.numel()}
        rows[1:] = [row | work for row in rows[1:]]
    if any(order != orders[0] for order in orders):
        raise RuntimeError(f"The layer searches chose different layers: {orders}")
    print(
        f"{common.where(args.device)}; {str(args.dtype).removeprefix('torch.')}; {shape.num_hidden_layers} layers, "
        f"{shape.n_routed_experts} experts, hidden {shape.hidden_size}, {ids.numel()} tokens, K = {args.kept}, "
        f"{args.condensed} layers condensed\n"
    )
    if 0 < args.naive_layers < len(sparse):
        print(f"The naive expert search is extrapolated from {args.naive_layers} of {len(sparse)} layers.\n")
    header = ["search", "time", "peak memory", "one forward per candidate", "ratio", "token-layers", "ratio of work"]
    print(format_table(header, [cells(row) for row in rows]))
    common.write_json(args.json, rows)


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Format a search and, where it was run, the naive one."""
    naive, work = row.get("naive_seconds"), row.get("token_layers")
    naive_work = row.get("naive_token_layers")
    return (
        row["search"],
        f"{row['seconds']:.2f} s",
        common.gigabytes(row["peak_memory_bytes"]),
        "" if naive is None else f"{naive:.1f} s",
        "" if naive is None else f"{naive / row['seconds']:.1f}x",
        "" if work is None else f"{work:,}",
        "" if naive_work is None else f"{naive_work / work:.2f}x",
    )


if __name__ == "__main__":
    main()
