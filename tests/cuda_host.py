"""Builds the CUDA library for the CPU: the kernels of csrc/cuda, unchanged, under tests/cuda_host.h.

    export FUSED_KD_CUDA_LIBRARY=$(python tests/cuda_host.py)     # --sanitize: with AddressSanitizer and UBSan
    pytest -k cuda

Then backend="cuda" takes CPU tensors. The test suite does this by itself where it finds g++. FUSED_KD_HOST_SEED picks
another order of lanes and warps. Python knows no sanitizer, so theirs have to be loaded before it:

    export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)"
    export ASAN_OPTIONS=detect_leaks=0
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

VARIABLE = "FUSED_KD_CUDA_LIBRARY"
HEADER = Path(__file__).with_suffix(".h")
ROOT = HEADER.parent.parent
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-strict-aliasing", "-fno-math-errno"]
SANITIZE = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++").split()[0])


def compiled(source: Path, output: Path, *flags: str) -> None:
    """One .cu file, under the header, into a shared library or a program."""
    native = ["-march=native"]  # a fused multiply-add is an instruction there, as on a GPU
    command = [str(compiler()), *native, *flags, "-include", str(HEADER), "-x", "c++", str(source), "-o", str(output)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr[:4000]}")


def library(sanitize: bool = False) -> Path:
    """The library, built anew where a source has changed."""
    sources = [HEADER, Path(__file__), *sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cu"))]
    digest = hashlib.sha256(b"\0".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"fused_kd_cuda_host_{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    output = folder / f"{'sanitized' if sanitize else 'plain'}_{digest}.so"
    if not output.exists():
        fresh = output.with_suffix(f".{os.getpid()}")
        compiled(ROOT / "csrc" / "cuda" / "rows.cu", fresh, *FLAGS, *(SANITIZE if sanitize else []))
        fresh.replace(output)
    return output


def use() -> None:
    """Lets backend="cuda" take CPU tensors in this process, where a library can be built and none is named."""
    if VARIABLE not in os.environ and compiler() is not None:
        os.environ[VARIABLE] = str(library())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sanitize", action="store_true", help="with AddressSanitizer and UBSan")
    print(library(parser.parse_args().sanitize))
