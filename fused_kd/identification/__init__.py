"""Which FusedKDLoss somebody's loss is: `identify(old_loss)`, or `fused-kd identify my_module:my_loss`.

The function is called on small random inputs in float64. What it does to labels, masks and positions is seen from which
gradients change when one of them does; softcaps, from what a softmax does not change with (`caps.py`); the ratio of
the temperatures, from where student and teacher agree (`agreement.py`); how it reduces, from how gradients scale with
the shape; and its divergence, temperatures and weights are fitted to the gradient (`fit.py`). What comes out is a guess
until value and gradient are equal on inputs that it was not made from: `Report.proved`.
"""

from collections.abc import Callable, Sequence
from typing import Any

from fused_kd.identification.probe import ProbeError, random_data, ways_to_call
from fused_kd.identification.proof import EQUAL, VOCABULARY, prove
from fused_kd.identification.report import Report
from fused_kd.identification.search import Search

_LAYOUTS = {"[B, T, V]": (2, 4), "[N, V]": (6,)}


def identify(old_loss: Callable[..., Any], *, arguments: Sequence[str] | None = None) -> Report:
    """The FusedKDLoss that has the value and the gradient of `old_loss`, and what is odd about the latter.

    Looked for are all options that change these, and none that need other arguments: no several teachers, no
    SparseTeacher, no vocabulary that is cut over ranks. Nor are softcaps found around LogitMSE(centred=False).

    Args:
        old_loss: a function, or a module, of a student's and a teacher's logits and, if it takes them, labels and a
            mask, in any order or by name; it returns the loss, or something with it first or under the name "loss".
            Whatever else it needs is bound beforehand:
            `lambda student, teacher, labels: old_loss(student, teacher, labels, config)`.
            It is called some hundred times on small random inputs, on the CPU, with logits [B, T, V] and [N, V]; at the
            end on a few with 4099 positions or columns.
        arguments: what its arguments are, of "student", "teacher", "labels", "mask"; None: by name, and by trying.

    Returns:
        A `Report`: `print(report)`.

    Raises:
        ValueError: it cannot be called, or gives no loss with a gradient; the message says what it raised.
    """
    searches: list[Search] = []
    problems = []
    for layout, positions in _LAYOUTS.items():
        try:
            ways = ways_to_call(old_loss, arguments, random_data(*positions, VOCABULARY, seed=1))
        except ProbeError as error:
            problems.append(f"logits {layout}: {error}")
            continue
        of_layout = []
        for loss in ways[:2]:
            of_layout.append(Search(loss, layout, positions))
            if of_layout[-1].search().proved:
                break
        searches.append(max(of_layout, key=Search.worth))
        if searches[-1].found.proved:
            break
    if not searches:
        raise ValueError("old_loss cannot be called with random inputs: " + "; ".join(problems))
    best = max(searches, key=Search.worth)
    report = best.found
    if report.proved and best is not searches[0]:
        others = searches[0].found
        report.notes.append(f"On logits [B, T, V] it is something else: {'; '.join(others.ruled_out)}.")
        report.notes += [habit for habit in others.habits if habit not in report.habits]
    elif report.proved and best.layout != "[N, V]":
        _also_on_rows(best, old_loss, arguments)
    elif not report.proved and len(searches) < len(_LAYOUTS):
        report.notes += problems
    return report


def _also_on_rows(best: Search, old_loss: Callable[..., Any], arguments: Sequence[str] | None) -> None:
    """A proof for logits [N, V] too; without, they are not mentioned."""
    answer = best.found.answer
    assert answer is not None
    positions = _LAYOUTS["[N, V]"]
    try:
        loss = ways_to_call(old_loss, arguments, random_data(*positions, VOCABULARY, seed=1))[0]
        equal = prove(loss, answer, positions, best.use, best.padding).largest <= EQUAL
    except (ProbeError, ValueError, IndexError):
        return
    if equal:
        best.found.layouts.append("[N, V]")
