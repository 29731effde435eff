"""What the Triton kernels, and the CUDA ones, can reach at best, read from their machine code: no GPU is needed.

    python benchmarks/static_bounds.py

For each kernel, dtype and target: registers, stack, and what the hot loop costs a pair of logits. A kernel cannot
reach a larger share of the memory bandwidth than issuing its instructions and exponentials leaves: the column "bound".
It is a static upper bound, not a measurement: latencies, occupancy and the cache are not in it.
"""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fused_kd.backends import triton_kernels
from fused_kd.backends.triton import ROUNDING, launch_for, shape_of

ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2}
EXPONENTIALS = ("MUFU.EX2", "v_exp_f32")
STORES = ("STG", "global_store", "buffer_store")
_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


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


@dataclass
class Code:
    """A compiled kernel."""

    registers: int
    stack: int  # bytes a lane: what was spilled, if anything, in the hot loop or around it
    loops: list[Counter[str]] = field(default_factory=list)  # opcodes of each loop that loads logits; the hot one first
    pairs: int = 0  # that a lane does in one turn of the hot loop
    ptx: str = ""  # of Triton kernels on NVIDIA's targets

    def in_loop(self, *prefixes: str) -> int:
        return sum(n for opcode, n in self.loops[0].items() if opcode.startswith(prefixes or ("",)))

    def per_pair(self, *prefixes: str) -> float:
        return self.in_loop(*prefixes) / self.pairs

    @property
    def spilled(self) -> int:
        """How many of the hot loop's instructions are on the stack."""
        return self.in_loop("LDL", "STL", "scratch_")

    def narrow(self, prefix: str, least: int = 128) -> int:
        """How many of these move fewer bits."""

        def bits(opcode: str) -> int:
            found = re.search(r"\.(64|128)\b", opcode)
            return int(found[1]) if found else 32

        return sum(n for opcode, n in self.loops[0].items() if opcode.startswith(prefix) and bits(opcode) < least)


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
    code = _read_amd(result.asm["amdgcn"]) if target.backend == "hip" else _read_cubin(result.asm["cubin"])
    if name == "fused":  # reads a row in one loop, and writes its gradient in another
        writing = next(loop for loop in code.loops if any(op.startswith(STORES) for op in loop))
        code.loops[0] = code.loops[0] + writing
    code.pairs = shape["GROUPS"] * shape["VECTOR"] * shape["LANES"] // (options["num_warps"] * target.warp_size)
    code.ptx = result.asm.get("ptx", "")
    return code


def _read_amd(text: str) -> Code:
    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", text)
        assert found is not None, name
        return int(found[1])

    # Scalar registers spill into lanes of vector registers, not into memory.
    stack = 4 * number("vgpr_spill_count") + number("private_segment_fixed_size")
    loops = _loops(text, r"^\s+([a-z]\w+)", r"^(\.LBB\w+):", r"branch\w*\s+(\.LBB\w+)")
    return Code(number("vgpr_count"), stack, list(loops))


def _read_cubin(cubin: bytes) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, text = (
            subprocess.run([_BIN / tool, flag, file.name], capture_output=True, text=True, check=True).stdout
            for tool, flag in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    found = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", usage)
    assert found is not None, usage
    registers, stack, local = map(int, found.groups())
    loops = _loops(
        text, r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", r"^(\.L_x_\d+):", r"BRA.*?(\.L_x_\d+)"
    )
    return Code(registers, stack + local, list(loops))


def _loops(text: str, instruction: str, label: str, branch: str) -> Iterator[Counter[str]]:
    """The innermost loops with a load from global memory, in the order of the code."""
    places: dict[str, int] = {}
    opcodes: list[str] = []
    spans: list[tuple[int, int]] = []
    for line in text.splitlines():
        if found := re.match(label, line.strip()):
            places[found[1]] = len(opcodes)
        elif found := re.match(instruction, line):
            opcodes.append(found[1])
            jump = re.search(branch, line)
            if jump and jump[1] in places:
                spans.append((places[jump[1]], len(opcodes)))
    for begin, end in spans:
        if not any(begin <= b and e <= end and (b, e) != (begin, end) for b, e in spans):
            body = Counter(opcodes[begin:end])
            if any(opcode.startswith(("LDG", "global_load", "buffer_load")) for opcode in body):
                yield body


def bound(code: Code, gpu: Gpu, bytes_per_pair: int) -> float:
    """The largest share of the memory bandwidth at which instructions and exponentials keep up."""
    instructions = gpu.instructions / code.per_pair()
    exponentials = gpu.exponentials / code.per_pair(*EXPONENTIALS)
    return min(instructions, exponentials) / gpu.pairs_per_clock(bytes_per_pair)


def bytes_per_pair(variant: str, dtype: str) -> int:
    """What moves to and from memory; the fused verb's second look at a row is taken to find it in the cache."""
    read = 1 if "hard term" in variant else 2
    return ITEMSIZE[dtype] * (read + (not variant.startswith("forward")))


def cuda_rows(columns: int) -> Iterator[tuple[Any, ...]]:
    """The same table's rows of the CUDA C++ kernels, if the package was built with them."""
    cuda_code = importlib.import_module("cuda_code")
    if isinstance(reason := cuda_code.library(), str):
        print(f"\nNo CUDA C++ kernels: {reason}")
        return
    for gpu in GPUS:
        if gpu.target.backend != "cuda" or (arch := f"sm_{gpu.target.arch}") not in cuda_code.targets():
            continue
        for variant in cuda_code.VARIANTS:
            for dtype in ("bf16", "fp32"):
                code = cuda_code.code(variant, arch, dtype, cuda_code.loads_for(variant, dtype, columns))
                size = bytes_per_pair(variant, dtype)
                yield (
                    gpu.name, f"CUDA C++ {variant}", dtype, size, code.registers, code.stack,
                    f"{code.per_pair():.1f}", f"{code.per_pair(*EXPONENTIALS):.2f}", code.in_loop("SHFL"),
                    code.in_loop("BAR"), f"{100 * bound(code, gpu, size):.0f} %",
                )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--columns", type=int, default=151936, help="the vocabulary")
    columns = parser.parse_args().columns
    print(f"Triton {triton.__version__}, contiguous logits, V = {columns}.")
    print("A pair is one student's and one teacher's logit.\n")
    print("| GPU | kernel | dtype | bytes | registers | stack | instructions | ex2 | shuffles | barriers | bound |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for gpu in GPUS:
        for variant in VARIANTS:
            for dtype in ("bf16", "fp32"):
                code = compiled(variant, gpu.target, dtype, columns=columns)
                size = bytes_per_pair(variant, dtype)
                cells = (
                    gpu.name, variant, dtype, size, code.registers, code.stack, f"{code.per_pair():.1f}",
                    f"{code.per_pair(*EXPONENTIALS):.2f}", code.in_loop("SHFL", "ds_bpermute"),
                    code.in_loop("BAR", "s_barrier"), f"{100 * bound(code, gpu, size):.0f} %",
                )  # fmt: skip
                print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    for cells in cuda_rows(columns):
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
