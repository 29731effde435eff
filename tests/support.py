"""What the tests share: logits as models make them, and the bounds of docs/design.md against the float64 reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cuda_host
import torch
from torch import Tensor

from fused_kd import KDLossOutput, SparseTeacher, fused_kd_loss
from fused_kd.backends import PREFERENCE, refusal
from fused_kd.backends.rows import SKIP, LogitRows, RowOptions
from fused_kd.divergences import Divergence, ForwardKL
from fused_kd.reference import hard_term, kd_loss, soft_term

# The bounds of docs/design.md for a loss; those for a gradient are in gradient_bound.
LOSS_RELATIVE = 1e-5
LOSS_ABSOLUTE = 1e-12  # what the reference itself loses at logits of 1e4: a log-sum-exp in float64

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOGITS = ("wide", "peaked", "masked", "close", "big")
INF = float("inf")

# The backends that take CPU tensors here; tests run on each. "cuda" does with its kernels compiled for the CPU, but
# there is one CUDA library in a process, and where there is a GPU it is that GPU's.
if not torch.cuda.is_available():
    cuda_host.use()
BACKENDS = [
    name for name, backend in PREFERENCE.items() if refusal(backend, torch.empty(1, 2), torch.empty(1, 2)) is None
]


# Those that take tensors on a GPU: `pytest -m gpu` runs the same tests on each, with the GPU as the default device.
GPU_BACKENDS = [name for name in PREFERENCE if name != "cpu"]

# Tensors whose values are not what lies in memory: these, or zeros in their place.
NOT_IN_MEMORY: dict[str, Callable[[Tensor], Tensor]] = {
    "negated": lambda x: torch._neg_view(-x),  # the same values
    "zeros": lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype),
    "zeros negated": lambda x: torch._neg_view(torch._efficientzerotensor(x.shape, dtype=x.dtype)),
}


def before(version: str, *numbers: int) -> bool:
    """Whether a version comes before these numbers."""
    return tuple(map(int, version.split(".")[: len(numbers)])) < numbers


def make_logits(kind: str, *shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Student and teacher logits [..., V], float32, on the default device: the same numbers on every one."""
    device = torch.get_default_device()
    with torch.device("cpu"):
        student, teacher = _make_logits(kind, *shape, seed=seed)
    return student.to(device), teacher.to(device)


def make_normal(*shape: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two samples of a standard normal distribution, float32, likewise."""
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(shape, generator=generator, device="cpu") for _ in range(2))
    return first.to(torch.get_default_device()), second.to(torch.get_default_device())


def _make_logits(kind: str, *shape: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(scale: float) -> Tensor:
        return torch.randn(shape, generator=generator) * scale

    teacher = normal(3.0)
    if kind == "wide":
        return normal(5.0) + 7, teacher
    if kind == "peaked":  # both sure of one token, mostly the same
        best = torch.randint(shape[-1], (*shape[:-1], 1), generator=generator)
        other = torch.where(torch.rand(best.shape, generator=generator) < 0.3, 0, best)
        return normal(2.0).scatter(-1, other, 22.0), teacher.scatter(-1, best, 19.0)
    if kind == "masked":  # tokens nobody may choose, and more that the teacher rules out
        both, only_teacher = torch.rand((2, shape[-1]), generator=generator) < torch.tensor([[0.3], [0.2]])
        both[0] = only_teacher[0] = False
        both[-1] = True
        return normal(3.0).masked_fill(both, -INF), teacher.masked_fill(both | only_teacher, -INF)
    if kind == "close":  # a nearly converged student
        return teacher + normal(0.05), teacher
    if kind == "big":
        return normal(3.0) * 1e4 / 10, teacher.sign() * 1e4 + normal(30.0)
    raise ValueError(kind)


def make_labels(*positions: int, vocabulary: int, ignored: float = 0.25, seed: int = 1) -> Tensor:
    device = torch.get_default_device()
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(vocabulary, positions, generator=generator)
        labels = labels.masked_fill(torch.rand(positions, generator=generator) < ignored, -100)
    return labels.to(device)


def on_device(options: dict[str, Any]) -> dict[str, Any]:
    """The options with their tensors on the default device."""
    device = torch.get_default_device()
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}


def parts(output: Tensor | KDLossOutput) -> Tensor:
    return output.loss if isinstance(output, KDLossOutput) else output


def both(
    student: Tensor,
    teacher: Tensor | list[Tensor],
    labels: Tensor | None,
    *,
    upstream: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss and gradient of the package, and those of the reference in float64 on the same numbers."""
    options = on_device(options)
    logits = student.detach().requires_grad_()
    # Through an identity, as a model's output: inplace=True wants no leaf.
    loss = parts(fused_kd_loss(_identity(logits), teacher, labels, **options))
    upstream = torch.ones_like(loss) if upstream is None else upstream
    (gradient,) = torch.autograd.grad(loss, logits, upstream.to(loss.dtype))

    for name in ("inplace", "backend", "return_parts", "vocab_mismatch"):
        options.pop(name, None)
    exact = student.detach().double().requires_grad_()
    exact_teacher: Any = teacher  # (log-probabilities are made float64 there)
    if not isinstance(teacher, SparseTeacher):
        exact_teacher = teacher.double() if isinstance(teacher, Tensor) else [x.double() for x in teacher]
    expected = kd_loss(exact, exact_teacher, labels, **options)
    (expected_gradient,) = torch.autograd.grad(expected, exact, upstream.double())
    return loss, gradient, expected.detach(), expected_gradient


class _Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        # Keeps the strides, whatever they are.
        span = sum(stride * (size - 1) for stride, size in zip(logits.stride(), logits.shape, strict=True)) + 1
        copy = torch.empty(max(1, span), dtype=logits.dtype).as_strided(logits.shape, logits.stride())
        return copy.copy_(logits)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def _identity(logits: Tensor) -> Tensor:
    result: Tensor = _Identity.apply(logits)
    return result


def assert_loss(loss: Tensor, expected: Tensor, relative: float = LOSS_RELATIVE) -> None:
    torch.testing.assert_close(loss.double(), expected, rtol=relative, atol=LOSS_ABSOLUTE, equal_nan=True)


def gradient_error(gradient: Tensor, exact: Tensor) -> float:
    return float((gradient.double() - exact).norm() / exact.norm())


def gradient_bound(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Of the error's norm. float32: 2e-6 of the gradient's. 16 bits: 1.1 times what rounding the gradient costs."""
    # Where one column has all of p and q it is 0; a fused multiply-add leaves the last bits of a product there.
    bound = 2e-6 * exact.norm() + 1e-14
    if dtype in (torch.bfloat16, torch.float16):
        bound = torch.maximum(bound, 1.1 * (exact.to(dtype).double() - exact).norm())
    return bound


def assert_gradient(gradient: Tensor, exact: Tensor) -> None:
    assert gradient.shape == exact.shape
    assert torch.equal(gradient.isnan(), exact.isnan())
    gradient, exact = gradient.nan_to_num(), exact.nan_to_num()
    error, bound = (gradient.double() - exact).norm(), gradient_bound(exact, gradient.dtype)
    assert error <= bound, f"error {error:.3e}, bound {bound:.3e}, norm {exact.norm():.3e}"


def check(
    student: Tensor, teacher: Tensor, labels: Tensor | None, *, relative: float = LOSS_RELATIVE, **options: Any
) -> None:
    """The package agrees with the reference, in value and gradient."""
    loss, gradient, expected, exact = both(student, teacher, labels, **options)
    assert gradient.dtype == student.dtype
    assert_loss(loss, expected, relative)
    assert_gradient(gradient, exact)


def placed(x: Tensor, offset: int, gap: int) -> Tensor:
    """The same rows, the first one so many columns after a multiple of 16 bytes, with NaNs around and between them."""
    stride = x.shape[1] + gap
    memory = torch.full((offset + len(x) * stride - gap,), torch.nan, dtype=x.dtype)
    return memory.as_strided(x.shape, (stride, 1), offset).copy_(x)


# Where the first row of student, teacher and gradient lies, and how far rows are apart: all alike, each row elsewhere;
# all alike, each row in the same way; one of them otherwise than the others; all different.
PLACES = [((0, 0, 0), 1), ((5, 5, 5), None), ((0, 1, 0), None), ((3, 3, 0), 0), ((1, 6, 3), 2)]


def check_where_rows_lie(
    backend: str,
    dtype: torch.dtype,
    teacher_dtype: torch.dtype | None,
    columns: int,
    divergence: Divergence = ForwardKL(),  # noqa: B008
) -> None:
    """The verbs agree with the reference, write the gradient's columns alone, and have the same bits wherever logits
    and gradient lie. Without a teacher's dtype there is no soft term."""
    verbs = PREFERENCE[backend]
    soft_term_too = teacher_dtype is not None
    options = RowOptions(2.0, 2.0, divergence.name, 0.0, soft_term_too, True, backend, divergence.parameters)
    student, teacher = make_logits("wide", 5, columns)
    student, teacher = student.to(dtype), teacher.to(teacher_dtype or dtype)
    labels, ones = torch.tensor([0, SKIP, min(5, columns - 1), columns // 2, columns - 1]), torch.ones(5)
    even = -columns % 8  # rows that are this far apart all lie at multiples of 16 bytes

    def run(offsets: tuple[int, int, int], gap: int) -> list[Tensor]:
        s, t, out = (placed(x, at, gap) for x, at in zip((student, teacher, student), offsets, strict=True))
        forward = verbs.rows_forward(LogitRows(s, t, labels, options))
        verbs.rows_backward(LogitRows(s, t, labels, options), forward[2], ones, ones, out)
        memory = out.as_strided((out.untyped_storage().size() // out.itemsize,), (1,), 0)
        assert memory.isnan().sum() == offsets[2] + 4 * gap
        # (The gradient takes the student's place.)
        fused = verbs.rows_fused(LogitRows(s, t, labels, options), ones, ones, s)
        return [x.clone() for x in (*forward, out, *fused, s)]

    expected = run((0, 0, 0), even)
    exact, counted = student.double().requires_grad_(), labels != SKIP
    soft, hard = torch.zeros(2, 5, dtype=torch.float64)
    if options.soft:
        taus: dict[str, Any] = {"temperature": 2.0, "teacher_temperature": 2.0, "divergence": divergence}
        soft = soft.index_put((counted,), soft_term(exact[counted], teacher[counted].double(), **taus))
    hard = hard.index_put((counted,), hard_term(exact[counted], labels[counted], label_smoothing=0.0))
    assert_loss(expected[0], soft.detach())
    assert_loss(expected[1], hard.detach())
    assert_gradient(expected[3], torch.autograd.grad(soft.sum() + hard.sum(), exact)[0])
    for offsets, gap in PLACES:
        for x, y in zip(run(offsets, even if gap is None else gap), expected, strict=True):
            assert torch.equal(x, y), (offsets, gap)


def check_narrow_gradient(
    backend: str, dtype: torch.dtype, divergence: Divergence, *, rows: int = 3, columns: int = 4099, **changes: Any
) -> None:
    """Of float32 logits the fused verb writes a gradient in 16 bits, rounded once, wherever it lies."""
    taus = [changes.get(name, 2.0) for name in ("temperature", "teacher_temperature")]
    options = RowOptions(*taus, divergence.name, 0.0, True, True, backend, divergence.parameters)._replace(**changes)
    student, teacher = make_logits("wide", rows, columns)
    targets = torch.arange(rows) * 97 % columns
    targets[1] = SKIP
    weights = torch.rand(2, rows, generator=torch.Generator().manual_seed(0), device="cpu").to(student.device)
    out = placed(student.to(dtype), 3, 2)
    verb = PREFERENCE[backend].rows_fused
    soft, hard = verb(LogitRows(student, teacher, targets, options), *weights, out)
    memory = out.as_strided((out.untyped_storage().size() // out.itemsize,), (1,), 0)
    assert memory.isnan().sum() == 3 + 2 * (rows - 1)

    exact, counted, expected = student.double().requires_grad_(), targets != SKIP, torch.zeros(2, rows).double()
    if options.soft:
        of_soft = soft_term(
            exact[counted],
            teacher[counted].double(),
            temperature=options.temperature,
            teacher_temperature=options.teacher_temperature,
            divergence=divergence,
        )
        expected[0] = expected[0].index_put((counted,), of_soft)
    if options.hard:
        of_hard = hard_term(exact[counted], targets[counted], label_smoothing=options.label_smoothing)
        expected[1] = expected[1].index_put((counted,), of_hard)
    assert_loss(torch.stack([soft, hard]), expected.detach())
    (gradient,) = torch.autograd.grad((weights * expected).sum(), exact)
    for row in range(rows):
        assert_gradient(out[row], gradient[row])
