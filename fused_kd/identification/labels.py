"""What a loss does with its labels: seen by giving one position every label in turn."""

from dataclasses import dataclass, field

from torch import Tensor

from fused_kd.identification.probe import Data, Loss, ProbeError

# What a position without a label may have, beside a class.
_NOT_CLASSES = [-100, -1, -2]


@dataclass(frozen=True)
class LabelUse:
    used: bool
    hard: bool  # which label a position has changes its gradient
    shifted: bool  # the label of position i is that of position i - 1's logits
    ignored: int | None  # the label that means none
    ordinary: list[int] = field(default_factory=list)  # classes
    notes: list[str] = field(default_factory=list)
    problem: str = ""

    @staticmethod
    def none(vocabulary: int) -> "LabelUse":
        return LabelUse(False, False, False, None, list(range(vocabulary + 20)))


def label_use(loss: Loss, data: Data) -> LabelUse:
    """A cross entropy's gradient at two labels differs in the columns of the two, in one row, and nowhere else; that of
    an ignored label differs from any other's in all of a row."""
    at = tuple(1 if size > 2 else 0 for size in data.positions)
    gradients = {}
    for label in [*range(data.vocabulary), *_NOT_CLASSES]:
        labels = data.labels.clone()
        labels[at] = label
        try:
            gradient = loss(data.but(labels=labels)).gradient
        except ProbeError:
            continue
        if gradient.isfinite().all():
            gradients[label] = gradient
    classes = [label for label in gradients if label >= 0]
    if len(classes) < data.vocabulary:
        return _problem("some classes as labels raise or give NaN")
    size = max(float(g.abs().max()) for g in gradients.values())

    def alike(one: int, other: int) -> bool:
        difference = (gradients[one] - gradients[other]).clone()
        for label in (one, other):
            if label >= 0:
                difference[..., label] = 0
        return bool(difference.abs().max() <= 1e-11 * size)

    ordinary = [c for c in classes if 2 * sum(alike(c, other) for other in classes) > len(classes)]
    if 2 * len(ordinary) <= len(classes):
        return _problem("a term that depends on labels, but is no cross entropy")
    special = [label for label in gradients if label not in ordinary and not all(alike(label, c) for c in ordinary)]
    swapped = gradients[ordinary[0]] - gradients[ordinary[1]]
    hard = bool(swapped.abs().max() > 1e-11 * size)
    if not hard and not special:
        return LabelUse.none(data.vocabulary)

    ignored = -100 if -100 in special else special[0] if special else None
    if hard:
        touched = _rows_of(swapped, size)
    else:
        assert ignored is not None
        without = gradients[ignored].abs().amax(-1) == 0
        touched = (without & (gradients[ordinary[0]].abs().amax(-1) > 0)).nonzero()
    rows = {tuple(row) for row in touched.tolist()}
    before = (*at[:-1], at[-1] - 1)
    if rows not in ({at}, {before}):
        return _problem(f"the label of position {at} acts on positions {sorted(rows)}")
    notes = []
    if ignored is not None:
        others = [label for label in special if label >= 0 and label != ignored]
        if others:
            return _problem(f"the labels {others} are ignored as well as {ignored}; one ignore_index says one")
        negative = [label for label in special if label < 0 and label != ignored]
        if negative:
            notes.append(f"Other negative labels are ignored too: {negative}. ignore_index is {ignored} alone.")
    larger = range(data.vocabulary, data.vocabulary + 20)  # for inputs with more of them
    return LabelUse(True, hard, rows == {before}, ignored, [*ordinary, *larger], notes)


def _rows_of(difference: Tensor, size: float) -> Tensor:
    return (difference.abs().amax(-1) > 1e-11 * size).nonzero()


def _problem(text: str) -> LabelUse:
    return LabelUse(True, True, False, None, problem=text)
