"""All that a machine with a GPU can say of this package, in one command and eight minutes.

    python benchmarks/gpu_report.py --output FOLDER

It needs PyTorch and a GPU. In the order of their worth: builds the package if it is not built; checks each verb of each
backend against float64; times them beside PyTorch and a copy; runs the tests marked gpu; lets compute-sanitizer look at
a slice; reads the GPU's counters. Each stage has a limit and processes of its own: one that crashes, hangs or cannot
run says why and leaves the others alone. The output ends with one table, at most 100 lines; FOLDER gets that, all
records (results.jsonl) and the logs. The exit status is 1 if any stage failed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import time
from collections import defaultdict
from pathlib import Path

from gpu_table import outcomes, table
from stages import Command, Runner, Stage

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
BACKENDS = {"cuda": ("triton", "cuda"), "cpu": ("cpu",)}
SMOKE_DTYPES = ("bfloat16", "float32", "float16")
# Few rows are shared by programs, many are not: below the number of multiprocessors, and above.
SMOKE_SHAPES = "64x151936,256x151936,64x50257,256x50257"
SANITIZED_SHAPES = "140x20001,2x600"  # small, as it takes a hundred times as long
# Tests by backend, so that one which takes the GPU down does not take the others' tests with it.
TESTS = {"triton": "triton", "cuda": "cuda and not triton", "rest": "not triton and not cuda"}


def stages(options: argparse.Namespace) -> list[Stage]:
    device, backends = options.device, BACKENDS[options.device]

    def program(name: str, *arguments: str) -> tuple[str, ...]:
        return (sys.executable, str(HERE / name), *arguments)

    def smoke(backend: str, dtype: str, shapes: str) -> tuple[str, ...]:
        about = ("--device", device, "--backend", backend, "--dtype", dtype, "--shapes", shapes)
        return program("gpu_smoke.py", *about)

    by_vocabulary = defaultdict(list)
    for shape in options.smoke_shapes.split(","):
        by_vocabulary[shape.split("x")[1]].append(shape)
    sanitizer, ncu = tool("compute-sanitizer"), tool("ncu")
    result = [
        Stage("build", 120, "build.log", (Command("build", program("gpu_build.py", "--device", device)),)),
        Stage(
            "smoke",
            90,
            "smoke.log",
            tuple(
                Command(f"{backend} {dtype} V={vocabulary}", smoke(backend, dtype, ",".join(shapes)))
                for vocabulary, shapes in by_vocabulary.items()
                for backend in backends
                for dtype in SMOKE_DTYPES
            ),
        ),
    ]
    shapes = ("--shapes", options.shapes) if options.shapes else ()
    linear_shapes = ("--dtypes", "bfloat16", *(("--shapes", options.linear_shapes) if options.linear_shapes else ()))
    for run in (*backends, "others", "linear"):
        of_run = linear_shapes if run == "linear" else shapes
        command = program("gpu_time.py", "--device", device, "--run", run, *of_run)
        result.append(Stage(f"time {run}", 110 if run == "others" else 75, "time.log", (Command(run, command),)))
    result.append(
        Stage(
            "tests",
            130,
            "tests.log",
            tuple(
                Command(f"tests {name}", program("gpu_tests.py", "--expression", expression))
                for name, expression in TESTS.items()
            ),
        )
    )
    result.append(
        Stage(
            "sanitizer",
            80,
            "sanitizer.log",
            tuple(
                Command(
                    f"{kind} {backend}",
                    (
                        str(sanitizer),
                        "--tool",
                        kind,
                        "--error-exitcode",
                        "9",
                        *smoke(backend, "bfloat16", SANITIZED_SHAPES),
                    ),
                    missing=None if sanitizer else absent("compute-sanitizer"),
                )
                for kind in ("memcheck", "racecheck")
                for backend in backends
            ),
            # PyTorch's allocator hands out parts of large blocks, and what lies beyond a part is in the block.
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )
    )
    for backend in backends:
        command = program("gpu_counters.py", "--ncu", str(ncu), "--backend", backend)
        missing = None if ncu else absent("ncu")
        result.append(Stage(f"counters {backend}", 45, "counters.log", (Command(f"ncu {backend}", command, missing),)))
    only = options.only.split(",")
    return [stage for stage in result if not options.only or {stage.name, stage.name.split()[0]} & {*only}]


def tool(name: str) -> str | None:
    """NVIDIA's tools lie beside nvcc, which PATH need not have."""
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(_cuda_folders()))


def absent(name: str) -> str:
    return f"{name} is missing: looked for in PATH, {', '.join(_cuda_folders())}"


def _cuda_folders() -> list[str]:
    return [str(Path(home, "bin")) for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]


def environment() -> dict[str, str]:
    """The package is taken from this checkout, installed or not; the bounds come from its tests."""
    path = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(filter(None, path))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, help="a folder; results there are replaced")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all of it (default: %(default)s)")
    parser.add_argument(
        "--only", default="", help="comma-separated stages: smoke, time triton, ..., or time for all of these"
    )
    parser.add_argument(
        "--device", default="cuda", choices=list(BACKENDS), help="cpu: to try this command without a GPU"
    )
    parser.add_argument("--shapes", help="timed; comma-separated ROWSxVOCABULARY (default: those of pytest benchmarks)")
    parser.add_argument("--linear-shapes", help="timed from hidden states; comma-separated ROWSxWIDTHxVOCABULARY")
    parser.add_argument("--smoke-shapes", default=SMOKE_SHAPES, help="checked (default: %(default)s)")
    options = parser.parse_args()

    todo = stages(options)
    output: Path = options.output
    output.mkdir(parents=True, exist_ok=True)
    for name in ("results.jsonl", "table.txt", *(stage.log for stage in todo)):
        (output / name).unlink(missing_ok=True)
    runner = Runner(output, time.monotonic() + 60 * options.minutes, ROOT, environment())
    for stage in todo:
        print(f"=== {stage.name}", flush=True)
        before = len(runner.records)
        runner.run(stage)
        print("\n".join(outcomes(runner.records[before:])), flush=True)
        # Whatever ends this program early, what is known is there.
        (output / "table.txt").write_text(table(runner.records) + "\n")
    print(f"=== report\n{table(runner.records)}", flush=True)
    return int(any(r["record"] == "outcome" and r["status"] != "passed" for r in runner.records))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no process outlives this one
    sys.exit(main())
