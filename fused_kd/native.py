"""The native libraries: finding, loading and calling them. Their C interface is csrc/fused_kd.h."""

import ctypes
import functools
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused_kd.backends.rows import REST, LogitRows, RowOptions
from fused_kd.divergences import with_parameters
from fused_kd.families import AlphaBetaFamily, Family, Linear, Mixture, Variation, kernel_numbers

ABI_VERSION = 4
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int64: 3}  # FkdDtype; the last of ids
# FkdDivergence: of divergences, and of families.
DIVERGENCES = {"forward_kl": 0, "cross_entropy": 1, "reverse_kl": 2, "logit_mse": 3, REST: 4}
FAMILIES: dict[type[Family], int] = {Linear: 5, Mixture: 6, AlphaBetaFamily: 8, Variation: 9}
DONE, OUT_OF_MEMORY = -1, -2
FORWARD, FUSED = 1, 3  # FkdVerb
TERMS = 4  # FKD_TERMS
_MAX_DIMS = 8

_FOLDER = Path(__file__).parent
# Names the CUDA library to load in place of the installed one: the tests have one that runs on the CPU.
CUDA_LIBRARY = "FUSED_KD_CUDA_LIBRARY"


# FkdRows and FkdLoss as bytes, which ctypes passes by their address.
_ROWS = struct.Struct(f"=qqqq{_MAX_DIMS}q{_MAX_DIMS}q")  # data, dtype, columns, dims, sizes, strides
_MATRIX = struct.Struct(f"=qqqqq{8 * _MAX_DIMS - 8}xq{8 * _MAX_DIMS - 8}x")  # FkdRows with one size and one stride
_NUMBERS = 16
# temperature, teacher_temperature, label_smoothing, divergence, soft, hard, numbers
_LOSS = struct.Struct(f"=dddqqq{_NUMBERS}d")


def leading_layout(tensor: Tensor) -> list[tuple[int, int]]:
    """(size, stride) of the dimensions before the last, with those merged that lie as one."""
    layout: list[tuple[int, int]] = []
    for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True):
        if size == 1:
            continue
        if layout and layout[-1][1] == size * stride:
            layout[-1] = (layout[-1][0] * size, stride)
        else:
            layout.append((size, stride))
    return layout


def rows_of(tensor: Tensor) -> bytes:
    """FkdRows."""
    columns = tensor.shape[-1]
    head = (tensor.data_ptr(), DTYPES[tensor.dtype], columns)
    if tensor.is_contiguous():
        return _MATRIX.pack(*head, 1, tensor.numel() // columns, columns)
    layout = leading_layout(tensor)
    rest = (0,) * (_MAX_DIMS - len(layout))
    sizes, strides = [size for size, _ in layout], [stride for _, stride in layout]
    return _ROWS.pack(*head, len(layout), *sizes, *rest, *strides, *rest)


@functools.lru_cache(maxsize=64)
def loss_of(options: RowOptions) -> bytes:
    """FkdLoss."""
    code, numbers = DIVERGENCES.get(options.divergence), options.parameters
    if code is None or options.divergence == "reverse_kl":  # (the CUDA library takes reverse KL's value in two sweeps)
        family = with_parameters(options.divergence, options.parameters).family or Linear(0.0)
        numbers = kernel_numbers(family)
        if code is None:
            code = FAMILIES[type(family)] + (isinstance(family, Mixture) and family.level != 0)  # FKD_SKEWED_MIXTURE
    return _LOSS.pack(
        options.temperature,
        options.teacher_temperature,
        options.label_smoothing,
        code,
        options.soft,
        options.hard,
        *numbers,
        *(0.0,) * (_NUMBERS - len(numbers)),
    )


def refuses(student: Tensor, teacher: Tensor) -> str | None:
    """Why no native library can take these tensors."""
    for name, logits in (("student_logits", student), ("teacher_logits", teacher)):
        if logits.dtype not in DTYPES or not logits.is_floating_point():
            return f"it takes float32, bfloat16 and float16, and {name} is {logits.dtype}; the torch backend takes it"
        if logits.dim() > _MAX_DIMS + 1 and len(leading_layout(logits)) > _MAX_DIMS:
            return f"{name} has more than {_MAX_DIMS} separately strided dimensions; the torch backend takes it"
    return None


Arguments = tuple[list[Any], list[Tensor]]  # as ctypes takes them; and what has to live until the call returns


def arguments(rows: LogitRows, *rest: Tensor) -> Arguments:
    """The head that the verbs of all libraries share, and `rest`: vectors of one number a row, or stats.

    A library believes what it is told: `fused_kd.operands` checks what the operators are called with.
    """
    # O(N), so a strided one (an expanded gradient) may be laid out anew; and so may ids.
    vectors = [vector.contiguous() for vector in (rows.targets, *rest)]
    addresses = [vector.data_ptr() for vector in vectors]
    teacher = rows.teacher
    if rows.options.divergence == REST:
        teacher = teacher.contiguous()
        vectors.append(teacher)
    values = [rows_of(rows.student), rows_of(teacher), addresses[0], loss_of(rows.options), *addresses[1:]]
    return values, vectors


@functools.cache
def build_report() -> dict[str, dict[str, str]]:
    """What setup.py wrote about each library: how it was built, or why it was not."""
    path = _FOLDER / "_native.json"
    report: dict[str, dict[str, str]] = json.loads(path.read_text()) if path.exists() else {}
    if CUDA_LIBRARY in os.environ:
        report["cuda"] = {"library": os.environ[CUDA_LIBRARY], "built": "somebody else", "flags": CUDA_LIBRARY}
    return report


@functools.cache
def load(name: str) -> ctypes.CDLL | str:
    """The library of this name, or why there is none and what to do about it."""
    report = build_report().get(name)
    if report is None:
        return "no build report beside it: it was not installed; install it with pip (in a checkout: pip install -e .)"
    if "missing" in report:
        return report["missing"]
    path = _FOLDER / report["library"]
    if path.exists() and _ends_early(path):
        return f"{report['library']} is only a part of one; reinstall the package"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return f"{report['library']} does not load ({error}); reinstall the package on this machine"
    try:
        library.fkd_abi_version.restype = ctypes.c_int64
        if library.fkd_abi_version() != ABI_VERSION:
            return f"{report['library']} was built from other sources than this Python code; reinstall the package"
        for function, parameters in _SIGNATURES[name]():
            getattr(library, function).argtypes = parameters
            getattr(library, function).restype = ctypes.c_int64
        if name == "cuda":
            library.fkd_cuda_error_text.restype = ctypes.c_char_p
    except AttributeError as error:  # another library under this name
        return f"{report['library']} is not this package's ({error}); reinstall the package"
    return library


def _ends_early(path: Path) -> bool:
    """Whether an ELF file stops before the end of its table of sections, which comes last: loading a half-written one
    would kill the process."""
    with path.open("rb") as file:
        head = file.read(64)
    if not head.startswith(b"\x7fELF\x02\x01"):  # 64 bits, little endian
        return False
    if len(head) < 64:
        return True
    offset, (size, count) = *struct.unpack_from("<Q", head, 40), struct.unpack_from("<HH", head, 58)
    return path.stat().st_size < int(offset) + int(size) * int(count)


_STRUCT, _VECTOR, _NUMBER = ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int64
_HEAD = [_STRUCT, _STRUCT, _VECTOR, _STRUCT]  # student, teacher, targets, loss
_VERBS: dict[str, list[Any]] = {
    "rows_forward": [_VECTOR, _VECTOR, _VECTOR],
    "rows_backward": [_VECTOR, _VECTOR, _VECTOR, _STRUCT],
    "rows_fused": [_VECTOR, _VECTOR, _VECTOR, _VECTOR, _STRUCT],
}


def _cpu_signatures() -> Iterator[tuple[str, list[Any]]]:
    for verb, rest in {**_VERBS, "rows_terms": [_VECTOR, _VECTOR]}.items():
        yield f"fkd_{verb}", [*_HEAD, *rest, _NUMBER]  # threads


def _cuda_signatures() -> Iterator[tuple[str, list[Any]]]:
    for verb, rest in _VERBS.items():
        scratch: list[Any] = [] if verb == "rows_backward" else [_VECTOR]
        yield f"fkd_cuda_{verb}", [*_HEAD, *rest, *scratch, _NUMBER, ctypes.c_void_p]  # device, stream
    yield "fkd_cuda_scratch", [_STRUCT, _STRUCT, _STRUCT, _NUMBER, _NUMBER]
    yield "fkd_cuda_usable", [_NUMBER]
    yield "fkd_cuda_error_text", [_NUMBER]
    yield "fkd_cuda_on_host", []


_SIGNATURES = {"cpu": _cpu_signatures, "cuda": _cuda_signatures}
