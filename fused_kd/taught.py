"""Rows with a teacher of any kind: what the verbs of `fused_kd.teachers`, and of each kind's module, work on."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from fused_kd.backends.rows import LogitRows, RowOptions

LOGITS = "logits"  # the kind of one teacher's logits [..., V]


class Teacher(NamedTuple):
    """`kind` says what the tensors are, each of which has the student's leading shape."""

    kind: str
    tensors: Sequence[Tensor]


class TaughtRows(NamedTuple):
    """Rows are the positions of the student's logits [..., V] in row-major order."""

    student: Tensor
    teacher: Teacher
    targets: Tensor  # [N]: a label, or SKIP or NO_LABEL of `fused_kd.backends.rows`
    options: RowOptions

    def of_logits(self) -> LogitRows:
        """What a backend takes, where that is the teacher's kind."""
        return LogitRows(self.student, self.teacher.tensors[0], self.targets, self.options)
