"""Compiles every Triton kernel for A100 (sm_80) and H100/H200 (sm_90) with the block and warps it
is launched with, without a GPU.

Prints a line a variant: registers, spilled bytes. Ends with an error where anything spills. A
process of its own, since one process cannot both interpret and compile.
"""

import itertools
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import elementwise_triton
from kernels.elementwise_triton import norm_tiles, rotary_tiles
from kernels.paged_decode import decode_kernel, tiles
from kernels.policy_row import BLOCK, NUM_WARPS, SCALE_BLOCK, row_kernel, scale_kernel

INTEGERS = ("V", "row_stride", "gradient_stride", "out_stride")


def compile_row(arch: int, dtype: str, flags: dict, aligned: bool) -> tuple[int, int]:
    """(registers, stack bytes) of one variant. dtype: the gradient's; logits are float32."""
    types = {"gradient_ptr": f"*{dtype}", "targets_ptr": "*i64"}
    types |= {name: "i32" for name in INTEGERS}
    constants = flags | {"BLOCK": BLOCK}
    return compiled(
        row_kernel, arch, types, constants, INTEGERS if aligned else (), {"num_warps": NUM_WARPS}
    )


def compile_decode(arch: int, dtype: str, heads: int, width: int) -> tuple[int, int]:
    types = {name: f"*{dtype}" for name in ("q_ptr", "k_ptr", "v_ptr")}
    types |= {name: "*i32" for name in ("table_ptr", "length_ptr")}
    types |= {name: "i32" for name in ("num_key_heads", "table_width", "splits")}
    launch = tiles(heads, width, 2 if dtype == "bf16" else 4)
    options = {name: launch.pop(name) for name in ("num_warps", "num_stages")}
    constants = {"G": heads, "D": width, "PAGE": 64} | launch
    return compiled(decode_kernel, arch, types, constants, (), options)


ROTARY = {"7B": (28, 4, 128), "3B": (16, 2, 128), "tower": (16, 16, 80), "nano": (4, 2, 32)}
ROTARY |= {"Qwen3-VL-8B": (32, 8, 128), "Qwen3-VL tower": (16, 16, 72)}
"""Query heads, key heads and their width."""
NORMS = {"7B": 3584, "3B": 2048, "tower": 1280, "nano, and Qwen3-VL's heads": 128}
NORMS |= {"Qwen3-VL-8B": 4096, "Qwen3-VL-32B": 5120}


def elementwise_variants():
    """(name, kernel, its types, constants, aligned integers) of each launch that goes through its
    inputs once."""
    k = elementwise_triton
    for model, (heads, keys, width) in ROTARY.items():
        table = {"cos_ptr": "*fp32", "sin_ptr": "*fp32"} if "tower" in model else {}
        sizes = {"H": heads, "K": keys, "HALF": width // 2, "BACK": True}
        sizes |= rotary_tiles(heads, keys, width // 2)
        yield f"rotary {model}", k.rotary_kernel, table, sizes, ()
    block = {"BLOCK": SCALE_BLOCK, "num_warps": NUM_WARPS}
    yield "a gradient's scale", scale_kernel, {"scale_ptr": "*fp32"}, block, ("N",)
    block = {"BLOCK": k.BLOCK, "num_warps": k.NUM_WARPS}
    for name, kernel in (("", k.swiglu_kernel), (" backward", k.swiglu_backward_kernel)):
        yield f"SwiGLU{name}", kernel, {}, block, ("gate_row", "up_row", "d_row", "F")
    narrow = {"inverse_ptr": "*fp32", "dparts_ptr": "*fp32", "eps": "fp32"}
    for model, width in NORMS.items():
        tile = norm_tiles(width)
        forward, backward = {"HAS_DELTA": True}, {"HAS_DTOTAL": True, "HAS_DWEIGHT": True}
        yield f"norm {model}", k.add_norm_kernel, narrow, forward | tile, ("D",)
        yield f"norm backward {model}", k.add_norm_backward_kernel, narrow, backward | tile, ("D",)


def compile_elementwise(arch: int, dtype: str, kernel, types, constants, aligned):
    """(registers, stack bytes) of one variant; what is no pointer and no eps is an integer."""
    kinds = {n: f"*{dtype}" if n.endswith("_ptr") else "i32" for n in kernel.arg_names}
    constants, warps = dict(constants), {"num_warps": constants["num_warps"]}
    del constants["num_warps"]
    return compiled(kernel, arch, kinds | types, constants, aligned, warps)


def compiled(kernel, arch, types, constants, aligned, options) -> tuple[int, int]:
    """Pointers are aligned, and to float32 unless `types` says otherwise; so are plain numbers."""
    signature, attrs = {}, {}
    for k, name in enumerate(kernel.arg_names):
        is_pointer = name.endswith("_ptr")
        kind = types.get(name, "*fp32" if is_pointer else "fp32")
        signature[name] = "constexpr" if name in constants else kind
        if is_pointer or name in aligned:
            attrs[(k,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attrs)
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options).asm[
        "cubin"
    ]
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        usage = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    return int(found[1]), int(found[2])


def main() -> None:
    spills = 0
    names = ("HAS_OLD", "HAS_REF", "HAS_SAMPLED", "HAS_RATIO", "LIKELIHOOD", "GRADIENT")
    variants = [
        dict.fromkeys(names, False),
        {n: n != "LIKELIHOOD" for n in names},
        dict.fromkeys(names, True),
    ]
    variants.append(dict.fromkeys(names, False) | {"LIKELIHOOD": True, "GRADIENT": True})
    for arch, dtype, flags, aligned in itertools.product(
        (80, 90), ("bf16", "fp32"), variants, (True, False)
    ):
        registers, stack = compile_row(arch, dtype, flags, aligned)
        on = " ".join(n for n in names if flags[n]) or "log-probs only"
        print(
            f"sm_{arch} {dtype} aligned={aligned} {on}: {registers} registers, {stack} bytes spilled"
        )
        spills += stack > 0
    for arch, dtype, (heads, width) in itertools.product(
        (80, 90), ("bf16", "fp32"), ((4, 128), (7, 128), (8, 128), (2, 32))
    ):
        registers, stack = compile_decode(arch, dtype, heads, width)
        shape = f"decode {heads} heads of {width}"
        print(f"sm_{arch} {dtype} {shape}: {registers} registers, {stack} bytes spilled")
        spills += stack > 0
    for arch, dtype in itertools.product((80, 90), ("bf16", "fp32")):
        for name, *variant in elementwise_variants():
            registers, stack = compile_elementwise(arch, dtype, *variant)
            print(f"sm_{arch} {dtype} {name}: {registers} registers, {stack} bytes spilled")
            spills += stack > 0
    if spills:
        sys.exit(f"{spills} variants spill")


if __name__ == "__main__":
    main()
