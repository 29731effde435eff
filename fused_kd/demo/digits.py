"""scikit-learn's 1797 handwritten digits of 8x8 pixels, perceptrons side by side, and how they are trained."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot, pad

from fused_kd.demo import Track

TRAIN = 1000  # of 1797; the rest is the test set
MEMBERS = 8  # of a teacher
BATCH = 50
PIXELS, CLASSES = 64, 10
_TEACHER = (PIXELS, 128, 128, CLASSES)
_LEARNING_RATE = 3e-3
_BIASES = torch.arange(-300, 301) / 10


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of student logits [n, 10], teacher logits [n, 10], labels [n]


class Digits(NamedTuple):
    images: Tensor  # [..., n, 64]
    labels: Tensor  # [..., n]


@dataclass(frozen=True)
class Course:
    """What all trainings of one command have in common."""

    epochs: int
    seed: int
    track: Track


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


def load(seed: int) -> tuple[Digits, Digits]:
    """The images to train with, and those to test with."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(seed))
    images, labels = torch.from_numpy(data.data).float()[order] / 16, torch.from_numpy(data.target).long()[order]
    return Digits(images[:TRAIN], labels[:TRAIN]), Digits(images[TRAIN:], labels[TRAIN:])


def teachers(name: str, sets: Digits, course: Course, *, moved_by: float) -> Networks:
    """An ensemble for each of the sets [k, n, 64], [k, n]: member i learns from set i // MEMBERS.

    Each has its own start, and sees the images moved in its own way by nothing or `moved_by` (of a pixel) on each axis.
    """
    members = len(sets.images) * MEMBERS
    generator = torch.Generator().manual_seed(course.seed)
    networks = Networks(members, _TEACHER, generator)
    moved, of = _moved(sets.images, moved_by), torch.arange(members) // MEMBERS

    def loss(batch: Tensor) -> Tensor:
        moves = torch.randint(len(moved), (members, len(batch)), generator=generator)
        logits = networks(moved[moves, of[:, None], batch])
        return members * cross_entropy(logits.flatten(0, 1), sets.labels[of[:, None], batch].flatten())

    _train(name, networks, loss, sets.images.shape[1], generator, course)
    return networks


def students(
    name: str, loss: Loss, sets: Digits, soft_targets: Tensor, width: int, course: Course
) -> tuple[Networks, list[float]]:
    """A network for each of the sets [k, n, 64], [k, n] with the teacher's logits [k, n, 10]; the loss of each epoch.

    Students of one width and sets of one size have the same start and see the same batches, whatever the loss.
    """
    members, images = sets.labels.shape
    generator = torch.Generator().manual_seed(course.seed + 1)
    networks = Networks(members, (PIXELS, width, width, CLASSES), generator)

    def loss_of(batch: Tensor) -> Tensor:
        logits, targets = networks(sets.images[:, batch]), soft_targets[:, batch]
        return members * loss(logits.flatten(0, 1), targets.flatten(0, 1), sets.labels[:, batch].flatten())

    return networks, _train(name, networks, loss_of, images, generator, course)


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
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, course.epochs * math.ceil(images / BATCH))
    curve = []
    for _ in course.track(name, course.epochs):
        total = torch.zeros(())
        for batch in torch.split(torch.randperm(images, generator=generator), BATCH):
            loss = loss_of(batch)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            total += loss.detach() * len(batch)
        curve.append(float(total) / images)
    return curve


def correction(logits: Tensor, labels: Tensor, classes: Sequence[int]) -> Tensor:
    """The one number on the logits of these classes with which the fewest of the images are wrong, as [10]."""
    at = one_hot(torch.tensor(classes), CLASSES).sum(0)
    errors = torch.stack([((logits + bias * at).argmax(-1) != labels).sum() for bias in _BIASES])
    best = _BIASES[errors == errors.min()]
    return best[len(best) // 2] * at  # the middle of those that do equally well


def _moved(images: Tensor, by: float) -> Tensor:
    """[9, ..., 64]: the images [..., 64] moved by so much of a pixel each way, between pixels linearly."""

    def along(dim: int, framed: Tensor) -> list[Tensor]:
        still = framed.narrow(dim, 1, 8)
        return [still.lerp(framed.narrow(dim, start, 8), by) for start in range(3)]

    framed = pad(images.reshape(*images.shape[:-1], 8, 8), (1, 1, 1, 1))
    return torch.stack([image.flatten(-2) for rows in along(-2, framed) for image in along(-1, rows)])
