"""The kinds of teachers that a loss may have, and the verbs of each, as `fused_kd.backends` has them for logits."""

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from fused_kd import backends, ensemble, sparse
from fused_kd.backends.rows import STATS, LogitRows, RowOptions, row_dtype

LOGITS = "logits"

# The one list of the other kinds, and who has their verbs.
_KINDS: dict[str, ModuleType] = {
    **dict.fromkeys(ensemble.ENSEMBLES, ensemble),
    **dict.fromkeys(sparse.MISSING, sparse),
}


class Teacher(NamedTuple):
    """`kind` says what the tensors are, each of which has the student's leading shape: the logits [..., V], or what
    its module says."""

    kind: str
    tensors: tuple[Tensor, ...]


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


def rows_entropy(student: Tensor, teacher: Sequence[Tensor], targets: Tensor, kind: str, options: RowOptions) -> Tensor:
    """The entropy of each row's p, [N], 0 where it is skipped; not of logits (`fused_kd.entropies`)."""
    result: Tensor = verbs_of(kind).rows_entropy(student, teacher, targets, kind, options)
    return result
