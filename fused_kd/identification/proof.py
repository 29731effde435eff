"""Whether an answer is equal to a loss: value and gradient on inputs that it was not made from."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from fused_kd.identification.answer import Answer
from fused_kd.identification.labels import LabelUse
from fused_kd.identification.probe import Data, Loss, random_data
from fused_kd.loss import FusedKDLoss

VOCABULARY = 7  # of the smallest inputs
EQUAL = 1e-9  # value and gradient, in units of them

_LARGE = 4099  # of a dimension
_DEPTHS = (300.0, -300.0, 1000.0)  # float64 rounds exp(-1000) to 0, as float32 does exp(-104)

# How labels that are ignored and a mask may go together.
PADDING = (
    "anything",
    "labels are ignored ones wherever the mask is 0",
    "labels are ignored ones where the mask is 0, and nowhere else",
    "no label is an ignored one: the mask says it all",
)


class Proof(NamedTuple):
    """Differences of value or gradient, in units of them."""

    worst: float
    far: float  # where probabilities are small, as far as the loss is finite there
    finite: bool  # whether it is

    @property
    def largest(self) -> float:
        return max(self.worst, self.far)


def fresh(
    positions: Sequence[int],
    use: LabelUse,
    answer: Answer,
    padding: str = PADDING[0],
    *,
    seeds: Sequence[int] = (50, 51, 52),
    vocabulary: int | None = None,
) -> list[Data]:
    """Inputs with ignored labels and masked positions, as far as the loss takes them."""
    classes = use.ordinary if use.ignored is not None and use.ignored >= 0 else None
    result = []
    for seed in seeds:
        scale = (1.0, 3.0, 9.0)[seed % 3]
        columns = vocabulary or VOCABULARY + seed % 5
        data = random_data(*positions, columns, seed=seed, scale=scale, classes=classes)
        generator = torch.Generator().manual_seed(seed)
        dropped, masked = torch.rand((2, *positions), generator=generator) < 0.35
        for left_out in (dropped, masked):  # one counts, also where it is shifted
            left_out.view(-1)[1 % math.prod(positions)] = False
        if not answer.weights:
            masked[...] = False
        if padding == PADDING[1]:
            dropped |= masked
        elif padding == PADDING[2]:
            dropped = masked
        elif padding == PADDING[3]:
            dropped[...] = False
        labels = data.labels if use.ignored is None else data.labels.masked_fill(dropped, use.ignored)
        result.append(data.but(labels=labels, mask=~masked))
    return result


def prove(loss: Loss, answer: Answer, positions: Sequence[int], use: LabelUse, padding: str = PADDING[0]) -> Proof:
    """On inputs of other shapes, some of them too large for a top k, a longest length or one chunk of rows, and with
    columns far below."""
    shapes = [p + 3 for p in positions], [1, *(p + 2 for p in positions[1:])]
    inputs = [data for shape in shapes for data in fresh(shape, use, answer, padding)]
    inputs += fresh(positions, use, answer, padding, seeds=(53, 54), vocabulary=_LARGE)
    for large in range(len(positions)):
        shape = [_LARGE if i == large else 2 for i in range(len(positions))]
        inputs += fresh(shape, use, answer, padding, seeds=(55,))
    worst = difference(loss, answer, inputs)
    deep = [_with_depth(x, answer, depth) for depth in _DEPTHS for x in fresh(shapes[0], use, answer, padding)]
    others = [difference(loss, answer, [data]) for data in deep]
    far = max((x for x in others if not math.isnan(x)), default=0.0)
    return Proof(math.inf if math.isnan(worst) else worst, far, not any(map(math.isnan, others)))


def _with_depth(data: Data, answer: Answer, depth: float) -> Data:
    """Probabilities of about exp(-depth) in a third of the columns, others of the student's than of the teacher's. For
    a negative depth in all but a third, the same of both: else there would be hardly any gradient.

    It shows an epsilon beside probabilities, or a clamp of them, of logits or of the loss.
    """
    options = FusedKDLoss(**answer.options).options
    temperature = options.temperature / options.student_logit_scale
    teacher_temperature = (options.teacher_temperature or options.temperature) / options.teacher_logit_scale
    student, teacher = data.student * max(1.0, temperature) / 9, data.teacher * max(1.0, teacher_temperature) / 9
    flat = 3 * (options.student_softcap or math.inf) / options.student_logit_scale  # no further up, for the same reason
    student[..., 0::3] -= max(depth * temperature, -flat)
    teacher[..., 1 if depth > 0 else 0 :: 3] -= depth * teacher_temperature
    return data.but(student=student, teacher=teacher)


def difference(loss: Loss, answer: Answer, inputs: list[Data]) -> float:
    """The largest of value and gradient, in units of them; NaN where those of `loss` are not finite."""
    worst = 0.0
    for data in inputs:
        generator = torch.Generator().manual_seed(7)
        shape = Answer.seen(data.mask, answer.view).shape if answer.view else ()
        upstream = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5
        theirs = loss(data, upstream)
        if theirs.value.shape != shape:
            return math.inf
        value, gradient = answer.call(data, upstream)
        for x, y in ((value, theirs.value), (gradient, theirs.gradient)):
            off, size = float((x - y).norm()), float(y.norm())
            if not y.isfinite().all():
                return math.nan
            off = math.inf if math.isnan(off) else off / size if size else off and math.inf
            worst = max(worst, off)
    return worst
