"""Helpers that the benchmarks share: random models of DeepSeekMoE's shape, timing, and cells of tables."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

import cdmoe_plugin  # noqa: F401  (makes AutoConfig know "deepseek")

T = TypeVar("T")
DEEPSEEK_MOE_16B = {
    **{"vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408},
    **{"num_hidden_layers": 28, "num_attention_heads": 16, "first_k_dense_replace": 1},
    **{"n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6},
}


def deepseek_config(
    sizes: Mapping[str, int],
    hidden_size: int | None = None,
    num_layers: int | None = None,
    experts: int | None = None,
    **fields: Any,
) -> Any:
    """Make the config of a DeepSeekMoE model.

    Args:
        sizes (`Mapping[str, int]`): Fields of the config, such as `DEEPSEEK_MOE_16B`.
        hidden_size (`int`, *optional*): Another hidden size; the MLPs, the vocabulary and the number of heads change in
            proportion. Widths become multiples of 8, which grouped matrix products need.
        num_layers (`int`, *optional*): Another number of decoder layers.
        experts (`int`, *optional*): Another number of routed experts.
        **fields: Other fields of the config.

    Raises:
        ValueError: naming the size that does not fit the others.
    """
    sizes = dict(sizes)
    if hidden_size is not None:
        factor = hidden_size / sizes["hidden_size"]
        for name in ("vocab_size", "intermediate_size", "moe_intermediate_size"):
            sizes[name] = max(8, round(sizes[name] * factor / 8) * 8)
        sizes |= {"hidden_size": hidden_size, "num_attention_heads": max(1, int(sizes["num_attention_heads"] * factor))}
    sizes["num_hidden_layers"] = num_layers or sizes["num_hidden_layers"]
    sizes["n_routed_experts"] = experts or sizes["n_routed_experts"]
    heads, top_k = sizes["num_attention_heads"], sizes["num_experts_per_tok"]
    if sizes["hidden_size"] % (2 * heads):
        raise ValueError(
            f"`hidden_size` is {hidden_size}, no multiple of {2 * heads} (two per head): use a power of 2."
        )
    if sizes["num_hidden_layers"] <= sizes["first_k_dense_replace"]:
        raise ValueError(f"`num_layers` is {num_layers}, but the first layer is dense: use 2 or more.")
    if sizes["n_routed_experts"] < top_k:
        raise ValueError(f"`experts` is {experts}, but each token is sent to {top_k}: use at least as many.")
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    return AutoConfig.for_model("deepseek", **{**sizes, "num_key_value_heads": heads, **tokens, **fields})


def build_model(config: Any, device: torch.device, dtype: torch.dtype, **options: Any) -> Any:
    """Build a model with random weights, in eval mode; `options` are those of `AutoModelForCausalLM.from_config`."""
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, **options).eval()


def random_ids(vocab_size: int, sequences: int, length: int) -> torch.Tensor:
    """Draw token ids `[sequences, length]`, int64, the same on every machine; 0 is left out as possible padding."""
    return torch.randint(1, vocab_size, (sequences, length), generator=torch.Generator().manual_seed(0))


def numbers(text: str) -> list[int]:
    """Read a list of numbers from the command line, such as 3,6,9."""
    return [int(part) for part in text.split(",")]


def words(text: str) -> list[str]:
    """Read a list of names from the command line, such as greedy,random."""
    return text.split(",")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how large a random model is, and where the measurements go."""
    add = parser.add_argument
    add("--hidden_size", type=int, help="hidden size of the random model; its other widths are in proportion")
    add("--num_layers", type=int, help="decoder layers of the random model; the first is dense")
    add("--experts", type=int, help="routed experts per layer of the random model")
    add("--json", type=Path, help="file to write the measurements to as JSON")


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what a model runs on."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    parser.add_argument("--device", type=torch.device, default=device, help="device to measure on (%(default)s)")
    parser.add_argument("--dtype", help="dtype of the weights (bfloat16; on a CPU float32)")


def memory_of(device: torch.device) -> Any:
    """Return torch's module that counts the memory of a device, such as `torch.cuda`; None where none does."""
    module = torch.get_device_module(device)
    return module if hasattr(module, "max_memory_allocated") else None


def timed(device: torch.device, function: Callable[[], T]) -> tuple[T, float, int | None]:
    """Call a function; return its result, the seconds it took, and the peak of allocated bytes (None on a CPU)."""
    memory = memory_of(device)
    synchronize = (lambda: None) if device.type == "cpu" else partial(torch.accelerator.synchronize, device)
    synchronize()
    if memory is not None:
        memory.reset_peak_memory_stats(device)
    start = time.perf_counter()
    result = function()
    synchronize()
    seconds = time.perf_counter() - start
    return result, seconds, None if memory is None else memory.max_memory_allocated(device)


def take_turns(runs: Mapping[str, Callable[[], T]], repeats: int) -> dict[str, list[T]]:
    """Call each function `repeats` times after a warm-up, one after the other in each round.

    Results of the same round saw the machine in the same state, so they are compared pair by pair. Every other round
    runs backwards, so that no function always follows the same one.
    """
    found: dict[str, list[T]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name in list(runs)[:: -1 if turn % 2 else 1]:
            found[name].append(runs[name]())
    return {name: results[1:] for name, results in found.items()}


def paired_ratios(base: Sequence[float], other: Sequence[float]) -> list[float]:
    """Divide `base` by `other` round by round: how many times as fast `other` was, given seconds."""
    return [a / b for a, b in zip(base, other, strict=True)]


def mean_and_spread(values: Sequence[float], style: str = "{:.4f}") -> str:
    """Format a mean, and where there are several values, their standard deviation behind it."""
    mean = style.format(statistics.mean(values))
    return mean if len(values) < 2 else f"{mean} ± {style.format(statistics.stdev(values))}"


def gigabytes(size: float | None) -> str:
    """Format bytes in GB (1e9 bytes), with three digits; "" for None."""
    return "" if size is None else f"{size / 1e9:#.3g} GB"


def where(device: torch.device) -> str:
    """Name the device and the versions of torch and transformers."""
    if device.type == "cpu":
        name = f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)"
    else:
        name = getattr(torch.get_device_module(device), "get_device_name", lambda d: d.type)(device)
    return f"{name}; torch {torch.__version__}; transformers {transformers.__version__}"


def write_json(path: Path | None, content: Any) -> None:
    """Write measurements to a file, if one was asked for."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
