"""entropies=True, against the float64 reference: the cross entropy of a row with itself."""

from typing import Any

import pytest
import torch
from support import DTYPES, INF, assert_loss, make_labels, make_logits
from test_memory import Allocations
from torch import Tensor

from fused_kd import FusedKDLoss, KDLossOutput, SparseTeacher, ensemble, fused_kd_loss, ops
from fused_kd.backends.rows import SKIP, RowOptions
from fused_kd.divergences import JSD, LogitMSE
from fused_kd.ensemble import ENSEMBLES
from fused_kd.reference import kd_loss, mean_logits
from fused_kd.sparse import MISSING

OPTIONS: list[dict[str, Any]] = [
    {},
    {"teacher_temperature": 3.5, "divergence": JSD(0.1), "reduction": "sum"},
    {"divergence": "reverse_kl", "reduction": "none", "shift": True},
    {"soft_on_ignored": True, "reduction": "batchmean", "label_smoothing": 0.1},
    {"alpha": 0.0, "weights": torch.arange(10.0).reshape(2, 5)},
    {"alpha": 1.0, "num_items": 7, "divergence": LogitMSE()},
]
LIKE_SOFT = ("reduction", "shift", "soft_on_ignored", "weights", "num_items", "label_smoothing")


def outputs(student: Tensor, teacher: Any, labels: Tensor | None, **options: Any) -> KDLossOutput:
    output = fused_kd_loss(student, teacher, labels, return_parts=True, entropies=True, **options)
    assert isinstance(output, KDLossOutput)
    for entropy in (output.student_entropy, output.teacher_entropy):
        assert isinstance(entropy, Tensor)
        assert not entropy.requires_grad
    return output


def expected(logits: Tensor, temperature: float, labels: Tensor, options: dict[str, Any]) -> Tensor:
    reduced = {name: value for name, value in options.items() if name in LIKE_SOFT}
    if not options.get("alpha", 0.9):
        reduced["soft_on_ignored"] = False
    own: dict[str, Any] = {"temperature": temperature, "alpha": 1.0, "t2_scaling": False, "divergence": "cross_entropy"}
    return kd_loss(logits.double(), logits.double(), labels, **own, **reduced)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_of_logits(dtype: torch.dtype, options: dict[str, Any]) -> None:
    for kind in ("wide", "peaked", "masked", "big"):
        student, teacher = (x.to(dtype) for x in make_logits(kind, 2, 5, 300))
        labels = make_labels(2, 5, vocabulary=300)
        taus = 2.0, options.get("teacher_temperature", 2.0)
        output = outputs(student, teacher, labels, **options)
        assert_loss(output.student_entropy, expected(student, taus[0], labels, options))  # type: ignore[arg-type]
        assert_loss(output.teacher_entropy, expected(teacher, taus[1], labels, options))  # type: ignore[arg-type]


def test_on_every_backend(backend: str) -> None:
    student, teacher = make_logits("wide", 4, 300)
    output = outputs(student, teacher, None, alpha=1.0, backend=backend)
    for found, logits in ((output.student_entropy, student), (output.teacher_entropy, teacher)):
        p = torch.softmax(logits.double() / 2, -1)
        assert_loss(found, -(p * p.log()).sum(-1).mean())  # type: ignore[arg-type]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", ENSEMBLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_of_several_teachers(
    dtype: torch.dtype, kind: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ensemble, "_PIECE", 1000)
    student, first = (x.to(dtype) for x in make_logits("wide", 2, 5, 300))
    teachers, labels = [first, make_logits("peaked", 2, 5, 300)[1]], make_labels(2, 5, vocabulary=300)
    tau = options.get("teacher_temperature", 2.0)
    output = outputs(student, teachers, labels, ensemble=kind, teacher_weights=[1, 3], **options)
    mean = mean_logits([x.double() for x in teachers], [1, 3], ensemble=kind, temperature=tau)
    assert_loss(output.student_entropy, expected(student, 2.0, labels, options))  # type: ignore[arg-type]
    assert_loss(output.teacher_entropy, expected(mean, tau, labels, options))  # type: ignore[arg-type]


def test_of_a_sparse_teacher() -> None:
    student, teacher = make_logits("wide", 4, 300)
    top = SparseTeacher.from_logits(teacher, 5)
    log_probs = top.log_probs.clone()
    log_probs[0, 3:] = -INF
    log_p = log_probs.double()
    p, total = log_p.exp(), log_p.exp().sum(-1, keepdim=True)
    classes = {"rest": torch.cat([p, 1 - total], -1), "renormalize": p / total, "both": p / total, "truncate": p}
    labels = torch.tensor([3, -100, 5, 6])
    for missing in MISSING:
        divergence = "forward_kl"
        output = outputs(student, SparseTeacher(top.ids, log_probs, missing), labels, divergence=divergence)  # type: ignore[arg-type]
        entropy = -torch.xlogy(classes[missing], classes[missing]).sum(-1)
        assert_loss(output.teacher_entropy, entropy[labels != -100].mean())  # type: ignore[arg-type]
        assert_loss(output.student_entropy, expected(student, 2.0, labels, {}))  # type: ignore[arg-type]


def test_over_the_columns_that_the_loss_has() -> None:
    student, teacher = make_logits("wide", 4, 300)
    cut = {"vocab_mismatch": "truncate", "alpha": 1.0}
    for one, other in (([teacher[:, :200]] * 2, [teacher[:, :200]] * 2), (teacher[:, :200], teacher[:, :200])):
        whole, less = outputs(student, one, None, **cut), outputs(student[:, :200], other, None, **cut)
        for x, y in zip(whole, less, strict=True):
            torch.testing.assert_close(x, y)
    whole, less = (
        outputs(student[:, :200], teacher, None, **cut),
        outputs(student[:, :200], teacher[:, :200], None, **cut),
    )
    for x, y in zip(whole, less, strict=True):
        torch.testing.assert_close(x, y)


def test_they_are_not_there_unless_asked_for() -> None:
    student, teacher = make_logits("wide", 4, 30)
    output = fused_kd_loss(student, teacher, alpha=1.0, return_parts=True)
    assert isinstance(output, KDLossOutput)
    assert output.student_entropy is output.teacher_entropy is None
    for make in (FusedKDLoss, lambda **options: fused_kd_loss(student, teacher, alpha=1.0, **options)):
        with pytest.raises(ValueError, match="entropies=True needs return_parts=True"):
            make(entropies=True)
        with pytest.raises(TypeError, match="entropies must be True or False, got 1"):
            make(entropies=1, return_parts=True)


def test_a_skipped_row_is_not_looked_at() -> None:
    student, teacher = make_logits("wide", 4, 30)
    labels = torch.tensor([1, -100, 2, 3])
    student[1] = teacher[1] = float("nan")
    for given in (teacher, [teacher, teacher * 2], SparseTeacher(torch.ones(4, 1).int(), teacher[:, :1].clamp(max=-3))):
        output = outputs(student, given, labels, reduction="none")
        for entropy in (output.student_entropy, output.teacher_entropy):
            assert entropy[1] == 0  # type: ignore[index]
            assert entropy.isfinite().all()  # type: ignore[union-attr]


def test_compile_with_temperatures_that_change() -> None:
    student, teacher = make_logits("wide", 6, 200)
    labels, second = make_labels(6, vocabulary=200), teacher * 2
    for kinds in (teacher, [teacher, second], SparseTeacher.from_logits(teacher, 5)):
        torch._dynamo.reset()
        loss_fn = FusedKDLoss(return_parts=True, entropies=True)
        compiled = torch.compile(loss_fn, fullgraph=True, backend="aot_eager")
        for tau in (2.0, 3.0, 4.5):
            loss_fn.temperature = tau
            if not isinstance(kinds, SparseTeacher):
                loss_fn.teacher_temperature = tau + 1
            for one, other in zip(compiled(student, kinds, labels), loss_fn(student, kinds, labels), strict=True):
                torch.testing.assert_close(one, other)


def test_transforms() -> None:
    student, teacher = make_logits("wide", 3, 4, 50)

    def both(s: Tensor, t: Tensor) -> Any:
        dense, several = (outputs(s, given, None, alpha=1.0) for given in (t, [t, t]))
        return dense.student_entropy, dense.teacher_entropy, several.teacher_entropy

    for one, rows in zip(
        torch.func.vmap(both)(student, teacher), zip(*map(both, student, teacher), strict=True), strict=True
    ):
        torch.testing.assert_close(one, torch.stack(rows))


def test_operator() -> None:
    student, teacher = make_logits("wide", 2, 3, 50)
    targets = torch.tensor([1, 2, SKIP, 3, 4, 49])
    weights = torch.tensor([0.5, 0.5], dtype=torch.float64).expand(2, 3, 2)
    top = SparseTeacher.from_logits(teacher, 4)
    options = RowOptions(2.0, 2.0, "forward_kl", 0.0, True, True, "auto")
    for tensors, kind in (([weights, teacher, teacher], "geometric"), ([top.ids, top.log_probs], "both")):
        torch.library.opcheck(ops.teachers_entropy, (student, tensors, targets, kind, *options))


def test_nothing_of_the_logits_size_is_allocated() -> None:
    student, teacher = make_logits("wide", 64, 2048)
    student, teacher = student.bfloat16(), teacher.bfloat16()
    labels = make_labels(64, vocabulary=2048)
    with Allocations() as seen:
        outputs(student, teacher, labels)
    assert seen.bytes < 100 * 8 * 64
