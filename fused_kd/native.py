"""The native libraries: finding, loading and calling them. Their C interface is csrc/fused_kd.h."""

import ctypes
import functools
import json
from pathlib import Path

import torch
from torch import Tensor

from fused_kd.backends.rows import RowOptions

ABI_VERSION = 1
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
DIVERGENCES = {"forward_kl": 0, "cross_entropy": 1}
DONE, OUT_OF_MEMORY = -1, -2
_MAX_DIMS = 8

_FOLDER = Path(__file__).parent


class Rows(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("dims", ctypes.c_int64),
        ("sizes", ctypes.c_int64 * _MAX_DIMS),
        ("strides", ctypes.c_int64 * _MAX_DIMS),
    )


class Loss(ctypes.Structure):
    _fields_ = (
        ("temperature", ctypes.c_double),
        ("teacher_temperature", ctypes.c_double),
        ("label_smoothing", ctypes.c_double),
        ("divergence", ctypes.c_int64),
        ("soft", ctypes.c_int64),
        ("hard", ctypes.c_int64),
    )


def leading_layout(tensor: Tensor) -> list[tuple[int, int]]:
    """(size, stride) of the dimensions before the last, with those merged that lie as one."""
    if tensor.is_contiguous():
        return [(tensor.numel() // tensor.shape[-1], tensor.shape[-1])]
    layout: list[tuple[int, int]] = []
    for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True):
        if size == 1:
            continue
        if layout and layout[-1][1] == size * stride:
            layout[-1] = (layout[-1][0] * size, stride)
        else:
            layout.append((size, stride))
    return layout


def rows_of(tensor: Tensor) -> Rows:
    layout = leading_layout(tensor)
    rows = Rows(tensor.data_ptr(), DTYPES[tensor.dtype], tensor.shape[-1], len(layout))
    for i, (size, stride) in enumerate(layout):
        rows.sizes[i], rows.strides[i] = size, stride
    return rows


def loss_of(options: RowOptions) -> Loss:
    return Loss(
        options.temperature,
        options.teacher_temperature,
        options.label_smoothing,
        DIVERGENCES[options.divergence],
        options.soft,
        options.hard,
    )


def refuses(student: Tensor, teacher: Tensor) -> str | None:
    """Why no native library can take these tensors."""
    for name, logits in (("student_logits", student), ("teacher_logits", teacher)):
        if logits.dtype not in DTYPES:
            return f"it takes float32, bfloat16 and float16, and {name} is {logits.dtype}; the torch backend takes it"
        if logits.dim() > _MAX_DIMS + 1 and len(leading_layout(logits)) > _MAX_DIMS:
            return f"{name} has more than {_MAX_DIMS} separately strided dimensions; the torch backend takes it"
    return None


@functools.cache
def build_report() -> dict[str, dict[str, str]]:
    """What setup.py wrote about each library: how it was built, or why it was not."""
    path = _FOLDER / "_native.json"
    if not path.exists():
        reason = (
            "no build report beside it: it was not installed; install it with pip (in a checkout: pip install -e .)"
        )
        return {"cpu": {"missing": reason}}
    report: dict[str, dict[str, str]] = json.loads(path.read_text())
    return report


@functools.cache
def load(name: str) -> ctypes.CDLL | str:
    """The library of this name, or why there is none and what to do about it."""
    report = build_report()[name]
    if "missing" in report:
        return report["missing"]
    try:
        library = ctypes.CDLL(str(_FOLDER / report["library"]))
    except OSError as error:
        return f"{report['library']} does not load ({error}); reinstall the package on this machine"
    library.fkd_abi_version.restype = ctypes.c_int64
    if library.fkd_abi_version() != ABI_VERSION:
        return f"{report['library']} was built from other sources than this Python code; reinstall the package"
    rows, vector = ctypes.POINTER(Rows), ctypes.c_void_p
    head = [rows, rows, vector, ctypes.POINTER(Loss)]  # student, teacher, targets, loss
    for verb, rest in (
        ("fkd_rows_forward", [vector, vector, vector]),
        ("fkd_rows_backward", [vector, vector, vector, rows]),
        ("fkd_rows_fused", [vector, vector, vector, vector, rows]),
    ):
        function = getattr(library, verb)
        function.argtypes = [*head, *rest, ctypes.c_int64]
        function.restype = ctypes.c_int64
    return library
