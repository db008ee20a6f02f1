"""The peak of the memory of tensors on the CPU."""

from __future__ import annotations

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def peak_memory(function: Callable[[], object]) -> int:
    """Return the largest number of bytes that a function has allocated and not yet given back."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        function()
    results = run.profiler.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
