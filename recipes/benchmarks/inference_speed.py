"""
Tokens per second and memory of a sparse model and its condensed forms, in prefill and decoding:

python recipes/benchmarks/inference_speed.py
python recipes/benchmarks/inference_speed.py --model_name_or_path Qwen/Qwen1.5-MoE-A2.7B --layers 3,6,9 --kept 0,4

Without a checkpoint, the model has DeepSeekMoE-16B's real sizes and random weights on an accelerator (bfloat16; 33 GB,
and 8 GB for the condensed forms, which share all other weights with it); on a CPU it is an eighth as wide. All models
take turns, and speeds are ratios of the same round. The experts implementations of transformers are tried on the sparse
model first, and the fastest one is used by all models. Condensed are the first sparse layers; all have the same sizes.
What the shapes alone predict of decoding, which reads all weights and the cache once per step:

python recipes/benchmarks/inference_speed.py --counts_only
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from typing import Any

import common
import torch
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.utils import logging

from cdmoe_plugin import CondensedLayer, CondensePlan, apply_plan
from cdmoe_plugin.blocks import find_sparse_blocks
from cdmoe_plugin.cards.tables import format_table
from cdmoe_plugin.integrations.measure import weight_bytes

SPARSE = "sparse"
# It copies the weights of each token's experts, so that a prefill takes hundreds of times the layer's memory.
DECODING_ONLY = "batched_mm"


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_model_arguments(parser)
    common.add_device_arguments(parser)
    add = parser.add_argument
    add("--model_name_or_path", help="a sparse checkpoint instead of random weights")
    add("--layers", type=common.numbers, default=[3, 6, 9, 12, 15], help="numbers of condensed layers")
    add("--kept", type=common.numbers, default=[0, 6], help="numbers K of routed experts kept, of E(shared+K)")
    add("--batch_sizes", type=common.numbers, default=[1, 8, 32], help="sequences at a time, such as 1,8,32")
    add("--prompt_tokens", type=int, help="tokens of each prompt (512; on a CPU 64)")
    add("--new_tokens", type=int, help="tokens decoded after each prompt (32; on a CPU 16)")
    add("--repeats", type=int, default=5, help="rounds; the table has their medians")
    add("--attn_implementation", default="sdpa", help="attention of all models")
    add("--experts_implementations", type=common.words, help="those to try (all of transformers)")
    backend = {"nargs": "?", "const": "inductor", "metavar": "BACKEND"}
    add("--compile", **backend, help="compile decoding with a static cache; a minute per model and batch size")
    add("--counts_only", action="store_true", help="print only what the shapes predict")
    args = parser.parse_args(given)
    if args.model_name_or_path and (args.hidden_size or args.num_layers or args.experts):
        parser.error("--hidden_size, --num_layers and --experts are of the random model: a checkpoint has its own")
    small = args.device.type == "cpu" and not args.counts_only
    if small and not args.model_name_or_path:
        args.hidden_size = args.hidden_size or common.DEEPSEEK_MOE_16B["hidden_size"] // 8
    args.prompt_tokens = args.prompt_tokens or (64 if small else 512)
    args.new_tokens = args.new_tokens or (16 if small else 32)
    args.dtype = getattr(torch, args.dtype or ("float32" if small else "bfloat16"))
    args.context = args.prompt_tokens + (args.new_tokens + 1) / 2  # mean number of tokens that a new one attends to
    args.experts_implementations = args.experts_implementations or [
        "eager",
        *sorted(ALL_EXPERTS_FUNCTIONS.valid_keys()),
    ]
    return args


@dataclass(frozen=True)
class Counts:
    """Parameters of a model (`total`), and how often a forward pass reads them.

    A token reads one row of `hidden` of the embedding and writes `cache` numbers; `always` is read for every token.
    Each of `sparse` layers also has a `router` and `num_experts` experts of `expert` parameters, `top_k` per token.
    """

    total: int
    hidden: int
    always: int
    cache: int
    sparse: int
    router: int
    expert: int
    num_experts: int
    top_k: int

    def condensed(self, layers: int, kept: int) -> Counts:
        """Count again after `layers` sparse layers are condensed to the shared and `kept` routed experts."""
        gone = layers * (self.router + (self.num_experts - kept) * self.expert)
        always = self.always + layers * kept * self.expert
        return replace(self, total=self.total - gone, always=always, sparse=self.sparse - layers)

    def weights_read(self, tokens: int) -> float:
        """Count what a pass of `tokens` tokens reads, by uniform routing: they choose N (1 - (1 - k/N)^T) experts."""
        experts = self.num_experts * (1 - (1 - self.top_k / self.num_experts) ** tokens)
        return tokens * self.hidden + self.always + self.sparse * (self.router + experts * self.expert)

    def step(self, batch: int, context: float) -> float:
        """Count weights and cache entries that a decoding step of `batch` sequences of `context` tokens reads."""
        return self.weights_read(batch) + batch * context * self.cache


def count(model: Any) -> Counts:
    """Count a sparse model on any device, also on "meta"; its sparse layers should have the same sizes."""
    config = model.config.get_text_config()
    named = dict(model.named_parameters())
    sparse = {name.partition(".experts.")[0] + "." for name in named if ".experts." in name}
    experts = [p for name, p in named.items() if ".experts." in name]
    routers = [p for n, p in named.items() if n.startswith(tuple(sparse)) and "expert" not in n and "shared" not in n]
    embedding, head = (module.weight for module in (model.get_input_embeddings(), model.get_output_embeddings()))
    total, apart = model.num_parameters(), sum(p.numel() for p in (*experts, *routers))
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Counts(
        total=total,
        hidden=config.hidden_size,
        always=total - apart - (0 if head is embedding else embedding.numel()),
        cache=config.num_hidden_layers * 2 * heads * width,
        sparse=len(sparse),
        router=sum(p.numel() for p in routers) // len(sparse),
        expert=sum(p.numel() for p in experts) // len(sparse) // len(experts[0]),
        num_experts=len(experts[0]),
        top_k=config.num_experts_per_tok,
    )


def condensed_twin(model: Any, layers: Sequence[int], kept: int) -> Any:
    """Condense a copy of a model that shares all other weights; which experts are kept has no effect on speed."""
    plan = CondensePlan([CondensedLayer(layer, list(range(kept)), [0.1] * kept) for layer in layers])
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return apply_plan(copy.deepcopy(model, shared), plan)


@dataclass(frozen=True)
class Run:
    """Seconds of one prefill and of decoding after it, and the peaks of bytes that were allocated since the start."""

    prefill: float
    decoding: float
    prefill_peak: int | None = None
    decoding_peak: int | None = None


class Inference:
    """Prefill and decoding of one batch of token ids `[batch, prompt + new]`; the first `prompt` are the prompt.

    Decoding is one forward pass per new token with the cache of all before. The new tokens are given, not the model's
    own choice: a random model soon repeats itself, and sequences that say the same would share their experts. With a
    `backend` such as "inductor", decoding steps are compiled, and the cache is static.
    """

    def __init__(self, model: Any, ids: torch.Tensor, prompt: int, backend: str | None = None) -> None:
        self.device, self.ids, self.prompt, self.backend = model.device, ids.to(model.device), prompt, backend
        self.places = torch.arange(ids.shape[1], device=self.device)[:, None, None]
        # One for all models: it is filled anew in each run, and a compiled step keeps its address.
        self.cache = StaticCache(config=model.config, max_cache_len=ids.shape[1]) if backend else None
        self.steps: dict[tuple[int, str], Callable[..., Any]] = {}

    @torch.no_grad()
    def run(self, model: Any, prefill: str, decoding: str, compiled: bool = True) -> Run:
        """Run the prompt and every new token, with an experts implementation for each phase."""
        memory, cache = common.memory_of(self.device), self.cache if compiled else None
        before = 0 if memory is None else memory.memory_allocated(self.device)
        if cache is not None:
            cache.reset()
        model.set_experts_implementation(prefill)
        prompt = partial(model, input_ids=self.ids[:, : self.prompt], past_key_values=cache, use_cache=True)
        output, first, peak = common.timed(self.device, lambda: prompt(logits_to_keep=1))
        model.set_experts_implementation(decoding)
        step = self.compiled(model, decoding) if cache is not None else model
        _, second, later = common.timed(self.device, lambda: self.decode(step, output.past_key_values))
        peaks = (None, None) if peak is None or later is None else (peak - before, later - before)
        return Run(first, second, *peaks)

    def decode(self, step: Callable[..., Any], cache: Any) -> None:
        """Call `step` once for each new token."""
        for at in range(self.prompt, self.ids.shape[1]):
            ids = self.ids[:, at : at + 1]
            step(input_ids=ids, position_ids=self.places[at], past_key_values=cache, use_cache=True)

    def compiled(self, model: Any, experts: str) -> Callable[..., Any]:
        """Return the forward pass of a model, compiled whole or not at all; for each experts implementation anew."""
        if (id(model), experts) not in self.steps:
            # A CUDA graph per step: without it, a GPU waits for Python.
            options: dict[str, Any] = {"mode": "reduce-overhead" if self.backend == "inductor" else None}
            if "isolate_recompiles" in signature(torch.compile).parameters:  # not in torch 2.11
                options["isolate_recompiles"] = True
            compiled = torch.compile(model.forward, backend=self.backend, fullgraph=True, dynamic=False, **options)
            self.steps[id(model), experts] = compiled
        return self.steps[id(model), experts]

    def try_experts(self, model: Any, names: Sequence[str], repeats: int) -> tuple[str, str, dict[str, str]]:
        """Find the sparse model's fastest experts implementations for prefill and decoding, and why others failed.

        Raises:
            RuntimeError: if none could run a prefill.
        """
        prefill: dict[str, float] = {}
        decoding: dict[str, float] = {}
        failed: dict[str, str] = {}
        for name in sorted(names, key=lambda name: name == DECODING_ONLY):
            try:
                first = min(prefill, key=prefill.__getitem__, default=name) if name == DECODING_ONLY else name
                runs = [self.run(model, first, name) for _ in range(repeats + 1)][1:]
            # A kernel from the hub may fail in any way: not installed, not for this dtype, out of memory.
            except Exception as error:
                failed[name] = f"{type(error).__name__}: {error!s:.120}"
                continue
            decoding[name] = statistics.median(run.decoding for run in runs)
            if name != DECODING_ONLY:
                prefill[name] = statistics.median(run.prefill for run in runs)
        if not prefill:
            raise RuntimeError(f"No experts implementation could run a prefill: {failed}.")
        return min(prefill, key=prefill.__getitem__), min(decoding, key=decoding.__getitem__), failed


def counts_table(args: argparse.Namespace, counts: dict[str, Counts]) -> str:
    """Format what the shapes predict of every model."""
    width, rows = args.dtype.itemsize, []
    for name, c in counts.items():
        reads = [common.gigabytes(width * c.step(batch, args.context)) for batch in args.batch_sizes]
        rows.append((name, f"{c.total:,}", common.gigabytes(c.total * width), f"{c.weights_read(1):,.0f}", *reads))
    steps = [f"read per step, batch {batch}" for batch in args.batch_sizes]
    return format_table(["model", "parameters", "weights", "active per token", *steps], rows)


def measure_batch(args: argparse.Namespace, models: dict[str, Any], counts: dict[str, Counts], batch: int) -> list[Any]:
    """Measure one batch size; print its tables and return their rows."""
    config = models[SPARSE].config.get_text_config()
    ids = common.random_ids(config.vocab_size, batch, args.prompt_tokens + args.new_tokens)
    inference = Inference(models[SPARSE], ids, args.prompt_tokens, args.compile)
    *experts, failed = inference.try_experts(models[SPARSE], args.experts_implementations, args.repeats)
    # Without the static cache and the graphs that compiled models share, so that each one's own memory is counted.
    peaks = {name: inference.run(model, *experts, compiled=False) for name, model in models.items()}
    turns = common.take_turns({n: partial(inference.run, m, *experts) for n, m in models.items()}, args.repeats)
    print(f"### Batch {batch}\n\nExperts implementations not available: {failed or 'none'}\n")
    found = []
    lengths = {"prefill": args.prompt_tokens, "decoding": args.new_tokens}
    for (phase, length), used in zip(lengths.items(), experts, strict=True):
        seconds = {name: [getattr(run, phase) for run in runs] for name, runs in turns.items()}
        rows = []
        for name, times in seconds.items():
            ratios = common.paired_ratios(seconds[SPARSE], times)
            speed, middle = batch * length / statistics.median(times), statistics.median(ratios)
            peak = getattr(peaks[name], f"{phase}_peak")
            peak = None if peak is None else peak + weight_bytes(models[name])
            row = {"batch": batch, "phase": phase, "model": name, "experts": used, "tokens_per_second": speed}
            found.append({**row, "ratio": middle, "ratios": ratios, "peak_memory_bytes": peak})
            single = f"{min(ratios):.2f}-{max(ratios):.2f}"
            predicted = counts[SPARSE].step(batch, args.context) / counts[name].step(batch, args.context)
            by_bytes = f"{predicted:.2f}x" if phase == "decoding" else ""
            rows.append((name, f"{speed:,.1f}", f"{middle:.2f}x", single, by_bytes, common.gigabytes(peak)))
        table = format_table(["model", "tokens/s", "speed", "single turns", "by bytes", "peak memory"], rows)
        print(f"{phase.capitalize()}, batch {batch}, experts by {used}:\n\n{table}\n", flush=True)
    if args.compile:
        torch.compiler.reset()
    return found


def main(given: Sequence[str] | None = None) -> None:
    args = parse_arguments(given)
    logging.set_verbosity_error()
    if args.model_name_or_path:
        config = AutoConfig.from_pretrained(args.model_name_or_path)
    else:
        config = common.deepseek_config(common.DEEPSEEK_MOE_16B, args.hidden_size, args.num_layers, args.experts)
    first = count(common.build_model(config, torch.device("meta"), args.dtype))
    if max(args.layers) > first.sparse:
        raise ValueError(f"`layers` asks for {max(args.layers)}, but the model has {first.sparse} sparse layers.")
    if max(args.kept) > first.num_experts:
        raise ValueError(f"`kept` asks for {max(args.kept)}, but each layer has {first.num_experts} routed experts.")
    shared = getattr(config, "n_shared_experts", None) or "shared"
    budgets = {f"E({shared}+{kept}) L{n}": (n, kept) for kept in args.kept for n in args.layers}
    counts = {SPARSE: first, **{name: first.condensed(*budget) for name, budget in budgets.items()}}
    where = "no device: counted from shapes" if args.counts_only else common.where(args.device)
    print(
        f"{where}; {str(args.dtype).removeprefix('torch.')}; {args.model_name_or_path or 'random weights'} "
        f"({config.model_type}): {first.sparse} sparse layers, hidden size {first.hidden}, {first.num_experts} "
        f"experts, {first.top_k} per token; {args.prompt_tokens} prompt tokens and {args.new_tokens} new ones per "
        f"sequence\n\n### Counted from the shapes\n\n{counts_table(args, counts)}\n"
    )
    if args.counts_only:
        return
    options: dict[str, Any] = {"attn_implementation": args.attn_implementation}
    if args.model_name_or_path:
        options |= {"dtype": args.dtype, "device_map": str(args.device)}
        sparse = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, **options).eval()
    else:
        sparse = common.build_model(config, args.device, args.dtype, **options)
    layers = [block.layer for block in find_sparse_blocks(sparse)]
    models = {SPARSE: sparse, **{name: condensed_twin(sparse, layers[:n], kept) for name, (n, kept) in budgets.items()}}
    for name, model in models.items():
        if model.num_parameters() != counts[name].total:
            raise ValueError(f"{name} has {model.num_parameters()} parameters, but {counts[name].total} were counted.")
    rows = [row for batch in args.batch_sizes for row in measure_batch(args, models, counts, batch)]
    common.write_json(args.json, rows)


if __name__ == "__main__":
    main()
