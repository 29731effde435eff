"""What the Triton kernels, and the CUDA ones, can reach at best, read from their machine code: no GPU is needed.

    python benchmarks/static_bounds.py

For each kernel, dtype and target: registers, stack, and what the hot loop costs a pair of logits. A kernel cannot
reach a larger share of the memory bandwidth than issuing its instructions and exponentials leaves: the column "bound".
It is a static upper bound, not a measurement: latencies, occupancy and the cache are not in it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import cuda_code
import triton
from machine_code import EXPONENTIALS, ITEMSIZE, Code, read_amd, read_cubin
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fused_kd.backends import triton_kernels
from fused_kd.backends.triton import ROUNDING, launch_for, shape_of

STORES = ("STG", "global_store", "buffer_store")


def cuda(capability: int) -> GPUTarget:
    return GPUTarget("cuda", capability, 32)


AMD = GPUTarget("hip", "gfx942", 64)


@dataclass(frozen=True)
class Gpu:
    """A target, with what a multiprocessor does in a clock; bandwidth and boost clock are the data sheet's.

    NVIDIA: 4 warps' instructions and 16 exponentials a clock and multiprocessor of compute capability 8.0, 9.0 and
    10.0 (CUDA programming guide, "Arithmetic Instructions"). AMD CDNA 3: 4 units that each issue an instruction of 64
    lanes every 4 clocks, and a transcendental one every 16 (ISA guide).
    """

    name: str
    target: GPUTarget
    bandwidth: float  # bytes a second
    multiprocessors: int
    clock: float  # hertz
    instructions: int = 128  # one lane's, a clock and multiprocessor
    exponentials: int = 16

    def pairs_per_clock(self, bytes_per_pair: int) -> float:
        """What memory brings one multiprocessor in a clock."""
        return self.bandwidth / self.multiprocessors / self.clock / bytes_per_pair


GPUS = (
    Gpu("A100 SXM 80GB", cuda(80), 2.039e12, 108, 1.410e9),
    Gpu("H100 SXM", cuda(90), 3.35e12, 132, 1.830e9),
    Gpu("H200 SXM", cuda(90), 4.8e12, 132, 1.830e9),
    Gpu("B200", cuda(100), 8.0e12, 148, 1.850e9),
    Gpu("MI300X", AMD, 5.3e12, 304, 2.100e9, instructions=64),
)

# Variants by name: the kernel, and its switches.
_BOTH = {"SOFT": True, "HARD": True, "ENTROPY": False, "SMOOTHED": False, "ROOT": 1, "POWER": 0}
SWITCHES: dict[str, dict[str, Any]] = {
    "any tau": _BOTH,
    "tau = 2": {**_BOTH, "POWER": 2},
    "tau = 1.5": {**_BOTH, "ROOT": 2, "POWER": 3},
    "soft term": {**_BOTH, "HARD": False, "POWER": 1},
    "hard term": {**_BOTH, "SOFT": False, "POWER": 1},
    "all options": {**_BOTH, "ENTROPY": True, "SMOOTHED": True},
}
VARIANTS = {
    f"{kernel}, {name}": (kernel, switches)
    for kernel in ("forward", "backward", "fused")
    for name, switches in SWITCHES.items()
}


def compiled(
    variant: str,
    target: GPUTarget,
    student: str = "bf16",
    teacher: str | None = None,
    columns: int = 151936,
    **overrides: Any,
) -> Code:
    """One variant for one target and contiguous logits of so many columns; `overrides` replace what the launch says."""
    teacher = teacher or student
    name, switches = VARIANTS[variant]
    kernel = getattr(triton_kernels, name)
    launch = launch_for(columns, max(ITEMSIZE[student], ITEMSIZE[teacher]), target.warp_size)
    exact = student == "fp32" and "all options" not in variant  # which include a temperature of the teacher's own
    rows = {"SHIFTED": columns % launch.vector > 0, "ALIKE": True, "WHOLE": columns <= launch.section}
    shape = {**shape_of(launch), **rows, "EXACT": exact, **overrides}
    options = {key: shape.pop(key) for key in ("num_warps", "num_stages", *ROUNDING)}
    # Triton compiles an argument that is 1 as a constant.
    ones = dict.fromkeys(("targets_stride", "soft_stride", "hard_stride", *(["sections"] if shape["WHOLE"] else ())), 1)
    constants = {key: value for key, value in {**switches, **shape, **ones}.items() if key in kernel.arg_names}

    types: dict[str, Any] = {
        "student": f"*{student}",
        "out": f"*{student}",
        "teacher": f"*{teacher}",
        "targets": "*i64",
    }
    types |= dict.fromkeys(("soft", "hard", "stats", "parts", "coef_soft", "coef_hard"), "*fp32")
    types |= dict.fromkeys(("student_layout", "teacher_layout", "out_layout"), ("i32",))
    types |= dict.fromkeys(("vocabulary", "width", "sections"), "i32")
    types |= dict.fromkeys(("k", "k_t", "unit", "smoothing"), "fp32")
    signature = {key: "constexpr" if key in constants else types[key] for key in kernel.arg_names}
    # As Triton finds them: pointers are multiples of 16, and rows and the vocabulary if there are so many columns.
    of_columns = ("student_layout", "teacher_layout", "out_layout", "vocabulary", "width")
    attributes = {
        (i, 0) if key.endswith("layout") else (i,): [["tt.divisibility", 16]]
        for i, key in enumerate(kernel.arg_names)
        if signature[key][0] == "*" or (key in of_columns and columns % 16 == 0)
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    result = triton.compile(source, target=target, options=options)
    code = read_amd(result.asm["amdgcn"]) if target.backend == "hip" else read_cubin(result.asm["cubin"])
    if name == "fused":  # reads a row in one loop, and writes its gradient in another
        writing = next(loop for loop in code.loops if any(op.startswith(STORES) for op in loop))
        code.loops[0] = code.loops[0] + writing
    code.pairs = shape["GROUPS"] * shape["VECTOR"] * shape["LANES"] // (options["num_warps"] * target.warp_size)
    code.ptx = result.asm.get("ptx", "")
    return code


def bound(code: Code, gpu: Gpu, bytes_per_pair: int) -> float:
    """The largest share of the memory bandwidth at which instructions and exponentials keep up."""
    instructions = gpu.instructions / code.per_pair()
    exponentials = gpu.exponentials / code.per_pair(*EXPONENTIALS)
    return min(instructions, exponentials) / gpu.pairs_per_clock(bytes_per_pair)


def bytes_per_pair(variant: str, dtype: str) -> int:
    """What moves to and from memory; the fused verb's second look at a row is taken to find it in the cache."""
    read = 1 if "hard term" in variant else 2
    return ITEMSIZE[dtype] * (read + (not variant.startswith("forward")))


def triton_kernels_on(gpu: Gpu, columns: int) -> Iterator[tuple[str, str, Code]]:
    """Names, dtypes and code."""
    for variant in VARIANTS:
        for dtype in ("bf16", "fp32"):
            yield variant, dtype, compiled(variant, gpu.target, dtype, columns=columns)


def cuda_kernels_on(gpu: Gpu, columns: int) -> Iterator[tuple[str, str, Code]]:
    """The same of the CUDA C++ kernels."""
    if gpu.target.backend != "cuda" or (arch := f"sm_{gpu.target.arch}") not in cuda_code.targets():
        return
    for variant in cuda_code.VARIANTS:
        for dtype in ("bf16", "fp32"):
            yield variant, dtype, cuda_code.code(variant, arch, dtype, cuda_code.loads_for(variant, dtype, columns))


def print_row(gpu: Gpu, kernel: str, variant: str, dtype: str, code: Code) -> None:
    size = bytes_per_pair(variant, dtype)
    cells = (
        gpu.name, kernel, dtype, size, code.registers, code.stack, f"{code.per_pair():.1f}",
        f"{code.per_pair(*EXPONENTIALS):.2f}", code.in_loop("SHFL", "ds_bpermute"), code.in_loop("BAR", "s_barrier"),
        f"{100 * bound(code, gpu, size):.0f} %",
    )  # fmt: skip
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--columns", type=int, default=151936, help="the vocabulary")
    columns = parser.parse_args().columns
    print(f"Triton {triton.__version__}, contiguous logits, V = {columns}.")
    print("A pair is one student's and one teacher's logit.\n")
    print("| GPU | kernel | dtype | bytes | registers | stack | instructions | ex2 | shuffles | barriers | bound |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for gpu in GPUS:
        for variant, dtype, code in triton_kernels_on(gpu, columns):
            print_row(gpu, variant, variant, dtype, code)
    if isinstance(reason := cuda_code.library(), str):
        print(f"\nNo CUDA C++ kernels: {reason}")
        return
    for gpu in GPUS:
        for variant, dtype, code in cuda_kernels_on(gpu, columns):
            print_row(gpu, f"CUDA C++ {variant}", variant, dtype, code)


if __name__ == "__main__":
    main()
