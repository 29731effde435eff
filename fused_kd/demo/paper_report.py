"""What `fused-kd paper` shows: a table for each experiment, what holds and what does not, and the picture."""

from itertools import chain
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from fused_kd.demo.findings import STANDARD_ERRORS, Experiment, Finding, spread
from fused_kd.demo.report import BLUE, CONSOLE, GREY, ORANGE, table

_WORDS = {True: "holds", False: "does not hold", None: "undecided"}


def tables(experiments: list[Experiment], *, seeds: int, epochs: int) -> None:
    CONSOLE.print(
        f"\nMean ± standard deviation over {seeds} seeds, each with its own split of the digits and its own networks, "
        f"after\n{epochs} epochs; beside it the paper's figure, of MNIST unless it says so. A claim's figure stands "
        "with its\nstandard error: the claim holds where the figure is right by "
        f"{STANDARD_ERRORS:g} of them, and is undecided within.\nWhat is alike is apart by less than the seeds' "
        "deviation."
    )
    for number, experiment in enumerate(experiments, 1):
        CONSOLE.print(f"\n[bold]{number}. {experiment.title}[/bold]\n{experiment.setting}\n")
        CONSOLE.print(_table(experiment))
        CONSOLE.print()
        for finding in experiment.findings:
            CONSOLE.print(f"{_told(finding)}: {finding.because}")
    CONSOLE.print("\n[bold]What does not reproduce on these digits, or is undecided[/bold]")
    findings = [finding for experiment in experiments for finding in experiment.findings]
    for finding in findings:
        if not finding.holds:
            CONSOLE.print(_told(finding))
    if all(finding.holds for finding in findings):
        CONSOLE.print(f"All {len(findings)} claims hold.")


def _told(finding: Finding) -> str:
    return f"{_WORDS[finding.holds]:<15}{finding.claim}"


def _table(experiment: Experiment) -> Table:
    """Each column, and the paper's beside it where the paper has anything."""
    with_paper = [any(line.cells[i].paper for line in experiment.lines) for i in range(len(experiment.columns))]
    names = [[name, "paper"] if has else [name] for name, has in zip(experiment.columns, with_paper, strict=True)]
    made = table(*chain.from_iterable(names))
    for line in experiment.lines:
        texts = []
        for (here, paper), has in zip(line.cells, with_paper, strict=True):
            texts += ["" if here is None else spread(here), *([paper] if has else [])]
        made.add_row(line.name, *texts)
    return made


def picture(experiments: list[Experiment], output: Path) -> None:
    """Writes a PNG with a panel for each experiment: means with the seeds' deviation, the paper's as diamonds."""
    figure = Figure(figsize=(13, 7.4), layout="constrained")
    figure.suptitle(
        "Mean and standard deviation over the seeds; diamonds: the paper's figures", fontsize=10, color=GREY
    )
    for axes, experiment in zip(figure.subplots(2, 3).flat, experiments, strict=True):
        _panel(axes, experiment)
    figure.savefig(output, format="png", dpi=150)
    CONSOLE.print(f"\nPicture: {output.absolute()}")


def _panel(axes: Axes, experiment: Experiment) -> None:
    """The lines from top to bottom, a colour for each column that is in percent."""
    columns = [i for i, name in enumerate(experiment.columns) if name.endswith("%")]
    for shift, (column, colour) in enumerate(zip(columns, (BLUE, ORANGE), strict=False)):
        for row, line in enumerate(experiment.lines):
            here, paper = line.cells[column]
            at = row + 0.16 * shift
            if here is not None:
                axes.errorbar(float(here.mean()), at, xerr=float(here.std()), fmt="o", color=colour, capsize=3)
            if paper[:1].isdigit():
                axes.plot(float(paper), at, "D", color=colour, markerfacecolor="white", zorder=3)
        axes.plot([], [], "o", color=colour, label=experiment.columns[column])
    axes.set_yticks(range(len(experiment.lines)), [line.name for line in experiment.lines])
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_title(experiment.title, loc="left", weight="bold", fontsize=9.5)
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=GREY, labelsize=8)
