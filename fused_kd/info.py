"""What `fused-kd info` says: plain text, with nothing but torch installed and whatever is missing."""

import importlib
import os
import platform
from collections.abc import Iterator

import torch

import fused_kd
from fused_kd import backends, native


def report() -> str:
    return "\n".join([*_versions(), "", *_devices(), "", *_backends(), "", *_choices()])


def _versions() -> Iterator[str]:
    yield f"fused_kd  {fused_kd.__version__}"
    yield f"python    {platform.python_version()}"
    yield f"torch     {torch.__version__}"
    yield f"triton    {_triton()}"


def _triton() -> str:
    try:
        return str(importlib.import_module("triton").__version__)
    except ImportError as error:
        return f"cannot be imported ({error})"


def _devices() -> Iterator[str]:
    yield "devices"
    yield f"  cpu     {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        capability = f"compute capability {properties.major}.{properties.minor}"
        yield f"  cuda:{i}  {properties.name}, {capability}, {properties.total_memory / 2**30:.0f} GiB"


def _backends() -> Iterator[str]:
    yield 'backends, in the order in which "auto" tries them'
    for name, backend in backends.PREFERENCE.items():
        missing = backend.unavailable()
        yield f"  {name:<8}{backend.DESCRIPTION}"
        if missing is not None:
            yield f"          missing: {missing}"
        elif (build := native.build_report().get(name)) is not None:
            yield f"          built by {build['built']}"
            if "archs" in build:
                yield f"          for {build['archs']}"
            yield f"          flags {build['flags']}"


def _choices() -> Iterator[str]:
    setting = os.environ.get(backends.VARIABLE)
    yield f'{backends.VARIABLE} is {f"set to {setting!r}" if setting else "not set"}, so "auto" takes'
    yield f"  cpu     {_choice('cpu')}"
    yield f"  cuda    {_choice('cuda') if torch.cuda.is_available() else 'PyTorch finds no CUDA device'}"


def _choice(device: str) -> str:
    """The backends that logits on this device get, each with the dtypes that get it."""
    dtypes: dict[str, list[str]] = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        logits = torch.empty(1, 1, dtype=dtype, device=device)
        try:
            taken = backends.choose("auto", logits, logits).NAME
        except ValueError as error:  # the variable names a backend that does not exist or does not fit
            taken = f"an error ({error})"
        dtypes.setdefault(taken, []).append(str(dtype).removeprefix("torch."))
    return "; ".join(f"{taken} for {', '.join(names)}" for taken, names in dtypes.items())
