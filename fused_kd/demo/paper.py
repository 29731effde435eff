"""What Hinton, Vinyals, Dean 2015 found with soft targets, again in small: scikit-learn's digits, several seeds.

Section 3 of the paper (MNIST), and from its other sections what digits can show: soft targets as regulariser (6),
ensembles (1), and matching logits as the limit of high temperatures (2.1). A seed is another split of the digits; the
networks of all seeds are trained side by side.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fused_kd.demo import Track
from fused_kd.demo.digits import (
    BATCH,
    CLASSES,
    MEMBERS,
    TRAIN,
    Course,
    Digits,
    Networks,
    correction,
    load,
    students,
    teachers,
)
from fused_kd.demo.findings import Cell, Experiment, Line, above, alike, fewer
from fused_kd.demo.unseen import TEMPERATURE, UNSEEN, WIDTH
from fused_kd.loss import FusedKDLoss
from fused_kd.reference import mean_logits

NARROW = 10  # units; the paper went from 300 or more to 30. With 6, a tenth of WIDTH, seeds were apart by 8 points
TEMPERATURES = (1.0, 2.5, 4.0, 8.0, TEMPERATURE)
MEDIUM, HIGH = (2.5, 4.0), (8.0, TEMPERATURE)  # what the paper found best if narrow; alike if wide
HOTTEST = 200.0
MOVED_BY = 0.5  # of a pixel of 8: the paper's two of 28
SHARE = 0.03  # of the training set: the paper's
_HARD = FusedKDLoss(alpha=0.0)

Ensemble = Literal["arithmetic", "geometric"]


@dataclass(frozen=True)
class School:
    """The digits of every seed, and what its teachers say of them. S seeds, K teachers each."""

    train: Digits  # [S, n, 64], [S, n]
    test: Digits
    teachers_train: Tensor  # logits [K, S, n, 10]
    teachers_test: Tensor
    course: Course

    def student(
        self,
        name: str,
        loss: FusedKDLoss,
        *,
        width: int = WIDTH,
        ensemble: Ensemble = "geometric",
        transfer: Tensor | None = None,
    ) -> Networks:
        """A student for each seed, after as many steps whatever `transfer` ([S, count], which images; None: all)."""
        targets = combined(self.teachers_train, loss.temperature, ensemble)
        sets = self.train
        if transfer is not None:
            seed = torch.arange(len(transfer))[:, None]
            sets, targets = Digits(*(part[seed, transfer] for part in sets)), targets[seed, transfer]
        batches, all_batches = (-(-images // BATCH) for images in (sets.labels.shape[1], TRAIN))
        course = replace(self.course, epochs=round(self.course.epochs * all_batches / batches))
        return students(name, loss, sets, targets, width, course)[0]

    def teacher_wrong(self, ensemble: Ensemble) -> Tensor:
        """The teacher's errors on the test set in percent, [S]."""
        return percent(combined(self.teachers_test, 1.0, ensemble).argmax(-1) != self.test.labels)

    def wrong(self, networks: Networks) -> Tensor:
        """Errors on the test set in percent, [S]."""
        return percent(logits_of(networks, self.test).argmax(-1) != self.test.labels)


def combined(logits: Tensor, temperature: float, ensemble: Ensemble) -> Tensor:
    """Logits [..., V] whose softmax at this temperature is the mean of that of the teachers' logits [K, ..., V]."""
    return mean_logits(list(logits), None, ensemble=ensemble, temperature=temperature)


def percent(which: Tensor) -> Tensor:
    return 100 * which.float().mean(-1)


@torch.no_grad()
def logits_of(networks: Networks, digits: Digits) -> Tensor:
    logits: Tensor = networks(digits.images)
    return logits


def run(epochs: int, seeds: int, seed: int, track: Track) -> list[Experiment]:
    """All experiments with the seeds `seed`, `seed + 1`, …"""
    school = _school(Course(epochs, seed, track), seeds)
    hard = {width: school.student(f"{width} units, hard targets", _HARD, width=width) for width in (WIDTH, NARROW)}
    soft = {
        (width, temperature): school.student(
            f"{width} units, τ = {temperature:g}", FusedKDLoss(temperature=temperature), width=width
        )
        for width in (WIDTH, NARROW)
        for temperature in TEMPERATURES
    }
    return [
        _hard_and_soft(school, hard[WIDTH], soft[WIDTH, TEMPERATURE]),
        _temperatures(school, hard, soft),
        _transfer_sets(school),
        _regulariser(school, hard[WIDTH]),
        _ensembles(school, {temperature: soft[WIDTH, temperature] for temperature in (MEDIUM[0], TEMPERATURE)}),
        _logit_matching(school, hard[WIDTH], {temperature: soft[WIDTH, temperature] for temperature in TEMPERATURES}),
    ]


def _school(course: Course, seeds: int) -> School:
    pairs = [load(course.seed + i) for i in range(seeds)]
    train, test = (
        Digits(torch.stack([d.images for d in digits]), torch.stack([d.labels for d in digits]))
        for digits in zip(*pairs, strict=True)
    )
    networks = teachers(f"teachers, {seeds} x {MEMBERS} networks", train, course, moved_by=MOVED_BY)

    def taught(digits: Digits) -> Tensor:
        each = Digits(digits.images.repeat_interleave(MEMBERS, 0), digits.labels)
        return logits_of(networks, each).view(seeds, MEMBERS, *digits.labels.shape[1:], CLASSES).transpose(0, 1)

    return School(train, test, taught(train), taught(test), course)


def _hard_and_soft(school: School, hard: Networks, soft: Networks) -> Experiment:
    of_teacher = school.teacher_wrong("geometric")
    of_hard, of_soft = school.wrong(hard), school.wrong(soft)
    gap = float((of_hard - of_teacher).mean())
    closed = f"{100 * float((of_hard - of_soft).mean()) / gap:.0f} %" if gap > 0 else "there is none"
    return Experiment(
        "Hard and soft targets",
        f"Two hidden layers of {WIDTH} units, τ = {TEMPERATURE:g}. The teacher: {MEMBERS} networks twice as wide that "
        "see the images\nmoved by half a pixel too (the paper's: by two of 28).",
        ("test errors, %",),
        [
            Line("teacher", (Cell(of_teacher, "0.67"),)),
            Line("student, hard targets", (Cell(of_hard, "1.46"),)),
            Line("student, soft targets too", (Cell(of_soft, "0.74"),)),
        ],
        [
            fewer("soft targets make fewer errors", of_hard, of_soft),
            above(
                f"they close most of the gap to the teacher (paper: 91 %, here: {closed})",
                (of_hard + of_teacher) / 2 - of_soft,
                0.0,
                "points past half",
            ),
        ],
    )


def _temperatures(school: School, hard: dict[int, Networks], soft: dict[tuple[int, float], Networks]) -> Experiment:
    wrong = {key: school.wrong(networks) for key, networks in soft.items()}

    def mean(temperatures: tuple[float, ...]) -> Tensor:
        return torch.stack([wrong[NARROW, temperature] for temperature in temperatures]).mean(0)

    def line(temperature: float) -> Line:
        wide = Cell(wrong[WIDTH, temperature], "alike" if temperature in HIGH else "")
        narrow = Cell(wrong[NARROW, temperature], "best" if temperature in MEDIUM else "")
        return Line(f"τ = {temperature:g}", (wide, narrow))

    return Experiment(
        "The temperature",
        "The paper: τ above 8 is alike with 300 units or more; 2.5 to 4 is best with 30.",
        (f"{WIDTH} units: test errors, %", f"{NARROW} units, %"),
        [
            Line("hard targets", tuple(Cell(school.wrong(hard[width])) for width in (WIDTH, NARROW))),
            *(line(temperature) for temperature in TEMPERATURES),
        ],
        [
            alike(f"{WIDTH} units: all τ from 8 on are alike", *(wrong[WIDTH, temperature] for temperature in HIGH)),
            fewer(f"{NARROW} units: τ of 2.5 to 4 beats a lower one", wrong[NARROW, 1.0], mean(MEDIUM)),
            fewer(f"{NARROW} units: τ of 2.5 to 4 beats higher ones", mean(HIGH), mean(MEDIUM)),
        ],
    )


def _transfer_sets(school: School) -> Experiment:
    without = _transferred(school, f"without {UNSEEN}s", school.train.labels != UNSEEN, (UNSEEN,))
    pair = _transferred(school, "7s and 8s alone", (school.train.labels == 7) | (school.train.labels == 8), (7, 8))
    share = 100 * without.errors_unseen / (without.before * school.test.labels.shape[1] / 100)
    gone = 100 * (pair.before - pair.after) / pair.before
    return Experiment(
        "Classes left out of the transfer set",
        f"τ = {TEMPERATURE:g}. A bias is moved by the number with which the fewest of the {TRAIN} training digits "
        "are wrong\n(the paper: of the test set for 3, of the training set for 7 and 8).",
        ("errors, %", f"{UNSEEN}s wrong, %", "bias by"),
        [
            Line(f"no {UNSEEN}s", (Cell(without.before, "2.06"), Cell(without.unseen_before, "13.2"), Cell())),
            Line(
                "bias corrected",
                (Cell(without.after, "1.09"), Cell(without.unseen_after, "1.4"), Cell(without.bias, "+3.5")),
            ),
            Line("7s and 8s alone", (Cell(pair.before, "47.3"), Cell(), Cell())),
            Line("both corrected", (Cell(pair.after, "13.2"), Cell(), Cell(pair.bias, "-7.6"))),
        ],
        [
            above(f"most {UNSEEN}s are right though none was seen", 100 - without.unseen_before, 50.0, "% right"),
            above(f"most errors are on {UNSEEN}s (paper: 65 %)", share, 50.0, "% of the errors"),
            fewer(f"the bias of {UNSEEN} raised: fewer errors", without.before, without.after),
            above("the biases of 7 and 8 lowered: most errors go (paper: 72 %)", gone, 50.0, "% of them"),
        ],
    )


@dataclass(frozen=True)
class _Transferred:
    """Percent of the test set, of its 3s, before and after the bias; [S] each."""

    before: Tensor
    after: Tensor
    unseen_before: Tensor
    unseen_after: Tensor
    bias: Tensor
    errors_unseen: Tensor  # a number of images, before


def _transferred(school: School, name: str, kept: Tensor, classes: tuple[int, ...]) -> _Transferred:
    networks = school.student(name, FusedKDLoss(temperature=TEMPERATURE), transfer=first(kept))
    on_train, on_test = logits_of(networks, school.train), logits_of(networks, school.test)
    biases = torch.stack(
        [correction(of_seed, labels, classes) for of_seed, labels in zip(on_train, school.train.labels, strict=True)]
    )
    labels, unseen = school.test.labels, school.test.labels == UNSEEN
    before, after = on_test.argmax(-1) != labels, (on_test + biases[:, None]).argmax(-1) != labels
    return _Transferred(
        before=percent(before),
        after=percent(after),
        unseen_before=100 * (before & unseen).sum(-1) / unseen.sum(-1),
        unseen_after=100 * (after & unseen).sum(-1) / unseen.sum(-1),
        bias=biases[:, classes[0]],
        errors_unseen=(before & unseen).sum(-1),
    )


def first(kept: Tensor) -> Tensor:
    """The first images to keep of each seed, as many as every seed has: kept [S, n] -> [S, count]."""
    return kept.int().argsort(dim=-1, descending=True, stable=True)[:, : int(kept.sum(-1).min())]


def _regulariser(school: School, hard: Networks) -> Experiment:
    few = round(SHARE * TRAIN)
    transfer = torch.arange(few).expand(len(school.train.labels), few)

    def right(networks: Networks) -> Tensor:
        return 100 - school.wrong(networks)

    all_hard = right(hard)
    few_hard = right(school.student("3 %, hard targets", _HARD, transfer=transfer))
    few_soft = right(school.student("3 %, soft targets", FusedKDLoss(temperature=TEMPERATURE), transfer=transfer))
    return Experiment(
        "Soft targets as regulariser",
        f"3 %: {few} of {TRAIN} digits; the paper: of the frames of speech. The teacher has seen all. The paper\n"
        "stopped early with hard targets; here every student takes as many steps.",
        ("right on the test set, %",),
        [
            Line("100 %, hard targets", (Cell(all_hard, "58.9"),)),
            Line("3 %, hard targets", (Cell(few_hard, "44.5"),)),
            Line("3 %, soft targets", (Cell(few_soft, "57.0"),)),
        ],
        [
            above("soft targets of 3 % beat hard ones of 3 %", few_soft - few_hard, 0.0, "points more"),
            above(
                "they regain most of what is lost (paper: 87 %)",
                100 * (few_soft - few_hard) / (all_hard - few_hard),
                50.0,
                "% of it",
            ),
        ],
    )


def _ensembles(school: School, geometric: dict[float, Networks]) -> Experiment:
    lines = []
    for temperature, networks in geometric.items():
        arithmetic = school.student(
            f"arithmetic mean, τ = {temperature:g}", FusedKDLoss(temperature=temperature), ensemble="arithmetic"
        )
        lines.append(
            Line(f"student, τ = {temperature:g}", (Cell(school.wrong(arithmetic)), Cell(school.wrong(networks))))
        )
    return Experiment(
        "Arithmetic and geometric mean of the teachers",
        "The paper: either can be used.",
        ("arithmetic: test errors, %", "geometric, %"),
        [Line("teachers", (Cell(school.teacher_wrong("arithmetic")), Cell(school.teacher_wrong("geometric")))), *lines],
        [alike(f"{line.name}: alike", *(c.here for c in line.cells if c.here is not None)) for line in lines],
    )


def _logit_matching(school: School, hard: Networks, kl: dict[float, Networks]) -> Experiment:
    hottest = school.student(f"KL, τ = {HOTTEST:g}", FusedKDLoss(temperature=HOTTEST))
    matching = school.student("logit MSE", FusedKDLoss(divergence="logit_mse", temperature=1.0))
    student = logits_of(hard, school.train)
    teacher = combined(school.teachers_train, 1.0, "geometric")
    limit = _gradient(FusedKDLoss(1.0, alpha=1.0, divergence="logit_mse"), student, teacher)
    apart, lines = {}, []
    for temperature, networks in {**kl, HOTTEST: hottest}.items():
        gradient = _gradient(FusedKDLoss(temperature, alpha=1.0), student, teacher)
        apart[temperature] = 100 * (gradient - limit).flatten(1).norm(dim=1) / limit.flatten(1).norm(dim=1)
        lines.append(Line(f"KL, τ = {temperature:g}", (Cell(apart[temperature]), Cell(school.wrong(networks)))))
    return Experiment(
        "KL at high τ, and matching logits",
        "The paper: matching logits is the limit as τ grows. The gradient: of the student with hard\n"
        "targets, on the training digits.",
        ("gradient off by, %", "test errors, %"),
        [*lines, Line("logit MSE", (Cell(), Cell(school.wrong(matching))))],
        [
            above(
                f"ten times τ ({TEMPERATURE:g}, {HOTTEST:g}): gradient 5 times nearer",
                apart[TEMPERATURE] / apart[HOTTEST],
                5.0,
                "times nearer",
            ),
            alike(
                f"KL at τ = {HOTTEST:g} and logit MSE: students alike", school.wrong(hottest), school.wrong(matching)
            ),
        ],
    )


def _gradient(loss: FusedKDLoss, student: Tensor, teacher: Tensor) -> Tensor:
    leaf = student.detach().requires_grad_()
    value = loss(leaf, teacher)
    assert isinstance(value, Tensor)
    (gradient,) = torch.autograd.grad(value, leaf)
    return gradient
