"""Where a step's time on the device goes, by kind of kernel."""

import re
from collections import Counter
from collections.abc import Callable

import torch

KINDS = {
    "attention": r"flash|fmha|attention|attn|compute_dq|compute_dk",
    "products": r"nvjet|gemm|cutlass|xmma|s16816|splitK|aten::(add)?(mm|bmm|linear)",
    "loss": r"row_kernel",
    "Adam, gradient norm": r"adam|multi_tensor|foreach|lpnorm",
    "norms, rotary, SwiGLU": r"norm|rotary|rotate|swiglu",
    "copies, casts, fills": r"copy|memcpy|memset|fill|cat|convert|zero",
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
