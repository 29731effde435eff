"""Says what the machine is, and builds the package where its CUDA library is missing or older than the sources.

The first stage of gpu_report.py. Nothing is fetched: the build takes the setuptools that is installed. The CUDA library
is built for this machine's GPU alone, unless FUSED_KD_CUDA_ARCHS says otherwise.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from gpu_device import require
from records import emit

from fused_kd import native

ROOT = Path(__file__).parent.parent
CUDA = "/usr/local/cuda"  # where NVIDIA installs it
SMI = "driver_version,clocks.sm,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"


def described(device: str) -> dict[str, object]:
    about: dict[str, object] = {
        "name": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "setuptools": version("setuptools"),
        "nvcc": shutil.which("nvcc") or "none",
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        about["name"] = properties.name
        about["capability"] = f"{properties.major}.{properties.minor}"
        about["multiprocessors"] = properties.multi_processor_count
        about["memory"] = properties.total_memory
        about["smi"] = asked("nvidia-smi", f"--query-gpu={SMI}", "--format=csv,noheader")
    return about


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def asked(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)


def outdated(name: str) -> str | None:
    """Why a library has to be built, or None."""
    library = native.load(name)
    if isinstance(library, str):
        return library
    built = Path(str(library._name)).stat().st_mtime
    newer = [path.name for path in sorted((ROOT / "csrc").rglob("*")) if path.stat().st_mtime > built]
    return f"{newer[0]} is newer than its library" if newer else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    require(device)
    emit("machine", **described(device))
    reason = outdated(device)
    if reason is None:
        print("the package is built")
        return
    print(f"building: {reason}", flush=True)
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        os.environ.setdefault("FUSED_KD_CUDA_ARCHS", f"{major}{minor}")
        if shutil.which("nvcc") is None and Path(CUDA, "bin", "nvcc").exists():
            os.environ.setdefault("CUDA_HOME", CUDA)
    pip = [sys.executable, "-m", "pip", "install", "--verbose", "--no-build-isolation", "--no-deps", "--no-index"]
    code = subprocess.run([*pip, "-e", str(ROOT)], check=False).returncode
    native.load.cache_clear()
    native.build_report.cache_clear()
    if code:
        raise SystemExit(
            f"pip ended with {code}; it needs setuptools 77 or newer, here is {described(device)['setuptools']}"
        )
    if (reason := outdated(device)) is not None:
        raise SystemExit(f"the package was built without this library: {reason}")
    print(native.build_report()[device])


if __name__ == "__main__":
    main()
