"""Every option, dtype and backend against the float64 reference."""

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    BACKENDS,
    DTYPES,
    LOGITS,
    check,
    check_narrow_gradient,
    make_labels,
    make_logits,
    on_device,
)
from test_divergences import ONE_OF_EACH

from fused_kd import FusedKDLoss, KDLossOutput, fused_kd_loss
from fused_kd.divergences import CrossEntropy, Divergence, ForwardKL

WEIGHTS = torch.tensor([[0.5, 0.0, 3.0, 1e-3, 1.0], [2.0, 0.25, 0.0, 1.0, 7.0], [1.0, 1.0, 1.0, 0.0, 0.125]])

OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "temperature 1": {"temperature": 1.0},
    "temperature 20": {"temperature": 20.0},
    "temperature 0.7": {"temperature": 0.7},
    "teacher_temperature": {"temperature": 2.0, "teacher_temperature": 3.5},
    "alpha 0": {"alpha": 0.0},
    "alpha 1": {"alpha": 1.0},
    "hard_weight": {"alpha": 1.0, "hard_weight": 0.3, "temperature": 4.0},
    "no t2": {"t2_scaling": False, "temperature": 5.0},
    "cross_entropy": {"divergence": "cross_entropy", "temperature": 3.0},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "batchmean": {"reduction": "batchmean"},
    "soft_on_ignored": {"soft_on_ignored": True},
    "shift": {"shift": True},
    "shift none weights": {"shift": True, "reduction": "none", "weights": WEIGHTS},
    "smoothing": {"label_smoothing": 0.1, "temperature": 1.0},
    "smoothing alpha 0": {"label_smoothing": 0.3, "alpha": 0.0},
    "num_items": {"num_items": 17},
    "weights": {"weights": WEIGHTS},
    "weights sum": {"weights": WEIGHTS, "reduction": "sum", "soft_on_ignored": True},
    "inplace": {"inplace": True},
    "inplace temperature 3": {"inplace": True, "temperature": 3.0, "shift": True},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options(options: dict[str, Any], dtype: torch.dtype, backend: str) -> None:
    student, teacher = make_logits("wide", 3, 5, 3001)
    labels = make_labels(3, 5, vocabulary=3001)
    check(student.to(dtype), teacher.to(dtype), labels, backend=backend, **options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options_in_float64(options: dict[str, Any]) -> None:
    student, teacher = make_logits("peaked", 3, 5, 301)
    labels = make_labels(3, 5, vocabulary=301)
    check(student.double(), teacher.double(), labels, relative=1e-12, backend="torch", **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("kind", LOGITS)
def test_logits(kind: str, temperature: float, dtype: torch.dtype, backend: str) -> None:
    student, teacher = make_logits(kind, 6, 5000)
    student, teacher = student.to(dtype), teacher.to(dtype)
    labels = torch.where(student[:, 17].isinf(), 0, 17)
    check(student, teacher, labels, temperature=temperature, backend=backend)


@pytest.mark.parametrize("teacher_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("student_dtype", DTYPES, ids=str)
def test_mixed_dtypes(student_dtype: torch.dtype, teacher_dtype: torch.dtype, backend: str) -> None:
    student, teacher = make_logits("peaked", 4, 2500)
    check(student.to(student_dtype), teacher.to(teacher_dtype), make_labels(4, vocabulary=2500), backend=backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=repr)
def test_a_gradient_in_16_bits_of_float32_logits(divergence: Divergence, dtype: torch.dtype, backend: str) -> None:
    check_narrow_gradient(backend, dtype, divergence)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"hard": False},
        {"soft": False},
        {"temperature": 1.0, "teacher_temperature": 1.0},
        {"temperature": 2.7, "teacher_temperature": 2.7, "rows": 9, "columns": 9000},
        {"teacher_temperature": 3.5, "label_smoothing": 0.1},
        {"divergence": CrossEntropy(), "columns": 600},
    ],
    ids=str,
)
def test_a_gradient_in_16_bits_with_the_options(options: dict[str, Any], dtype: torch.dtype, backend: str) -> None:
    options = {"divergence": ForwardKL(), **options}
    check_narrow_gradient(backend, dtype, options.pop("divergence"), **options)


@pytest.mark.parametrize("columns", [(130, 100), (100, 130), (5000, 4097), (4097, 5000)])
@pytest.mark.parametrize("inplace", [False, True])
def test_truncated_vocabulary(columns: tuple[int, int], inplace: bool, backend: str) -> None:
    student, _ = make_logits("wide", 4, columns[0])
    _, teacher = make_logits("wide", 4, columns[1])
    labels = make_labels(4, vocabulary=min(columns))
    check(student, teacher, labels, vocab_mismatch="truncate", inplace=inplace, backend=backend)


@pytest.mark.parametrize("upstream", [0.0, -2.5, 1e-4])
def test_upstream_gradient(upstream: float, backend: str) -> None:
    student, teacher = make_logits("wide", 4, 700)
    check(student, teacher, make_labels(4, vocabulary=700), upstream=torch.tensor(upstream), backend=backend)
    rows = torch.tensor([1.0, upstream, 0.5, -1.0])
    check(student, teacher, make_labels(4, vocabulary=700), upstream=rows, reduction="none", backend=backend)


@pytest.mark.parametrize("sure", [10.0, 16.0, 22.0])
def test_a_sure_and_right_student_keeps_its_digits(sure: float, backend: str) -> None:
    """1 - q1[label] is 1e-6 and below: taken as a difference it would be noise, in the value and the gradient."""
    student, teacher = make_logits("wide", 3, 4000)
    labels = torch.tensor([0, 2047, 3999])
    student = student.scatter(1, labels[:, None], sure + 20)
    check(student, teacher, labels, alpha=0.0, temperature=1.0, backend=backend)
    check(student, teacher, labels, alpha=0.0, hard_weight=1.0, temperature=2.0, backend=backend)
    check(student, student + 0.1 * teacher, labels, temperature=3.0, backend=backend)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_parts_make_the_loss(options: dict[str, Any], backend: str) -> None:
    student, teacher = make_logits("wide", 3, 5, 50)
    labels = make_labels(3, 5, vocabulary=50)
    options = on_device({**options, "inplace": False})
    loss = fused_kd_loss(student.requires_grad_(), teacher, labels, backend=backend, **options)
    output = fused_kd_loss(student, teacher, labels, backend=backend, return_parts=True, **options)
    assert isinstance(output, KDLossOutput)
    assert isinstance(loss, torch.Tensor)
    assert torch.equal(output.loss, loss)
    alpha, temperature = options.get("alpha", 0.9), options.get("temperature", 2.0)
    hard_weight = options.get("hard_weight", 1 - alpha)
    factor = temperature**2 if options.get("t2_scaling", True) else 1.0
    assert (output.soft is None) == (alpha == 0)
    assert (output.hard is None) == (hard_weight == 0)
    total = torch.zeros(())
    for part, weight in ((output.soft, alpha * factor), (output.hard, hard_weight)):
        if part is not None:
            assert not part.requires_grad
            total = total + weight * part
    torch.testing.assert_close(total, output.loss.detach())


def test_num_items_may_be_a_tensor(backend: str) -> None:
    student, teacher = make_logits("wide", 4, 60)
    labels = make_labels(4, vocabulary=60)
    losses = [
        fused_kd_loss(student, teacher, labels, num_items=n, backend=backend)
        for n in (12, 12.0, torch.tensor(12), torch.tensor([12.0]))
    ]
    assert all(torch.equal(loss, losses[0]) for loss in losses)


def test_accumulated_micro_batches_equal_the_whole_batch(backend: str) -> None:
    student, teacher = make_logits("wide", 8, 90)
    labels = make_labels(8, vocabulary=90)
    items = int((labels != -100).sum())
    whole = fused_kd_loss(student, teacher, labels, backend=backend)
    halves = [
        fused_kd_loss(student[half], teacher[half], labels[half], num_items=items, backend=backend)
        for half in (slice(0, 3), slice(3, 8))
    ]
    torch.testing.assert_close(sum(halves), whole)


STRIDES = st.sampled_from(["contiguous", "sliced", "transposed", "padded", "expanded teacher", "permuted"])


@st.composite
def calls(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, dict[str, Any]]:
    positions = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    vocabulary = draw(st.sampled_from([1, 2, 3, 7, 8, 31, 100, 257, 2047, 2048, 2049, 4500]))
    kind = draw(st.sampled_from(LOGITS if vocabulary > 2 else ("wide",)))
    seed = draw(st.integers(0, 10**6))
    student, teacher = make_logits(kind, *positions, vocabulary, seed=seed)
    student = student.to(draw(st.sampled_from(DTYPES)))
    teacher = teacher.to(draw(st.sampled_from(DTYPES)))
    layout = draw(STRIDES)
    if layout == "sliced":
        student = torch.cat([student, student], 0)[: positions[0]]
        teacher = torch.cat([teacher, teacher], -1)[..., :vocabulary]
    elif layout == "transposed" and len(positions) > 1:
        student = student.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "padded":
        student = torch.nn.functional.pad(student, (3, 5))[..., 3 : 3 + vocabulary]
    elif layout == "expanded teacher":
        teacher = teacher[:1].expand_as(teacher)
    elif layout == "permuted":
        order = [*reversed(range(len(positions))), len(positions)]
        student = student.permute(order).contiguous().permute(order)
        teacher = teacher.permute(order).contiguous().permute(order)
    labels = make_labels(*positions, vocabulary=vocabulary, ignored=draw(st.sampled_from([0.0, 0.3, 1.0])), seed=seed)
    own = student.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    labels = labels.masked_fill(own.isinf(), -100)  # an impossible label is a case of its own
    options: dict[str, Any] = {
        "temperature": draw(st.sampled_from([0.5, 1.0, 1.3, 2.0, 4.0, 10.0])),
        "alpha": draw(st.sampled_from([0.0, 0.3, 1.0])),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "soft_on_ignored": draw(st.booleans()),
        "shift": draw(st.booleans()),
        "inplace": draw(st.booleans()),
    }
    if draw(st.booleans()):
        options["teacher_temperature"] = draw(st.floats(0.5, 8.0))
    if draw(st.booleans()):
        generator = torch.Generator().manual_seed(seed)
        weights = torch.rand(positions, generator=generator) * 2
        options["weights"] = weights.masked_fill(torch.rand(positions, generator=generator) < 0.3, 0.0)
    return student, teacher, labels, options


@pytest.mark.parametrize("backend_name", BACKENDS)
@given(call=calls())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_anything(call: tuple[Any, ...], backend_name: str) -> None:
    student, teacher, labels, options = call
    # A student close to the teacher has a small loss that is a difference of large numbers: its bound is 1e-4.
    check(student, teacher, labels, relative=1e-4, backend=backend_name, **options)


def test_options_may_be_read_and_set(backend: str) -> None:
    class Annealed(FusedKDLoss):
        def __init__(self) -> None:
            super().__init__(4.0, alpha=1.0, backend=backend)
            self.temperature = 3.0
            self.step = 0

    loss_fn = Annealed()
    student, teacher = make_logits("wide", 4, 100)
    assert (loss_fn.temperature, loss_fn.alpha, loss_fn.hard_weight, loss_fn.step) == (3.0, 1.0, None, 0)
    assert torch.equal(
        loss_fn(student, teacher), fused_kd_loss(student, teacher, temperature=3.0, alpha=1.0, backend=backend)
    )
    loss_fn.temperature, loss_fn.reduction = 1.5, "sum"
    expected = fused_kd_loss(student, teacher, temperature=1.5, alpha=1.0, reduction="sum", backend=backend)
    assert torch.equal(loss_fn(student, teacher), expected)
    assert "temperature=1.5" in repr(loss_fn)
    assert copy.deepcopy(loss_fn).temperature == pickle.loads(pickle.dumps(FusedKDLoss(1.5))).temperature == 1.5


def test_numbers_of_numpy_are_numbers() -> None:
    np = pytest.importorskip("numpy")
    student, teacher = make_logits("wide", 4, 100)
    labels = make_labels(4, vocabulary=100)
    ours = {"temperature": 2.5, "alpha": 0.5, "teacher_temperature": 3, "label_smoothing": 0.25, "ignore_index": -1}
    theirs = {
        "temperature": np.float32(2.5),
        "alpha": np.float64(0.5),
        "teacher_temperature": np.int64(3),
        "label_smoothing": np.float16(0.25),
        "ignore_index": np.int32(-1),
    }
    labels = labels.masked_fill(labels < 0, -1)
    expected = fused_kd_loss(student, teacher, labels, num_items=7, **ours)
    assert torch.equal(fused_kd_loss(student, teacher, labels, num_items=np.int64(7), **theirs), expected)
    assert type(FusedKDLoss(np.float32(2)).temperature) is float
