"""Compiled kernels, read from their machine code: registers, stack, and the opcodes of their hot loops."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import triton

ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2}
EXPONENTIALS = ("MUFU.EX2", "v_exp_f32")
# The CUDA tools that come with Triton.
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


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


def read_amd(text: str) -> Code:
    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", text)
        assert found is not None, name
        return int(found[1])

    # Scalar registers spill into lanes of vector registers, not into memory.
    stack = 4 * number("vgpr_spill_count") + number("private_segment_fixed_size")
    loops = _loops(text, r"^\s+([a-z]\w+)", r"^(\.LBB\w+):", r"branch\w*\s+(\.LBB\w+)")
    return Code(number("vgpr_count"), stack, list(loops))


def disassembled(*cubins: Path) -> tuple[str, str]:
    """What kernels use of registers and memory, and their text."""
    usage, text = (
        "".join(
            subprocess.run([BIN / tool, flag, cubin], capture_output=True, text=True, check=True).stdout
            for cubin in cubins
        )
        for tool, flag in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
    )
    return usage, text


def read_cubin(cubin: bytes, around: bool = False) -> Code:
    """Of one kernel. `around`: its hot loop has a loop in it that seldom turns, and is not counted."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, text = disassembled(Path(file.name))
    code = read_usage(usage)
    code.loops = list(sass_loops(text, around))
    return code


def read_usage(usage: str, kernel: str = r"\S+") -> Code:
    """What it says of the first kernel whose name matches."""
    found = re.search(rf"Function {kernel}:\s+REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", usage)
    assert found is not None, kernel
    registers, stack, local = map(int, found.groups())
    return Code(registers, stack + local)


def sass_loops(text: str, around: bool = False) -> Iterator[Counter[str]]:
    instruction = r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)"
    return _loops(text, instruction, r"^(\.L_x_\d+):", r"BRA.*?(\.L_x_\d+)", around)


def _loops(text: str, instruction: str, label: str, branch: str, around: bool = False) -> Iterator[Counter[str]]:
    """The innermost loops with a load from global memory, in the order of the code; or those `around` one, without
    what is in that."""
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
        inside = [(b, e) for b, e in spans if begin <= b and e <= end and (b, e) != (begin, end)]
        if bool(inside) == around:
            body = Counter(opcodes[begin:end])
            for b, e in inside:
                body -= Counter(opcodes[b:e])
            if any(opcode.startswith(("LDG", "global_load", "buffer_load")) for opcode in body):
                yield body
