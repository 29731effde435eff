"""What the GPU's counters say of each verb's kernels: bandwidth, issue slots, stalls. Read by Nsight Compute (ncu).

A stage of gpu_report.py, for one backend: it runs itself under ncu, which measures what --measured-work does between
starting and stopping the profiler.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import sys
from collections.abc import Iterator

import torch
from contenders import Inputs, of_backend
from gpu_device import require
from records import Record, emit

VERBS = ("forward", "backward", "fused verb")
SECTIONS = (
    "SpeedOfLight",
    "MemoryWorkloadAnalysis",
    "ComputeWorkloadAnalysis",
    "SchedulerStats",
    "WarpStateStats",
    "LaunchStats",
    "Occupancy",
)
# What to tell of ncu's metrics. Names differ a little between its versions; the first that matches counts.
METRICS = {
    "nanoseconds": r"gpu__time_duration\.sum",
    "dram_bytes_per_second": r"dram__bytes\.sum\.per_second",
    "dram_percent": r"(gpu__dram|dram_)_throughput\.avg\.pct_of_peak_sustained_elapsed",
    "issue_percent": r"(sm__inst_issued|smsp__issue_active)\.avg\.pct_of_peak_sustained_active",
    "occupancy_percent": r"sm__warps_active\.avg\.pct_of_peak_sustained_active",
    "registers": r"launch__registers_per_thread",
}
STALL = r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio"


def measured_work(backend: str, shape: str, dtype: str) -> None:
    contenders = of_backend(backend, backend)
    rows, columns = map(int, shape.split("x"))
    inputs = Inputs(rows, columns, getattr(torch, dtype), "cuda")
    works = [contenders[f"{backend} {verb}"].work(inputs) for verb in VERBS]
    for work in works:
        work()  # compiles
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    for work in works:
        work()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def read(output: str) -> Iterator[Record]:
    """A record for each kernel in what ncu prints with --csv --page raw: names, units, and a line a kernel."""
    lines = [line for line in output.splitlines() if line.startswith('"')]
    names, _, *kernels = [*csv.reader(lines), [], []]
    verb = -1
    for row in filter(None, kernels):
        values = dict(zip(names, row, strict=False))
        kernel = re.sub(r"\(.*|<.*|^void ", "", values.get("Kernel Name", "")).split("::")[-1]
        finish = kernel.startswith("finish")  # what a forward of few rows launches second
        verb += not finish
        known = {
            key: number(values[name])
            for key, pattern in METRICS.items()
            if (name := next((name for name in names if re.fullmatch(pattern, name)), None)) is not None
        }
        stalls = {found[1]: number(values[name]) for name in names if (found := re.fullmatch(STALL, name))}
        stalls = {name: value for name, value in stalls.items() if "not_issued" not in name and name != "selected"}
        yield {
            "kernel": kernel,
            "verb": VERBS[verb] if verb < len(VERBS) else "?",
            **known,
            "stalls": dict(sorted(stalls.items(), key=lambda item: -item[1])),
        }


def number(text: str) -> float:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ncu", default="ncu")
    parser.add_argument("--backend", required=True)
    parser.add_argument("--shape", default="2048x151936")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--measured-work", action="store_true", help="what ncu runs")
    options = parser.parse_args()
    require("cuda")
    about = {"backend": options.backend, "shape": options.shape, "dtype": options.dtype}
    if options.measured_work:
        measured_work(**about)
        return
    # The clocks stay as they are: a lent or shared GPU is not ours to set.
    ncu = [options.ncu, "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw"]
    ncu += ["--print-units", "base", *(part for section in SECTIONS for part in ("--section", section))]
    arguments = [f"--{key}={value}" for key, value in about.items()]
    command = [*ncu, sys.executable, __file__, *arguments, "--measured-work"]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    print(result.stdout, flush=True)
    kernels = list(read(result.stdout))
    for kernel in kernels:
        emit("counters", **about, **kernel)
    if result.returncode or not kernels:
        said = re.findall(r"^==(?:ERROR|WARNING)== (.*)", result.stdout, re.MULTILINE)
        raise SystemExit(f"ncu ended with {result.returncode} and {len(kernels)} kernels; {said[0] if said else ''}")


if __name__ == "__main__":
    main()
