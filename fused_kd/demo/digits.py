"""A student that learns a class it never saw, from its teacher: Hinton, Vinyals, Dean 2015, section 3, in small.

The paper leaves every 3 out of MNIST's transfer set. Here it is scikit-learn's 1797 digits of 8x8 pixels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot, pad

from fused_kd.demo import Track
from fused_kd.demo.eager import eager_kd_loss
from fused_kd.loss import FusedKDLoss
from fused_kd.options import KDOptions

UNSEEN = 3
TRAIN = 1000  # of 1797; the rest is the test set
MEMBERS = 8
TEMPERATURE = 20.0
_CLASSES = 10
_TEACHER, _STUDENT = (64, 128, 128, _CLASSES), (64, 64, 64, _CLASSES)
_BATCH, _LEARNING_RATE = 50, 3e-3
_BIASES = torch.arange(-50, 301) / 10

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of student logits, teacher logits, labels


class Digits(NamedTuple):
    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Course:
    """What all trainings here have in common."""

    epochs: int
    seed: int
    track: Track


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


class Networks(torch.nn.Module):
    """Perceptrons of one shape side by side: images [n, 64] or [members, n, 64] -> logits [members, n, 10]."""

    def __init__(self, members: int, sizes: tuple[int, ...], generator: torch.Generator) -> None:
        super().__init__()

        def uniform(rows: int, columns: int, inputs: int) -> torch.nn.Parameter:
            values = torch.rand(members, rows, columns, generator=generator)
            return torch.nn.Parameter((2 * values - 1) / math.sqrt(inputs))  # as torch.nn.Linear

        self.weights = torch.nn.ParameterList([uniform(a, b, a) for a, b in pairwise(sizes)])
        self.biases = torch.nn.ParameterList([uniform(1, b, a) for a, b in pairwise(sizes)])

    def forward(self, images: Tensor) -> Tensor:
        x = images.expand(len(self.weights[0]), -1, -1)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x.relu() if i else x, weight)
        return x

    @torch.no_grad()
    def mean_logits(self, images: Tensor) -> Tensor:
        mean: Tensor = self(images).mean(0)
        return mean


def run(epochs: int, seed: int, track: Track) -> Learned:
    course = Course(epochs, seed, track)
    train, test = load(seed)
    teacher = _teacher(train, course)
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


def load(seed: int) -> tuple[Digits, Digits]:
    """The images to train with, and those to test with."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(seed))
    images, labels = torch.from_numpy(data.data).float()[order] / 16, torch.from_numpy(data.target).long()[order]
    return Digits(images[:TRAIN], labels[:TRAIN]), Digits(images[TRAIN:], labels[TRAIN:])


def _teacher(train: Digits, course: Course) -> Networks:
    """An ensemble; each member has its own start, and sees the images moved in its own way by up to a pixel."""
    generator = torch.Generator().manual_seed(course.seed)
    networks = Networks(MEMBERS, _TEACHER, generator)
    moved = _moved(train.images)

    def loss(batch: Tensor) -> Tensor:
        moves = torch.randint(len(moved), (MEMBERS, len(batch)), generator=generator)
        logits = networks(moved[moves, batch])
        return MEMBERS * cross_entropy(logits.flatten(0, 1), train.labels[batch].repeat(MEMBERS))

    _train(f"teacher, {MEMBERS} networks", networks, loss, len(train.labels), generator, course)
    return networks


def _student(name: str, loss: Loss, train: Digits, soft_targets: Tensor, test: Digits, course: Course) -> Student:
    """Every student has the same start and sees the same batches: only the loss differs."""
    generator = torch.Generator().manual_seed(course.seed + 1)
    network = Networks(1, _STUDENT, generator)
    seen = train.labels != UNSEEN
    images, targets, labels = train.images[seen], soft_targets[seen], train.labels[seen]

    def loss_of(batch: Tensor) -> Tensor:
        return loss(network(images[batch])[0], targets[batch], labels[batch])

    curve = _train(name, network, loss_of, len(labels), generator, course)
    logits = network.mean_logits(test.images)
    correction = _correction(network.mean_logits(train.images), train.labels)
    return Student(_score(logits, test.labels), _score(logits + correction, test.labels), curve)


def _train(
    name: str,
    networks: Networks,
    loss_of: Callable[[Tensor], Tensor],
    images: int,
    generator: torch.Generator,
    course: Course,
) -> list[float]:
    """Adam with a cosine schedule; `loss_of` takes the numbers of a batch's images. The mean loss of each epoch."""
    optimizer = torch.optim.Adam(networks.parameters(), lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, course.epochs * math.ceil(images / _BATCH))
    curve = []
    for _ in course.track(name, course.epochs):
        total = torch.zeros(())
        for batch in torch.split(torch.randperm(images, generator=generator), _BATCH):
            loss = loss_of(batch)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            total += loss.detach() * len(batch)
        curve.append(float(total) / images)
    return curve


def _moved(images: Tensor) -> Tensor:
    """[9, n, 64]: the images moved by up to a pixel each way."""
    framed = pad(images.view(-1, 8, 8), (1, 1, 1, 1))
    return torch.stack([framed[:, y : y + 8, x : x + 8].flatten(1) for y in range(3) for x in range(3)])


def _score(logits: Tensor, labels: Tensor) -> Score:
    right = logits.argmax(-1) == labels
    return Score(errors=int((~right).sum()), unseen_right=int((right & (labels == UNSEEN)).sum()))


def _correction(logits: Tensor, labels: Tensor) -> Tensor:
    """The one number on the unseen class's logit with which the fewest of these images are wrong, as [10]."""
    unseen = one_hot(torch.tensor(UNSEEN), _CLASSES)
    errors = torch.tensor([_score(logits + bias * unseen, labels).errors for bias in _BIASES])
    best = _BIASES[errors == errors.min()]
    return best[len(best) // 2] * unseen  # the middle of those that do equally well
