"""safetensors files that are written one tensor after the other: a file takes no memory of its own,
where the library's writer holds all of it twice."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
}


def write(
    path: Path,
    shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    load: Callable[[str], torch.Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write a file of tensors by name, each `load`ed in its turn. Raises OSError where there is no
    room, and ValueError for a tensor that is not as `shapes` says."""
    header, end = {"__metadata__": {"format": "pt", **metadata}}, 0
    for name, (shape, dtype) in shapes.items():
        begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        kind = {"dtype": NAMES[dtype], "shape": list(shape)}
        header[name] = {**kind, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # what follows is aligned
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (shape, dtype) in shapes.items():
            tensor = load(name)
            if tensor.shape != shape or tensor.dtype != dtype:
                raise ValueError(f"{name}: {tensor.dtype} of {tuple(tensor.shape)}, not {shape}")
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
