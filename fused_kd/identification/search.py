"""The search for the FusedKDLoss that somebody's loss is, for logits of one kind: [B, T, V] or [N, V]."""

import math
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fused_kd.divergences import CrossEntropy, ForwardKL, LogitMSE, TotalVariation
from fused_kd.identification import report as say
from fused_kd.identification.agreement import Agreement, agreement
from fused_kd.identification.answer import Answer, weight_options
from fused_kd.identification.caps import over_uncapped, recapped, student_rate, teacher_rate, uncapped
from fused_kd.identification.fit import Fit, fit, fit_hard, fit_variation, weights_of
from fused_kd.identification.hard import EXACT, Rows, nice
from fused_kd.identification.labels import LabelUse, label_use
from fused_kd.identification.probe import Data, Loss, ProbeError, Reading, random_data
from fused_kd.identification.proof import EQUAL, PADDING, VOCABULARY, difference, fresh, prove
from fused_kd.identification.report import Report
from fused_kd.identification.values import parts_of, with_teacher_temperature

_MORE = {"batch": 3, "length": 3, "vocabulary": 4}  # how much larger the inputs get that show a reduction


class _Unlike(Exception):
    """No FusedKDLoss does this; the message says what it does."""


class Search:
    """What a loss does to logits with leading dimensions `positions`, or larger ones."""

    def __init__(self, loss: Loss, layout: str, positions: tuple[int, ...]) -> None:
        self.loss, self.layout, self.positions = loss, layout, positions
        self.found = Report(layouts=[layout], arguments={x.name: x.role for x in loss.parameters})
        self.view, self.padding = "", PADDING[0]
        self.use = LabelUse.none(VOCABULARY)
        self.shift = self.has_soft = False
        self.rates = (0.0, 0.0)  # the softcaps of student and teacher, as caps.py has them

    def worth(self) -> tuple[bool, bool]:
        return self.found.proved, self.found.answer is not None

    def search(self) -> Report:
        try:
            self._check_positions()
            self._find_labels()
            self._find_shift()
            self._find_teacher()
            self._find_caps()
            fitted = self._compare_values(self._fit())
            self._choose_and_prove(self._reduction(fitted))
        except _Unlike as unlike:
            self.found.ruled_out.append(str(unlike))
        except ProbeError as error:
            self.found.ruled_out.append(f"on other inputs it fails: {error}")
        except ValueError as error:  # of FusedKDLoss
            self.found.ruled_out.append(f"its numbers are out of range: {error}")
        if self.loss.rounds:
            self.found.notes.append(say.ROUNDS)
        if self.loss.overwritten:
            self.found.habits.append(say.OVERWRITES.format(names=" and ".join(sorted(self.loss.overwritten))))
        return self.found

    def _data(self, *, seed: int, batch: int = 0, length: int = 0, vocabulary: int = 0, scale: float = 1.0) -> Data:
        """Labels that have a term; so many more of each dimension than the smallest."""
        positions = list(self.positions)
        positions[0] += batch
        positions[-1] += length
        scale = 2 / max(1 / scale, *(2 * rate for rate in self.rates))  # beyond a softcap everything is flat
        return random_data(*positions, VOCABULARY + vocabulary, seed=seed, scale=scale, classes=self.use.ordinary)

    def _rows(self, data: Data, reading: Reading) -> Rows:
        student, teacher, labels, gradient = data.student, data.teacher, data.labels, reading.gradient
        if self.shift:
            student, teacher, gradient = (x[..., :-1, :] for x in (student, teacher, gradient))
            labels = labels[..., 1:]
        student, teacher, gradient = (x.flatten(0, -2) for x in (student, teacher, gradient))
        gradient = over_uncapped(gradient, student, self.rates[0])
        student, teacher = uncapped(student, self.rates[0]), uncapped(teacher, self.rates[1])
        return Rows(student, teacher, labels.flatten() if self.use.hard else None, gradient)

    def _check_positions(self) -> None:
        """That it is a function, of each position by itself, and returns one number or one a position."""
        data = random_data(*self.positions, VOCABULARY, seed=1)
        reading = self.loss(data)
        if not (reading.value.isfinite().all() and reading.gradient.isfinite().all()):
            raise _Unlike("it is NaN or infinite on ordinary logits")
        again = self.loss(data)
        for what, x, y in (("gradient", again.gradient, reading.gradient), ("value", again.value, reading.value)):
            if not torch.equal(x, y):
                raise _Unlike(f"the same input has another {what} the next time")
        twice = self.loss(data, torch.full_like(reading.value, 2.0)).gradient
        if (twice - 2 * reading.gradient).norm() > EQUAL * reading.gradient.norm():
            raise _Unlike("its backward ignores what it is multiplied by: half of it trains as much as all of it")
        self.view = _view(reading.value.shape, data.positions)
        dimensions: set[int] = set()
        at = tuple(1 if size > 1 else 0 for size in data.student.shape)
        for name in ("student", "teacher"):
            logits = getattr(data, name).clone()
            logits[at] += 0.7
            after = self.loss(data.but(**{name: logits})).gradient
            changed = ((after - reading.gradient).abs() > 1e-11 * reading.gradient.abs().max()).nonzero()
            elsewhere = {d for d in range(changed.shape[1] - 1) if (changed[:, d] != at[d]).any()}
            if elsewhere and _proportional(after, reading.gradient, at[:-1]):
                raise _Unlike(say.NO_SUM)
            dimensions |= elsewhere
        if dimensions:
            axes = " and ".join(map(str, sorted(dimensions)))
            self.found.habits.append(say.WRONG_DIMENSION.format(axes=axes, dimensions=data.student.dim()))
            raise _Unlike("its positions are not independent of each other")

    def _find_labels(self) -> None:
        if "labels" in self.loss.roles:
            self.use = label_use(self.loss, random_data(*self.positions, VOCABULARY, seed=1))
            if self.use.problem:
                raise _Unlike(self.use.problem)

    def _find_shift(self) -> None:
        empty = self.loss(self._data(seed=2)).gradient.abs().amax(-1) == 0
        last_alone = bool(empty[..., -1].all() and not empty[..., :-1].any())
        if empty.any() and not last_alone:
            raise _Unlike("positions other than the last have no gradient")
        if self.use.used and self.use.shifted and not last_alone:
            raise _Unlike("the labels are shifted by one position, but the last position has a soft term all the same")
        if self.use.used and not self.use.shifted and last_alone:
            raise _Unlike("the last position is left out, but the labels are not shifted")
        self.shift = last_alone

    def _find_teacher(self) -> None:
        one, other = self._data(seed=3), self._data(seed=4)
        first, second = self.loss(one), self.loss(one.but(teacher=other.teacher))
        self.has_soft = not torch.equal(first.gradient, second.gradient)
        if not self.has_soft and not self.use.hard:
            raise _Unlike("neither the teacher's logits nor the labels change its gradient")
        if first.teacher_gradient is not None and first.teacher_gradient.abs().max() > 0:
            self.found.habits.append(say.TEACHER_GRADIENT)

    def _find_caps(self) -> None:
        def seen(teacher: Tensor) -> Tensor:
            reading = self.loss(data.but(teacher=teacher))
            pairs = ((reading.value, first.value), (reading.gradient, first.gradient))
            return torch.cat([x.flatten() / (float(of_first.norm()) or 1) for x, of_first in pairs])

        found = 0.0, 0.0
        sizes = [0.5, 0.5]  # of the logits: where no cap is flat, then where it is seen best
        for _ in range(2):
            data = self._data(seed=9)
            teacher = sizes[1] * (data.teacher.abs() + 1)
            data = data.but(student=sizes[0] * data.student, teacher=teacher)
            first = self.loss(data)
            rows = self._rows(data, first)
            of_student = student_rate(rows.student, rows.gradient)
            of_teacher = teacher_rate(seen, teacher) if self.has_soft else 0.0
            if of_student is None or of_teacher is None:
                break
            found = of_student, of_teacher
            if not any(found):
                break
            sizes = [0.3 / rate if rate else 0.5 for rate in found]
        self.rates = found

    def _agreement(self, scale: float) -> Agreement | None:
        data = self._data(seed=10, scale=scale)
        of_student, of_teacher = self.rates
        z = uncapped(data.student, of_student)
        largest = float(z.abs().max())

        def rows(scale: float, ratio: float) -> Rows:
            student, teacher = recapped(scale * z, of_student), recapped(ratio * scale * z, of_teacher)
            changed = data.but(student=student, teacher=teacher)
            return self._rows(changed, self.loss(changed))

        @cache
        def without(scale: float) -> Tensor:
            return rows(scale, 0.0).gradient

        def at(ratio: float) -> tuple[Rows, Tensor]:
            scale = min(1.0, 0.9 / (of_teacher * ratio * largest + 1e-9))  # the teacher's are under its softcap
            return rows(scale, ratio), without(scale)

        return agreement(at)

    def _fit(self) -> Fit:
        data = self._data(seed=5)
        reading = self.loss(data)
        rows = self._rows(data, reading)
        ruled_out: list[str] = []
        if not self.has_soft:
            fitted = fit_hard(rows)
        elif self._is_flat(data, reading):
            fitted = fit_variation(rows)
        else:
            agreed = self._agreement(1.0) or (self._agreement(3.0) if self.use.hard else None)
            if agreed is None:
                raise _Unlike(
                    "its gradient is that of no divergence here plus a cross entropy: at no temperatures is it that of "
                    "the latter alone where student and teacher are the same, with softcaps or without"
                )
            fitted, ruled_out = fit(rows, agreed)
            if fitted is None:  # it may be hot
                wide = self._data(seed=5, scale=16.0)
                fitted, ruled_out = fit(self._rows(wide, self.loss(wide)), agreed)
        if fitted is None:
            self.found.ruled_out += [
                f"{name}: at no temperature and with no weights, with softcaps or without" for name in ruled_out
            ]
            raise _Unlike("its gradient is that of no divergence here plus a cross entropy")
        if fitted.why_not:
            raise _Unlike(fitted.why_not)
        return fitted

    def _is_flat(self, data: Data, reading: Reading) -> bool:
        """The total variation's gradient does not change with a teacher that hardly does."""
        after = self.loss(data.but(teacher=data.teacher * (1 + 1e-6))).gradient
        return bool((after - reading.gradient).norm() < 1e-13 * reading.gradient.norm())

    def _compare_values(self, fitted: Fit) -> Fit:
        """Which of two divergences with the same gradient it is; and whether the value belongs to the gradient."""
        inputs = [self._data(seed=seed) for seed in range(20, 28)]
        readings = [self.loss(data) for data in inputs]
        rows = [self._rows(*pair) for pair in zip(inputs, readings, strict=True)]
        values = torch.stack([reading.value.sum() for reading in readings])
        if isinstance(fitted.divergence, TotalVariation):
            fitted = with_teacher_temperature(fitted, rows, values)
        parts = torch.stack([parts_of(x, fitted) for x in rows])  # [M, 4]: soft, hard, the teacher's entropy, 1
        left = values - parts[:, :2] @ torch.tensor([fitted.soft, fitted.hard], dtype=torch.float64)
        if left.norm() <= EQUAL * values.norm():
            return fitted
        sizes = torch.where(parts.norm(dim=0) > 0, parts.norm(dim=0), torch.inf)  # a term that is not there: 0
        more = torch.linalg.lstsq(parts / sizes, left[:, None], driver="gelsd").solution[:, 0] / sizes
        if (parts @ more - left).norm() > 1e-8 * left.norm():
            raise _Unlike("its gradient is not that of its value: no weights of the same terms give the latter")
        smallest = 1e-7 * (fitted.soft + fitted.hard)
        soft, hard, entropy, constant = (x if abs(x) > smallest else 0.0 for x in more.tolist())
        forward = isinstance(fitted.divergence, ForwardKL)
        if forward and not (soft or hard or constant) and _close(entropy, fitted.soft):
            self.found.habits.append(say.CROSS_ENTROPY)
            return replace(fitted, divergence=CrossEntropy())
        if not (entropy or constant or hard) and _close(fitted.soft + soft, fitted.soft * fitted.temperature**2):
            text = say.SQUARE_IN_VALUE_ONLY
        elif soft or hard:
            text = say.DIFFERENT_WEIGHTS.format(
                soft=fitted.soft, hard=fitted.hard, soft_value=fitted.soft + soft, hard_value=fitted.hard + hard
            )
        elif entropy:
            text = f"the value is greater by {entropy:.6g} times the teacher's entropy; the gradient fits"
        else:
            text = f"the value is greater by {constant:.6g}; the gradient fits"
        self.found.habits.append(text[0].upper() + text[1:] + ".")
        self.found.ruled_out.append(text)
        return fitted

    def _reduction(self, fitted: Fit) -> Answer:
        """From how the weights change with each dimension: as which power of it."""
        base = self._weights(self._data(seed=7), fitted)
        length = self.positions[-1] - self.shift  # that have a label
        # (Of one dimension both changes are.)
        sizes = {"batch": self.positions[0] if len(self.positions) > 1 else length, "length": length}
        sizes["vocabulary"] = VOCABULARY
        powers: dict[str, tuple[int, int]] = {}
        for name, more in _MORE.items():
            larger = self._weights(self._data(seed=8, **{name: more}), fitted)
            both = (_power(x, y, (sizes[name] + more) / sizes[name], name) for x, y in zip(base, larger, strict=True))
            powers[name] = (next(both), next(both))
        leading = 1 if fitted.hard else 0
        batch, of_length = powers["batch"][leading], powers["length"][leading]
        reduction = {(0, 0): "sum", (-1, -1): "mean", (-1, 0): "batchmean"}.get((batch, of_length))
        if self.view:
            reduction = "none" if reduction == "sum" else None
        if reduction is None:
            raise _Unlike(f"its weight goes as the power {batch} of the batch and {of_length} of the length")
        per_length = per_vocabulary = 0
        if fitted.soft:
            per_length, per_vocabulary = powers["length"][0] - of_length, powers["vocabulary"][0]
            if powers["batch"][0] != batch or per_length not in (0, 1) or per_vocabulary not in (0, -1):
                raise _Unlike("soft and hard term are divided by different powers of the shape")
        if fitted.hard and powers["vocabulary"][1]:
            raise _Unlike("the hard term's weight changes with the size of the vocabulary")
        divisor = {"mean": math.prod(self.positions[:-1]) * length, "batchmean": self.positions[0]}.get(reduction, 1)
        soft, hard = (x * divisor for x in base)
        soft /= float(length) ** per_length * float(VOCABULARY) ** per_vocabulary
        return self._answer(fitted, reduction, soft, hard, per_length, per_vocabulary)

    def _weights(self, data: Data, fitted: Fit) -> tuple[float, float]:
        soft, hard, left = weights_of(self._rows(data, self.loss(data)), fitted)
        if left > 1e-7:
            raise _Unlike("on another input, or with another shape, it is another function")
        return soft, hard

    def _answer(
        self, fitted: Fit, reduction: str, soft: float, hard: float, per_length: int, per_vocabulary: int
    ) -> Answer:
        if soft < 0 or hard < -1e-9 * soft:
            raise _Unlike(f"a negative weight: {soft:.6g} of the soft term, {hard:.6g} of the hard one")
        hard = nice(hard) if self.use.hard and hard > 0 else 0.0
        habits = self.found.habits
        own = fitted.hard_temperature if hard else 1.0
        temperature, teacher_temperature = fitted.temperature, fitted.teacher_temperature
        options: dict[str, Any] = {"temperature": nice(temperature / own), "reduction": reduction, "shift": self.shift}
        if self.use.ignored is not None:
            options["ignore_index"] = self.use.ignored
        if fitted.label_smoothing:
            options["label_smoothing"] = fitted.label_smoothing
        if own != 1:
            options["student_logit_scale"] = nice(1 / own)
            habits.append(say.HARD_TEMPERATURE.format(temperature=own))
        if fitted.divergence is not None:
            options["divergence"] = fitted.divergence
            if temperature == teacher_temperature:
                if own != 1:
                    options["teacher_logit_scale"] = nice(1 / own)
            else:
                if teacher_temperature != options["temperature"]:
                    options["teacher_temperature"] = teacher_temperature
                one_side = 1 in (temperature, teacher_temperature) and not isinstance(fitted.divergence, LogitMSE)
                text = say.ONE_SIDE if one_side else say.TWO_TEMPERATURES
                habits.append(text.format(student=temperature, teacher=teacher_temperature))
        for side, rate in zip(("student", "teacher"), self.rates, strict=True):
            if rate:
                options[f"{side}_softcap"] = nice(options.get(f"{side}_logit_scale", 1.0) / rate)
        softcaps = options.get("student_softcap"), options.get("teacher_softcap")
        if self.has_soft and softcaps[0] != softcaps[1]:
            habits.append(say.TWO_SOFTCAPS.format(student=softcaps[0], teacher=softcaps[1]))
        options |= weight_options(soft, hard, options["temperature"], bool(per_length or per_vocabulary))
        if soft and options["temperature"] != 1 and not options.get("t2_scaling", True):
            habits.append(say.NO_SQUARE)
        if per_vocabulary:
            habits.append(say.DIVIDED_BY_V)
        if per_length:
            habits.append(say.SOFT_BY_BATCH)
        elif reduction == "batchmean":
            habits.append(say.BY_BATCH)
        return Answer(options, per_length, per_vocabulary, labels=self.use.used, view=self.view)

    def _choose_and_prove(self, answer: Answer) -> None:
        """What becomes of positions without a label or under a mask; then the proof."""
        ways = [answer.but(soft_on_ignored=soft, num_items=count) for count in ("", "all") for soft in (False, True)]
        ways.append(answer.but(soft_on_ignored=True, num_items="labelled"))
        if not (self.use.used and self.use.ignored is not None and self.has_soft):
            ways = [way for way in ways if not way.options["soft_on_ignored"]]
        if answer.options["reduction"] != "mean":
            ways = [way for way in ways if not way.num_items]
        if "mask" in self.loss.roles:
            ways = [way.but(weights=True) for way in ways]
        found = self.found
        for padding in PADDING if "mask" in self.loss.roles else PADDING[:1]:
            for way in ways:
                small = fresh(self.positions, self.use, way, padding, seeds=(40, 41, 44))
                if difference(self.loss, way, small) <= EQUAL:
                    found.answer, self.padding = way, padding
                    proof = prove(self.loss, way, self.positions, self.use, padding)
                    found.worst = proof.largest
                    if not proof.finite:
                        found.habits.append(say.NOT_FINITE)
                    if not proof.worst <= EQUAL:
                        found.ruled_out.append("on fresh inputs it is something else")
                    elif not proof.far <= EQUAL:
                        found.ruled_out.append(say.OTHERWISE_IF_SMALL)
                    found.proved = not found.ruled_out
                    self._describe(way)
                    return
        found.answer = answer
        if found.ruled_out:
            return
        counted = answer.but(weights=False)  # with every position a label and no mask
        if difference(self.loss, counted, [self._data(seed=seed) for seed in (42, 43)]) > EQUAL:
            found.ruled_out.append("on fresh inputs it is something else")
        elif difference(self.loss, counted, fresh(self.positions, self.use, counted, PADDING[3])) <= EQUAL:
            found.ruled_out.append(
                "what it makes of labels that are ignored, or of a mask; where every position counts it is equal"
            )
        else:
            found.ruled_out.append(say.OTHERWISE_IF_SMALL)

    def _describe(self, way: Answer) -> None:
        found = self.found
        if way.options["soft_on_ignored"]:
            found.habits.append(say.PADDING_HAS_SOFT_TERM)
        if way.num_items == "labelled":
            found.habits.append(say.PADDING_NOT_IN_DIVISOR)
        elif way.num_items:
            found.habits.append(say.PADDING_IN_DIVISOR)
        if self.padding != PADDING[0]:
            found.notes.append(f"It is this as long as {self.padding}.")
        if "labels" in self.loss.roles and not self.use.used:
            found.habits.append(say.NO_LABELS)
        elif self.use.used and self.use.ignored is None:
            found.notes.append(say.NONE_IGNORED)
        found.notes += self.use.notes


def _proportional(one: Tensor, other: Tensor, position: tuple[int, ...]) -> bool:
    """Whether two gradients are so at all positions but one."""
    one, other = one.clone(), other.clone()
    one[position] = other[position] = 0
    return bool((one - (one * other).sum() / (other * other).sum() * other).norm() < EXACT * one.norm())


def _power(before: float, after: float, growth: float, name: str) -> int:
    """Of the growth of a dimension, by which a weight changes."""
    if not before or after / before <= 0:
        return 0
    exact = math.log(after / before) / math.log(growth)
    if abs(exact - round(exact)) > 1e-5:
        raise _Unlike(f"a weight changes as the power {exact:.3g} of the {name}")
    return round(exact)


def _view(shape: torch.Size, positions: torch.Size) -> str:
    """What makes theirs of our numbers, one a position; "" for a scalar."""
    if len(shape) == 0:
        return ""
    numbers = torch.empty(positions)
    for view in ("[...]", "[..., :-1]", ".transpose(0, 1)", ".flatten()", "[..., :-1].flatten()"):
        if ("transpose" not in view or len(positions) == 2) and Answer.seen(numbers, view).shape == shape:
            return view
    raise _Unlike(f"for positions {tuple(positions)} it returns a tensor of shape {tuple(shape)}")


def _close(x: float, y: float) -> bool:
    return abs(x - y) <= 1e-6 * abs(y)
