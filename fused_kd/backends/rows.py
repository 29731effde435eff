"""What every backend knows of rows."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

# What a target says when it is not a label. csrc/fused_kd.h has the first two.
SKIP = -100  # no term: the row is not read, and its gradient is 0. PyTorch's ignore_index: labels serve as they are
NO_LABEL = -(2**63)  # the soft term only
OUT_OF_RANGE = NO_LABEL + 1  # the label SKIP where it has no such meaning


# In place of a divergence, of teachers that say something of a few columns alone (`fused_kd.sparse`). `teacher` is then
# their ids [..., k], int64, -1 for none and none twice, and
#     soft = log R,  R = the sum over all other columns of exp(s / temperature)
#     d soft / ds = exp(s / temperature) / (temperature R) there; its gradient at the ids is not looked at
# The hard term is as ever. For soft alone, rounded to float32, would not do (close to the teacher at tau = 100 log R
# has to be right to 5e-10), the stats have R = exp(TEACHER_MAX / temperature) (STUDENT_SUM + LOG_RATIO): the largest
# logit of the other columns, their sum from there, rounded to the dtype of stats, and what that rounding took off.
REST = "rest"

# What the gradient needs of a row: the columns of stats [N, STATS]. With e_s = exp((s - max) / tau):
(
    STUDENT_MAX,  # the points that the sums are measured from: the maxima, or near them
    TEACHER_MAX,
    STUDENT_SUM,  # sum of e_s; of a row of -inf 0, from which its term and gradient become NaN
    TEACHER_SUM,  # sum of e_t
    LOG_RATIO,  # log(sum of e_s / sum of e_t), with its small values intact
    HARD_SUM,  # sum of exp(s - max)
    MISS,  # 1 - softmax(s)[label], with its small values intact
    GROWTH,  # G of `fused_kd.families`; for LogitMSE what is taken off x - y
    TOP,  # of a family: the gradient, times tau, at a column with more than half of q; for LogitMSE 1 / n;
    # for ReverseKL what is added to delta: its gradient, times tau, is q (log(e_s / e_t) + TOP)
    STATS,
) = range(10)


class RowOptions(NamedTuple):
    """What the mathematics of a row depends on. A term that is switched off is neither read for nor computed."""

    temperature: float
    teacher_temperature: float
    divergence: str  # a name of fused_kd.divergences.DIVERGENCES, or REST
    label_smoothing: float
    soft: bool
    hard: bool
    backend: str  # "auto" or a name
    parameters: tuple[float, ...] = ()  # of the divergence
    # The student's scale and softcap, then the teacher's (`fused_kd.capped`); a backend does not see them.
    caps: tuple[float, ...] = ()


def with_itself(options: RowOptions, temperature: float) -> RowOptions:
    """For the cross entropy of rows with themselves, which is their entropy."""
    return options._replace(
        temperature=temperature,
        teacher_temperature=temperature,
        divergence="cross_entropy",
        parameters=(),
        soft=True,
        hard=False,
    )


def new_results(
    student: Tensor, targets: Tensor, dtypes: tuple[torch.dtype, torch.dtype, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """soft [N], hard [N] and stats [N, k], of the dtype of vectors, that of stats, and k."""
    dtype, stats_dtype, width = dtypes
    number = targets.shape[0]
    soft, hard = (student.new_empty(number, dtype=dtype) for _ in range(2))
    return soft, hard, student.new_empty((number, width), dtype=stats_dtype)


class LogitRows(NamedTuple):
    """What a verb works on. Rows are the positions of the logits [..., V] in row-major order."""

    student: Tensor
    teacher: Tensor
    targets: Tensor  # [N]: a label, or SKIP or NO_LABEL
    options: RowOptions

    @property
    def number(self) -> int:
        return self.targets.numel()

    @property
    def columns(self) -> int:
        """The vocabulary: the columns that both have."""
        if self.options.divergence == REST:
            return self.student.shape[-1]
        return min(self.student.shape[-1], self.teacher.shape[-1])


class Backend(Protocol):
    """What a backend's module offers. `backends/__init__.py` says what the verbs do."""

    NAME: str
    DESCRIPTION: str  # one line for `fused-kd info`

    def unavailable(self) -> str | None:
        """Why it cannot run on this machine, and what to do about it."""

    def refuses(self, student: Tensor, teacher: Tensor, divergence: str) -> str | None:
        """Why it cannot take these tensors, or this divergence (a name)."""

    def rows_forward(self, rows: LogitRows, /) -> tuple[Tensor, Tensor, Tensor]: ...

    def rows_backward(
        self, rows: LogitRows, stats: Tensor, grad_soft: Tensor, grad_hard: Tensor, out: Tensor, /
    ) -> None: ...

    def rows_fused(
        self, rows: LogitRows, coef_soft: Tensor, coef_hard: Tensor, out: Tensor, /
    ) -> tuple[Tensor, Tensor]: ...


def row_dtype(*logits: Tensor) -> torch.dtype:
    """The dtype of vectors with one number a row."""
    return torch.float64 if torch.float64 in [x.dtype for x in logits] else torch.float32


def exact_dtype(device: torch.device) -> torch.dtype:
    """float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def bad_target(rows: LogitRows, row: int) -> IndexError:
    label = int(rows.targets[row])
    label = SKIP if label == OUT_OF_RANGE else label
    return IndexError(
        f"labels: row {row} has the label {label}, which is not in [0, {rows.columns}) and is not ignore_index; "
        "correct the labels, or name the value that marks positions without one as ignore_index"
    )


def in_range(targets: Tensor, columns: int | Tensor) -> Tensor:
    return ((targets >= 0) & (targets < columns)) | (targets == SKIP) | (targets == NO_LABEL)


def check_targets(rows: LogitRows) -> None:
    """Raises IndexError for a target out of range, on the CPU. Elsewhere that would wait: such a row becomes NaN."""
    if rows.targets.device.type != "cpu":
        return
    bad = (~in_range(rows.targets, rows.columns)).nonzero()
    if len(bad):
        raise bad_target(rows, int(bad[0]))
