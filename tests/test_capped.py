"""Logits that are scaled and capped: the four options, alone and with what else a loss may have."""

from typing import Any

import pytest
import torch
from support import BACKENDS, DTYPES, assert_gradient, assert_loss, both, make_labels, make_logits
from torch import Tensor

from fused_kd import FusedKDLoss, KDLossOutput, SparseTeacher, fused_kd_loss
from fused_kd.divergences import AlphaBeta
from fused_kd.reference import kd_loss

ALL: dict[str, Any] = {
    "student_logit_scale": 0.7,
    "teacher_logit_scale": 1.3,
    "student_softcap": 5.0,
    "teacher_softcap": 30.0,
}
CAPS: list[dict[str, Any]] = [{"student_logit_scale": 1.5}, {"student_softcap": 4.0}, {"teacher_softcap": 4.0}, ALL]


def checked(student: Tensor, teacher: Any, labels: Tensor | None, **options: Any) -> None:
    loss, gradient, expected, exact = both(student, teacher, labels, **options)
    assert gradient.dtype == student.dtype
    assert_loss(loss, expected)
    assert_gradient(gradient, exact)


@pytest.mark.parametrize("caps", CAPS, ids=str)
@pytest.mark.parametrize("kind", ["wide", "peaked", "masked"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_the_reference(backend: str, dtype: torch.dtype, kind: str, caps: dict[str, Any]) -> None:
    student, teacher = make_logits(kind, 3, 5, 4099)
    labels = make_labels(3, 5, vocabulary=1000)
    checked(student.to(dtype), teacher.to(dtype), labels, backend=backend, **caps)


@pytest.mark.parametrize(
    "options",
    [
        {"divergence": "jsd"},
        {"divergence": "reverse_kl", "teacher_temperature": 3.0},
        {"divergence": "logit_mse"},
        {"divergence": AlphaBeta(0.3, 0.5)},
        {"alpha": 0.0, "label_smoothing": 0.1},
        {"alpha": 1.0},
        {"shift": True, "reduction": "sum"},
        {"reduction": "none", "soft_on_ignored": True},
        {"inplace": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_options(dtype: torch.dtype, options: dict[str, Any]) -> None:
    student, teacher = make_logits("wide", 3, 5, 501)
    checked(student.to(dtype), teacher.to(dtype), make_labels(3, 5, vocabulary=501), **ALL, **options)


@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float32), (torch.float32, torch.float64)], ids=str)
@pytest.mark.parametrize("several", [False, True])
def test_a_loss_in_float64_is_exact_to_that(several: bool, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    student, teacher = (x.to(dtype) for x, dtype in zip(make_logits("wide", 3, 5, 501), dtypes, strict=True))
    labels = make_labels(3, 5, vocabulary=501)
    teachers: Any = [teacher, teacher * 2] if several else teacher
    loss, gradient, expected, exact = both(student, teachers, labels, **ALL)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    bound = 1e-12 if student.dtype == torch.float64 else 1e-7
    assert (gradient.double() - exact).norm() <= bound * exact.norm()


@pytest.mark.parametrize("ensemble", ["arithmetic", "geometric"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_teachers(dtype: torch.dtype, ensemble: str) -> None:
    student, first = make_logits("wide", 3, 5, 501)
    second, _ = make_logits("wide", 3, 5, 501, seed=3)
    teachers = [x.to(dtype) for x in (first, second)]
    labels = make_labels(3, 5, vocabulary=501)
    checked(student.to(dtype), teachers, labels, ensemble=ensemble, teacher_weights=[1.0, 2.0], **ALL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sparse_teacher(dtype: torch.dtype) -> None:
    student, teacher = make_logits("wide", 3, 5, 501)
    sparse = SparseTeacher.from_logits(teacher, 8, temperature=2.0)
    labels = make_labels(3, 5, vocabulary=501)
    checked(student.to(dtype), sparse, labels, student_logit_scale=0.7, student_softcap=5.0)
    for option in ({"teacher_logit_scale": 2.0}, {"teacher_softcap": 30.0}):
        with pytest.raises(ValueError, match="SparseTeacher"):
            fused_kd_loss(student, sparse, labels, **option)


@pytest.mark.parametrize("teachers", [1, 2])
def test_entropies(teachers: int) -> None:
    student, teacher = make_logits("wide", 3, 5, 501)
    given: Any = [teacher, student][:teachers] if teachers > 1 else teacher
    output = fused_kd_loss(student, given, alpha=1.0, return_parts=True, entropies=True, **ALL)
    assert isinstance(output, KDLossOutput)
    z = 5.0 * torch.tanh(0.7 * student.double() / 5.0)
    q = torch.softmax(z / 2, -1)
    torch.testing.assert_close(output.student_entropy.double(), -(q * q.log()).sum(-1).mean(), rtol=1e-5, atol=0)
    each = [30.0 * torch.tanh(1.3 * x.double() / 30.0) for x in ([teacher, student] if teachers > 1 else [teacher])]
    p = torch.stack([torch.softmax(x / 2, -1) for x in each]).mean(0)
    torch.testing.assert_close(output.teacher_entropy.double(), -(p * p.log()).sum(-1).mean(), rtol=1e-5, atol=0)


def test_a_layout_that_is_no_rectangle() -> None:
    """Pieces are views, in their order, and the gradient finds its place."""
    student, teacher = make_logits("wide", 7, 6, 70000)
    student, teacher = student.transpose(0, 1)[:, 1:], teacher.transpose(0, 1)[:, 1:]
    weights = torch.arange(36.0).view(6, 6) / 36
    checked(student, teacher, make_labels(6, 6, vocabulary=500), weights=weights, **ALL)


def test_gradcheck() -> None:
    student, teacher = (x.double() for x in make_logits("wide", 2, 3, 7))
    labels = make_labels(2, 3, vocabulary=7)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: fused_kd_loss(s, teacher, labels, divergence="jsd", **ALL), student)


@pytest.mark.parametrize("dynamic", [None, True])
def test_compile(dynamic: bool | None) -> None:
    student, teacher = make_logits("wide", 3, 5, 501)
    labels = make_labels(3, 5, vocabulary=501)

    def loss(s: Tensor, softcap: float) -> Any:
        output = fused_kd_loss(
            s,
            teacher,
            labels,
            divergence="jsd",
            student_softcap=softcap,
            teacher_logit_scale=0.5,
            return_parts=True,
            entropies=True,
        )
        return output[0], output[3], output[4]

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic)
    for softcap in (4.0, 5.0, 6.0):  # the second time the number is symbolic
        exact = kd_loss(
            student.double(),
            teacher.double(),
            labels,
            divergence="jsd",
            student_softcap=softcap,
            teacher_logit_scale=0.5,
        )
        s = student.clone().requires_grad_()
        results = compiled(s, softcap)
        assert_loss(results[0].detach(), exact)
        for x, y in zip(results, loss(student, softcap), strict=True):
            torch.testing.assert_close(x.detach(), y)
        (gradient,) = torch.autograd.grad(results[0], s)
        s2 = student.double().requires_grad_()
        expected = kd_loss(
            s2, teacher.double(), labels, divergence="jsd", student_softcap=softcap, teacher_logit_scale=0.5
        )
        assert_gradient(gradient, torch.autograd.grad(expected, s2)[0])


@pytest.mark.parametrize("name", ["student_logit_scale", "teacher_logit_scale", "student_softcap", "teacher_softcap"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), 1e11])
def test_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        FusedKDLoss(**{name: value})


def test_a_scale_is_a_finite_number() -> None:
    with pytest.raises(TypeError, match="student_logit_scale"):
        FusedKDLoss(student_logit_scale=None)
    with pytest.raises(ValueError, match="student_logit_scale"):
        FusedKDLoss(student_logit_scale=float("inf"))
