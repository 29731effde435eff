"""Several teachers, against the float64 reference."""

import functools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import DTYPES, INF, assert_loss, both, gradient_bound, make_labels, make_logits, make_normal, parts
from test_divergences import ONE_OF_EACH, gradient_error_bound
from test_memory import Allocations
from torch import Tensor

from fused_kd import FusedKDLoss, KDLossOutput, ensemble, fused_kd_loss, ops
from fused_kd.backends import PREFERENCE, pytorch
from fused_kd.backends.rows import NO_LABEL, SKIP, RowOptions
from fused_kd.divergences import JSD, Divergence, ForwardKL, LogitMSE, ReverseKL, SymmetricKL
from fused_kd.ensemble import ENSEMBLES, pieces
from fused_kd.reference import kd_loss
from fused_kd.taught import TaughtRows, Teacher

NAN = math.nan


def make_teachers(kind: str, *shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[Tensor]]:
    """A student and three teachers of dtypes of their own, of which the student is as far from the first as `kind`
    says."""
    student, first = make_logits(kind, *shape)
    _, second = make_logits("wide", *shape, seed=5)
    third, _ = make_logits("peaked", *shape, seed=6)
    return student.to(dtype), [first.to(dtype), second.to(torch.bfloat16), third.to(torch.float16)]


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ensemble, "_PIECE", 1000)


def check_rows(
    student: Tensor, teachers: list[Tensor], divergence: Divergence, kind: str, tau: float, **options: Any
) -> None:
    """The soft term of rows [N, V], and its gradient without tau^2."""
    options = {"temperature": tau, "alpha": 1.0, "t2_scaling": False, "reduction": "none", **options}
    loss, gradient, expected, exact = both(student, teachers, None, divergence=divergence, ensemble=kind, **options)
    assert_loss(loss, expected)
    assert loss.dtype == torch.float32
    error = (gradient.double() - exact).norm(dim=-1)
    bound = gradient_error_bound(student, exact, divergence, tau, expected) + 1e-14
    if student.dtype != torch.float32:
        bound = torch.maximum(bound, 1.1 * (exact.to(student.dtype).double() - exact).norm(dim=-1) + 1e-14)
    assert (error <= bound).all(), f"{(error / bound).max():.3g} times the bound"


@pytest.mark.parametrize("divergence", [*ONE_OF_EACH, LogitMSE(centred=False)], ids=repr)
@pytest.mark.parametrize("kind", ENSEMBLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_value_and_gradient(dtype: torch.dtype, kind: str, divergence: Divergence, small_pieces: None) -> None:
    for logits in ("wide", "peaked", "close", "big") if dtype == torch.float32 else ("wide",):
        student, teachers = make_teachers(logits, 4, 700, dtype=dtype)
        check_rows(student, teachers, divergence, kind, 3.0, teacher_weights=[0.5, 3, 1.0])


def test_the_native_kernels_take_the_pieces_of_a_student_of_16_bits(backend: str) -> None:
    for kind in ENSEMBLES:
        for dtype in (torch.bfloat16, torch.float16):
            student, teachers = make_teachers("wide", 3, 4, 700, dtype=dtype)
            check_rows(student, teachers, ForwardKL(), kind, 2.0, backend=backend)


@functools.cache
def large(kind: str, tau: float) -> tuple[Tensor, list[Tensor]]:
    """What a student would have to be, and its teachers."""
    (first, _), (third, _) = make_normal(1, 151936, seed=3), make_normal(1, 151936, seed=4)
    teachers = [first * 3, first * 3 + third]
    weights = torch.full((1, 2), 1 / 2)
    return ensemble.combined(teachers, weights, kind, tau, torch.float32, level=False), teachers


EACH = [("arithmetic", divergence) for divergence in ONE_OF_EACH] + [("geometric", JSD())]


@pytest.mark.parametrize(("kind", "divergence"), EACH, ids=str)
def test_a_nearly_converged_student(kind: str, divergence: Divergence) -> None:
    noise, _ = make_normal(1, 151936, seed=7)
    for sigma, tau in ((0.01, 100.0), (0.05, 1.0)):
        if sigma == 0.05 and not isinstance(divergence, ForwardKL | JSD):
            continue
        student, teachers = large(kind, tau)
        check_rows(student + sigma * noise, teachers, divergence, kind, tau)


@pytest.mark.parametrize("kind", ENSEMBLES)
@pytest.mark.parametrize("divergence", ["forward_kl", "logit_mse"])
def test_a_nearly_converged_student_of_16_bits(divergence: Any, kind: str) -> None:
    """Its teachers' combined logits are rounded to float32."""
    noise, base = make_normal(1, 20000, seed=3)
    for tau in (1.0, 100.0):
        student = (base * 3 + 0.01 * noise).bfloat16()
        teachers = [base * 3 + 0.001 * noise, (base * 3).half(), base * 3 + 40]
        loss, gradient, expected, exact = both(
            student, teachers, None, alpha=1.0, temperature=tau, divergence=divergence, ensemble=kind
        )
        assert_loss(loss, expected, 3e-5)
        assert (gradient.double() - exact).norm() <= gradient_bound(exact, torch.bfloat16)


@pytest.mark.parametrize(("kind", "divergence"), EACH, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 0.7, "temperature": 3.0, "teacher_weights": torch.tensor([1.0, 2.0, 0.0])},
        {"alpha": 0.5, "hard_weight": 1.0, "label_smoothing": 0.1, "reduction": "sum"},
        {"alpha": 0.3, "shift": True, "reduction": "none", "inplace": True},
        {"alpha": 0.3, "soft_on_ignored": True, "reduction": "batchmean"},
        {"alpha": 0.9, "teacher_temperature": 3.5, "weights": torch.arange(10.0).reshape(2, 5)},
        {"alpha": 1.0, "vocab_mismatch": "truncate", "num_items": 7, "return_parts": True},
        {"alpha": 0.0, "vocab_mismatch": "truncate"},
    ],
    ids=",".join,
)
def test_with_the_options(options: dict[str, Any], divergence: Divergence, kind: str, small_pieces: None) -> None:
    student, teachers = make_teachers("wide", 2, 5, 300)
    labels = make_labels(2, 5, vocabulary=270)
    if "vocab_mismatch" in options:
        teachers[1] = teachers[1][..., :270]
    loss, gradient, expected, exact = both(student, teachers, labels, divergence=divergence, ensemble=kind, **options)
    assert_loss(loss, expected)
    assert (gradient.double() - exact).norm() <= gradient_bound(exact, torch.float32) * 2.5


@st.composite
def calls(draw: st.DrawFn) -> tuple[Tensor, list[Tensor], Tensor, dict[str, Any]]:
    positions = [*draw(st.lists(st.integers(0, 4), max_size=2)), draw(st.integers(1, 4))]
    vocabulary = draw(st.sampled_from([1, 2, 7, 100, 513]))
    seed = draw(st.integers(0, 1000))
    student, first = make_logits(draw(st.sampled_from(["wide", "masked", "big"])), *positions, vocabulary, seed=seed)
    teachers = [first] + [
        make_logits("wide", *positions, vocabulary, seed=seed + k)[1].to(draw(st.sampled_from(DTYPES)))
        for k in range(draw(st.integers(0, 3)))
    ]
    if len(positions) > 1 and draw(st.booleans()):
        student, teachers[-1] = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (student, teachers[-1]))
    labels = make_labels(*positions, vocabulary=vocabulary, seed=seed)
    own = student.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    labels = labels.masked_fill(own.isinf(), -100)  # an impossible label is a case of its own
    weights = draw(st.lists(st.sampled_from([0.0, 0.3, 2.0]), min_size=len(teachers), max_size=len(teachers)))
    options = {
        "temperature": draw(st.floats(0.5, 8)),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "soft_on_ignored": draw(st.booleans()),
        "shift": draw(st.booleans()),
        "inplace": draw(st.booleans()),
        "ensemble": draw(st.sampled_from(ENSEMBLES)),
        "teacher_weights": weights if sum(weights) > 0 else None,
    }
    return student, teachers, labels, options


@given(call=calls(), rows=st.integers(1, 20))
@settings(max_examples=75, deadline=None, derandomize=True)
def test_anything(call: tuple[Any, ...], rows: int) -> None:
    student, teachers, labels, options = call
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ensemble, "_PIECE", rows * student.shape[-1])
        loss, gradient, expected, exact = both(student, teachers, labels, **options)
    assert_loss(loss, expected)
    assert (gradient.double() - exact).norm() <= gradient_bound(exact, torch.float32)


@pytest.mark.parametrize("sizes", [(), (0,), (5,), (3, 4), (2, 0, 3), (2, 3, 4), (7, 1)], ids=str)
def test_pieces(sizes: tuple[int, ...]) -> None:
    rows = torch.arange(math.prod(sizes)).reshape(sizes)
    for limit in (1, 2, 4, 5, 8, 12, 100):
        found: list[int] = []
        assert list(pieces(sizes, limit))  # one of nothing, too
        for index, span in pieces(sizes, limit):
            piece = rows[index]
            assert piece.numel() <= limit
            assert piece.untyped_storage().data_ptr() == rows.untyped_storage().data_ptr()
            assert span == slice(len(found), len(found) + piece.numel())
            found += piece.flatten().tolist()
        assert found == list(range(rows.numel()))


@pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=repr)
def test_gradcheck(divergence: Divergence) -> None:
    student, (first, second, _) = make_teachers("wide", 2, 2, 7)
    teachers, labels = [first.double(), second], make_labels(2, 2, vocabulary=7)
    leaf = student.double().requires_grad_()
    for kind in ENSEMBLES:
        options: dict[str, Any] = {"divergence": divergence, "ensemble": kind, "teacher_weights": [0.2, 0.8]}
        assert torch.autograd.gradcheck(lambda s, o=options: fused_kd_loss(s, teachers, labels, **o), leaf)


def test_one_teacher_is_the_plain_loss(backend: str) -> None:
    student, teacher = make_logits("wide", 3, 200)
    labels = make_labels(3, vocabulary=200)
    for several in ([teacher], (teacher,)):
        results = []
        for given_teacher in (teacher, several):
            leaf = student.clone().requires_grad_()
            loss = fused_kd_loss(leaf, given_teacher, labels, backend=backend)
            results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))  # type: ignore[union-attr]
        assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def rows_of(student: Tensor, teachers: list[Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """The soft term of each row, and its gradient."""
    leaf = student.clone().requires_grad_()
    loss = fused_kd_loss(leaf, teachers, alpha=1.0, reduction="none", **options)
    assert isinstance(loss, Tensor)
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]


@pytest.mark.parametrize("kind", ENSEMBLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_teacher_twice_is_that_teacher(dtype: torch.dtype, kind: str) -> None:
    student, teacher = make_logits("wide", 3, 200)
    options = {"ensemble": kind, "teacher_weights": [0.2, 0.7]}
    twice, once = rows_of(student.to(dtype), [teacher, teacher], **options), rows_of(student.to(dtype), [teacher])
    torch.testing.assert_close(twice[0], once[0], rtol=1e-5, atol=0)
    assert (twice[1] - once[1]).norm() <= 4e-3 * once[1].norm()


def test_only_the_ratio_of_weights_counts() -> None:
    student, teachers = make_teachers("wide", 3, 200)
    for one, other in zip(
        rows_of(student, teachers[:2], teacher_weights=[1e308, 1e308]), rows_of(student, teachers[:2]), strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", ENSEMBLES)
def test_rows_of_a_teacher_without_weight_are_not_looked_at(kind: str) -> None:
    student, (first, second, third) = make_teachers("wide", 3, 200)
    expected = rows_of(student, [first, second], ensemble=kind)
    for bad in (NAN, INF, -INF):
        for weights in ([1.0, 0.0, 1], torch.tensor([1.0, 0.0, 1.0])):
            teachers = [first, torch.full_like(third, bad), second]
            for one, other in zip(
                rows_of(student, teachers, ensemble=kind, teacher_weights=weights), expected, strict=True
            ):
                torch.testing.assert_close(one, other)


@pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=repr)
@pytest.mark.parametrize("kind", ENSEMBLES)
def test_minus_infinity(kind: str, divergence: Divergence) -> None:
    """Ruled out by one teacher: only of a geometric mean is p 0 there. By all: of both."""
    student, (first, second, third) = make_teachers("wide", 3, 300)
    first[:, ::3], second[:, ::6], third[:, ::12] = -INF, -INF, -INF
    student[:, ::60] = -INF
    teachers = [first, second, third]
    options: dict[str, Any] = {"alpha": 1.0, "reduction": "none", "divergence": divergence, "ensemble": kind}
    loss, gradient, expected, exact = both(student, teachers, None, **options)
    if isinstance(divergence, (ReverseKL, SymmetricKL)):
        assert (loss == INF).all()
        assert gradient.isnan().all()
        return
    assert_loss(loss, expected)
    assert gradient.isfinite().all()
    assert (gradient[:, ::60] == 0).all()
    assert (gradient.double() - exact).norm() <= 5e-6 * exact.norm()


@pytest.mark.parametrize("kind", ENSEMBLES)
def test_a_row_that_is_not_finite(kind: str, backend: str) -> None:
    student, teachers = make_teachers("wide", 4, 300)
    student, labels = student.bfloat16(), torch.tensor([3, -100, 5, 7])
    teachers[1][1, 5] = NAN  # of a row that is skipped
    teachers[1][2] = -INF
    leaf = student.requires_grad_()
    loss = fused_kd_loss(leaf, teachers, labels, reduction="none", ensemble=kind, backend=backend)  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad(loss, leaf, torch.ones(4))
    assert loss.isfinite().tolist() == [True, True, False, True]  # type: ignore[union-attr]
    assert (loss[1], gradient[1].abs().sum()) == (0, 0)  # type: ignore[index]
    assert gradient.isnan().any(-1).tolist() == [False, False, True, False]


def test_a_bad_label_is_named_by_its_row(small_pieces: None) -> None:
    student, teachers = make_teachers("wide", 6, 300)
    labels = torch.arange(6).masked_fill(torch.arange(6) == 4, 300)
    with pytest.raises(IndexError, match="labels: row 4 has the label 300, which is not in \\[0, 300\\)"):
        fused_kd_loss(student, teachers, labels)


@pytest.mark.parametrize("kind", ENSEMBLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pieces_are_bounded(dtype: torch.dtype, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the logits' size but the gradient: what is allocated does not grow with the number of rows."""
    monkeypatch.setattr(ensemble, "_PIECE", 1 << 14)
    monkeypatch.setattr(pytorch, "_CHUNK", 1 << 14)
    largest = []
    for rows in (16, 32):
        student, teachers = make_teachers("wide", 4, rows // 4, 2048, dtype=dtype)
        targets, ones, gradient = make_labels(rows, vocabulary=2048), torch.ones(rows), torch.empty_like(student)
        teacher = Teacher(kind, [torch.full((4, rows // 4, 3), 1 / 3), *teachers])
        taught = TaughtRows(student, teacher, targets, RowOptions(2.0, 2.0, "forward_kl", 0.0, True, True, "auto"))
        with Allocations() as seen:
            stats = ensemble.rows_forward(taught)[2]
            ensemble.rows_backward(taught, stats, ones, ones, gradient)
        largest.append(seen.largest)
    assert largest[0] == largest[1] == 8 << 14


def loss_and_gradient(f: Any, student: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = student.clone().requires_grad_()
    loss = f(leaf * 1.5, *arguments, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]


@pytest.mark.parametrize(
    "options",
    [{}, {"ensemble": "geometric"}, {"reduction": "none"}, {"divergence": "jsd"}, {"inplace": True}],
    ids=str,
)
def test_compile(options: dict[str, Any]) -> None:
    student, teachers = make_teachers("wide", 6, 200)
    labels = make_labels(6, vocabulary=200)
    loss_fn = FusedKDLoss(**options)
    torch._dynamo.reset()
    compiled = torch.compile(loss_fn, fullgraph=True, backend="aot_eager")
    for weights in (None, [1.0, 2.0, 0.0], torch.tensor([1.0, 2.0, 0.0])):
        arguments = (student, teachers, labels)
        expected = loss_and_gradient(loss_fn, *arguments, teacher_weights=weights)
        for one, other in zip(loss_and_gradient(compiled, *arguments, teacher_weights=weights), expected, strict=True):
            torch.testing.assert_close(one, other)
        with torch.no_grad():
            torch.testing.assert_close(compiled(student * 1.5, teachers, labels, teacher_weights=weights), expected[0])


def test_compile_with_another_number_of_rows() -> None:
    loss_fn = FusedKDLoss()
    torch._dynamo.reset()
    compiled = torch.compile(loss_fn, fullgraph=True, backend="inductor", dynamic=True)
    for rows in (6, 9):
        student, teachers = make_teachers("wide", rows, 200)
        labels = make_labels(rows, vocabulary=200)
        expected = loss_and_gradient(loss_fn, student, teachers, labels)
        for one, other in zip(loss_and_gradient(compiled, student, teachers, labels), expected, strict=True):
            torch.testing.assert_close(one, other)


def test_transforms() -> None:
    student, (first, second, _) = make_teachers("wide", 3, 4, 50)
    second, labels = second.float(), make_labels(3, 4, vocabulary=50)

    def loss(s: Tensor, a: Tensor, b: Tensor, y: Tensor) -> Tensor:
        result = fused_kd_loss(s, [a, b], y, teacher_weights=[1, 3])
        assert isinstance(result, Tensor)
        return result

    rows = [
        loss_and_gradient(lambda s, *r: loss(s / 1.5, *r), *x) for x in zip(student, first, second, labels, strict=True)
    ]
    torch.testing.assert_close(torch.func.vmap(loss)(student, first, second, labels), torch.stack([x for x, _ in rows]))
    gradients = torch.func.vmap(torch.func.grad(loss))(student, first, second, labels)
    torch.testing.assert_close(gradients, torch.stack([x * 1.0 for _, x in rows]))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace")
def test_trace() -> None:
    student, teachers = make_teachers("wide", 6, 30)
    labels = make_labels(6, vocabulary=30)

    def loss(s: Tensor, a: Tensor, b: Tensor, y: Tensor) -> Any:
        return fused_kd_loss(s, [a, b], y)

    traced = torch.jit.trace(loss, (student, *teachers[:2], labels))
    arguments = (student * 2, *teachers[1:], labels.roll(1))
    torch.testing.assert_close(traced(*arguments), loss(*arguments))


def test_backward_twice_and_upstream_gradients() -> None:
    student, teachers = make_teachers("wide", 4, 100)
    leaf = student.requires_grad_()
    loss = fused_kd_loss(leaf, teachers, alpha=1.0, reduction="none")
    upstream = torch.tensor([0.0, 1.0, -2.0, 0.5])
    first, second = (torch.autograd.grad(loss, leaf, upstream, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    (plain,) = torch.autograd.grad(loss, leaf, torch.ones(4))
    torch.testing.assert_close(first, plain * upstream.unsqueeze(1))


def test_nothing_waits_for_a_gpu() -> None:
    """Tensors without values in the place of a GPU's: reading one would raise."""
    student, teachers = make_teachers("wide", 3, 4, 50)
    teacher: Any = [x.to("meta") for x in teachers]
    labels = make_labels(3, 4, vocabulary=50).to("meta")
    for options in ({}, {"reduction": "none", "shift": True}, {"return_parts": True, "entropies": True}):
        leaf = student.to("meta").requires_grad_()
        loss = parts(fused_kd_loss(leaf, teacher, labels, label_smoothing=0.1, **options))
        assert torch.autograd.grad(loss.sum(), leaf)[0].shape == student.shape


def test_operators() -> None:
    student, teachers = make_teachers("wide", 2, 3, 50)
    targets, vector = torch.tensor([1, 2, SKIP, NO_LABEL, 4, 49]), torch.rand(6)
    weights = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64).expand(2, 3, 3)
    options = RowOptions(2.0, 2.0, "forward_kl", 0.0, True, True, "auto")
    arguments = ([weights, *teachers], targets)
    stats = ops.teachers_forward(student, *arguments, "arithmetic", *options)[2]
    rest = (*arguments, stats, vector, vector, "arithmetic", *options)
    for logits in (student, student.clone().requires_grad_()):
        torch.library.opcheck(ops.teachers_forward, (logits, *arguments, "arithmetic", *options))
    torch.library.opcheck(ops.teachers_backward, (student, *rest))
    torch.library.opcheck(ops.teachers_backward_, (student.clone(), *rest))
    bad: list[tuple[Any, str]] = [
        (([weights, *teachers[:2]], targets, "arithmetic"), "floating weights .* and K tensors of logits"),
        (([weights, *teachers], targets, "median"), "kind must be one of 'arithmetic', .*got 'median'"),
        (([weights, *teachers], targets, "logits"), "kind must be one of 'arithmetic', .*got 'logits'"),
        (([weights, *(x[:1] for x in teachers)], targets, "arithmetic"), "must have the student's leading shape"),
    ]
    for call, message in bad:
        with pytest.raises(ValueError, match=message):
            ops.teachers_forward(student, *call, *options)


def test_parts() -> None:
    student, teachers = make_teachers("wide", 4, 100)
    labels = make_labels(4, vocabulary=100)
    output = fused_kd_loss(student, teachers, labels, return_parts=True)
    assert isinstance(output, KDLossOutput)
    soft = kd_loss(student.double(), [x.double() for x in teachers], labels, alpha=1.0, t2_scaling=False)
    assert_loss(output.soft, soft)  # type: ignore[arg-type]


S, T, Y = torch.randn(2, 3, 10), torch.randn(2, 3, 10), torch.zeros(2, 3, dtype=torch.int64)

BAD: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    ([], {}, ValueError, "teacher_logits must have at least one tensor, got an empty list"),
    ([T, "t"], {}, TypeError, r"teacher_logits\[1\] must be a tensor, got str"),
    ([T, T[:1]], {}, ValueError, r"teacher_logits\[1\] must have the student's leading shape.*\(1, 3, 10\)"),
    ([T, T[..., :9]], {}, ValueError, r"teacher_logits\[1\] must have the student's vocabulary.*truncate"),
    ([T, T.to("meta")], {}, ValueError, r"teacher_logits\[1\] must be on the student's device"),
    ([T, T.transpose(0, 2)], {}, ValueError, r"teacher_logits\[1\] must have unit stride"),
    (T, {"teacher_weights": [1.0]}, ValueError, "teacher_weights weighs several teachers, but teacher_logits is one"),
    ([T, T], {"teacher_weights": [1.0]}, ValueError, "teacher_weights must be 2 numbers, one for each teacher, got 1"),
    ([T, T], {"teacher_weights": torch.ones(3)}, ValueError, r"teacher_weights must have the shape \(2,\), got \(3,\)"),
    ([T, T], {"teacher_weights": [1.0, -1]}, ValueError, r"teacher_weights\[1\] must be finite and at least 0, got -1"),
    ([T, T], {"teacher_weights": [NAN, 1]}, ValueError, r"teacher_weights\[0\] must be finite and at least 0, got nan"),
    ([T, T], {"teacher_weights": torch.tensor([NAN, 1])}, ValueError, r"teacher_weights\[0\] must be finite"),
    ([T, T], {"teacher_weights": [0, 0.0]}, ValueError, "teacher_weights must not all be 0, got"),
    ([T, T], {"teacher_weights": ["1", 0.0]}, TypeError, r"teacher_weights\[0\] must be a number, got '1'"),
    ([T, T], {"teacher_weights": 0.5}, TypeError, "teacher_weights must be a sequence of numbers or a tensor"),
    ([T, T], {"teacher_weights": torch.ones(2).int()}, TypeError, "teacher_weights must be a floating tensor"),
    (
        [T, T],
        {"teacher_weights": torch.ones(2).to("meta")},
        ValueError,
        "teacher_weights must be on the logits' device",
    ),
    ([T], {"teacher_weights": [0.0]}, ValueError, "teacher_weights must not all be 0"),
    ([T, T], {"ensemble": "mean"}, ValueError, "ensemble must be one of 'arithmetic', 'geometric', got 'mean'"),
    ([T, T], {"backend": "gpu"}, ValueError, "backend must be one of 'auto', .*got 'gpu'$"),
    (iter([T, T]), {}, TypeError, "teacher_logits must be a tensor, got list_iterator"),
]


@pytest.mark.parametrize(("teachers", "options", "error", "message"), BAD, ids=[x[3][:50] for x in BAD])
def test_errors(teachers: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    if isinstance(teachers, Iterator):
        teachers = iter([T, T])
    with pytest.raises(error, match=message):
        fused_kd_loss(S, teachers, Y, **options)


def test_a_native_backend_and_a_float32_student() -> None:
    if PREFERENCE["cpu"].unavailable() is not None:
        pytest.skip("no native backend")
    with pytest.raises(ValueError, match='combined in float64.*use backend="auto" or "torch", or student_logits in'):
        fused_kd_loss(S, [T, T], Y, backend="cpu")


def test_inplace_on_a_teachers_storage() -> None:
    logits = torch.randn(4, 10, requires_grad=True) * 1
    with pytest.raises(ValueError, match="inplace=True would overwrite teacher_logits"):
        fused_kd_loss(logits, [torch.zeros(4, 10), logits.detach()], alpha=1.0, inplace=True)
