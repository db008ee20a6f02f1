"""What a model costs when it runs: bytes of weights, peak memory, tokens per second."""

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
    """Bytes of a model's weights as they are stored in its state dict.

    Tied weights count once; of quantised weights, so do their scales.
    """
    # With `keep_vars`, tied weights are the same objects.
    tensors = {id(t): t for t in model.state_dict(keep_vars=True).values() if isinstance(t, torch.Tensor)}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def accelerators(model: nn.Module) -> list[torch.device]:
    """The devices, other than the CPU, that hold weights of a model."""
    found = {parameter.device for parameter in model.parameters()}
    return sorted((device for device in found if device.type not in ("cpu", "meta", "disk")), key=str)


def reset_peak_memory(model: nn.Module) -> None:
    """Starts the measurement of `peak_memory` anew, on those devices that can."""
    for device in accelerators(model):
        reset = getattr(torch.get_device_module(device), "reset_peak_memory_stats", None)
        if reset is not None:
            reset(device)


def peak_memory(model: nn.Module) -> tuple[int | None, str]:
    """The most memory in use at any time, and what that is measured on.

    Returns:
        `tuple[int | None, str]`: Bytes, None where the system does not tell. On accelerators, what torch had allocated
            on all that hold weights of the model, since `reset_peak_memory`; else what this process held in RAM since
            it started, whatever it was used for.
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
        # Not `getrusage`, which on Linux starts a process with the peak of the one that launched it.
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
    """Tokens per second of greedy generation, for one sequence: the median of some runs after a warm-up.

    The prompt is the same random token ids for every model of that vocabulary. An end-of-sequence token stops nothing;
    the time covers prompt and new tokens, as a user waits for both.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model, where and as it is.
        device (`torch.device`): Where it expects token ids.
        vocabulary_size (`int`): Token ids of the prompt are below this.
        max_length (`int`): What prompt and new tokens may be long together.
        avoid (`Collection[int]`): Token ids that must not be in the prompt (special tokens).

    Returns:
        `dict[str, Any]`: `tokens_per_second` (`float`), and how it was measured: `batch_size`, `prompt_tokens`,
            `new_tokens`, `runs`.

    Raises:
        RuntimeError: if the model generates fewer tokens than it is told to.
        ValueError: if there is no room for a token of prompt and one of output.
    """
    prompt_tokens = min(PROMPT_TOKENS, max_length // 2)
    new_tokens = min(NEW_TOKENS, max_length - prompt_tokens)
    if prompt_tokens < 1:
        raise ValueError(f"A model of {max_length} tokens' length has no room for a prompt and a new token.")
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
            raise RuntimeError(f"{count} new tokens were asked for, and {len(made)} came.")
        return seconds

    generate(min(_WARM_UP_TOKENS, new_tokens))
    seconds = statistics.median(generate(new_tokens) for _ in range(RUNS))
    shape = {"batch_size": 1, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "runs": RUNS}
    return {"tokens_per_second": new_tokens / seconds, **shape}


def _prompt(vocabulary_size: int, length: int, avoid: Collection[int]) -> torch.Tensor:
    """Random token ids `[1, length]`, the same for the same vocabulary on every machine."""
    drawn = torch.randperm(vocabulary_size, generator=torch.Generator().manual_seed(0)).tolist()
    avoid = set(avoid)
    allowed = [token for token in drawn if token not in avoid] or drawn
    return torch.tensor([[allowed[i % len(allowed)] for i in range(length)]])
