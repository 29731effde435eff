"""A student that learns a class it never saw, from its teacher: Hinton, Vinyals, Dean 2015, section 3, in small.

The paper leaves every 3 out of MNIST's transfer set. Here it is scikit-learn's 1797 digits of 8x8 pixels.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import cross_entropy

from fused_kd.demo import Track
from fused_kd.demo.digits import MEMBERS, Course, Digits, Loss, correction, load, students, teachers
from fused_kd.demo.eager import eager_kd_loss
from fused_kd.loss import FusedKDLoss
from fused_kd.options import KDOptions

UNSEEN = 3
TEMPERATURE = 20.0
WIDTH = 64  # of the student's two hidden layers


@dataclass(frozen=True)
class Score:
    """How a network does on the test set."""

    errors: int
    unseen_right: int


@dataclass(frozen=True)
class Student:
    score: Score
    corrected: Score  # with the best constant added to the logit of the unseen class
    curve: list[float]  # the mean loss of each epoch


@dataclass(frozen=True)
class Learned:
    teacher: Score
    hard: Student
    fused: Student
    eager: Student
    transfer: int  # images to learn from, none of the unseen class
    test: int
    test_unseen: int

    @property
    def difference(self) -> float:
        """The largest difference of the two curves, relative to the eager one."""
        return max(abs(f - e) / e for f, e in zip(self.fused.curve, self.eager.curve, strict=True))


def run(epochs: int, seed: int, track: Track) -> Learned:
    course = Course(epochs, seed, track)
    train, test = load(seed)
    teacher = teachers(
        f"teacher, {MEMBERS} networks", Digits(train.images[None], train.labels[None]), course, moved_by=1.0
    )
    soft_targets = teacher.mean_logits(train.images)
    fused = FusedKDLoss(temperature=TEMPERATURE)

    def eager(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return eager_kd_loss(student, teacher, labels, temperature=TEMPERATURE, alpha=KDOptions.alpha)

    def labels_alone(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(student, labels)

    def student(name: str, loss: Loss) -> Student:
        return _student(name, loss, train, soft_targets, test, course)

    return Learned(
        teacher=_score(teacher.mean_logits(test.images), test.labels),
        hard=student("student, labels alone", labels_alone),
        fused=student("student, distilled", fused),
        eager=student("the same with eager PyTorch", eager),
        transfer=int((train.labels != UNSEEN).sum()),
        test=len(test.labels),
        test_unseen=int((test.labels == UNSEEN).sum()),
    )


def _student(name: str, loss: Loss, train: Digits, soft_targets: Tensor, test: Digits, course: Course) -> Student:
    seen = train.labels != UNSEEN
    transfer = Digits(train.images[seen][None], train.labels[seen][None])
    network, curve = students(name, loss, transfer, soft_targets[seen][None], WIDTH, course)
    logits = network.mean_logits(test.images)
    bias = correction(network.mean_logits(train.images), train.labels, [UNSEEN])
    return Student(_score(logits, test.labels), _score(logits + bias, test.labels), curve)


def _score(logits: Tensor, labels: Tensor) -> Score:
    right = logits.argmax(-1) == labels
    return Score(errors=int((~right).sum()), unseen_right=int((right & (labels == UNSEEN)).sum()))
