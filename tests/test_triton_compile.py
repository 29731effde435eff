"""The machine code of the Triton kernels: every variant for every target, without a GPU.

What stays unchecked: time, the driver's part, and memory order between warps (no kernel shares memory in its loop).
"""

from __future__ import annotations

import os
import re

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing can be compiled in the interpreter's process", allow_module_level=True)

import triton
from machine_code import EXPONENTIALS, Code
from static_bounds import AMD, DIVERGENCES, GPUS, SPARSE, SWITCHES, VARIANTS, bound, bytes_per_pair, compiled, cuda
from support import before

NVIDIA = (80, 90, 100, 120)

OLD = before(triton.__version__, 3, 7)
# Bytes: ptxas leaves a few registers on the stack to have one more warp on a multiprocessor, around the hot loops, once
# a row. Which variants it does so for depends on its version; the old one does for the fused verb at any offset.
STACK = 56 if OLD else 24

# Instructions and exponentials a pair, bf16, sm_90: what is reached, rounded up. A change that costs more is seen.
LIMITS = {
    "forward, any tau": (29.75, 3.3),
    "forward, tau = 2": (28.5, 2.3),
    "forward, tau = 1.5": (29.5, 2.3),
    "forward, soft term": (26.5, 2.3),
    "forward, hard term": (7, 1.1),
    "forward, all options": (37.25, 3.3),
    "backward, any tau": (18, 3.0),
    "backward, tau = 2": (17, 2.0),
    "backward, tau = 1.5": (18.5, 2.0),
    "backward, soft term": (15.5, 2.0),
    "backward, hard term": (6, 1.0),
    "backward, all options": (18, 3.0),
}
for _name in SWITCHES:  # the fused verb does what both do
    _both = zip(LIMITS[f"forward, {_name}"], LIMITS[f"backward, {_name}"], strict=True)
    LIMITS[f"fused, {_name}"] = tuple(map(sum, _both))
# Every other divergence: the second sweep (reverse KL has none), and the gradient.
LIMITS |= {
    "forward, reverse KL": (26.5, 2.3),
    "sweep, symmetric KL": (42.5, 2.0),
    "sweep, JSD": (50.5, 3.0),
    "sweep, JSD, 0.1": (60.5, 3.0),
    "sweep, skew KL": (56.5, 4.0),
    "sweep, total variation": (27.5, 2.0),
    "sweep, alpha": (41.5, 3.0),
    "sweep, alpha, 0.1": (66.5, 4.0),
    "sweep, alpha-beta": (43.5, 4.0),
    "sweep, logit MSE": (22, 0.0),
    "backward, reverse KL": (13.5, 1.0),
    "backward, symmetric KL": (29, 2.0),
    "backward, JSD": (37.5, 3.0),
    "backward, JSD, 0.1": (47, 3.0),
    "backward, skew KL": (41.5, 4.0),
    "backward, total variation": (17.25, 1.0),
    "backward, alpha": (29.5, 3.0),
    "backward, alpha, 0.1": (50, 4.0),
    "backward, alpha-beta": (31.5, 4.0),
    "backward, logit MSE": (13.5, 0.0),
    "sweep, sparse teacher": (27.5, 0.0),
    "backward, sparse teacher": (7, 1.0),
}
OTHERS = [variant for variant in VARIANTS if variant.partition(", ")[2] in (*DIVERGENCES, SPARSE)]
# Instructions more with Triton 3.6: it takes `-x` for 0 - x, up to twice a pair, and its ptxas computes three more
# addresses in the loop, two instructions each.
SLACK = 2.4 if OLD else 0


def ids(variant: str) -> int:
    """How many narrow loads the hot loop has: the next id that a sparse teacher lists."""
    return int(variant == f"sweep, {SPARSE}")


def check_loop(code: Code) -> None:
    assert code.spilled == 0
    assert code.stack <= STACK
    assert code.in_loop("SHFL", "BAR", "LDS", "STS") == 0  # lanes keep to themselves


# (The other divergences on half of the targets: each is a second's work.)
@pytest.mark.parametrize(
    ("variant", "capability"), [(v, c) for v in VARIANTS for c in NVIDIA if v not in OTHERS or c in (80, 90, 100)]
)
def test_nvidia(variant: str, capability: int) -> None:
    code = compiled(variant, cuda(capability))
    check_loop(code)
    assert code.narrow("LDG") == ids(variant)
    assert code.narrow("STG") == 0
    assert code.in_loop("STG") == (0 if variant.startswith(("forward", "sweep")) else code.pairs // 8)
    instructions, exponentials = LIMITS[variant]
    assert code.per_pair(*EXPONENTIALS) <= exponentials
    if capability == 90:
        assert code.per_pair() <= instructions + SLACK


@pytest.mark.parametrize(
    ("variant", "capability"), [(v, c) for v in VARIANTS for c in NVIDIA if v not in OTHERS or c == 90]
)
def test_rows_at_any_offset_cost_little_more(variant: str, capability: int) -> None:
    """Rows of 50257 columns: the forward shifts what it loads, and the backward begins where they are aligned."""
    code, aligned = compiled(variant, cuda(capability), columns=50257), compiled(variant, cuda(capability))
    check_loop(code)
    assert code.narrow("STG") == 0
    assert code.narrow("LDG", least=64) == ids(variant)
    # Shifting a logit costs up to two instructions: much for the hard term's forward, which has six or seven in all.
    if variant in ("forward, hard term", "fused, hard term"):
        assert code.per_pair() <= aligned.per_pair() + 2
    elif variant in OTHERS:
        assert code.per_pair() <= aligned.per_pair() + 4.25  # two a logit
    else:
        assert code.per_pair() <= 1.15 * aligned.per_pair()


@pytest.mark.parametrize("variant", ["forward, any tau", "backward, tau = 2", "fused, all options"])
def test_products_are_fused_only_where_the_kernels_say_so(variant: str) -> None:
    """`.rn` forbids it: a product that rounds once here and not there leaves a lane of -inf with 1e20 and not 0."""
    ptx = compiled(variant, cuda(90)).ptx
    assert re.search(r"\bmul\.rn\.f32", ptx)
    assert not re.search(r"\b(mul|add|sub)(\.ftz)?\.f32", ptx)


@pytest.mark.parametrize("variant", VARIANTS)
def test_amd(variant: str) -> None:
    code = compiled(variant, AMD)
    if variant == "sweep, sparse teacher" and before(triton.__version__, 3, 8):
        pytest.skip("in what Triton 3.6 makes of it no loop is found that loads logits")
    assert code.stack == 0
    assert code.in_loop("ds_", "s_barrier") == 0
    assert code.in_loop("global_load_dwordx4", "buffer_load_dwordx4") == code.in_loop("global_load", "buffer_load")
    assert code.per_pair("v_exp_f32") <= LIMITS[variant][1]


@pytest.mark.parametrize(
    ("student", "teacher"), [("fp32", "fp32"), ("fp16", "fp16"), ("bf16", "fp32"), ("fp32", "bf16")]
)
@pytest.mark.parametrize("variant", ["forward, any tau", "forward, all options", "backward, any tau"])
def test_dtypes(variant: str, student: str, teacher: str) -> None:
    code = compiled(variant, cuda(90), student, teacher)
    check_loop(code)
    if student == teacher:
        assert code.narrow("LDG") == code.narrow("STG") == 0


@pytest.mark.parametrize("gradient", ["bf16", "fp16"])
@pytest.mark.parametrize("variant", ["fused, any tau", "fused, all options", "backward, JSD"])
def test_a_gradient_in_16_bits_of_float32_logits(variant: str, gradient: str) -> None:
    code = compiled(variant, cuda(90), "fp32", gradient=gradient)
    check_loop(code)
    assert code.narrow("LDG") == 0
    assert code.narrow("STG", least=64) == 0  # a lane's vector is 16 bytes of logits
    assert code.in_loop("STG") == compiled(variant, cuda(90), "fp32").in_loop("STG")


@pytest.mark.parametrize("columns", [100, 1000, 16000, 32000])
@pytest.mark.parametrize("variant", ["forward, any tau", "backward, any tau"])
def test_every_entry_of_the_launch_table(variant: str, columns: int) -> None:
    check_loop(compiled(variant, cuda(90), columns=columns))


@pytest.mark.parametrize("variant", ["forward, any tau", "forward, tau = 2", "backward, any tau", "backward, tau = 2"])
def test_an_h100_is_bound_by_memory(variant: str) -> None:
    gpu = next(gpu for gpu in GPUS if gpu.name.startswith("H100"))
    assert bound(compiled(variant, gpu.target), gpu, bytes_per_pair(variant, "bf16")) >= 1


def test_these_tests_see_spills_and_narrow_loads() -> None:
    assert compiled("forward, any tau", cuda(90), lanes=2048, warps=4).spilled > 0
    assert compiled("forward, any tau", cuda(90), vector=4, groups=4).narrow("LDG") > 0
