"""The Triton kernels in Triton's interpreter, against the float64 reference.

TRITON_INTERPRET must be set before Triton is imported, and then nothing can be compiled: so these tests run in
processes of their own, each with a part of them, which the first test here starts. By hand, with the shared cases too:

    TRITON_INTERPRET=1 pytest -k triton
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from support import (
    DTYPES,
    INF,
    assert_gradient,
    assert_loss,
    before,
    both,
    check,
    check_narrow_gradient,
    check_where_rows_lie,
    make_labels,
    make_logits,
    make_normal,
)
from test_divergences import KINDS, ONE_OF_EACH, check_rows, gradient_error_bound
from test_sparse import check_log_rest, exactly, make_teacher
from test_sparse import check_rows as check_sparse_rows
from test_sparse import check_where_rows_lie as check_where_sparse_rows_lie

from fused_kd import SparseTeacher, fused_kd_loss
from fused_kd.backends import PREFERENCE
from fused_kd.backends.rows import NO_LABEL, SKIP, LogitRows, RowOptions
from fused_kd.divergences import (
    JSD,
    AlphaBeta,
    AlphaDivergence,
    CrossEntropy,
    Divergence,
    ForwardKL,
    LogitMSE,
    ReverseKL,
    SkewReverseKL,
    SymmetricKL,
    TotalVariation,
)

triton = pytest.importorskip("triton")
if before(triton.__version__, 3, 7) and not before(np.__version__, 2, 4):
    # Its own fault: "only 0-dimensional arrays can be converted to Python scalars".
    pytest.skip("the interpreter of Triton 3.6 does not run on numpy 2.4 and later", allow_module_level=True)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that test_in_the_interpreter starts")

V = 4500  # tiles of 2048: two whole ones and a tail
LONG = 20000  # more than one section


PARTS = 6


@pytest.mark.first
@pytest.mark.skipif(INTERPRETED, reason="this is that process")
@pytest.mark.parametrize("part", range(PARTS))
def test_in_the_interpreter(part: int) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--part", f"{part}/{PARTS}", __file__]
    result = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]


@pytest.mark.skipif(INTERPRETED, reason="there they are taken")
def test_cpu_tensors_are_refused_and_the_variable_named() -> None:
    with pytest.raises(ValueError, match="backend='triton' cannot be used: .*TRITON_INTERPRET=1"):
        fused_kd_loss(torch.zeros(1, 2), torch.zeros(1, 2), alpha=1.0, backend="triton")


def test_float64_is_refused() -> None:
    wide = torch.zeros(1, 2, dtype=torch.float64)
    reason = PREFERENCE["triton"].refuses(wide.to("cpu" if INTERPRETED else "meta"), wide, "forward_kl")
    assert reason is not None
    with pytest.raises(ValueError, match="backend='triton' cannot be used"):
        fused_kd_loss(wide, wide, alpha=1.0, backend="triton")


OPTIONS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 1.5},
    {"temperature": 2.0},
    {"temperature": 3.0},
    {"temperature": 4.0},
    {"temperature": 2.7},
    {"temperature": 2.7, "teacher_temperature": 1.3},
    {"alpha": 1.0, "temperature": 2.0},
    {"alpha": 0.0},
    {"alpha": 0.0, "label_smoothing": 0.1},
    {"alpha": 0.5, "label_smoothing": 0.1},
    {"divergence": "cross_entropy", "temperature": 2.7},
    {"soft_on_ignored": True},
]


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(options: dict[str, Any], dtype: torch.dtype) -> None:
    student, teacher = (x.to(dtype) for x in make_logits("wide", 3, V))
    labels = torch.tensor([V - 1, -100, 2050])  # in the tail, and in a whole tile
    check(student, teacher, labels, backend="triton", **options)


@interpreted
@pytest.mark.parametrize("columns", [1, 2, 37, 600, 2048, 4097, LONG])
@pytest.mark.parametrize("kind", ["peaked", "masked", "close"])
def test_sizes(kind: str, columns: int) -> None:
    student, teacher = make_logits(kind, 2, columns)
    labels = torch.tensor([0, columns - 1])
    check(student, teacher, labels, backend="triton", relative=1e-5 if kind != "close" else 1e-4)


@interpreted
@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0, 100.0])
@pytest.mark.parametrize("offset", [0.0, 5.0])
def test_a_nearly_converged_student(temperature: float, offset: float) -> None:
    student, teacher = make_logits("close", 1, LONG)
    student += offset
    loss, gradient, expected, exact = both(student, teacher, None, alpha=1.0, temperature=temperature, backend="triton")
    assert loss >= 0
    assert_loss(loss, expected, 1e-5)
    if offset == 0:
        assert_gradient(gradient, exact)


@interpreted
@pytest.mark.parametrize("temperature", [20.0, 100.0])
def test_a_logit_that_sticks_out(temperature: float) -> None:
    student, teacher = make_logits("close", 1, LONG)
    student[0, 777] = teacher.max() + 20
    check(student, teacher, None, alpha=1.0, temperature=temperature, backend="triton", relative=1e-4)


@interpreted
@pytest.mark.parametrize("teacher_temperature", [1.0, 2.0])
def test_a_teacher_temperature_costs_large_logits_no_digits(teacher_temperature: float) -> None:
    student, teacher = make_logits("big", 2, V)
    check(student, teacher, None, alpha=1.0, temperature=3.0, teacher_temperature=teacher_temperature, backend="triton")


@interpreted
@pytest.mark.parametrize("student_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("teacher_dtype", DTYPES, ids=str)
def test_mixed_dtypes(student_dtype: torch.dtype, teacher_dtype: torch.dtype) -> None:
    student, teacher = make_logits("wide", 2, V)
    check(student.to(student_dtype), teacher.to(teacher_dtype), torch.tensor([7, 4400]), backend="triton")


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=repr)
def test_a_gradient_in_16_bits_of_float32_logits(divergence: Divergence, dtype: torch.dtype) -> None:
    check_narrow_gradient("triton", dtype, divergence, columns=2100)


@interpreted
@pytest.mark.parametrize(
    "options",
    [
        {"hard": False, "columns": LONG, "rows": 2},
        {"soft": False, "columns": 97},
        {"teacher_temperature": 3.5, "label_smoothing": 0.1},
    ],
    ids=str,
)
def test_a_gradient_in_16_bits_with_the_options(options: dict[str, Any]) -> None:
    check_narrow_gradient("triton", torch.bfloat16, ForwardKL(), **options)


@interpreted
@pytest.mark.parametrize("inplace", [False, True])
def test_strided_rows_and_vocabularies_of_different_sizes(inplace: bool) -> None:
    student, teacher = make_logits("wide", 3, 2, 2, 3000)
    student, teacher = student[:, :, :1].transpose(0, 1), teacher[:, :, 1:, :2500].transpose(0, 1)
    labels = make_labels(2, 3, 1, vocabulary=2500)
    check(student, teacher, labels, vocab_mismatch="truncate", inplace=inplace, backend="triton")
    check(teacher, student, labels, vocab_mismatch="truncate", backend="triton")


@interpreted
@pytest.mark.parametrize("span", [slice(0, 2048), slice(2048, 4096), slice(4096, V)], ids=str)
@pytest.mark.parametrize("who", ["student", "teacher", "both"])
def test_a_tile_of_minus_infinity(who: str, span: slice) -> None:
    student, teacher = make_logits("wide", 1, V)
    if who != "student":
        teacher[:, span] = -INF
    if who != "teacher":
        student[:, span] = -INF
    label = torch.tensor([3000 if span.start != 2048 else 5])
    loss, gradient, expected, exact = both(student, teacher, label, backend="triton")
    assert_loss(loss, expected)
    assert_gradient(gradient, exact)


@interpreted
@pytest.mark.parametrize("what", [float("nan"), INF])
@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("column", [10, 4400])
def test_a_bad_number_stays_in_its_row(column: int, who: int, what: float) -> None:
    logits = make_logits("wide", 2, V)
    logits[who][0, column] = what
    student = logits[0].requires_grad_()
    loss = fused_kd_loss(student, logits[1], torch.tensor([5, 6]), reduction="none", backend="triton")
    assert isinstance(loss, torch.Tensor)
    assert loss.isnan().tolist() == [True, False]
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert gradient[0].isnan().all()
    assert gradient[1].isfinite().all()


def _rows(
    student: torch.Tensor,
    teacher: torch.Tensor,
    targets: torch.Tensor,
    divergence: Divergence = ForwardKL(),  # noqa: B008
) -> LogitRows:
    options = RowOptions(2.0, 2.0, divergence.name, 0.0, True, True, "triton", divergence.parameters)
    return LogitRows(student, teacher, targets, options)


@interpreted
@pytest.mark.parametrize(
    ("columns", "divergence"), [(V, ForwardKL()), (LONG, ForwardKL()), (600, JSD()), (LONG, LogitMSE())]
)
def test_what_a_gpu_does_with_other_targets(
    columns: int, divergence: Divergence, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Skipped rows are not read, a label out of range is NaN in its row: on a GPU nobody can raise."""
    backend: Any = PREFERENCE["triton"]
    monkeypatch.setattr(backend, "check_targets", lambda *_: None)
    student, teacher = make_logits("wide", 6, columns)
    student[1] = teacher[1] = float("nan")
    targets = torch.tensor([3, SKIP, NO_LABEL, columns, -5, 2**40])
    soft, hard, stats = backend.rows_forward(_rows(student, teacher, targets, divergence))
    for values in (soft, hard):
        assert values.isnan().tolist() == [False, False, False, True, True, True]
        assert values[1] == 0
    assert hard[2] == 0
    # Skipped rows are not even addressed: the gradient may be written over them all the same.
    out = torch.empty(6, columns + 3)
    wide = torch.cat([student, torch.zeros(6, 3)], 1)
    backend.rows_backward(_rows(wide, teacher, targets, divergence), stats, torch.ones(1).expand(6), torch.ones(6), out)
    assert out[:, columns:].eq(0).all()
    assert out[1].eq(0).all()
    assert out[:3, :columns].isfinite().all()
    assert out[3:, :columns].isnan().all()


@interpreted
@pytest.mark.parametrize("divergence", [ForwardKL(), ReverseKL(), JSD(), LogitMSE()], ids=repr)
def test_fused_is_forward_and_backward(divergence: Divergence) -> None:
    backend = PREFERENCE["triton"]
    student, teacher = make_logits("wide", 2, LONG)
    targets, coefficients = torch.tensor([19999, NO_LABEL]), (torch.tensor([0.5, 2.0]), torch.tensor([1.0, 3.0]))
    expected, out = torch.empty_like(student), torch.empty_like(student)
    soft, hard, stats = backend.rows_forward(_rows(student, teacher, targets, divergence))
    backend.rows_backward(_rows(student, teacher, targets, divergence), stats, *coefficients, expected)
    fused = backend.rows_fused(_rows(student, teacher, targets, divergence), *coefficients, out)
    assert torch.equal(fused[0], soft)
    assert torch.equal(fused[1], hard)
    assert torch.equal(out, expected)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_rows_bits_are_its_own(dtype: torch.dtype) -> None:
    backend = PREFERENCE["triton"]
    student, teacher = (x.to(dtype) for x in make_logits("wide", 3, LONG))
    targets, ones = torch.tensor([1, 19000, 3000]), torch.ones(3)
    soft, hard, stats = backend.rows_forward(_rows(student, teacher, targets))
    out = torch.empty_like(student)
    backend.rows_backward(_rows(student, teacher, targets), stats, ones, ones, out)
    for row in range(3):
        alone = slice(row, row + 1)
        rows = _rows(student[alone], teacher[alone], targets[alone])
        one = backend.rows_forward(rows)
        assert all(torch.equal(a, b[alone]) for a, b in zip(one, (soft, hard, stats), strict=True))
        part = torch.empty_like(student[alone])
        backend.rows_backward(rows, one[2], ones[alone], ones[alone], part)
        assert torch.equal(part, out[alone])


# Less than a vector; a row of one tile; whole tiles and a tail, with the label at their edges; two sections.
@interpreted
@pytest.mark.parametrize("columns", [5, 97, V + 1, 16384 + 3])
@pytest.mark.parametrize("teacher_dtype", [torch.float32, torch.bfloat16, None], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_where_rows_lie(
    dtype: torch.dtype, teacher_dtype: torch.dtype | None, columns: int
) -> None:
    check_where_rows_lie("triton", dtype, teacher_dtype, columns)


# Every other divergence. test_divergences.py has more, and runs on these kernels with TRITON_INTERPRET=1.
OTHERS = [kind for kind in KINDS if not isinstance(kind, (ForwardKL, CrossEntropy))]
OTHERS += [JSD(1e-4), AlphaDivergence(0.9999)]  # whose careful expressions all count


@interpreted
@pytest.mark.parametrize("divergence", OTHERS, ids=repr)
def test_a_divergence(divergence: Divergence) -> None:
    pairs = [make_logits(kind, 1, 600) for kind in ("close", "wide", "peaked", "big")]
    student, teacher = (torch.cat(logits) for logits in zip(*pairs, strict=True))
    check_rows(student, teacher, divergence, 1.5, "triton")


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("divergence", [ReverseKL(), SymmetricKL(), AlphaBeta(2.0, 3.0), LogitMSE()], ids=repr)
def test_a_divergence_of_several_sections(divergence: Divergence, dtype: torch.dtype) -> None:
    student, teacher = (x.to(dtype) for x in make_logits("close", 1, LONG))
    check_rows(student, teacher, divergence, 4.0, "triton")


@interpreted
@pytest.mark.parametrize("divergence", [ReverseKL(), SkewReverseKL(), AlphaDivergence(0.5), LogitMSE(False)], ids=repr)
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 2.7, "label_smoothing": 0.1},
        {"temperature": 1.5, "teacher_temperature": 3.5},
        {"vocab_mismatch": "truncate", "inplace": True},
    ],
    ids=str,
)
def test_a_divergence_with_the_options(options: dict[str, Any], divergence: Divergence) -> None:
    student, teacher = make_logits("wide", 3, 500)
    teacher = teacher[:, :470].half() if "vocab_mismatch" in options else teacher
    labels = torch.tensor([3, -100, 469])
    loss, gradient, expected, exact = both(
        student, teacher, labels, divergence=divergence, alpha=0.6, soft_on_ignored=True, backend="triton", **options
    )
    assert_loss(loss, expected)
    assert (gradient.double() - exact).norm() <= 5e-6 * exact.norm()


@interpreted
@pytest.mark.parametrize("divergence", [JSD(), TotalVariation(), AlphaDivergence(0.5), AlphaDivergence(0.1)], ids=repr)
def test_a_student_that_is_sure_and_wrong(divergence: Divergence) -> None:
    """In its column c and q G are all but equal: the others' sums have the gradient."""
    teacher, student = make_normal(2, 600, seed=1)
    student[:, 5] = torch.tensor([15.0, 20.0])
    options: dict[str, Any] = {"alpha": 1.0, "reduction": "none", "temperature": 1.0, "divergence": divergence}
    loss, gradient, expected, exact = both(student, teacher, None, backend="triton", **options)
    assert_loss(loss, expected)
    assert ((gradient.double() - exact).norm(dim=-1) <= 5e-6 * exact.norm(dim=-1)).all()


@interpreted
def test_a_power_of_q_may_be_far_above_those_of_p() -> None:
    teacher, student = make_normal(1, LONG, seed=1)
    student[0, 5] = 30.0
    loss, gradient, expected, _ = both(
        student, teacher / 10, None, divergence=AlphaBeta(6.0, 5.0), alpha=1.0, temperature=1.0, backend="triton"
    )
    assert_loss(loss, expected)
    assert gradient.isfinite().all()


@interpreted
@pytest.mark.parametrize("divergence", [*ONE_OF_EACH[2:], SymmetricKL(1.0), AlphaDivergence(0.1)], ids=repr)
def test_minus_infinity_of_a_divergence(divergence: Divergence) -> None:
    """In the teacher, in the student, in both."""
    student, teacher = make_logits("wide", 3, 300)
    teacher[::2, ::3] = student[1:, ::3] = -INF
    options: dict[str, Any] = {"alpha": 1.0, "reduction": "none", "temperature": 1.0, "t2_scaling": False}
    loss, gradient, expected, exact = both(student, teacher, None, divergence=divergence, backend="triton", **options)
    of_q = divergence in (ReverseKL(), SymmetricKL())
    assert (loss == INF).tolist() == [of_q, isinstance(divergence, SymmetricKL), False]
    assert_loss(loss, expected)
    bound = gradient_error_bound(student, exact, divergence, 1.0, expected)
    for row in range(3):
        if loss[row] < INF:
            assert (gradient[row].double() - exact[row]).norm() <= bound[row]
    assert gradient[0].isnan().all() if of_q else gradient[0].isfinite().all()
    assert gradient[1:].isfinite().all()
    assert (gradient[2, ::3] == 0).all()


@interpreted
@pytest.mark.parametrize("divergence", [ReverseKL(), TotalVariation(), JSD(), LogitMSE()], ids=repr)
def test_a_bad_number_of_a_divergence_stays_in_its_row(divergence: Divergence) -> None:
    logits = make_logits("wide", 5, 300)
    for row, (who, what) in enumerate([(0, float("nan")), (1, float("nan")), (0, INF), (1, INF)]):
        logits[who][row, 7] = what
    student = logits[0].requires_grad_()
    loss = fused_kd_loss(student, logits[1], alpha=1.0, divergence=divergence, reduction="none", backend="triton")
    assert isinstance(loss, torch.Tensor)
    assert loss.isnan().tolist() == [True] * 4 + [False]
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert gradient[:4].isnan().all()
    assert gradient[4].isfinite().all()


@interpreted
@pytest.mark.parametrize("divergence", [ReverseKL(), JSD(), AlphaDivergence(0.3), LogitMSE(False)], ids=repr)
def test_one_column_and_the_same_logits(divergence: Divergence) -> None:
    student, teacher = make_logits("wide", 3, 1)
    check_rows(student, teacher, divergence, 2.0, "triton")
    student, _ = make_logits("wide", 1, 300)
    loss, gradient, _, _ = both(student, student.clone(), None, alpha=1.0, divergence=divergence, backend="triton")
    assert loss == 0
    assert (gradient == 0).all()


@interpreted
@pytest.mark.parametrize(
    ("divergence", "dtype", "teacher_dtype", "columns"),
    [(JSD(), torch.float32, torch.float32, 97), (LogitMSE(), torch.bfloat16, torch.float16, 600)],
    ids=str,
)
def test_bits_of_a_divergence_do_not_depend_on_where_rows_lie(
    divergence: Divergence, dtype: torch.dtype, teacher_dtype: torch.dtype, columns: int
) -> None:
    check_where_rows_lie("triton", dtype, teacher_dtype, columns, divergence)


# A sparse teacher. test_sparse.py has more, and runs on these kernels with TRITON_INTERPRET=1.


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("missing", ["rest", "renormalize", "truncate"])
def test_a_sparse_teacher(missing: str, dtype: torch.dtype) -> None:
    pairs = [make_logits(kind, 1, V) for kind in ("close", "wide", "peaked", "big")]
    student, teacher = (torch.cat(logits) for logits in zip(*pairs, strict=True))
    for k in (1, 70):
        sparse_teacher = make_teacher(teacher, k, 2.0, missing)
        check_sparse_rows(student.to(dtype), sparse_teacher, ForwardKL(), 2.0, backend="triton")


@interpreted
@pytest.mark.parametrize("divergence", [ForwardKL(), JSD(), AlphaBeta(0.2, 0.7)], ids=repr)
def test_a_student_close_to_a_sparse_teacher(divergence: Divergence) -> None:
    noise, teacher = make_normal(1, 3 * LONG, seed=3)
    student, tau = teacher * 3 + 0.01 * noise, 100.0
    sparse_teacher = SparseTeacher.from_logits((teacher * 3).double(), 64, tau)
    options: dict[str, Any] = {"temperature": tau, "alpha": 1.0, "t2_scaling": False, "divergence": divergence}
    loss, gradient, _, exact = both(student, sparse_teacher, None, backend="triton", **options)
    assert_loss(loss, torch.tensor(exactly(student, sparse_teacher, divergence, tau), dtype=torch.float64))
    assert (gradient.double() - exact).norm() <= 5e-6 * exact.norm()


@interpreted
@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 0.5, "label_smoothing": 0.1, "temperature": 2.7},
        {"alpha": 0.5, "inplace": True, "temperature": 1.5, "reduction": "sum"},
        {"alpha": 0.0},
    ],
    ids=str,
)
def test_a_sparse_teacher_with_the_options(options: dict[str, Any]) -> None:
    student, teacher = make_logits("wide", 3, 1, LONG + 1)
    sparse_teacher = make_teacher(teacher, 9, 2.0)
    labels = torch.tensor([[int(sparse_teacher.ids[0, 0, 0])], [-100], [LONG]])
    check(student, sparse_teacher, labels, soft_on_ignored=True, backend="triton", **options)


@interpreted
def test_the_other_columns_of_a_sparse_teacher() -> None:
    check_log_rest("triton")


@interpreted
@pytest.mark.parametrize("columns", [97, LONG + 1])
def test_bits_of_a_sparse_teacher_do_not_depend_on_where_rows_lie(columns: int) -> None:
    check_where_sparse_rows_lie("triton", columns)


@interpreted
@pytest.mark.parametrize("what", [float("nan"), INF, -INF])
def test_a_bad_number_beside_a_sparse_teacher_stays_in_its_row(what: float) -> None:
    student, teacher = make_logits("wide", 3, V)
    top = SparseTeacher.from_logits(teacher, 3)
    others = torch.ones(V, dtype=torch.bool).index_fill(0, top.ids[0], False)
    student[0, others if what == -INF else others.nonzero()[[9, 4400]]] = what
    leaf = student.requires_grad_()
    loss = fused_kd_loss(leaf, top, alpha=1.0, reduction="none", backend="triton")
    assert isinstance(loss, torch.Tensor)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    if what == -INF:
        assert loss[0] == INF
        assert gradient[0].isfinite().all()
    else:
        assert loss[0].isnan()
        assert gradient[0].isnan().all()
    assert loss[1:].isfinite().all()
    assert gradient[1:].isfinite().all()
