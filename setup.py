"""Builds the native libraries of csrc/ where a compiler is found. No compiler, no library, no failure.

A library is plain C: no Python, no PyTorch header. Beside the libraries, `_native.json` keeps how each was built, or
why it is missing, for `fused-kd info`. `CXX` names the C++ compiler; nvcc is that of `CUDA_HOME`, else the one in PATH.
`FUSED_KD_BUILD_CPU=never` builds no CPU library, and `=always` makes a missing or failing compiler an error;
`FUSED_KD_BUILD_CUDA` says the same of the CUDA library, and `FUSED_KD_CUDA_ARCHS=80,90` for which GPUs it is built.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
HEADERS = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*.h"))]
SOURCES = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]

# Never -ffast-math or -fassociative-math: they remove rounding by a magic number and regroup sums.
FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    # The loops' columns are long chains that do not depend on one another: GCC interleaves them. Others ignore it.
    "-fschedule-insns",
    "-fsched-pressure",
]
# The first that the compiler takes. GCC before 12 cannot clone functions for an instruction set.
OPTIONAL_FLAGS = [
    [*threads, *clones] for clones in ([], ["-DFKD_NO_CLONES"]) for threads in (["-fopenmp"], ["-fopenmp-simd"], [])
]
CUDA_SOURCE = str(Path("csrc", "cuda", "rows.cu"))
CUDA_FLAGS = ["-std=c++17", "-O3", "-shared", "-cudart", "static", "--threads", "2"]
if sys.platform != "win32":
    CUDA_FLAGS += ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
# Compute capabilities with code of their own. The kernels use nothing newer than the first has: so its PTX, which the
# front end then makes once for all of them, is also what the driver of any later GPU compiles.
CUDA_ARCHS = ["80", "86", "89", "90", "100", "120"]


class BuildNative(build_ext):
    """Compiles each library with one call of the compiler, and writes the report."""

    def run(self) -> None:
        folder = Path("fused_kd") if self.inplace or self.editable_mode else Path(self.build_lib) / "fused_kd"
        folder.mkdir(parents=True, exist_ok=True)
        report = {"cpu": build_cpu(folder), "cuda": build_cuda(folder)}
        for name, entry in report.items():
            print(f"fused_kd: {name} library: {entry.get('missing', 'built by ' + entry.get('built', ''))}")
        (folder / "_native.json").write_text(json.dumps(report, indent=1) + "\n")

    def get_outputs(self) -> list[str]:
        folder = Path(self.build_lib) / "fused_kd"
        return [str(folder / "_native.json"), *(str(path) for path in folder.glob(f"*{SUFFIX}"))]


def build_cpu(folder: Path) -> dict[str, str]:
    mode = os.environ.get("FUSED_KD_BUILD_CPU", "auto")
    output = folder / f"libfused_kd_cpu{SUFFIX}"
    output.unlink(missing_ok=True)
    if mode == "never":
        return {"missing": "it was not built (FUSED_KD_BUILD_CPU=never); reinstall without that variable"}
    named = shlex.split(os.environ.get("CXX", ""))  # perhaps with arguments: "ccache g++"
    names = named[:1] or ["g++", "c++", "clang++"]
    compiler = next((found for name in names if (found := shutil.which(name))), None)
    entry = {"missing": f"no C++ compiler was found (tried {', '.join(names)}); install g++ and reinstall"}
    if compiler is not None:
        entry = compile_cpu([compiler, *named[1:]], output)
    if mode == "always" and "missing" in entry:
        raise SystemExit(f"fused_kd: FUSED_KD_BUILD_CPU=always, but {entry['missing']}")
    return entry


def compile_cpu(compiler: list[str], output: Path) -> dict[str, str]:
    for optional in OPTIONAL_FLAGS:
        flags = [*FLAGS, *optional]
        result = run(*compiler, *flags, *SOURCES, "-o", str(output))
        if result.returncode == 0:
            version = run(*compiler, "--version").stdout.split("\n")[0]
            return {"library": output.name, "built": version, "flags": " ".join(flags)}
    last = (result.stderr.strip() or "it said nothing").split("\n")[0]
    return {"missing": f"{Path(compiler[0]).name} failed ({last}); set CXX to a C++17 compiler and reinstall"}


def build_cuda(folder: Path) -> dict[str, str]:
    mode = os.environ.get("FUSED_KD_BUILD_CUDA", "auto")
    output = folder / f"{'' if sys.platform == 'win32' else 'lib'}fused_kd_cuda{SUFFIX}"
    output.unlink(missing_ok=True)
    if mode == "never":
        return {"missing": "it was not built (FUSED_KD_BUILD_CUDA=never); reinstall without that variable"}
    home = os.environ.get("CUDA_HOME")
    compiler = shutil.which("nvcc", path=str(Path(home, "bin"))) if home else shutil.which("nvcc")
    entry = {
        "missing": f"no nvcc was found (tried {f'CUDA_HOME={home}' if home else 'PATH'}); install the CUDA toolkit, "
        "11.8 or newer, and reinstall"
    }
    if compiler is not None:
        entry = compile_cuda(compiler, output)
    if mode == "always" and "missing" in entry:
        raise SystemExit(f"fused_kd: FUSED_KD_BUILD_CUDA=always, but {entry['missing']}")
    return entry


def compile_cuda(compiler: str, output: Path) -> dict[str, str]:
    named = os.environ.get("FUSED_KD_CUDA_ARCHS", "").replace(";", ",").replace(".", "").replace(" ", "")
    known = run(compiler, "--list-gpu-code").stdout.split()
    archs = named.split(",") if named else [arch for arch in CUDA_ARCHS if f"sm_{arch}" in known]
    archs.sort(key=int)
    virtual = f"compute_{archs[0]}"
    code = ",".join([*(f"sm_{arch}" for arch in archs), virtual])
    flags = [*CUDA_FLAGS, "-gencode", f"arch={virtual},code=[{code}]"]
    result = run(compiler, *flags, CUDA_SOURCE, "-o", str(output))
    if result.returncode == 0:
        version = run(compiler, "--version").stdout.strip().split("\n")[-1]
        return {
            "library": output.name,
            "built": f"nvcc {version}",
            "flags": " ".join(flags),
            "archs": f"{', '.join(f'sm_{arch}' for arch in archs)}; newer GPUs by PTX of {virtual}",
        }
    last = ((result.stderr or result.stdout).strip() or "it said nothing").split("\n")[0]
    return {"missing": f"nvcc failed ({last}); set CUDA_HOME to a CUDA toolkit, 11.8 or newer, and reinstall"}


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, check=False, capture_output=True, text=True)


class PlatformWheel(bdist_wheel):
    """One wheel for every Python 3 of a platform: the libraries do not know Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


setup(
    ext_modules=[Extension("fused_kd._native", SOURCES, depends=[*HEADERS, CUDA_SOURCE])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
