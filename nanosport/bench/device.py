"""What a step takes of the device: its time by kind of kernel, and its memory at the peak."""

import re
from collections import Counter
from collections.abc import Callable

import numpy as np
import torch

KINDS = {
    "attention": r"flash|fmha|attention|attn|compute_dq|compute_dk",
    "products": r"nvjet|gemm|cutlass|xmma|s16816|splitK|aten::(add)?(mm|bmm|linear)",
    "loss": r"row_kernel",
    "Adam, gradient norm": r"adam|multi_tensor|foreach|lpnorm",
    "norms, rotary, SwiGLU": r"norm|rotary|rotate|swiglu",
    "copies, casts, fills": r"copy|memcpy|memset|fill|\bcat|CatArray|convert|zero",
    "index": r"index|gather|scatter|embedding",
    "elementwise": r"elementwise|vectorized|reduce|mul|add|silu|neg",
}
"""Kinds of kernels by their names; the first that fits."""


def kind_of(kernel: str) -> str:
    names = (kind for kind, pattern in KINDS.items() if re.search(pattern, kernel, re.IGNORECASE))
    return next(names, "other")


def device_ms(step: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of the device by kind of kernel; on a CPU, of torch's operations."""
    on_gpu = torch.cuda.is_available()
    activity = getattr(torch.profiler.ProfilerActivity, "CUDA" if on_gpu else "CPU")
    with torch.profiler.profile(activities=[activity]) as profile:
        step()
        if on_gpu:
            torch.cuda.synchronize()
    spent: Counter[str] = Counter()
    for event in profile.events():
        if not on_gpu:
            spent[kind_of(event.name)] += event.self_cpu_time_total
        elif event.device_type == torch.autograd.DeviceType.CUDA:
            spent[kind_of(event.name)] += event.self_device_time_total
    return {kind: round(spent[kind] / 1e3, 2) for kind in (*KINDS, "other")}


def peak_bytes(step: Callable[[], object]) -> int:
    """What torch has allocated at most during `step`; on a CPU, which keeps no count, above what
    was there before."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return int(np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]).max())
