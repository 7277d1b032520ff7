"""Device time of a step by kernel."""

from __future__ import annotations

import collections
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def kernel_spans(run: Callable[[], object], meet: Callable[[], None] = lambda: None) -> list[tuple[float, float, str]]:
    """(start, end, name) of each kernel of a second run, microseconds, in order of start. `meet` waits for the other ranks, so that none
    waits for another's profiler."""
    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        meet()
        run()
        torch.cuda.synchronize()
    return sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in found.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )


def profile_step(step: torch.cuda.CUDAGraph | Callable[[], None], meet: Callable[[], None] = lambda: None) -> dict[str, float]:
    """Microseconds of device time by kernel ("calls x name"), most first; "idle" is what no kernel covers between first and last."""
    spans = kernel_spans(step.replay if isinstance(step, torch.cuda.CUDAGraph) else step, meet)
    spent: collections.Counter[str] = collections.Counter()
    calls: collections.Counter[str] = collections.Counter()
    idle, last = 0.0, spans[0][0] if spans else 0.0
    for start, end, name in spans:
        spent[name[:100]] += end - start
        calls[name[:100]] += 1
        idle += max(0.0, start - last)
        last = max(last, end)
    return {"idle": round(idle, 1), **{f"{calls[name]} x {name}": round(us, 1) for name, us in spent.most_common()}}
