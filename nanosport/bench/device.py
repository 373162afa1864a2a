"""What a step takes of the device: its time by kind of kernel, and its memory at the peak; and the
file in which a benchmark says so."""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from nanosport.files import write_atomically

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


def card_name() -> str:
    """This GPU's name; cpu where there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def wait() -> None:
    """Wait until the device has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def write_report(folder: Path, name: str, report: dict) -> Path:
    """Write a benchmark's report, and return its file, which is named after what was measured."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name.lower().replace(' ', '-')}.json"
    write_atomically(path, json.dumps(report, indent=1) + "\n")
    return path


def kind_of(kernel: str) -> str:
    names = (kind for kind, pattern in KINDS.items() if re.search(pattern, kernel, re.IGNORECASE))
    return next(names, "other")


def device_ms(step: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of the device by kind of kernel; on a CPU, of torch's operations."""
    on_gpu = torch.cuda.is_available()
    activity = getattr(torch.profiler.ProfilerActivity, "CUDA" if on_gpu else "CPU")
    with torch.profiler.profile(activities=[activity]) as profile:
        step()
        wait()
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
