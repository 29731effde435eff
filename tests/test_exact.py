"""The same input gives the same bits; a row's bits depend on nothing but the row."""

from collections.abc import Iterator

import pytest
import torch
from support import BACKENDS, DTYPES, check_where_rows_lie, make_labels, make_logits

from fused_kd import fused_kd_loss
from fused_kd.backends import PREFERENCE
from fused_kd.backends.rows import LogitRows, RowOptions

COLUMNS = 20011


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(
    student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, temperature: float, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    student = student.detach().requires_grad_()
    loss = fused_kd_loss(student, teacher, labels, temperature=temperature, reduction="none", backend=backend)
    assert isinstance(loss, torch.Tensor)
    return loss.detach(), torch.autograd.grad(loss.sum(), student)[0]


def same(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("temperature", [2.0, 3.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits(dtype: torch.dtype, temperature: float, backend: str, threads: None) -> None:
    student, teacher = (x.to(dtype) for x in make_logits("wide", 70, COLUMNS))
    labels = make_labels(70, vocabulary=COLUMNS)
    torch.set_num_threads(2)
    whole = run(student, teacher, labels, temperature, backend)
    assert same(run(student, teacher, labels, temperature, backend), whole)
    for count in (1, 3, 7):
        torch.set_num_threads(count)
        assert same(run(student, teacher, labels, temperature, backend), whole), f"{count} threads"
        # Few rows: the threads share a row.
        for begin, end in ((0, 1), (5, 8), (9, 11), (31, 70)):
            part = run(student[begin:end], teacher[begin:end], labels[begin:end], temperature, backend)
            assert same(part, tuple(x[begin:end] for x in whole)), f"rows {begin} to {end}, {count} threads"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_the_address(dtype: torch.dtype, backend: str) -> None:
    """A vectorised loop that peels for alignment would sum in another order."""
    student, teacher = (x.to(dtype) for x in make_logits("wide", 1, COLUMNS))
    labels = torch.tensor([77])
    expected = run(student, teacher, labels, 2.0, backend)
    for offset in range(1, 17):
        moved = [
            torch.empty(COLUMNS + 32, dtype=dtype)[offset:][:COLUMNS].unsqueeze(0).copy_(x) for x in (student, teacher)
        ]
        assert same(run(moved[0], moved[1], labels, 2.0, backend), expected)


# For the CUDA kernels: no step; one, and so few columns after it that shifted loads would leave the row, or just
# enough; three sections, the last of them empty where the gradient's begin 7 columns late.
@pytest.mark.parametrize("columns", [7, 513, 519, 520, 8197])
@pytest.mark.parametrize("teacher_dtype", [*DTYPES, None], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_where_rows_lie(
    dtype: torch.dtype, teacher_dtype: torch.dtype | None, columns: int, backend: str
) -> None:
    check_where_rows_lie(backend, dtype, teacher_dtype, columns)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the way past the caches is the native CPU kernel's")
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("columns", [65544, 65541])
def test_bits_of_a_gradient_larger_than_the_caches(columns: int, temperature: float) -> None:
    """Written past them, where its rows are aligned and it does not replace the logits."""
    student, teacher = make_logits("wide", 130, columns)
    targets, coef = make_labels(130, vocabulary=columns, ignored=0), torch.linspace(0.1, 1, 130)
    options = RowOptions(temperature, temperature, "forward_kl", 0.0, True, True, "cpu")
    cpu = PREFERENCE["cpu"]
    stats = cpu.rows_forward(LogitRows(student, teacher, targets, options))[2]

    def part(logits: torch.Tensor, rows: slice) -> LogitRows:
        return LogitRows(logits[rows], teacher[rows], targets[rows], options)

    def fused(rows: slice, out: torch.Tensor) -> None:
        cpu.rows_fused(part(student, rows), coef[rows], coef[rows], out[rows])

    def backward(rows: slice, out: torch.Tensor) -> None:
        logits = out if out is replaced else student
        cpu.rows_backward(part(logits, rows), stats[rows], coef[rows], coef[rows], out[rows])

    replaced = student.clone()
    for verb in (fused, backward):
        whole, parts = torch.full_like(student, 7), torch.full_like(student, 7)
        verb(slice(0, 130), whole)
        for span in (slice(0, 60), slice(60, 130)):
            verb(span, parts)
        assert torch.equal(whole, parts)
    backward(slice(0, 130), replaced)
    assert torch.equal(whole, replaced)
