"""The kinds of teachers that a loss may have, and the verbs of each, as `fused_kd.backends` has them for logits."""

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from fused_kd import backends, ensemble, sparse
from fused_kd.backends import rows as backend_rows
from fused_kd.backends.rows import STATS, LogitRows, RowOptions, check_targets, exact_dtype, row_dtype
from fused_kd.checks import check_teacher_logits, check_teacher_weights
from fused_kd.divergences import divergence_of
from fused_kd.options import KDOptions
from fused_kd.sparse import SparseTeacher

LOGITS = "logits"

# The one list of the other kinds, and who has their verbs.
_KINDS: dict[str, ModuleType] = {
    **dict.fromkeys(ensemble.ENSEMBLES, ensemble),
    **dict.fromkeys(sparse.MISSING, sparse),
}


TeacherLogits: TypeAlias = Tensor | Sequence[Tensor] | SparseTeacher


class Teacher(NamedTuple):
    """`kind` says what the tensors are, each of which has the student's leading shape: the logits [..., V], or what
    its module says."""

    kind: str
    tensors: tuple[Tensor, ...]


def tensors_of(teacher: object) -> Sequence[object]:
    """What stands in `teacher_logits`, before it is checked."""
    if isinstance(teacher, SparseTeacher):
        return teacher.ids, teacher.log_probs
    return teacher if isinstance(teacher, (list, tuple)) else [teacher]


def teacher_of(
    student: Tensor,
    teacher: TeacherLogits,
    weights: Sequence[float] | Tensor | None,
    options: KDOptions,
    readable: bool,
    name: str = "teacher_logits",
) -> Teacher:
    """The teacher, checked and detached; `name` is what errors call it."""
    if not isinstance(teacher, (list, tuple)):
        if weights is not None:
            raise ValueError(
                f"teacher_weights weighs several teachers, but {name} is one; leave teacher_weights out, or pass a "
                "list of tensors"
            )
        if isinstance(teacher, SparseTeacher):
            if options.teacher_temperature is not None:
                raise ValueError(
                    f"teacher_temperature is {options.teacher_temperature}, but the log-probabilities of a "
                    "SparseTeacher already have theirs (from_logits takes it); leave teacher_temperature out"
                )
            if options.teacher_logit_scale != 1 or options.teacher_softcap is not None:
                raise ValueError(
                    "teacher_logit_scale and teacher_softcap are for logits, and the log-probabilities of a "
                    "SparseTeacher have had them; leave them out"
                )
            sparse.check_fits(teacher, student, divergence_of(options.divergence))
            return Teacher(teacher.missing, (teacher.ids, teacher.log_probs.detach()))
        teacher = check_teacher_logits(name, teacher, student, options)
        return Teacher(LOGITS, (teacher.detach(),))
    if len(teacher) == 0:
        raise ValueError(f"{name} must have at least one tensor, got an empty list")
    named = [(f"{name}[{k}]", logits) for k, logits in enumerate(teacher)]
    tensors = tuple(check_teacher_logits(name, logits, student, options).detach() for name, logits in named)
    shares = check_teacher_weights(weights, len(teacher), student, readable)
    if len(tensors) == 1:
        return Teacher(LOGITS, tensors)
    if not (options.has_soft or options.entropies):  # they will not be read
        return Teacher(LOGITS, (ensemble.common_columns(student, tensors),))
    dtype = exact_dtype(student.device)
    if not isinstance(shares, Tensor):
        # (Each number as a filled tensor: a copy from the CPU would make a GPU wait.)
        shares = torch.stack([torch.ones((), dtype=dtype, device=student.device) * share for share in shares])
    shares = shares.detach().to(dtype)
    shares = (shares / shares.sum()).expand(*student.shape[:-1], -1)
    return Teacher(options.ensemble, (shares, *tensors))


def verbs_of(kind: str) -> ModuleType:
    """Raises ValueError for an unknown kind, and for logits, which have those of the backends."""
    if kind not in _KINDS:
        raise ValueError(f"kind must be one of {', '.join(map(repr, _KINDS))}, got {kind!r}")
    return _KINDS[kind]


def check_teacher(kind: str, student: Tensor, teacher: Sequence[Tensor]) -> None:
    """Whether an operator's teacher can be of this kind. Raises ValueError or TypeError."""
    verbs_of(kind).check_teacher(student, teacher)
    for each in teacher:
        if each.shape[:-1] != student.shape[:-1]:
            shapes = f"{tuple(student.shape)} and {tuple(each.shape)}"
            raise ValueError(f"teacher must have the student's leading shape, got the shapes {shapes}")


def row_dtypes(kind: str, student: Tensor, teacher: Sequence[Tensor]) -> tuple[torch.dtype, torch.dtype, int]:
    """The dtype of vectors with one number a row; that of stats, and how many numbers these have a row."""
    if kind == LOGITS:
        dtype = row_dtype(student, *teacher)
        return dtype, dtype, STATS
    dtypes: tuple[torch.dtype, torch.dtype, int] = verbs_of(kind).row_dtypes(student, teacher)
    return dtypes


def backend_name(name: str, student: Tensor, teacher: Teacher, divergence: str) -> str:
    """That of the backend which the verbs will take. Raises ValueError where the named one cannot be used."""
    if teacher.kind == LOGITS:
        return backends.choose(name, student, teacher.tensors[0], divergence).NAME
    chosen: str = verbs_of(teacher.kind).backend_for(name, student, teacher.tensors, divergence).NAME
    return chosen


def logits_of(teacher: Teacher) -> tuple[Tensor, ...]:
    """Those of its tensors that are logits [..., V]."""
    if teacher.kind == LOGITS:
        return teacher.tensors
    return teacher.tensors[1:] if teacher.kind in ensemble.ENSEMBLES else ()


def common_columns(student: Tensor, teacher: Teacher) -> int:
    """The vocabulary: the columns that all have."""
    return min(x.shape[-1] for x in (student, *logits_of(teacher)))


def check_rows(student: Tensor, teacher: Teacher, targets: Tensor, options: RowOptions) -> None:
    """Raises what the verbs do for a row that cannot be, with its number among all rows."""
    logits = student[..., : common_columns(student, teacher)]
    check_targets(LogitRows(student, logits, targets, options))
    if teacher.kind in sparse.MISSING:
        sparse.check_rows(student, teacher.tensors, targets, teacher.kind)


def new_results(
    student: Tensor, teacher: Sequence[Tensor], targets: Tensor, kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    return backend_rows.new_results(student, targets, row_dtypes(kind, student, teacher))


def rows_forward(
    student: Tensor, teacher: Sequence[Tensor], targets: Tensor, kind: str, options: RowOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """options.backend is the name of one."""
    if kind == LOGITS:
        return backends.PREFERENCE[options.backend].rows_forward(LogitRows(student, teacher[0], targets, options))
    result: tuple[Tensor, Tensor, Tensor] = verbs_of(kind).rows_forward(student, teacher, targets, kind, options)
    return result


def rows_backward(
    student: Tensor,
    teacher: Sequence[Tensor],
    targets: Tensor,
    stats: Tensor,
    grad_soft: Tensor,
    grad_hard: Tensor,
    kind: str,
    options: RowOptions,
    out: Tensor,
) -> None:
    vectors = (stats, grad_soft, grad_hard)
    if kind == LOGITS:
        rows = LogitRows(student, teacher[0], targets, options)
        backends.PREFERENCE[options.backend].rows_backward(rows, *vectors, out)
    else:
        verbs_of(kind).rows_backward(student, teacher, targets, *vectors, kind, options, out)


def rows_fused(
    student: Tensor,
    teacher: Sequence[Tensor],
    targets: Tensor,
    coef_soft: Tensor,
    coef_hard: Tensor,
    kind: str,
    options: RowOptions,
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    """soft[N] and hard[N], and the gradient of sum(coef_soft * soft + coef_hard * hard) into `out`, which may be the
    student."""
    if kind == LOGITS:
        rows = LogitRows(student, teacher[0], targets, options)
        return backends.PREFERENCE[options.backend].rows_fused(rows, coef_soft, coef_hard, out)
    soft, hard, stats = rows_forward(student, teacher, targets, kind, options)
    rows_backward(student, teacher, targets, stats, coef_soft, coef_hard, kind, options, out)
    return soft, hard


def rows_entropy(student: Tensor, teacher: Sequence[Tensor], targets: Tensor, kind: str, options: RowOptions) -> Tensor:
    """The entropy of each row's p, [N], 0 where it is skipped; not of logits (`fused_kd.entropies`)."""
    result: Tensor = verbs_of(kind).rows_entropy(student, teacher, targets, kind, options)
    return result
