"""Builds the native libraries of csrc/ where a compiler is found. No compiler, no library, no failure.

A library is plain C: no Python, no PyTorch header. Beside the libraries, `_native.json` keeps how each was built, or
why it is missing, for `fused-kd info`. `CXX` names the compiler; `FUSED_KD_BUILD_CPU=never` builds none, and `=always`
makes a missing or failing compiler an error.
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
]
# The first that the compiler takes. GCC before 12 cannot clone functions for an instruction set.
OPTIONAL_FLAGS = [
    [*threads, *clones] for clones in ([], ["-DFKD_NO_CLONES"]) for threads in (["-fopenmp"], ["-fopenmp-simd"], [])
]


class BuildNative(build_ext):
    """Compiles each library with one call of the compiler, and writes the report."""

    def run(self) -> None:
        folder = Path("fused_kd") if self.inplace or self.editable_mode else Path(self.build_lib) / "fused_kd"
        folder.mkdir(parents=True, exist_ok=True)
        report = {"cpu": build_cpu(folder)}
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


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, check=False, capture_output=True, text=True)


class PlatformWheel(bdist_wheel):
    """One wheel for every Python 3 of a platform: the libraries do not know Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


setup(
    ext_modules=[Extension("fused_kd._native", SOURCES, depends=HEADERS)],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
