"""The time and the memory of one run of contenders, each with the share of the bandwidth that a copy has beside it.

A stage of gpu_report.py: a run is one backend, or what is not fused_kd, in a process of its own. What matters most
comes first, and each result is printed when it is there.
"""

from __future__ import annotations

import argparse
import gc

import torch
from contenders import COPY, SHAPES, Contender, Inputs, copies, of_backend, of_others
from gpu_device import failed, require
from memory import peak_extra_bytes
from records import emit
from timing import measure, rounds

OTHERS = "others"
OUT_OF_MEMORY = "out of memory"


def timed(contender: Contender, inputs: Inputs, device: str) -> dict[str, float]:
    work = contender.work(inputs)
    work()  # compiles
    peak = peak_extra_bytes(work, device)
    times = measure(work, device, rounds(inputs.teacher.numel()))
    moved = contender.crossings * inputs.teacher.nbytes
    return {
        **times._asdict(),
        "bytes_per_second": moved / times.median,
        "peak_of_logits": peak / inputs.teacher.nbytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--run", required=True, help=f"a backend, or {OTHERS}")
    parser.add_argument("--shapes")
    parser.add_argument("--dtypes", default="bfloat16,float32")
    options = parser.parse_args()
    require(options.device)
    shapes = (options.shapes or SHAPES[options.device]).split(",")
    of_run = of_others(options.device) if options.run == OTHERS else of_backend(options.run, options.run)
    errors = []
    for dtype in options.dtypes.split(","):
        for shape in shapes:
            inputs, bandwidth = None, None
            for name, contender in {**copies(), **of_run}.items():
                about = {"run": options.run, "dtype": dtype, "shape": shape, "contender": name}
                try:
                    if inputs is None:
                        rows, columns = map(int, shape.split("x"))
                        inputs = Inputs(rows, columns, getattr(torch, dtype), options.device)
                    result = timed(contender, inputs, options.device)
                except torch.cuda.OutOfMemoryError:
                    emit("time", **about, error=OUT_OF_MEMORY)
                except Exception as error:
                    emit("time", **about, error=failed(error, options.device))
                    errors.append(f"{shape} {dtype} {name}")
                else:
                    bandwidth = result["bytes_per_second"] if name == COPY else bandwidth
                    emit("time", **about, **result, of_copy=bandwidth and result["bytes_per_second"] / bandwidth)
                gc.collect()  # an error's traceback, or a compiled function, may hold tensors
    if errors:
        raise SystemExit(f"failed: {', '.join(errors)}")


if __name__ == "__main__":
    main()
