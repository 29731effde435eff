"""What the paper claims about the loss, of the definition and of the package alike."""

import math

import pytest
import torch
from support import make_labels, make_logits, make_normal
from torch.nn.functional import cross_entropy, kl_div, log_softmax, softmax

from fused_kd import FusedKDLoss, fused_kd_loss
from fused_kd.reference import kd_loss


def test_the_definition_is_what_everybody_writes() -> None:
    student, teacher = (x.double() for x in make_logits("wide", 6, 50))
    labels = make_labels(6, vocabulary=50, ignored=0)
    soft = kl_div(log_softmax(student / 3, -1), softmax(teacher / 3, -1), reduction="batchmean")
    expected = 0.9 * 9 * soft + 0.1 * cross_entropy(student, labels)
    torch.testing.assert_close(kd_loss(student, teacher, labels, temperature=3.0), expected)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 7.0])
@pytest.mark.parametrize("divergence", ["forward_kl", "cross_entropy"])
def test_gradient_of_the_soft_term(temperature: float, divergence: str, backend: str) -> None:
    """Equation 2: dC/dz = (q - p) / T."""
    student, teacher = make_logits("wide", 4, 900)
    student.requires_grad_()
    loss = fused_kd_loss(
        student, teacher, alpha=1.0, temperature=temperature, t2_scaling=False, divergence=divergence,
        reduction="sum", backend=backend,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(loss, student)
    q = softmax(student.detach().double() / temperature, -1)
    p = softmax(teacher.double() / temperature, -1)
    torch.testing.assert_close(gradient.double(), (q - p) / temperature, rtol=1e-5, atol=1e-8)


def test_t2_keeps_the_relative_size_of_the_two_terms(backend: str) -> None:
    """Section 2: the soft gradients scale as 1/T^2, so they are multiplied by T^2."""
    student, teacher = make_logits("wide", 4, 900)
    student.requires_grad_()

    def size(temperature: float, t2_scaling: bool) -> float:
        loss = fused_kd_loss(
            student, teacher, alpha=1.0, temperature=temperature, t2_scaling=t2_scaling, backend=backend
        )
        return float(torch.autograd.grad(loss, student)[0].norm())

    assert size(50.0, True) / size(100.0, True) == pytest.approx(1, rel=0.1)
    assert size(50.0, False) / size(100.0, False) == pytest.approx(4, rel=0.1)


def test_high_temperature_is_logit_matching(backend: str) -> None:
    """Equation 4: with zero-meaned logits, T^2 KL -> sum (s - t)^2 / (2 V), and its gradient (s - t) / V."""
    student, teacher = make_logits("wide", 4, 900)
    student = (student - student.mean(-1, keepdim=True)).requires_grad_()
    teacher = teacher - teacher.mean(-1, keepdim=True)
    loss = fused_kd_loss(student, teacher, alpha=1.0, temperature=3000.0, reduction="none", backend=backend)
    assert isinstance(loss, torch.Tensor)
    limit = (student - teacher).double().square().sum(-1) / (2 * 900)
    torch.testing.assert_close(loss.double(), limit, rtol=0.01, atol=0)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    torch.testing.assert_close(gradient, (student - teacher).detach() / 900, rtol=0.02, atol=1e-5)


def test_cross_entropy_differs_by_the_teachers_entropy(backend: str) -> None:
    student, teacher = make_logits("wide", 5, 700)
    student.requires_grad_()
    kl, ce = (
        fused_kd_loss(
            student, teacher, alpha=1.0, temperature=2.5, t2_scaling=False, reduction="none",
            divergence=divergence, backend=backend,
        )
        for divergence in ("forward_kl", "cross_entropy")
    )  # fmt: skip
    assert isinstance(kl, torch.Tensor)
    assert isinstance(ce, torch.Tensor)
    log_p = log_softmax(teacher.double() / 2.5, -1)
    torch.testing.assert_close((ce - kl).double(), -(log_p.exp() * log_p).sum(-1), rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(loss.sum(), student)[0] for loss in (kl, ce)]
    assert torch.equal(*gradients)


def test_a_partly_labelled_transfer_set(backend: str) -> None:
    """Each term is averaged over its own rows: the soft term over all, the hard term over the labelled ones."""
    student, teacher = make_logits("wide", 6, 80)
    labels = torch.tensor([3, -100, -100, 5, 7, -100])
    output = FusedKDLoss(2.0, soft_on_ignored=True, return_parts=True, backend=backend)(student, teacher, labels)
    s, t = student.double(), teacher.double()
    soft = kl_div(log_softmax(s / 2, -1), softmax(t / 2, -1), reduction="batchmean")
    torch.testing.assert_close(output.soft.double(), soft, rtol=1e-5, atol=0)
    torch.testing.assert_close(output.hard.double(), cross_entropy(s, labels), rtol=1e-5, atol=0)


def test_ensemble_by_arithmetic_or_geometric_mean(backend: str) -> None:
    """Soft targets may come from an ensemble: log of the mean probability, or the mean logit, is a teacher's logits."""
    student, _ = make_logits("wide", 4, 60)
    teachers = torch.stack([make_logits("wide", 4, 60, seed=seed)[1] for seed in range(3)])
    for mean in (teachers.softmax(-1).mean(0).log(), teachers.mean(0)):
        loss = fused_kd_loss(student, mean, alpha=1.0, temperature=1.0, t2_scaling=False, backend=backend)
        expected = kl_div(log_softmax(student.double(), -1), softmax(mean.double(), -1), reduction="batchmean")
        assert float(loss) == pytest.approx(float(expected), rel=1e-5)


# (temperature, offset, outlier); an outlier at a lower temperature would take all of q.
NEAR = [(t, offset, 0.0) for t in (1.0, 4.0, 20.0, 100.0) for offset in (0.0, 9.0)]
NEAR += [(20.0, 0.0, 20.0), (100.0, 0.0, 20.0)]


@pytest.mark.parametrize(("temperature", "offset", "outlier"), NEAR)
@pytest.mark.parametrize("sigma", [0.05, 0.01])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_near_convergence(
    offset: float, outlier: float, sigma: float, temperature: float, dtype: torch.dtype, backend: str
) -> None:
    """A KL of 1e-3 down to 1e-9 between two log-sum-exps of 12, at a language model's vocabulary; also where all of the
    student's logits lie higher, and where one of them sticks out."""
    teacher, noise = make_normal(2, 151936, seed=7)
    teacher *= 3
    student = teacher + sigma * noise + offset
    if outlier:
        student[:, 70001] = teacher.max() + outlier
    student = student.to(dtype)
    teacher = teacher.to(dtype)
    exact = student.double().requires_grad_()
    options = {"alpha": 1.0, "temperature": temperature, "t2_scaling": False, "reduction": "none"}
    expected = kd_loss(exact, teacher.double(), **options)
    student.requires_grad_()
    loss = fused_kd_loss(student, teacher, backend=backend, **options)
    assert isinstance(loss, torch.Tensor)
    assert (loss >= 0).all()
    torch.testing.assert_close(loss.detach().double(), expected.detach(), rtol=1e-5, atol=0)
    if dtype == torch.float32:  # the gradient, a difference of two close probabilities, is as exact
        (gradient,) = torch.autograd.grad(loss.sum(), student)
        (exact_gradient,) = torch.autograd.grad(expected.sum(), exact)
        assert (gradient.double() - exact_gradient).norm() <= 2e-6 * exact_gradient.norm()


@pytest.mark.parametrize("temperature", [1.0, 2.0, 8.0])
@pytest.mark.parametrize("vocabulary", [700, 20000])
def test_at_any_distance(vocabulary: int, temperature: float, backend: str) -> None:
    """From a close student to one far off: wherever a backend changes from one form of the KL to another."""
    teacher, noise = make_normal(25, vocabulary, seed=3)
    teacher *= 3
    student = teacher + torch.linspace(0.3, 1.5, 25).unsqueeze(1) * temperature**0.5 * noise
    options = {"alpha": 1.0, "temperature": temperature, "t2_scaling": False, "reduction": "none"}
    exact = student.double().requires_grad_()
    expected = kd_loss(exact, teacher.double(), **options)
    student.requires_grad_()
    loss = fused_kd_loss(student, teacher, backend=backend, **options)
    assert isinstance(loss, torch.Tensor)
    torch.testing.assert_close(loss.detach().double(), expected.detach(), rtol=5e-6, atol=0)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    (exact_gradient,) = torch.autograd.grad(expected.sum(), exact)
    assert (gradient.double() - exact_gradient).norm() <= 2e-6 * exact_gradient.norm()


def test_identical_logits_are_zero(backend: str) -> None:
    student, _ = make_logits("wide", 3, 5000)
    student.requires_grad_()
    loss = fused_kd_loss(student, student.detach(), alpha=1.0, backend=backend)
    assert float(loss.detach()) == 0
    assert math.isclose(float(torch.autograd.grad(loss, student)[0].abs().max()), 0)


def test_nothing_counts() -> None:
    empty, labels = torch.zeros(0, 5, dtype=torch.float64, requires_grad=True), torch.zeros(0, dtype=torch.int64)
    for options in ({}, {"reduction": "batchmean"}, {"num_items": 0}):
        loss = kd_loss(empty, empty, labels, **options)  # type: ignore[arg-type]
        assert loss == 0
        assert torch.autograd.grad(loss, empty)[0].shape == (0, 5)
    nowhere = torch.zeros(2, 0, 5, dtype=torch.float64)
    assert kd_loss(nowhere, nowhere, alpha=1.0, shift=True, reduction="none").shape == (2, 0)


def test_the_soft_term_has_no_part_without_a_weight() -> None:
    student, teacher = (x.double() for x in make_logits("wide", 4, 20))
    student[:, 3] = -math.inf  # the divergence is infinite
    labels = torch.tensor([0, 1, 2, 4])
    expected = cross_entropy(student, labels, reduction="none")
    torch.testing.assert_close(kd_loss(student, teacher, labels, alpha=0.0, reduction="none"), expected)
