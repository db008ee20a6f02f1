"""Measurements of a running model: bytes of weights, peak memory, tokens per second."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn

PROMPT_TOKENS = 32
NEW_TOKENS = 32
RUNS = 3
_WARM_UP_TOKENS = 4


def weight_bytes(model: nn.Module) -> int:
    """Count the bytes of a model's state dict: tied weights once, quantised weights with their scales."""
    # With `keep_vars`, tied weights are the same objects.
    tensors = {id(t): t for t in model.state_dict(keep_vars=True).values() if isinstance(t, torch.Tensor)}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def accelerators(model: nn.Module) -> list[torch.device]:
    """List the devices of a model's weights, except the CPU."""
    found = {parameter.device for parameter in model.parameters()}
    return sorted((device for device in found if device.type not in ("cpu", "meta", "disk")), key=str)


def reset_peak_memory(model: nn.Module) -> None:
    """Reset the measurement of `peak_memory` on devices that support it."""
    for device in accelerators(model):
        reset = getattr(torch.get_device_module(device), "reset_peak_memory_stats", None)
        if reset is not None:
            reset(device)


def peak_memory(model: nn.Module) -> tuple[int | None, str]:
    """Return the peak memory and its description.

    Returns:
        `tuple[int | None, str]`: Bytes, or None if the system does not report them. On accelerators, the memory that
            torch allocated on all devices with weights of the model since `reset_peak_memory`; otherwise all RAM of
            this process since it started.
    """
    devices = accelerators(model)
    if not devices:
        return _peak_of_process(), "RAM of this process since it started"
    what = f"allocated on {', '.join(map(str, devices))} since the model was loaded"
    peaks = [getattr(torch.get_device_module(device), "max_memory_allocated", None) for device in devices]
    if any(peak is None for peak in peaks):
        return None, what
    return sum(peak(device) for peak, device in zip(peaks, devices, strict=True) if peak is not None), what


def _peak_of_process() -> int | None:
    status = Path("/proc/self/status")
    if status.exists():
        # Not `getrusage`: on Linux, a process inherits the peak of the process that started it.
        lines = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(lines[0].split()[1]) * 1024 if lines else None
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@torch.no_grad()
def generation_speed(
    model: Any, device: torch.device, vocabulary_size: int, max_length: int, avoid: Collection[int] = ()
) -> dict[str, Any]:
    """Measure tokens per second of greedy generation for one sequence: the median of some runs after a warm-up.

    The prompt has the same random token ids for every model with that vocabulary. Generation does not stop at an
    end-of-sequence token, and the time covers prompt and new tokens, as a user waits for both.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model.
        device (`torch.device`): The device of the token ids.
        vocabulary_size (`int`): Upper bound of token ids in the prompt.
        max_length (`int`): Maximum length of prompt and new tokens together.
        avoid (`Collection[int]`): Token ids that must not be in the prompt (special tokens).

    Returns:
        `dict[str, Any]`: `tokens_per_second` (`float`), and the settings of the measurement: `batch_size`,
            `prompt_tokens`, `new_tokens`, `runs`.

    Raises:
        RuntimeError: if the model generates another number of tokens.
        ValueError: if `max_length` has no room for a prompt and a new token.
    """
    prompt_tokens = min(PROMPT_TOKENS, max_length // 2)
    new_tokens = min(NEW_TOKENS, max_length - prompt_tokens)
    if prompt_tokens < 1:
        raise ValueError(f"`max_length` is {max_length}, which has no room for a prompt and a new token.")
    prompt = _prompt(vocabulary_size, prompt_tokens, avoid).to(device)

    def generate(count: int) -> float:
        start = time.perf_counter()
        output = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            num_beams=1,
        )
        made = output[0].tolist()[prompt_tokens:]  # waits for the device
        seconds = time.perf_counter() - start
        if len(made) != count:
            raise RuntimeError(f"The model should generate {count} new tokens, but generated {len(made)}.")
        return seconds

    generate(min(_WARM_UP_TOKENS, new_tokens))
    seconds = statistics.median(generate(new_tokens) for _ in range(RUNS))
    shape = {"batch_size": 1, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "runs": RUNS}
    return {"tokens_per_second": new_tokens / seconds, **shape}


def _prompt(vocabulary_size: int, length: int, avoid: Collection[int]) -> torch.Tensor:
    """Draw random token ids `[1, length]`, the same for the same vocabulary on every machine."""
    drawn = torch.randperm(vocabulary_size, generator=torch.Generator().manual_seed(0)).tolist()
    avoid = set(avoid)
    allowed = [token for token in drawn if token not in avoid] or drawn
    return torch.tensor([[allowed[i % len(allowed)] for i in range(length)]])
