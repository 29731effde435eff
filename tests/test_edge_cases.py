"""The table of docs/design.md, row by row."""

import math
from typing import Any

import pytest
import torch
from support import (
    DTYPES,
    INF,
    NOT_IN_MEMORY,
    assert_gradient,
    assert_loss,
    both,
    check,
    gradient_error,
    make_labels,
    make_logits,
    make_normal,
)

from fused_kd import fused_kd_loss
from fused_kd.reference import kd_loss

V = 5000  # more than two blocks of the native kernel


def loss_and_gradient(student: torch.Tensor, *args: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    student = student.clone().requires_grad_()
    loss = fused_kd_loss(student, *args, **options)
    assert isinstance(loss, torch.Tensor)
    return loss.detach(), torch.autograd.grad(loss.sum(), student)[0]


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
def test_teacher_minus_infinity(temperature: float, backend: str) -> None:
    student, teacher = make_logits("wide", 3, V)
    teacher[:, ::3] = -INF
    loss, gradient, expected, exact = both(student, teacher, None, alpha=1.0, temperature=temperature, backend=backend)
    assert loss.isfinite().all()
    assert gradient.isfinite().all()
    assert_loss(loss, expected)
    assert_gradient(gradient, exact)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
def test_both_minus_infinity(temperature: float, backend: str) -> None:
    student, teacher = make_logits("wide", 3, V)
    student[:, ::3] = teacher[:, ::3] = -INF
    check(student, teacher, torch.tensor([1, 2, 4]), temperature=temperature, backend=backend)
    _, gradient = loss_and_gradient(student, teacher, torch.tensor([1, 2, 4]), backend=backend)
    assert (gradient[:, ::3] == 0).all()
    # The column might as well not be there.
    keep = torch.arange(V) % 3 != 0
    loss, _ = loss_and_gradient(student, teacher, alpha=1.0, backend=backend)
    without, _ = loss_and_gradient(student[:, keep], teacher[:, keep], alpha=1.0, backend=backend)
    torch.testing.assert_close(loss, without)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("column", [0, 2048, V - 1])
def test_student_minus_infinity_where_the_teacher_is_not(column: int, temperature: float, backend: str) -> None:
    student, teacher = make_logits("wide", 3, V)
    student[1, column] = -INF
    loss, gradient, expected, exact = both(
        student, teacher, None, alpha=1.0, temperature=temperature, reduction="none", backend=backend
    )
    assert loss[1] == INF
    assert expected[1] == INF
    assert_loss(loss[::2], expected[::2])
    assert gradient.isfinite().all()
    assert_gradient(gradient, exact)


@pytest.mark.parametrize("tile", [slice(0, 2048), slice(0, 4096), slice(2048, 4096), slice(4096, V), slice(0, V - 1)])
@pytest.mark.parametrize("who", ["student", "teacher", "both"])
def test_a_tile_of_minus_infinity(tile: slice, who: str, backend: str) -> None:
    student, teacher = make_logits("wide", 2, V)
    if who != "student":
        teacher[:, tile] = -INF
    if who != "teacher":
        student[:, tile] = -INF
    loss, gradient, expected, exact = both(student, teacher, torch.tensor([V - 1, V - 1]), backend=backend)
    assert_loss(loss, expected)
    assert_gradient(gradient, exact)


@pytest.mark.parametrize("who", ["student", "teacher"])
@pytest.mark.parametrize("what", ["nan", "nan with a payload", "inf", "all -inf"])
@pytest.mark.parametrize("options", [{}, {"alpha": 1.0, "divergence": "cross_entropy"}, {"alpha": 0.0}], ids=str)
def test_bad_numbers_stay_in_their_row(options: dict[str, Any], what: str, who: str, backend: str) -> None:
    student, teacher = make_logits("wide", 3, V)
    bad = student if who == "student" else teacher
    if what == "all -inf":
        bad[1] = -INF
    elif what == "nan with a payload":
        bad.view(torch.int32)[1, 3000] = -1
    else:
        bad[1, 3000] = float(what)
    labels = torch.tensor([5, 6, 7])
    loss, gradient = loss_and_gradient(student, teacher, labels, reduction="none", backend=backend, **options)
    if options.get("alpha") == 0.0 and who == "teacher":  # the teacher is not looked at
        assert loss.isfinite().all()
        assert gradient.isfinite().all()
        return
    assert loss.isnan().tolist() == [False, True, False]
    assert gradient[1].isnan().all()
    assert gradient[::2].isfinite().all()
    clean, clean_gradient = loss_and_gradient(
        student[::2], teacher[::2], labels[::2], reduction="none", backend=backend, **options
    )
    assert torch.equal(loss[::2], clean)
    assert torch.equal(gradient[::2], clean_gradient)


@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7FC00000])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_nan_from_upstream_stays_one_in_16_bits(dtype: torch.dtype, alpha: float, bits: int, backend: str) -> None:
    """Rounding carries into what stands above: a NaN with all bits set must not come out as a number."""
    student, teacher = (x.to(dtype) for x in make_logits("wide", 3, V))
    upstream = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    student.requires_grad_()
    loss = fused_kd_loss(student, teacher, torch.tensor([5, 6, 7]), alpha=alpha, reduction="sum", backend=backend)
    (gradient,) = torch.autograd.grad(loss, student, upstream)
    assert gradient.isnan().all()


@pytest.mark.parametrize("what", [float("nan"), INF, -INF])
@pytest.mark.parametrize("how", ["label", "weight", "shift"])
def test_bad_numbers_in_an_ignored_row_are_nothing(how: str, what: float, backend: str) -> None:
    student, teacher = make_logits("wide", 3, V)
    labels = torch.tensor([5, 6, 7])
    student[2] = teacher[2] = what
    options: dict[str, Any] = {}
    if how == "label":
        labels[2] = -100
    elif how == "weight":
        options["weights"] = torch.tensor([1.0, 1.0, 0.0])
    else:
        options["shift"] = True
    loss, gradient = loss_and_gradient(student, teacher, labels, backend=backend, reduction="none", **options)
    assert loss[2] == 0
    assert (gradient[2] == 0).all()
    assert loss.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e4), (torch.bfloat16, 1e4), (torch.float16, 6e4)])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 3.0])
def test_big_logits(dtype: torch.dtype, size: float, temperature: float, backend: str) -> None:
    student, teacher = make_logits("wide", 4, V)
    student, teacher = (student.sign() * size).to(dtype), (teacher * size / 20).clamp(-size, size).to(dtype)
    check(student, teacher, make_labels(4, vocabulary=V), temperature=temperature, backend=backend)


def test_the_lowest_number_is_a_number(backend: str) -> None:
    """Masks are often finfo.min, for whole blocks too."""
    student, teacher = make_logits("wide", 3, V)
    lowest = torch.finfo(torch.float32).min
    student[:, :2500] = teacher[:, :2500] = lowest
    check(student, teacher, None, alpha=1.0, backend=backend)
    student[1] = teacher[1] = lowest
    if backend == "triton":  # its lanes start from -1e28, and take a row with nothing above it for one of -inf
        loss, _ = loss_and_gradient(student, teacher, None, alpha=1.0, reduction="none", backend=backend)
        assert loss.isnan().tolist() == [False, True, False]
    else:
        check(student, teacher, None, alpha=1.0, backend=backend)


@pytest.mark.parametrize("shape", [(0, 7), (2, 0, 7), (0, 3, 7)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean", "none"])
def test_empty_batch(shape: tuple[int, ...], reduction: str, backend: str) -> None:
    student = torch.zeros(shape, requires_grad=True)
    labels = torch.zeros(shape[:-1], dtype=torch.int64)
    for shift in (False, True):
        loss = fused_kd_loss(student, torch.zeros(shape), labels, reduction=reduction, shift=shift, backend=backend)
        assert isinstance(loss, torch.Tensor)
        assert loss.sum() == 0
        loss.sum().backward()
        assert student.grad is not None
        assert student.grad.shape == shape


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
def test_one_column(temperature: float, backend: str) -> None:
    student, teacher = make_logits("wide", 4, 1)
    loss, gradient = loss_and_gradient(
        student, teacher, torch.zeros(4, dtype=torch.int64), temperature=temperature, backend=backend
    )
    assert loss == 0
    assert (gradient == 0).all()


def test_one_dimension(backend: str) -> None:
    student, teacher = make_logits("wide", 300)
    check(student, teacher, torch.tensor(7), backend=backend)
    check(student, teacher, torch.tensor(7), reduction="none", inplace=True, backend=backend)


@pytest.mark.parametrize(
    ("how", "reduction"),
    [(how, r) for how in ("labels", "weights", "shift") for r in ("mean", "sum", "batchmean", "none")]
    + [("num_items", "mean")],
)
def test_no_valid_row(reduction: str, how: str, backend: str) -> None:
    student, teacher = make_logits("wide", 3, 1, 40)
    labels, options = torch.full((3, 1), 5), {}
    if how == "labels":
        labels[:] = -100
    elif how == "weights":
        options = {"weights": torch.zeros(3, 1)}
    elif how == "shift":
        options = {"shift": True}
    else:
        labels[:] = -100
        options = {"num_items": torch.tensor(0)}
    loss, gradient = loss_and_gradient(student, teacher, labels, reduction=reduction, backend=backend, **options)
    assert (loss == 0).all()
    assert (gradient == 0).all()


def _only_the_cpu_looks() -> None:
    if torch.get_default_device().type != "cpu":
        pytest.skip("a GPU gives NaN and does not wait: test_gpu.py")


@pytest.mark.parametrize("label", [V, V + 7, -1, -2, 2**40, -(2**62)])
def test_label_out_of_range(label: int, backend: str) -> None:
    _only_the_cpu_looks()
    student, teacher = make_logits("wide", 4, V)
    labels = torch.tensor([1, 2, label, 3])
    for options in ({}, {"alpha": 1.0}, {"alpha": 0.0}, {"soft_on_ignored": True}):
        with pytest.raises(IndexError, match=rf"labels: row 2 has the label {label}, which is not in \[0, {V}\)"):
            fused_kd_loss(student, teacher, labels, backend=backend, **options)
    assert isinstance(fused_kd_loss(student, teacher, labels, ignore_index=label, backend=backend), torch.Tensor)


def test_minus_100_is_a_label_out_of_range_where_ignore_index_is_another(backend: str) -> None:
    _only_the_cpu_looks()
    student, teacher = make_logits("wide", 3, V)
    labels = torch.tensor([1, -100, 5])
    for options in ({}, {"alpha": 0.0}, {"soft_on_ignored": True}, {"weights": torch.ones(3)}):
        with pytest.raises(IndexError, match="labels: row 1 has the label -100, "):
            fused_kd_loss(student, teacher, labels, ignore_index=5, backend=backend, **options)


def test_label_beyond_the_truncated_vocabulary(backend: str) -> None:
    _only_the_cpu_looks()
    student, teacher = torch.randn(2, 10), torch.randn(2, 7)
    with pytest.raises(IndexError, match=r"row 1 has the label 8, which is not in \[0, 7\)"):
        fused_kd_loss(student, teacher, torch.tensor([1, 8]), vocab_mismatch="truncate", backend=backend)


def test_backward_twice(backend: str) -> None:
    student, teacher = make_logits("wide", 3, V)
    student.requires_grad_()
    loss = fused_kd_loss(student, teacher, torch.tensor([1, 2, 3]), backend=backend)
    first, second, doubled = (
        torch.autograd.grad(loss, student, torch.tensor(scale), retain_graph=True)[0] for scale in (1.0, 1.0, 2.0)
    )
    assert torch.equal(first, second)
    torch.testing.assert_close(doubled, 2 * first)


def test_backward_twice_inplace_raises(backend: str) -> None:
    student, teacher = make_logits("wide", 3, V)
    logits = student.requires_grad_() * 1
    loss = fused_kd_loss(logits, teacher, torch.tensor([1, 2, 3]), inplace=True, backend=backend)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inplace_does_not_corrupt_another_loss_of_the_same_logits(backend: str) -> None:
    student, teacher = make_logits("wide", 3, V)
    logits = student.requires_grad_() * 1
    other = logits.square().sum()  # its backward needs the logits
    loss = fused_kd_loss(logits, teacher, torch.tensor([1, 2, 3]), inplace=True, backend=backend)
    loss.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_teacher_gets_no_gradient(backend: str) -> None:
    student, teacher = make_logits("wide", 3, 50)
    student.requires_grad_()
    teacher.requires_grad_()
    fused_kd_loss(student, teacher, torch.tensor([1, 2, 3]), backend=backend).backward()
    assert teacher.grad is None


def test_impossible_label(backend: str) -> None:
    """A label that the student rules out: an infinite loss and a finite gradient, as in PyTorch."""
    student, teacher = make_logits("wide", 3, V)
    student[1, 9] = teacher[1, 9] = -INF
    loss, gradient, expected, exact = both(
        student, teacher, torch.tensor([9, 9, 9]), reduction="none", temperature=1.0, backend=backend
    )
    assert loss[1] == INF
    assert expected[1] == INF
    assert_gradient(gradient, exact)


def test_smoothing_over_a_masked_column_is_infinite(backend: str) -> None:
    """-log 0 has a share in the smoothed labels: as torch.nn.functional.cross_entropy."""
    student, teacher = make_logits("wide", 2, V)
    student[:, 9] = teacher[:, 9] = -INF
    loss, gradient = loss_and_gradient(
        student, teacher, torch.tensor([1, 2]), alpha=0.0, label_smoothing=0.1, backend=backend
    )
    assert math.isinf(loss)
    assert gradient.isfinite().all()


def test_smoothing_with_an_impossible_label_is_infinite(backend: str) -> None:
    student, teacher = make_logits("wide", 2, V)
    student[1, 9] = -INF
    loss, gradient = loss_and_gradient(
        student, teacher, torch.tensor([9, 9]), alpha=0.0, label_smoothing=0.1, reduction="none", backend=backend
    )
    assert loss[0].isfinite()
    assert loss[1] == INF
    assert gradient.isfinite().all()


def test_labels_of_any_stride(backend: str) -> None:
    student, teacher = make_logits("wide", 4, V)
    labels = torch.tensor([3, -1, -100, -1, 7, -1, 0, -1])
    check(student, teacher, labels[::2], backend=backend)
    check(student, teacher, labels[:1].expand(4), backend=backend)


@pytest.mark.parametrize("options", [{}, {"soft_on_ignored": True}, {"reduction": "none"}])
def test_teacher_and_labels_in_inference_mode(backend: str, options: dict[str, Any]) -> None:
    student, teacher = make_logits("wide", 3, V)
    labels = torch.tensor([1, 2, 3])
    expected = loss_and_gradient(student, teacher, labels, backend=backend, **options)
    with torch.inference_mode():
        frozen, chosen = teacher * 1, labels * 1
    got = loss_and_gradient(student, frozen, chosen, backend=backend, **options)
    assert all(torch.equal(*x) for x in zip(got, expected, strict=True))


@pytest.mark.large
def test_more_than_two_to_the_31_elements(backend: str) -> None:
    rows, columns = 2**31 // 151936 + 2, 151936
    student = torch.zeros(rows, columns, dtype=torch.bfloat16)
    teacher = torch.zeros(1, columns, dtype=torch.bfloat16).expand(rows, columns)
    assert student.numel() > 2**31
    tail = make_logits("wide", 2, columns)[0].to(torch.bfloat16)
    student[-2:] = tail
    labels = torch.full((rows,), -100)
    labels[-2:] = torch.tensor([7, columns - 1])
    logits = student.requires_grad_() * 1
    del student
    loss = fused_kd_loss(logits, teacher, labels, inplace=True, backend=backend)
    gradient = torch.autograd.grad(loss, logits)[0]
    small = tail.clone().requires_grad_()
    expected = fused_kd_loss(small, torch.zeros_like(tail), labels[-2:], backend=backend)
    assert torch.equal(loss, expected)
    assert torch.equal(gradient[-2:], torch.autograd.grad(expected, small)[0])
    assert (gradient[:-2:997] == 0).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [2, 700])
def test_a_teacher_sure_of_one_token(columns: int, dtype: torch.dtype, temperature: float, backend: str) -> None:
    """Next to nothing is left to learn, of the size of what float32 loses in a difference from 1."""
    student, teacher = make_logits("wide", 2, columns)
    student[:, columns // 2] = student.amax(-1) + 14 * temperature + 0.3
    teacher[:, columns // 2] = teacher.amax(-1) + 12 * temperature + 0.7
    check(student.to(dtype), teacher.to(dtype), None, alpha=1.0, temperature=temperature, backend=backend)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", ["student", "teacher", "labels", "weights", "upstream", "all"])
@pytest.mark.parametrize("how", NOT_IN_MEMORY)
def test_values_that_do_not_lie_in_memory(how: str, name: str, reduction: str, backend: str) -> None:
    student, teacher = make_logits("wide", 6, 300)
    labels, weights = torch.tensor([0, 5, -100, 299, 1, 2]), torch.tensor([0.5, 0.0, 2.0, 1.0, 0.25, 3.0])
    upstream = torch.rand(6 if reduction == "none" else ())
    values = {"student": student, "teacher": teacher, "labels": labels, "weights": weights, "upstream": upstream}
    lazy = {key: NOT_IN_MEMORY[how](x) if name in (key, "all") else x for key, x in values.items()}
    results = []
    for x in (lazy, {key: x + torch.zeros_like(values[key]) for key, x in lazy.items()}):
        logits = x["student"].requires_grad_()
        for options in ({"weights": x["weights"]}, {}):
            loss = fused_kd_loss(logits, x["teacher"], x["labels"], reduction=reduction, backend=backend, **options)
            assert isinstance(loss, torch.Tensor)
            results.append((loss.detach(), torch.autograd.grad(loss, logits, x["upstream"])[0]))
    for (loss, gradient), (expected, exact) in zip(results[:2], results[2:], strict=True):
        assert_loss(loss, expected.double(), relative=1e-6)
        assert_gradient(gradient, exact.double())


def test_the_gradient_of_what_is_negated(backend: str) -> None:
    student, teacher = make_logits("close", 4, V)
    leaf, exact = (-student).requires_grad_(), (-student).double().requires_grad_()
    loss = fused_kd_loss(torch._neg_view(leaf), torch._neg_view(-teacher), alpha=1.0, backend=backend)
    expected = kd_loss(-exact, teacher.double(), alpha=1.0)
    assert isinstance(loss, torch.Tensor)
    assert isinstance(expected, torch.Tensor)
    assert_loss(loss, expected.detach())
    assert_gradient(torch.autograd.grad(loss, leaf)[0], torch.autograd.grad(expected, exact)[0])


def test_a_weight_that_is_negated_below_0(backend: str) -> None:
    student, teacher = make_logits("wide", 2, 50)
    weights = torch._neg_view(torch.tensor([-1.0, 1.0]))
    if weights.device.type == "cpu":
        with pytest.raises(ValueError, match="weights must be finite and at least 0, got -1.0 in row 1"):
            fused_kd_loss(torch._neg_view(student), teacher, alpha=1.0, weights=weights, backend=backend)


# The native kernel takes a sample of a block for the whole: its first 64 columns of 4096. Sure of one of these, of one
# elsewhere, in one block of two.
@pytest.mark.parametrize(
    ("vocabulary", "column"), [(4096, 11), (4096, 0), (4096, 64), (4096, 1000), (9000, 4100), (9000, 8999)]
)
@pytest.mark.parametrize(("temperature", "teacher_temperature"), [(1.0, 1.0), (2.0, 2.0), (3.0, 3.0), (1.0, 1.5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_teacher_sure_of_one_token_somewhere(
    dtype: torch.dtype, temperature: float, teacher_temperature: float, column: int, vocabulary: int, backend: str
) -> None:
    # On GPUs delta is a difference of the exponents then.
    rounded = teacher_temperature != temperature and dtype == torch.float32 and backend in ("cuda", "triton")
    for rise in (14, 18):
        student, teacher = make_logits("wide", 2, vocabulary)
        for logits, tau in ((student, temperature), (teacher, teacher_temperature)):
            logits[:, column] = logits.amax(-1) + rise * tau
        options: dict[str, Any] = {"temperature": temperature, "teacher_temperature": teacher_temperature}
        loss, gradient, expected, exact = both(
            student.to(dtype), teacher.to(dtype), None, alpha=1.0, backend=backend, **options
        )
        assert_loss(loss, expected)
        if rounded:
            assert gradient_error(gradient, exact) <= 5e-6
        else:
            assert_gradient(gradient, exact)


@pytest.mark.parametrize("temperature", [1.0, 5.0, 20.0])
@pytest.mark.parametrize("rise", [12, 16])
def test_a_teacher_sure_of_one_token_and_a_wide_student(rise: int, temperature: float, backend: str) -> None:
    """Elsewhere the student lies far from the teacher, with next to none of p: little of that is left in the row."""
    noise, teacher = make_normal(8, 9000, seed=5)
    student = teacher + 3 * temperature * noise
    for logits in (student, teacher):
        logits[:, 3000] += rise * temperature
    options: dict[str, Any] = {"temperature": temperature, "alpha": 1.0, "reduction": "none", "backend": backend}
    loss, gradient, expected, exact = both(student, teacher, None, **options)
    assert_loss(loss, expected)
    assert gradient_error(gradient, exact) <= 5e-6


@pytest.mark.parametrize(("temperature", "teacher_temperature"), [(1.0, 1.0), (2.0, 2.0), (3.0, 3.3)])
@pytest.mark.parametrize("sure", [(19.0, 22.0), (22.0, 19.0), (14.0, 14.0), (12.0, 24.0), (19.0, -3.0)], ids=str)
@pytest.mark.parametrize("columns", [2, 17, 1000, 5000])
def test_cross_entropy_where_both_are_sure(
    columns: int, sure: tuple[float, float], temperature: float, teacher_temperature: float, backend: str
) -> None:
    """It is as small as what one token leaves to the others, which a sum beside that token's 1 loses."""
    for noise in (0.0, 1.0):
        student, teacher = (noise * x for x in make_logits("wide", 2, columns))
        best = [columns // 2, -1]
        teacher[[0, 1], best] = teacher.amax(-1) + sure[0] * teacher_temperature
        student[[0, 1], best] = student.amax(-1) + sure[1] * temperature
        options: dict[str, Any] = {"temperature": temperature, "teacher_temperature": teacher_temperature}
        options |= {"alpha": 1.0, "divergence": "cross_entropy", "backend": backend}
        loss, _, expected, _ = both(student, teacher, None, **options)
        assert_loss(loss, expected)
        # Two columns with all of p: the number of those at the maximum counts too.
        teacher[:, 0] = teacher.amax(-1)
        loss, _, expected, _ = both(student, teacher, None, **options)
        assert_loss(loss, expected)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 20.0])
@pytest.mark.parametrize("offset", [0.0, 0.3, -1.0, 3.0, 9.0, 100.0, -37.3])
@pytest.mark.parametrize("columns", [2, 3, 5, 17, 100])
def test_a_converged_student_of_few_columns(columns: int, offset: float, temperature: float, backend: str) -> None:
    """s - t is exact in float32's numbers, so its smallest differences are to be seen whatever the offset."""
    teacher, noise = make_normal(4, columns, seed=5)
    for size in (1e-5, 1e-4, 1e-3, 1e-2):
        loss, gradient, _, exact = both(
            teacher + offset + size * noise, teacher, None, alpha=1.0, temperature=temperature, backend=backend
        )
        assert loss >= 0
        assert_gradient(gradient, exact)
