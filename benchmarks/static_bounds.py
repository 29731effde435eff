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

from fused_kd import divergences
from fused_kd.backends import triton_kernels
from fused_kd.backends.triton import PTX, Rows, Scalars, Switches, family_of, launch_for

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
_BOTH = Switches(soft=True, hard=True, entropy=False, smoothed=False, exact=False, root=1, power=0)
SWITCHES = {
    "any tau": _BOTH,
    "tau = 2": _BOTH._replace(power=2),
    "tau = 1.5": _BOTH._replace(root=2, power=3),
    "soft term": _BOTH._replace(hard=False, power=1),
    "hard term": _BOTH._replace(soft=False, power=1),
    "all options": _BOTH._replace(entropy=True, smoothed=True),
}
_MULTIPLE = [["tt.divisibility", 16]]
VARIANTS = {
    f"{kernel}, {name}": (kernel, switches)
    for kernel in ("forward", "backward", "fused")
    for name, switches in SWITCHES.items()
}
# The other divergences' soft terms: reverse KL in one sweep, the others' in a second one after the forward.
DIVERGENCES: dict[str, divergences.Divergence] = {
    "reverse KL": divergences.ReverseKL(),
    "symmetric KL": divergences.SymmetricKL(),
    "JSD": divergences.JSD(),
    "JSD, 0.1": divergences.JSD(0.1),
    "skew KL": divergences.SkewKL(),
    "total variation": divergences.TotalVariation(),
    "alpha": divergences.AlphaDivergence(0.5),
    "alpha, 0.1": divergences.AlphaDivergence(0.1),
    "alpha-beta": divergences.AlphaBeta(0.2, 0.7),
    "logit MSE": divergences.LogitMSE(),
}
for _name, _divergence in DIVERGENCES.items():
    _family = family_of(_divergence)
    _switches = SWITCHES["soft term"]._replace(
        soft=_family.soft, family=_family.family, second=_family.second, careful=_family.careful
    )
    for _kernel in ("sweep" if _family.second else "forward", "backward"):
        VARIANTS[f"{_kernel}, {_name}"] = (_kernel, _switches)
# The student alone, for a sparse teacher.
SPARSE = "sparse teacher"
_switches = SWITCHES["soft term"]._replace(soft=False, family="rest", second=True)
VARIANTS |= {f"{_kernel}, {SPARSE}": (_kernel, _switches) for _kernel in ("sweep", "backward")}


def compiled(
    variant: str,
    target: GPUTarget,
    student: str = "bf16",
    teacher: str | None = None,
    columns: int = 151936,
    gradient: str | None = None,
    **overrides: int,
) -> Code:
    """One variant for one target and contiguous logits of so many columns; `overrides` replace what the launch says."""
    teacher = teacher or student
    name, switches = VARIANTS[variant]
    if name == "backward":
        switches = switches._replace(entropy=False)
    if student == "fp32" and "all options" not in variant:  # which include a temperature of the teacher's own
        switches = switches._replace(exact=True)
    divergence = variant.partition(", ")[2]
    of_family = family_of(DIVERGENCES[divergence]).numbers if divergence in DIVERGENCES else ()
    if divergence == SPARSE:
        teacher, of_family = student, (0.0,)
    switches = switches._replace(ptx=target.backend == "cuda" and switches.family in PTX)
    kernel = getattr(triton_kernels, name)
    launch = launch_for(columns, max(ITEMSIZE[student], ITEMSIZE[teacher]), target.warp_size)._replace(**overrides)
    if name != "backward":
        launch = launch._replace(shifted=columns % launch.vector > 0)
    whole = columns <= launch.section

    # As Triton sees the arguments: an integer that is 1 is a constant, pointers are multiples of 16, and rows and the
    # vocabulary if there are so many columns.
    rows, numbers = ("i32",), ("constexpr",)
    types: dict[str, Any] = {
        "student": Rows(f"*{student}", rows),
        "teacher": Rows("*i32" if switches.family == "rest" and name == "sweep" else f"*{teacher}", rows),
        "out": Rows(f"*{gradient or student}", rows),
        "targets": Rows("*i64", numbers),
        "coef_soft": Rows("*fp32", numbers),
        "coef_hard": Rows("*fp32", numbers),
        **dict.fromkeys(("soft", "hard", "stats", "parts"), "*fp32"),
        **dict.fromkeys(("vocabulary", "width"), "i32"),
        "sections": "constexpr" if whole else "i32",
        "scalars": Scalars("fp32", "fp32", "fp32", "fp32", ("fp32",) * len(of_family)),
        **dict.fromkeys(("SWITCHES", "LAUNCH", "WHOLE"), "constexpr"),
    }
    signature = {key: types[key] for key in kernel.arg_names}
    known = {"SWITCHES": switches, "LAUNCH": launch, "WHOLE": whole, **({"sections": 1} if whole else {})}
    constants: dict[Any, Any] = {key: value for key, value in known.items() if key in signature}
    attributes = {}
    for i, (key, kind) in enumerate(signature.items()):
        if isinstance(kind, Rows):
            attributes[i, 0] = _MULTIPLE
            if kind.layout == numbers:
                constants[i, 1, 0] = 1
            elif columns % 16 == 0:
                attributes[i, 1, 0] = _MULTIPLE
        elif kind == "*fp32" or (key in ("vocabulary", "width") and columns % 16 == 0):
            attributes[i,] = _MULTIPLE
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    result = triton.compile(source, target=target, options=launch.options)
    if target.backend == "hip":
        code = read_amd(result.asm["amdgcn"])
    else:
        code = read_cubin(result.asm["cubin"], around=variant == f"sweep, {SPARSE}")  # the loop over a tile's ids
    if name == "fused":  # reads a row in one loop, and writes its gradient in another
        writing = next(loop for loop in code.loops if any(op.startswith(STORES) for op in loop))
        code.loops[0] = code.loops[0] + writing
    code.pairs = launch.groups * launch.vector * launch.lanes // (launch.warps * target.warp_size)
    code.ptx = result.asm.get("ptx", "")
    return code


def bound(code: Code, gpu: Gpu, bytes_per_pair: int) -> float:
    """The largest share of the memory bandwidth at which instructions and exponentials keep up."""
    clocks = max(code.per_pair() / gpu.instructions, code.per_pair(*EXPONENTIALS) / gpu.exponentials)
    return 1 / clocks / gpu.pairs_per_clock(bytes_per_pair)


def bytes_per_pair(variant: str, dtype: str) -> int:
    """What moves to and from memory; the fused verb's second look at a row is taken to find it in the cache."""
    read = 1 if "hard term" in variant or SPARSE in variant else 2
    return ITEMSIZE[dtype] * (read + (not variant.startswith(("forward", "sweep"))))


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
