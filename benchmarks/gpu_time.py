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
from linear_contenders import LINEAR_SHAPES, LinearInputs, of_linear
from memory import peak_extra_bytes
from records import emit
from timing import measure, rounds

OTHERS, LINEAR = "others", "linear"
OUT_OF_MEMORY = "out of memory"


def timed(contender: Contender, inputs: Inputs | LinearInputs, device: str) -> dict[str, float]:
    work = contender.work(inputs)
    work()  # compiles
    peak = peak_extra_bytes(work, device)
    times = measure(work, device, rounds(inputs.elements))
    moved = contender.crossings * inputs.logits_bytes
    return {
        **times._asdict(),
        "bytes_per_second": moved / times.median,
        "peak_of_logits": peak / inputs.logits_bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--run", required=True, help=f"a backend, {OTHERS}, or {LINEAR}: the losses from hidden states")
    parser.add_argument("--shapes")
    parser.add_argument("--dtypes", default="bfloat16,float32")
    options = parser.parse_args()
    require(options.device)
    linear = options.run == LINEAR
    shapes = (options.shapes or (LINEAR_SHAPES if linear else SHAPES)[options.device]).split(",")
    if linear:
        contenders = of_linear()
    else:
        others = of_others(options.device) if options.run == OTHERS else of_backend(options.run, options.run)
        contenders = {**copies(), **others}
    errors, kind = [], "linear" if linear else "time"
    for dtype in options.dtypes.split(","):
        for shape in shapes:
            inputs, bandwidth = None, None
            for name, contender in contenders.items():
                about = {"run": options.run, "dtype": dtype, "shape": shape, "contender": name}
                try:
                    if inputs is None:
                        sizes = map(int, shape.split("x"))
                        inputs = (LinearInputs if linear else Inputs)(*sizes, getattr(torch, dtype), options.device)
                    result = timed(contender, inputs, options.device)
                except torch.cuda.OutOfMemoryError:
                    emit(kind, **about, error=OUT_OF_MEMORY)
                except Exception as error:
                    emit(kind, **about, error=failed(error, options.device))
                    errors.append(f"{shape} {dtype} {name}")
                else:
                    bandwidth = result["bytes_per_second"] if name == COPY else bandwidth
                    emit(kind, **about, **result, of_copy=bandwidth and result["bytes_per_second"] / bandwidth)
                gc.collect()  # an error's traceback, or a compiled function, may hold tensors
    if errors:
        raise SystemExit(f"failed: {', '.join(errors)}")


if __name__ == "__main__":
    main()
