"""What the demo shows: progress, the terminal's text, and the picture."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import fused_kd
from fused_kd.demo import Track
from fused_kd.demo.digits import MEMBERS, TRAIN
from fused_kd.demo.unseen import UNSEEN, Learned, Score
from fused_kd.demo.vocabulary import VOCABULARY, Cost, Measured

BLUE, ORANGE, GREY = "#0b6e99", "#f2a65a", "#5f6b76"
CONSOLE = Console(highlight=False, soft_wrap=True)


@contextmanager
def progress() -> Iterator[Track]:
    """Bars on stderr, gone when the work is done."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:

        def track(name: str, steps: int) -> Iterable[int]:
            return bars.track(range(steps), description=f"{name:<28}")

        yield track


def title(seed: int) -> None:
    threads = torch.get_num_threads()
    CONSOLE.print(
        f"fused_kd {fused_kd.__version__}, torch {torch.__version__}, {threads} threads, seed {seed}", style="dim"
    )


def tables(learned: Learned, measured: Measured) -> None:
    _digits(learned)
    _vocabulary(measured)


def _digits(learned: Learned) -> None:
    CONSOLE.print(
        f"\n[bold]1. A student learns what a {UNSEEN} is without ever seeing one[/bold]\n"
        f"{learned.transfer} of {TRAIN} digits to learn from: those that are no {UNSEEN}. The teacher, {MEMBERS} "
        f"networks that know\nall digits, tells the distilled student how much each of them looks like a "
        f"{UNSEEN}.\nThe test: {learned.test} other digits, {learned.test_unseen} of them a {UNSEEN}.\n"
    )
    scores = table(f"{UNSEEN}s right", "all errors", f"{UNSEEN}s right *", "all errors *")
    scores.add_row("teacher", *_cells(learned.teacher))
    for name, student in (("labels alone", learned.hard), ("distilled", learned.fused)):
        scores.add_row(f"student, {name}", *_cells(student.score), *_cells(student.corrected))
    CONSOLE.print(scores)
    CONSOLE.print(
        f"\n* after correcting one number, the bias against {UNSEEN}, on the {TRAIN} digits.\n"
        f"Trained with eager PyTorch instead, the curve of the loss differs by {_percent(learned.difference)} at most."
    )


def table(*headings: str) -> Table:
    made = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for heading in ("", *headings):
        made.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    return made


def _cells(score: Score) -> tuple[str, str]:
    return str(score.unseen_right), str(score.errors)


def _vocabulary(measured: Measured) -> None:
    rows, logits = measured.rows, measured.logits_bytes
    CONSOLE.print(
        f"\n[bold]2. The same loss over a language model's vocabulary of {VOCABULARY}[/bold]\n"
        f"{rows} rows of float32 logits ({_megabytes(logits)} each for student and teacher), forward and backward.\n"
    )
    costs = table("time", "peak extra memory", "in logits' sizes")
    for name, cost in (
        (f"FusedKDLoss ({measured.backend} backend)", measured.fused),
        ("eager PyTorch", measured.eager),
    ):
        costs.add_row(name, _milliseconds(cost.seconds), *_memory(cost, logits))
    costs.add_row("yardstick: one torch.softmax", _milliseconds(measured.softmax_seconds), "", "")
    CONSOLE.print(costs)
    CONSOLE.print(
        f"\nThe losses differ by {measured.loss_difference:.0e} of their size, the gradients by "
        f"{measured.gradient_difference:.0e}. Time: median of turns\nin one process. Memory: the rise of the process's "
        "resident memory, gradient included."
    )


def _memory(cost: Cost, logits: int) -> tuple[str, str]:
    if cost.memory is None:
        return "not measured", "(needs /proc)"
    return _megabytes(cost.memory), f"{cost.memory / logits:.1f}"


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.0f} MB"


def _percent(part: float) -> str:
    return f"{100 * part:.2g} %"


def picture(learned: Learned, measured: Measured, output: Path) -> None:
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.05))
    _curves(left, learned)
    _bars(right, measured)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=GREY)
    figure.savefig(output, format="png", dpi=150)
    CONSOLE.print(f"\nPicture: {output.absolute()}")


def _curves(axes: Axes, learned: Learned) -> None:
    epochs = range(1, len(learned.fused.curve) + 1)
    axes.plot(epochs, learned.eager.curve, color=ORANGE, linewidth=7, alpha=0.7, label="eager PyTorch")
    axes.plot(epochs, learned.fused.curve, color=BLUE, linewidth=1.8, label="FusedKDLoss")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.set_xlabel("epoch", color=GREY)
    axes.set_ylabel("distillation loss (log scale)", color=GREY)
    axes.legend(frameon=False, loc="upper right")
    axes.set_title(
        f"Same training: the curves differ by at most {_percent(learned.difference)}", loc="left", weight="bold"
    )
    student, hard, total = learned.fused, learned.hard, learned.test_unseen
    axes.text(
        0.3,
        0.76,
        f"{UNSEEN}s recognised by a student that never saw one:\n"
        f"distilled  {student.score.unseen_right} of {total}, bias corrected {student.corrected.unseen_right}\n"
        f"labels alone  {hard.score.unseen_right} of {total}",
        transform=axes.transAxes,
        verticalalignment="top",
        linespacing=1.5,
        color=GREY,
    )


def _bars(axes: Axes, measured: Measured) -> None:
    """Both quantities in units of the eager one, so that one axis from zero serves both."""
    fused, eager = measured.fused, measured.eager
    ratio = eager.seconds / fused.seconds
    finding = f"{ratio:.1f} times as fast" if ratio >= 1 else f"{1 / ratio:.1f} times as slow"
    groups = [("time", fused.seconds, eager.seconds, _milliseconds(fused.seconds), _milliseconds(eager.seconds))]
    if fused.memory is not None and eager.memory is not None:
        finding += f", {_percent(fused.memory / eager.memory)} of the memory"
        groups.append(
            ("peak extra\nmemory", fused.memory, eager.memory, _megabytes(fused.memory), _megabytes(eager.memory))
        )
    yardstick = measured.softmax_seconds / eager.seconds
    for i, (_, of_fused, of_eager, fused_text, eager_text) in enumerate(groups):
        for offset, value, text, colour in (
            (-0.2, of_eager, f"eager PyTorch  {eager_text}", ORANGE),
            (0.2, of_fused, f"FusedKDLoss  {fused_text}", BLUE),
        ):
            part = value / of_eager
            axes.barh(i + offset, part, height=0.34, color=colour)
            free = max(part, yardstick) if i == 0 else part  # the yardstick stands across the bars of time
            axes.text(free + 0.015, i + offset, text, verticalalignment="center", color=GREY)
    axes.plot([yardstick, yardstick], [-0.4, 0.4], color="black", linewidth=1.2, linestyle=":")
    axes.text(yardstick, 0.42, "one torch.softmax", verticalalignment="top", fontsize=9, color="black")
    axes.set_yticks(range(len(groups)), [group[0] for group in groups])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.45)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
    axes.set_xlabel(
        f"part of what eager PyTorch takes; {measured.rows} rows x {VOCABULARY}, float32, "
        f"{torch.get_num_threads()} CPU threads",
        color=GREY,
    )
    axes.set_title(f"Same loss, {finding}", loc="left", weight="bold")
