"""The machine code of the CUDA kernels, in the library that setup.py built: every variant, dtype and architecture.

What stays unchecked: time, the driver's part, and memory order between warps.
"""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")  # its wheel has cuobjdump and nvdisasm
from cuda_code import DTYPES, SECOND_SWEEP, VARIANTS, code, library, loads_for, second_sweep, targets
from machine_code import EXPONENTIALS

FOUND = library()
if isinstance(FOUND, str):
    pytest.skip(f"no CUDA library: {FOUND}", allow_module_level=True)

# Instructions and exponentials a pair, bf16, sm_90: what is reached, rounded up. A change that costs more is seen.
LIMITS = {
    "forward, any tau": (36, 3.3),
    "forward, tau = 2": (33.5, 2.3),
    "forward, tau = 1": (33.5, 2.3),
    "forward, soft term": (32.5, 2.3),
    "forward, hard term": (11, 1.3),
    "forward, all options": (47.5, 3.3),
    "backward, any tau": (19, 3.0),
    "backward, tau = 2": (18, 2.0),
    "backward, tau = 1": (17, 2.0),
    "backward, soft term": (16, 2.0),
    "backward, hard term": (6, 1.0),
    "backward, all options": (21.5, 3.0),
}


# Of a second sweep, and of gradients that are not q - p: how many kernels; their registers, as reached (512 threads
# have 128 each); and how many bytes of stack there are around the hot loops.
KERNELS = {
    "terms_kernel": (3 * 6, 128, 32),  # dtypes; sums (reverse KL has those of a linear family)
    "other_gradient_kernel": (5 * 8, 128, 16),  # dtypes of student and gradient; divergences
    "rest_kernel": (3, 72, 0),
}


@pytest.fixture(scope="module")
def architectures() -> list[str]:
    found = targets()
    assert found
    return found


@pytest.mark.parametrize("loads", ["whole", "shifted"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_stack_and_whole_accesses(variant: str, dtype: str, loads: str, architectures: list[str]) -> None:
    for arch in architectures:
        hot = code(variant, arch, dtype, loads)
        assert hot.stack == 0, arch
        assert hot.in_loop("SHFL", "BAR", "LDS", "STS") == 0, arch  # lanes keep to themselves
        assert hot.narrow("LDG") == hot.narrow("STG") == 0, arch
        stores = 2 if dtype != "fp32" else 4
        assert hot.in_loop("STG") == (stores if variant.startswith("backward") else 0), arch


@pytest.mark.parametrize("gradient", ["bf16", "fp16"])
@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant.startswith("backward")])
def test_a_gradient_in_16_bits_of_float32_logits(variant: str, gradient: str, architectures: list[str]) -> None:
    for arch in architectures:
        hot = code(variant, arch, "fp32", gradient=gradient)
        assert hot.stack == 0, arch
        assert hot.narrow("LDG") == hot.narrow("STG") == 0, arch
        assert hot.in_loop("STG") == 2, arch
        assert hot.per_pair() <= code(variant, arch, "fp32").per_pair() + 1, arch


@pytest.mark.parametrize("variant", VARIANTS)
def test_instructions_and_exponentials(variant: str, architectures: list[str]) -> None:
    instructions, exponentials = LIMITS[variant]
    for arch in architectures:
        assert code(variant, arch).per_pair(*EXPONENTIALS) <= exponentials, arch
        if arch == "sm_90":
            assert code(variant, arch).per_pair() <= instructions


@pytest.mark.parametrize("template", SECOND_SWEEP)
def test_the_second_sweep_keeps_to_registers(template: str, architectures: list[str]) -> None:
    number, registers, stack = KERNELS[template]
    for arch in architectures:
        kernels = second_sweep(template, arch)
        assert len(kernels) == number, arch
        for name, found in kernels.items():
            assert found.registers <= registers, (arch, name)
            assert found.stack <= stack, (arch, name)
            assert found.loops, (arch, name)
            for loop in found.loops:
                hot = replace(found, loops=[loop])
                assert hot.spilled <= 2, (arch, name)  # (an address of the alpha-beta family's, once in 16 pairs)
                assert hot.in_loop("SHFL", "BAR", "STS") == 0, (arch, name)


def test_what_a_sparse_teacher_costs(architectures: list[str]) -> None:
    """Of the student alone: neither exponentials of the hardware nor float64 for each logit."""
    for arch in architectures:
        for name, found in second_sweep("rest_kernel", arch).items():
            whole, shifted = sorted((replace(found, loops=[loop]) for loop in found.loops), key=lambda x: x.per_pair())
            assert whole.per_pair() <= 29.25, (arch, name)
            assert shifted.per_pair() <= whole.per_pair() + 2.25, (arch, name)
            assert whole.in_loop("MUFU") <= 1, (arch, name)
            assert whole.in_loop("DADD", "DFMA", "DMUL") <= 4, (arch, name)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_at_any_offset_cost_little_more(variant: str, dtype: str, architectures: list[str]) -> None:
    """Rows of 50257 columns: the forward shifts what it loads, and the backward begins where they are aligned."""
    loads = loads_for(variant, dtype, 50257)
    assert (loads, loads_for(variant, dtype, 151936)) == ("shifted" if "forward" in variant else "whole", "whole")
    # Shifting a logit costs two instructions: much for the hard term, which has ten in all. Of "all options" those for
    # each of the teacher's three dtypes are counted.
    most = 1.15 if "hard term" not in variant and "all options" not in variant else 1.25
    for arch in architectures:
        assert code(variant, arch, dtype, loads).per_pair() <= most * code(variant, arch, dtype).per_pair(), arch


def test_it_exports_its_interface_and_nothing_else(tmp_path: Path) -> None:
    names = subprocess.run(
        ["nm", "-D", "--defined-only", str(FOUND)], capture_output=True, text=True, check=True
    ).stdout
    exported = {line.split()[-1] for line in names.splitlines()}
    assert {name for name in exported if not name.startswith("_")} == {
        "fkd_abi_version",
        "fkd_cuda_error_text",
        "fkd_cuda_on_host",
        "fkd_cuda_rows_backward",
        "fkd_cuda_rows_forward",
        "fkd_cuda_rows_fused",
        "fkd_cuda_scratch",
        "fkd_cuda_usable",
    }


def test_it_needs_no_cuda_library_to_load() -> None:
    needed = subprocess.run(["readelf", "-d", str(FOUND)], capture_output=True, text=True, check=True).stdout
    assert "libcudart" not in needed
    assert "libcuda.so" not in needed
