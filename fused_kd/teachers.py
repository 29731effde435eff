"""The kinds of teachers that a loss may have, and the verbs of each, as `fused_kd.backends` has them for logits."""

from collections.abc import Sequence
from types import ModuleType
from typing import TypeAlias

import torch
from torch import Tensor

from fused_kd import backends, ensemble, sparse
from fused_kd.backends import rows as backend_rows
from fused_kd.backends.rows import STATS, LogitRows, check_targets, exact_dtype, row_dtype
from fused_kd.checks import check_teacher_logits, check_teacher_weights
from fused_kd.divergences import divergence_of
from fused_kd.options import KDOptions
from fused_kd.sparse import SparseTeacher
from fused_kd.taught import LOGITS, TaughtRows, Teacher

# The one list of the other kinds, and who has their verbs.
_KINDS: dict[str, ModuleType] = {
    **dict.fromkeys(ensemble.ENSEMBLES, ensemble),
    **dict.fromkeys(sparse.MISSING, sparse),
}


TeacherLogits: TypeAlias = Tensor | Sequence[Tensor] | SparseTeacher


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
        return Teacher(LOGITS, (ensemble.stand_in(student, tensors),))
    dtype = exact_dtype(student.device)
    if not isinstance(shares, Tensor):
        # (Each number as a filled tensor: a copy from the CPU would make a GPU wait.)
        shares = torch.stack([torch.ones((), dtype=dtype, device=student.device) * share for share in shares])
    shares = shares.detach().to(dtype)
    shares = shares / shares.amax()  # the sum of large ones would be infinite
    shares = (shares / shares.sum()).expand(*student.shape[:-1], -1)
    return Teacher(options.ensemble, (shares, *tensors))


def verbs_of(kind: str) -> ModuleType:
    """Raises ValueError for an unknown kind, and for logits, which have those of the backends."""
    if kind not in _KINDS:
        raise ValueError(f"kind must be one of {', '.join(map(repr, _KINDS))}, got {kind!r}")
    return _KINDS[kind]


def check_teacher(student: Tensor, teacher: Teacher) -> None:
    """Whether an operator's teacher can be of its kind. Raises ValueError or TypeError."""
    verbs_of(teacher.kind).check_teacher(student, teacher.tensors)
    for each in teacher.tensors:
        if each.shape[:-1] != student.shape[:-1]:
            shapes = f"{tuple(student.shape)} and {tuple(each.shape)}"
            raise ValueError(f"teacher must have the student's leading shape, got the shapes {shapes}")


def row_dtypes(student: Tensor, teacher: Teacher) -> tuple[torch.dtype, torch.dtype, int]:
    """The dtype of vectors with one number a row; that of stats, and how many numbers these have a row."""
    if teacher.kind == LOGITS:
        dtype = row_dtype(student, *teacher.tensors)
        return dtype, dtype, STATS
    dtypes: tuple[torch.dtype, torch.dtype, int] = verbs_of(teacher.kind).row_dtypes(student, teacher.tensors)
    return dtypes


def backend_name(name: str, student: Tensor, teacher: Teacher, divergence: str) -> str:
    """That of the backend which the verbs will take. Raises ValueError where the named one cannot be used."""
    if teacher.kind == LOGITS:
        return backends.choose(name, student, teacher.tensors[0], divergence).NAME
    chosen: str = verbs_of(teacher.kind).backend_for(name, student, teacher.tensors, divergence).NAME
    return chosen


def logits_of(teacher: Teacher) -> Sequence[Tensor]:
    """Those of its tensors that are logits [..., V]."""
    if teacher.kind == LOGITS:
        return teacher.tensors
    return teacher.tensors[1:] if teacher.kind in ensemble.ENSEMBLES else ()


def common_columns(student: Tensor, teacher: Teacher) -> int:
    """The vocabulary: the columns that all have."""
    return min(x.shape[-1] for x in (student, *logits_of(teacher)))


def check_rows(rows: TaughtRows) -> None:
    """Raises what the verbs do for a row that cannot be, with its number among all rows."""
    columns = common_columns(rows.student, rows.teacher)
    check_targets(LogitRows(rows.student, rows.student[..., :columns], rows.targets, rows.options))
    if rows.teacher.kind in sparse.MISSING:
        sparse.check_rows(rows)


def new_results(rows: TaughtRows) -> tuple[Tensor, Tensor, Tensor]:
    return backend_rows.new_results(rows.student, rows.targets, row_dtypes(rows.student, rows.teacher))


def rows_forward(rows: TaughtRows) -> tuple[Tensor, Tensor, Tensor]:
    """Of logits: options.backend is the name of one."""
    if rows.teacher.kind == LOGITS:
        return backends.PREFERENCE[rows.options.backend].rows_forward(rows.of_logits())
    result: tuple[Tensor, Tensor, Tensor] = verbs_of(rows.teacher.kind).rows_forward(rows)
    return result


def rows_backward(rows: TaughtRows, stats: Tensor, grad_soft: Tensor, grad_hard: Tensor, out: Tensor) -> None:
    if rows.teacher.kind == LOGITS:
        backends.PREFERENCE[rows.options.backend].rows_backward(rows.of_logits(), stats, grad_soft, grad_hard, out)
    else:
        verbs_of(rows.teacher.kind).rows_backward(rows, stats, grad_soft, grad_hard, out)


def rows_fused(rows: TaughtRows, coef_soft: Tensor, coef_hard: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """soft[N] and hard[N], and the gradient of sum(coef_soft * soft + coef_hard * hard) into `out`, which may be the
    student."""
    if rows.teacher.kind == LOGITS:
        return backends.PREFERENCE[rows.options.backend].rows_fused(rows.of_logits(), coef_soft, coef_hard, out)
    soft, hard, stats = rows_forward(rows)
    rows_backward(rows, stats, coef_soft, coef_hard, out)
    return soft, hard


def rows_entropy(rows: TaughtRows) -> Tensor:
    """The entropy of each row's p, [N], 0 where it is skipped; not of logits (`fused_kd.entropies`)."""
    result: Tensor = verbs_of(rows.teacher.kind).rows_entropy(rows)
    return result
