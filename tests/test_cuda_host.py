"""The header that runs CUDA kernels on the CPU finds what it is there to find: each fault here is planted."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from cuda_host import SANITIZE, compiled, compiler

if compiler() is None:
    pytest.skip("no C++ compiler", allow_module_level=True)

PROGRAM = """
constexpr int kThreads = 128;

struct Work {
    const float* in;
    float* out;
    int fault;
};

// out[i] = in[kThreads - 1 - i], by way of shared memory, and the sum of 4 numbers of each warp's lanes.
__global__ void kernel(const Work w) {
    __shared__ float shared[kThreads];
    const int i = static_cast<int>(threadIdx.x);
    shared[i] = w.in[w.fault == 'o' ? i + 1 : i];
    if (w.fault == 'd' && i >= 64) return;
    if (w.fault != 'b') __syncthreads();
    float x = shared[kThreads - 1 - i];
    if (w.fault != 's' || i % 32 < 16) x += __shfl_xor_sync(0xffffffffu, x, 1);
    x += __shfl_xor_sync(0xffffffffu, x, 2);
    if (w.fault == 'm') x += reinterpret_cast<const float4*>(w.in + 1)->x;
    w.out[i] = x;
}

int main(int, char** arguments) {
    // Clean numbers before the faulty launch, so that a barrier that is missing reads old ones.
    for (int fault : {0, static_cast<int>(arguments[1][0])}) {
        std::vector<float> in(kThreads), out(kThreads);
        for (int i = 0; i < kThreads; ++i) in[static_cast<size_t>(i)] = static_cast<float>(fault ? i * i : i);
        Work w{in.data(), out.data(), fault};
        void* work[] = {&w};
        if (cudaLaunchKernel(kernel, dim3(1), dim3(kThreads), work, size_t(0), nullptr) != cudaSuccess) return 3;
        for (int i = 0; i < kThreads; ++i) {
            float expected = 0;
            for (int j = i / 4 * 4; j < i / 4 * 4 + 4; ++j) expected += in[static_cast<size_t>(kThreads - 1 - j)];
            if (out[static_cast<size_t>(i)] != expected) return 2;
        }
    }
    return 0;
}
"""
SEEDS = range(4)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("host")
    source = folder / "faults.cu"
    source.write_text(PROGRAM)
    result = {}
    for name, flags in (("plain", []), ("sanitized", SANITIZE)):
        result[name] = folder / name
        compiled(source, result[name], "-std=c++17", *flags)
    return result


def run(program: Path, fault: str, seed: int = 0) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "FUSED_KD_HOST_SEED": str(seed)}
    return subprocess.run([program, fault], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ["plain", "sanitized"])
def test_a_right_kernel_is_right(name: str, seed: int, programs: dict[str, Path]) -> None:
    result = run(programs[name], "-", seed)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_missing_barrier_gives_a_wrong_result(programs: dict[str, Path]) -> None:
    assert 2 in [run(programs["plain"], "b", seed).returncode for seed in SEEDS]


@pytest.mark.parametrize(
    ("name", "fault", "message"),
    [
        ("plain", "d", "divergent barrier"),
        ("plain", "s", "divergent shuffle"),
        ("sanitized", "m", "misaligned address"),
        ("sanitized", "o", "heap-buffer-overflow"),
    ],
)
def test_a_fault_ends_the_process_and_is_named(name: str, fault: str, message: str, programs: dict[str, Path]) -> None:
    result = run(programs[name], fault)
    assert result.returncode not in (0, 2, 3)
    assert message in result.stderr
