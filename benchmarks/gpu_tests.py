"""The tests that run on a GPU, each reported when it is done; those of one backend, or of the others, in a process.

A stage of gpu_report.py. Tests run in parallel where pytest-xdist is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections import Counter
from typing import Any

import pytest
from records import emit

MARKS = "gpu and not large"


class Results:
    """A plugin of pytest that says what came of each test, and counts."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.skipped: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and report.passed:
            return  # a setup or teardown without events
        self.counts[report.outcome] += 1
        why = ""
        if report.skipped:
            why = str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr)
            self.skipped[why] += 1
        elif report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            why = str(crash.message if crash else report.longrepr).strip().split("\n")[0]
        emit("test", test=report.nodeid, outcome=report.outcome, seconds=report.duration, why=why[:200])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--expression", default="", help="which tests, as pytest's -k")
    # Three such programs run side by side.
    parser.add_argument("--workers", default=str(max(1, (os.cpu_count() or 3) // 3)))
    options = parser.parse_args()
    # pytest captures what is printed while it runs; records go where this program's output went before.
    sys.stdout = os.fdopen(os.dup(1), "w")
    arguments = ["-m", MARKS, "-k", options.expression, "-q", "--tb=short", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist"):
        arguments += ["-n", options.workers]
    results = Results()
    code = pytest.main(arguments, plugins=[results])
    if not results.counts["passed"]:
        reason = results.skipped.most_common(1)[0][0] if results.skipped else f"pytest ended with {code!r}"
        raise SystemExit(f"no test passed, {results.counts['failed']} failed; {reason}")
    if code != pytest.ExitCode.OK:
        raise SystemExit(f"{results.counts['failed']} failed, {results.counts['passed']} passed")


if __name__ == "__main__":
    main()
