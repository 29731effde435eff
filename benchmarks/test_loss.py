"""The contenders of contenders.py beside one another, in speed and memory.

    pytest benchmarks --benchmark-only [--shapes 256x128256,1024x151936] [--dtypes float32,bfloat16] [--scaling]
    pytest benchmarks --benchmark-only -k linear [--linear-shapes 1024x576x49152]

On a GPU where there is one; `gpu_report.py` runs the same there, and more.
"""

from typing import Any

import pytest
import torch
from contenders import YARDSTICK, Contender, Inputs, copies, of_backend, of_divergences, of_others
from linear_contenders import LINEAR_YARDSTICK, LinearInputs, of_linear
from memory import peak_extra_bytes
from timing import WARMUP, before_round, clock, rounds

from fused_kd.backends import PREFERENCE, refusal

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def of_each_backend() -> dict[str, Contender]:
    """fused_kd on each backend for this device; on the CPU the one that "auto" takes."""
    if DEVICE == "cpu":
        return of_backend("auto", "fused_kd")
    tensor = torch.empty(1, 2, device=DEVICE)
    fitting = [name for name, backend in PREFERENCE.items() if refusal(backend, tensor, tensor) is None]
    return {k: v for name in fitting for k, v in of_backend(name, f"fused_kd {name}").items()}


CONTENDERS = {**of_each_backend(), **of_others(DEVICE), **(copies() if DEVICE == "cuda" else {})}


@pytest.mark.benchmark(timer=clock(DEVICE))
@pytest.mark.parametrize("contender", CONTENDERS)
def test_loss_and_gradient(benchmark: Any, shape: tuple[int, int], dtype: torch.dtype, contender: str) -> None:
    measure(benchmark, shape, dtype, contender, CONTENDERS[contender], YARDSTICK)


OF_DIVERGENCES = of_divergences()


@pytest.mark.benchmark(timer=clock(DEVICE))
@pytest.mark.parametrize("contender", OF_DIVERGENCES)
def test_divergences(benchmark: Any, shape: tuple[int, int], dtype: torch.dtype, contender: str) -> None:
    measure(benchmark, shape, dtype, contender, OF_DIVERGENCES[contender], "forward_kl")


OF_LINEAR = of_linear()


@pytest.mark.benchmark(timer=clock(DEVICE))
@pytest.mark.parametrize("contender", OF_LINEAR)
def test_linear(benchmark: Any, linear_shape: tuple[int, int, int], dtype: torch.dtype, contender: str) -> None:
    measure(benchmark, linear_shape, dtype, contender, OF_LINEAR[contender], LINEAR_YARDSTICK)


def measure(
    benchmark: Any, shape: tuple[int, ...], dtype: torch.dtype, name: str, contender: Contender, yardstick: str
) -> None:
    try:
        inputs = (Inputs if len(shape) == 2 else LinearInputs)(*shape, dtype, DEVICE)
        work = contender.work(inputs)
        work()  # compiles, starts threads, takes memory from the system
        sizes = " x ".join(map(str, shape))
        benchmark.group = f"{sizes}, {str(dtype).removeprefix('torch.')}, of {yardstick}"
        benchmark.extra_info["contender"] = name
        benchmark.extra_info["yardstick"] = yardstick
        benchmark.extra_info["peak_extra_bytes"] = peak_extra_bytes(work, DEVICE)
        benchmark.extra_info["logits_bytes"] = inputs.logits_bytes
        benchmark.extra_info["bytes"] = contender.crossings * inputs.logits_bytes
        benchmark.pedantic(
            work,
            setup=before_round(DEVICE),
            rounds=rounds(inputs.elements),
            iterations=1,
            warmup_rounds=WARMUP if len(shape) == 2 else 0,  # the two runs before are enough
        )
    except torch.cuda.OutOfMemoryError:
        pytest.skip(f"{name}: out of memory at {shape}, {dtype}")
