"""What an experiment over several seeds shows: its table, and which claims it bears out."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

STANDARD_ERRORS = 3.0


class Cell(NamedTuple):
    """What came out, one number a seed [S], and what the paper says."""

    here: Tensor | None = None
    paper: str = ""


@dataclass(frozen=True)
class Line:
    name: str
    cells: tuple[Cell, ...]  # one for each of the experiment's columns


@dataclass(frozen=True)
class Finding:
    claim: str
    holds: bool | None  # None: undecided by these seeds
    because: str


@dataclass(frozen=True)
class Experiment:
    title: str
    setting: str
    columns: tuple[str, ...]  # with their units
    lines: list[Line]
    findings: list[Finding]


def spread(values: Tensor) -> str:
    """Mean and standard deviation of one number a seed."""
    return f"{float(values.mean()):.1f} ± {float(values.std()):.1f}"


def above(claim: str, values: Tensor, limit: float, unit: str) -> Finding:
    """That the mean of one number a seed is above the limit: it is, it is below, or the seeds do not tell."""
    mean, error = float(values.mean()), float(values.std()) / len(values) ** 0.5
    far = abs(mean - limit) > STANDARD_ERRORS * error
    return Finding(claim, mean > limit if far else None, f"{mean:.1f} ± {error:.1f} {unit}")


def fewer(claim: str, more: Tensor, less: Tensor) -> Finding:
    """That the second has fewer errors than the first, compared seed by seed."""
    return above(claim, more - less, 0.0, "points")


def alike(claim: str, *columns: Tensor) -> Finding:
    """That means are apart by less than the seeds are within a column."""
    means = [float(values.mean()) for values in columns]
    apart, seeds = max(means) - min(means), sum(float(values.std()) for values in columns) / len(columns)
    return Finding(claim, apart < seeds, f"{apart:.1f} points apart, seeds {seeds:.1f}")
