"""The machine code of the CUDA C++ kernels, read from the built library: what `static_bounds.py` does for Triton's."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

from machine_code import BIN, ITEMSIZE, Code, disassembled, read_usage, sass_loops

from fused_kd import native

DTYPES = {"fp32": "Float32", "bf16": "Bfloat16", "fp16": "Float16"}
# Variants by name, as static_bounds.VARIANTS: template arguments of `Variant` after the student's dtype.
_TEMPLATES = {
    "any tau": ("{}", "1", "3", "0"),
    "tau = 2": ("{}", "1", "2", "0"),
    "tau = 1": ("{}", "1", "1", "0"),
    "soft term": ("{}", "1", "0", "0"),
    "hard term": ("{}", "0", "1", "0"),
    "all options": ("AnyDtype", "1", "3", "1"),
}
VARIANTS = [f"{verb}, {name}" for verb in ("forward", "backward") for name in _TEMPLATES]
PAIRS = 16  # that a lane does in one turn of a hot loop: kChunk of csrc/cuda/warp.h


def library() -> Path | str:
    """The library that setup.py built, or why there is none."""
    report = native.build_report().get("cuda", {"missing": "the package was built without it"})
    path = Path(native.__file__).parent / "libfused_kd_cuda.so"
    return path if path.exists() else report.get("missing", "no library was built")


@functools.cache
def targets() -> list[str]:
    """The architectures that it has code for."""
    command = [BIN / "cuobjdump", "-lelf", library()]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sorted(set(re.findall(r"\bsm_\d+", listed)), key=lambda arch: int(arch[3:]))


@functools.cache
def _kernels(arch: str) -> dict[str, tuple[Code, str]]:
    """Mangled names of one architecture's kernels, with their resources and their text."""
    path = library()
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([BIN / "cuobjdump", "-xelf", arch, path], cwd=folder, capture_output=True, check=True)
        usage, text = disassembled(*sorted(Path(folder).iterdir()))
    result = {}
    bodies = re.split(r"^\.text\.(\S+):$", text, flags=re.MULTILINE)
    for name, body in zip(bodies[1::2], bodies[2::2], strict=True):
        result[name] = (read_usage(usage, re.escape(name)), body)
    return result


def loads_for(variant: str, dtype: str, columns: int) -> str:
    """Which of a verb's hot loops takes contiguous rows of a vocabulary."""
    # The backward begins at the first column that is aligned: in gradient, student and teacher it is the same one.
    aligned = variant.startswith("backward") or columns * ITEMSIZE[dtype] % 16 == 0
    return "whole" if aligned else "shifted"


@functools.cache
def code(variant: str, arch: str, dtype: str = "bf16", loads: str = "whole", gradient: str | None = None) -> Code:
    """One of a verb's hot loops in one kernel, on one architecture ("sm_90").

    `loads`, as in csrc/cuda/forward.h: "whole" is for aligned rows, "shifted" for others. `gradient`: its dtype, where
    that is not the logits'.
    """
    verb, name = variant.split(", ", 1)
    student = DTYPES[dtype]
    teacher, soft, hard, general = _TEMPLATES[name]
    # The Itanium ABI's name for a repeated type is a substitution: S and a digit.
    first, other, written = (
        f"NS_{len(name)}{name}E" if name else r"S\d?_"
        for name in (student, teacher.format(""), DTYPES[gradient] if gradient else "")
    )
    pattern = rf"rows_kernelINS_7VariantI{first}{other}Lb{soft}ELNS_4HardE{hard}ELb{general}E{written}E"
    (match,) = [found for key, found in _kernels(arch).items() if re.search(pattern, key)]
    resources, body = match
    loops = [loop for loop in sass_loops(body) if _count(loop, "LDG", ".128")]
    both = [loop for loop in loops if (_count(loop, "STG") > 0) == (verb == "backward")]
    whole, shifted = sorted(both, key=lambda loop: _count(loop, "LDG"))  # shifted loads are more
    return Code(resources.registers, resources.stack, [whole if loads == "whole" else shifted], PAIRS)


# Templates of the kernels for a second sweep and for gradients that are not q - p: of each divergence and dtype one.
SECOND_SWEEP = ("terms_kernel", "other_gradient_kernel", "rest_kernel")


@functools.cache
def second_sweep(template: str, arch: str) -> dict[str, Code]:
    """All kernels of one template on one architecture, by mangled name: their loops that read 16 bytes at a time."""
    found = {}
    for name, (resources, body) in _kernels(arch).items():
        if re.search(rf"\d{template}I", name):
            loops = [loop for loop in sass_loops(body) if _count(loop, "LDG", ".128")]
            found[name] = Code(resources.registers, resources.stack, loops, PAIRS)
    return found


def _count(loop: Counter[str], opcode: str, width: str = "") -> int:
    return sum(n for name, n in loop.items() if name.startswith(opcode) and width in name)
