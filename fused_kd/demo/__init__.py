"""`fused-kd demo`: the paper's experiment on a small scale, then the loss on a large one.
`fused-kd paper`: more of the paper's experiments, over several seeds.

    digits.py      the images, the networks and their training
    unseen.py      a student recognises a class that it never saw; trained with the fused loss and with the eager one
    vocabulary.py  time and memory of one step of both losses at a language model's vocabulary
    eager.py       the loss as one would write it without this package
    report.py      the terminal's text and the picture

    paper.py         the paper's experiments
    findings.py      which of its claims they bear out
    paper_report.py  their text and picture

This file imports none of the extras, so that it can say which are missing.
"""

import importlib.util
from collections.abc import Callable, Iterable
from pathlib import Path

ROWS, QUICK_ROWS = 128, 64
FEWEST_ROWS = 64  # below, a tensor comes from a heap that keeps what is freed, and memory cannot be told
EPOCHS, QUICK_EPOCHS = 100, 10
PAPER_EPOCHS, QUICK_PAPER_EPOCHS = 150, 5
SEEDS, QUICK_SEEDS = 6, 2
FEWEST_SEEDS = 2  # for a spread
Track = Callable[[str, int], Iterable[int]]  # range(n), shown as progress under a name
_EXTRAS = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "rich": "rich"}


def problem(output: Path) -> str | None:
    """Why neither command can run, and what to do about it: said before the work, not after it."""
    missing = [name for module, name in _EXTRAS.items() if importlib.util.find_spec(module) is None]
    if missing:
        return f"needs {' and '.join(missing)}; install with: pip install 'fused_kd[demo]'"
    if output.is_dir() or not output.absolute().parent.is_dir():
        return f"--output {output} is not a file in an existing folder"
    return None


def run(output: Path, *, seed: int, quick: bool, rows: int) -> None:
    """Does the work, prints what came out, and writes the picture."""
    from fused_kd.demo import report, unseen, vocabulary  # noqa: PLC0415 (these need the extras)

    report.title(seed)
    with report.progress() as track:
        learned = unseen.run(QUICK_EPOCHS if quick else EPOCHS, seed, track)
        measured = vocabulary.run(rows, seed, track)
    report.tables(learned, measured)
    report.picture(learned, measured, output)


def run_paper(output: Path, *, seed: int, seeds: int, quick: bool) -> None:
    """Does the paper's experiments with the seeds from `seed` on, prints what came out, and writes the picture."""
    from fused_kd.demo import paper, paper_report, report  # noqa: PLC0415 (these need the extras)

    report.title(seed)
    epochs = QUICK_PAPER_EPOCHS if quick else PAPER_EPOCHS
    with report.progress() as track:
        experiments = paper.run(epochs, seeds, seed, track)
    paper_report.tables(experiments, seeds=seeds, epochs=epochs)
    paper_report.picture(experiments, output)
