"""What `fused_kd.identify` says of a loss: the report, and its sentences about habits."""

import math
from dataclasses import dataclass, field

from fused_kd.identification.answer import Answer

WRONG_DIMENSION = (
    "Softmax over the wrong dimension: a logit changes gradients along dimension {axes} of logits with {dimensions} "
    "dimensions. A softmax over the vocabulary is dim=-1; dim=1 is that for [N, V] alone."
)
NO_SUM = (
    "it is no sum over positions: what one position's logits are changes what all others weigh (a power or a logarithm "
    "of the sum, or weights that add up to 1)"
)
TEACHER_GRADIENT = (
    "The teacher's logits receive a gradient: nothing detaches them here. That is harmless where the teacher runs "
    "under no_grad; otherwise this loss trains the teacher too, and FusedKDLoss does not."
)
CROSS_ENTROPY = (
    "The soft term is the cross entropy: its value has the teacher's entropy in it and does not reach 0. Its gradient "
    "is that of the KL."
)
SQUARE_IN_VALUE_ONLY = "temperature**2 multiplies the value of the soft term, but not its gradient"
DIFFERENT_WEIGHTS = (
    "value and gradient have different weights: in the gradient {soft:.6g} times the soft and {hard:.6g} times the "
    "hard term, in the value {soft_value:.6g} and {hard_value:.6g}"
)
HARD_TEMPERATURE = (
    "The hard term has a temperature too, {temperature:.6g}, or its logits a scale: here student_logit_scale has it, "
    "and temperature what the soft term's is beyond that. The paper has the hard term at 1."
)
ONE_SIDE = (
    "A temperature on one side only, or a scale of its logits: {student:.6g} of the student, {teacher:.6g} of the "
    "teacher. Here options say so; if it was meant for both, drop them."
)
TWO_TEMPERATURES = (
    "Two temperatures, or scales of the logits: {student:.6g} of the student, {teacher:.6g} of the teacher."
)
TWO_SOFTCAPS = "Student and teacher have not the same softcap: {student} and {teacher}."
NO_SQUARE = (
    "No temperature**2: the gradient of the soft term shrinks as the temperature grows, so that its weight beside a "
    "hard term, or its learning rate, changes with the temperature."
)
DIVIDED_BY_V = (
    'The soft term is divided by V, the size of the vocabulary: reduction="mean" of KLDivLoss averages over classes '
    'too ("batchmean" does not). It weighs V times less than it seems to.'
)
SOFT_BY_BATCH = (
    "The soft term is divided by the batch's size alone, the hard term by the number of tokens: the soft one grows "
    'with the length of a sequence ("batchmean" of [B, T, V]).'
)
BY_BATCH = "Divided by the batch's size alone: the loss grows with the length of a sequence."
PADDING_HAS_SOFT_TERM = (
    "Padding is counted: positions without a label have a soft term (soft_on_ignored=True). Drop that option to leave "
    "them out."
)
PADDING_NOT_IN_DIVISOR = (
    "The sum over all positions is divided by the number of those with a label (num_items): the more padding, the more "
    "the soft term weighs."
)
PADDING_IN_DIVISOR = (
    "Padding is counted: the sum over the positions with a label is divided by the number of all (num_items)."
)
NO_LABELS = "The labels are not used at all: padding is counted."
NONE_IGNORED = "A label of -100 raises or gives NaN; here a position with it has no term."
OTHERWISE_IF_SMALL = (
    "on fresh inputs with small probabilities, or large logits, it is something else: an epsilon beside a probability, "
    "or a clamp"
)
NOT_FINITE = (
    "NaN or infinite where a probability is rounded to 0: in float32 by a logit 104 temperatures below the others. "
    "FusedKDLoss is finite there."
)
OVERWRITES = (
    "It overwrites the {names} that it is given: what is done with them afterwards sees other numbers. FusedKDLoss "
    "leaves them as they are."
)
ROUNDS = (
    "It rounds to float32 or less inside; what is compared is the same code in float64, but for a backward of its own."
)


@dataclass
class Report:
    """What was found; `str(report)` says it in words.

    `proved`: `answer` has the value and the gradient of the loss on fresh inputs, of other shapes too: with finite
    logits, probabilities down to exp(-300) and 0, up to 4099 columns or positions along a dimension, labels of which
    some count, a mask of 0 and 1. What happens beyond is not looked at: a padding label that is a larger class, logits
    of -inf, a batch in which nothing counts. Without it, `answer` is None or what comes closest, and `ruled_out` says
    what does not fit.
    """

    proved: bool = False
    answer: Answer | None = None
    arguments: dict[str, str] = field(default_factory=dict)  # what each of the loss's was taken for
    layouts: list[str] = field(default_factory=list)  # of the logits that it was proved for
    habits: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    ruled_out: list[str] = field(default_factory=list)
    worst: float = math.inf  # difference seen in the proof, in units of value or gradient

    @property
    def code(self) -> str:
        """To paste."""
        return "" if self.answer is None else self.answer.code()

    def __str__(self) -> str:
        title = (
            f"For logits {' and '.join(self.layouts)} this is:"
            if self.proved
            else "No FusedKDLoss was found that is this."
        )
        if self.answer is not None and not self.proved:
            title += " What comes closest:"
        taken = ", ".join(f"{name} is the {role}" for name, role in self.arguments.items() if name != role)
        lines = [title, *([""] if self.answer is not None else []), *("    " + x for x in self.code.splitlines())]
        if self.proved:
            lines += ["", f"Value and gradient are equal on fresh inputs, within {max(self.worst, 1e-16):.0e} of them."]
        if taken:
            lines += ["", f"Taken so: {taken} (arguments= says otherwise)."]
        for title, texts in (
            ("Look at this", self.habits), ("To know", self.notes), ("What does not fit", self.ruled_out),
        ):  # fmt: skip
            if texts:
                lines += ["", f"{title}:", *(f"  - {text}" for text in texts)]
        return "\n".join(lines) + "\n"
