"""The Triton backend: NVIDIA and AMD GPUs. Launches the kernels of `triton_kernels.py`; nothing here waits for them.

A row is read in sections of a fixed number of columns, one program each, so that few rows fill a GPU too. Where the
sections begin depends on the vocabulary alone, and so a row's bits do not depend on the other rows.
"""

import ctypes
import functools
import importlib
import importlib.util
import math
import os
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_kd.backends.rows import REST, STATS, LogitRows, RowOptions, check_targets
from fused_kd.divergences import Divergence, LogitMSE, ReverseKL, with_parameters
from fused_kd.families import AlphaBetaFamily, Linear, Mixture, Variation, kernel_numbers
from fused_kd.native import leading_layout

NAME = "triton"
DESCRIPTION = "Triton kernels for NVIDIA and AMD GPUs: float32, bfloat16, float16"
INTERPRET = "TRITON_INTERPRET"

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_DIMS = 3
# Columns are counted in int32, and the last tile of a row may reach past it.
_MAX_COLUMNS = 2**31 - 2**16
_NO_COLUMN = 2**31 - 1
# tau = power / root: exp(s) is a power of what exp(s / tau) is a power of. For other temperatures it is computed.
_POWERS = {1.0: (1, 1), 1.5: (2, 3), 2.0: (1, 2), 3.0: (1, 3), 4.0: (1, 4)}


# What the kernels take. What the compiler knows has capitals there: SWITCHES, LAUNCH.


class Rows(NamedTuple):
    """Logits, or one number a row, and how their rows lie, as `row_start` takes it."""

    data: Tensor
    layout: tuple[int, ...]


class Scalars(NamedTuple):
    """What the kernels know of temperatures, as `triton_exponents.py` explains it, and of label smoothing."""

    k: float
    k_t: float
    unit: float  # of the soft term's gradient: 1 / tau
    smoothing: float
    family: tuple[float, ...] = ()  # the divergence's numbers, as `triton_families.py` takes them


class Switches(NamedTuple):
    """Which terms there are, and by which formulas `triton_exponents.py` and `triton_families.py` compute them."""

    soft: bool  # the sums of KL
    hard: bool
    entropy: bool
    smoothed: bool
    exact: bool
    root: int
    power: int
    family: str = ""  # of divergences; "" for forward KL and cross entropy, "rest" for REST
    second: bool = False  # it needs a second sweep
    careful: bool = False  # its parameters are so far apart that its expressions lose digits
    ptx: bool = False  # the GPU takes NVIDIA's instructions


class Launch(NamedTuple):
    """How a row is laid over a program: its tiles are [groups, lanes, vector], its sections `section` columns."""

    groups: int
    lanes: int
    vector: int
    warps: int
    stages: int
    section: int
    shifted: bool = False  # some rows do not start at a multiple of a vector's bytes
    alike: bool = True  # a row starts as far past such a multiple in student, teacher and gradient

    @property
    def options(self) -> dict[str, Any]:
        """Triton's own."""
        return {"num_warps": self.warps, "num_stages": self.stages, **ROUNDING}


# Up to this many columns: (lanes, elements a lane takes at a time, section). A lane that takes 16 rescales its sums
# half as often as one that takes 8. Sections: long enough that what a program does once is a small part of its work.
_TABLE = (
    (512, (32, 8, 512)),
    (1024, (64, 16, 1024)),
    (16384, (128, 16, 16384)),
    (_MAX_COLUMNS, (256, 16, 16384)),
)
_VECTOR_BYTES = 16
# The families whose kernels have instructions of their own for NVIDIA.
PTX = ("mixture", "jensen_shannon")
# Fused multiply-adds where the kernels say so, and nowhere else: what rounds a reference for the logits has to round it
# in the same way where a sum moves from that reference to the next, or the sum is off by an ulp of the logits' size.
ROUNDING = {"enable_fp_fusion": False}


def launch_for(columns: int, itemsize: int, warp: int) -> Launch:
    """The one place that says how kernels are launched. `itemsize`: of the wider logits; `warp`: lanes in a warp."""
    lanes, elements, section = next(entry for limit, entry in _TABLE if columns <= limit)
    lanes = max(lanes, warp)
    vector = _VECTOR_BYTES // itemsize
    return Launch(max(1, elements // vector), lanes, vector, lanes // warp, 1, max(section, lanes * elements))


def unavailable() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install triton (Linux)"
    return None


def refuses(student: Tensor, teacher: Tensor, divergence: str) -> str | None:
    device = student.device.type
    if device == "cpu" and not _interpreted():
        return f"it takes tensors on a GPU, and those of the CPU only with {INTERPRET}=1 in the environment (slow)"
    if device not in ("cpu", "cuda"):
        return f"it takes tensors on NVIDIA and AMD GPUs, and student_logits is on {student.device}"
    if device == "cuda" and (old := _too_old(student.device)) is not None:
        return old
    for name, logits in (("student_logits", student), ("teacher_logits", teacher)):
        if logits.dtype not in _DTYPES:
            return f"it takes float32, bfloat16 and float16, and {name} is {logits.dtype}; the torch backend takes it"
        if len(leading_layout(logits)) > _MAX_DIMS:
            return f"{name} has more than {_MAX_DIMS} separately strided dimensions; the torch backend takes it"
        if logits.shape[-1] > _MAX_COLUMNS:
            return f"{name} has more than {_MAX_COLUMNS} columns; the torch backend takes it"
    return None


@functools.cache
def _kernels() -> ModuleType:
    """Imported when first launched: Triton may be missing, and takes longer to import than this package."""
    return importlib.import_module("fused_kd.backends.triton_kernels")


def _interpreted() -> bool:
    return os.environ.get(INTERPRET, "0") in ("1", "true", "on")


@functools.cache
def _warp(device: torch.device) -> int:
    return 32 if device.type == "cpu" else int(torch.cuda.get_device_properties(device).warp_size)


@functools.cache
def _too_old(device: torch.device) -> str | None:
    major, minor = torch.cuda.get_device_capability(device)
    if torch.version.hip or major >= 8:
        return None
    return f"its kernels need compute capability 8.0, and {device} has {major}.{minor}; the torch backend takes it"


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return 0 if device.type == "cpu" else int(torch.cuda.get_device_properties(device).multi_processor_count)


def rows_forward(rows: LogitRows) -> tuple[Tensor, Tensor, Tensor]:
    check_targets(rows)
    student, _, targets, options = rows
    number, columns = rows.number, rows.columns
    shapes = ((number,), (number,), (number, STATS))
    soft, hard, stats = (student.new_empty(shape, dtype=torch.float32) for shape in shapes)
    if number == 0:
        return soft, hard, stats
    launch = _launch(columns, student, _teacher_logits(rows))
    sections, kernels = -(-columns // launch.section), _kernels()
    switches = _switches(options, student)
    parts = student.new_empty((number, sections, kernels.PARTS.value) if sections > 1 else 0, dtype=torch.float32)
    arguments = (
        _rows(student), _teacher(rows), _numbers(targets), soft, hard, stats, parts, columns, sections,
        _scalars(options, columns), switches,
    )  # fmt: skip
    with _on(student.device):
        kernels.forward[(number * sections,)](*arguments, launch, sections == 1, **launch.options)
        if sections > 1:
            kernels.finish[(number,)](*arguments, num_warps=1, **ROUNDING)
            if switches.second:
                kernels.sweep[(number * sections,)](*arguments, launch, **launch.options)
                kernels.finish_sweep[(number,)](*arguments, num_warps=1, **ROUNDING)
    return soft, hard, stats


def rows_terms(rows: LogitRows, stats: Tensor) -> Tensor:
    student, _, targets, options = rows
    number, columns = rows.number, rows.columns
    launch = _launch(columns, student, rows.teacher)
    sections, kernels = -(-columns // launch.section), _kernels()
    sums = student.new_empty((number, kernels.SUMS.value), dtype=torch.float32)
    if number == 0:
        return sums
    parts = student.new_empty((number, sections, kernels.SUMS.value), dtype=torch.float32)
    stats, scalars, switches = stats.contiguous(), _scalars(options, columns), _switches(options, student)
    head = _rows(student), _rows(rows.teacher), _numbers(targets)
    with _on(student.device):
        kernels.sweep[(number * sections,)](
            *head, sums, sums, stats, parts, columns, sections, scalars, switches, launch, **launch.options
        )
        kernels.finish_terms[(number,)](
            _numbers(targets), stats, parts, sums, columns, sections, scalars, switches, num_warps=1, **ROUNDING
        )
    return sums


def rows_backward(rows: LogitRows, stats: Tensor, grad_soft: Tensor, grad_hard: Tensor, out: Tensor) -> None:
    student, _, targets, options = rows
    number, columns = rows.number, rows.columns
    if number == 0:
        return
    teacher = _teacher_logits(rows)
    launch = _launch(columns, student, teacher, out)._replace(shifted=False)  # it aligns its columns itself
    sections = -(-columns // launch.section)
    switches = _switches(options, student)._replace(entropy=False)  # of the teacher: no matter to the student
    with _on(student.device):
        _kernels().backward[(number * sections,)](
            _rows(student),
            _rows(teacher),
            _numbers(targets),
            stats.contiguous(),
            _numbers(grad_soft),
            _numbers(grad_hard),
            _rows(out),
            columns,
            out.shape[-1],
            sections,
            _scalars(options, columns),
            switches,
            launch,
            **launch.options,
        )


def rows_fused(rows: LogitRows, coef_soft: Tensor, coef_hard: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    student, _, targets, options = rows
    number, columns = rows.number, rows.columns
    # One program has a row here: too few of them leave the device idle, and the others' bits are the same.
    if number < _multiprocessors(student.device):
        soft, hard, stats = rows_forward(rows)
        rows_backward(rows, stats, coef_soft, coef_hard, out)
        return soft, hard
    check_targets(rows)
    soft, hard = (student.new_empty(number, dtype=torch.float32) for _ in range(2))
    launch = _launch(columns, student, _teacher_logits(rows), out)
    sections = -(-columns // launch.section)
    with _on(student.device):
        _kernels().fused[(number,)](
            _rows(student),
            _teacher(rows),
            _numbers(targets),
            soft,
            hard,
            _numbers(coef_soft),
            _numbers(coef_hard),
            _rows(out),
            columns,
            out.shape[-1],
            sections,
            _scalars(options, columns),
            _switches(options, student),
            launch,
            sections == 1,
            **launch.options,
        )
    return soft, hard


def _teacher_logits(rows: LogitRows) -> Tensor:
    """The student's own for REST, whose ids are no logits; nothing but the sums over the other columns reads them."""
    return rows.student if rows.options.divergence == REST else rows.teacher


def _teacher(rows: LogitRows) -> Rows:
    if rows.options.divergence != REST or not rows.options.soft:
        return _rows(_teacher_logits(rows))
    # A row's ids in ascending order, and one behind them that no column reaches.
    ids = rows.teacher.reshape(-1, rows.teacher.shape[-1]).clamp(-1, _NO_COLUMN).to(torch.int32)
    ids = torch.nn.functional.pad(ids, (0, 1), value=_NO_COLUMN).sort(-1).values
    return Rows(ids, (ids.shape[1],))


def _temperatures(options: RowOptions) -> tuple[float, float]:
    # Without the soft term there is one temperature: that of the hard term, 1.
    return (options.temperature, options.teacher_temperature) if options.soft else (1.0, 1.0)


def _scalars(options: RowOptions, columns: int) -> Scalars:
    temperature, teacher_temperature = _temperatures(options)
    family = _family(options)
    # In one column both probabilities are 1, whatever the last bit says.
    unit = 0.0 if columns == 1 and family.soft else 1 / temperature
    log2e = math.log2(math.e)
    return Scalars(log2e / temperature, log2e / teacher_temperature, unit, options.label_smoothing, family.numbers)


def _switches(options: RowOptions, student: Tensor) -> Switches:
    temperature, teacher_temperature = _temperatures(options)
    root, power = _POWERS.get(temperature, (1, 0)) if options.hard else (1, 1)
    family, sums, second, careful, _ = _family(options)
    return Switches(
        options.soft and sums,
        options.hard,
        entropy=options.soft and options.divergence == "cross_entropy",
        smoothed=options.hard and options.label_smoothing > 0,
        exact=student.dtype == torch.float32 and teacher_temperature == temperature,
        root=root,
        power=power,
        family=family,
        second=second,
        careful=careful,
        ptx=family in PTX and student.is_cuda and torch.version.hip is None,
    )


class _Family(NamedTuple):
    """What Switches and Scalars have of a divergence."""

    family: str = ""
    soft: bool = True
    second: bool = False
    careful: bool = False
    numbers: tuple[float, ...] = ()


def _family(options: RowOptions) -> _Family:
    if options.soft and options.divergence == REST:
        k = math.log2(math.e) / options.temperature
        return _Family("rest", soft=False, second=True, numbers=(k - ctypes.c_float(k).value,))
    return family_of(with_parameters(options.divergence, options.parameters)) if options.soft else _Family()


@functools.lru_cache(maxsize=64)
def family_of(divergence: Divergence) -> _Family:
    """The one place that says how the kernels compute a divergence."""
    match divergence:
        case ReverseKL():
            return _Family("reverse_kl")
        case LogitMSE():
            return _Family("logit_mse", soft=False, second=True, numbers=divergence.parameters)
    family = divergence.family
    careful = False
    match family:
        case None | Linear(forward=1.0):
            return _Family()
        case Linear(forward=0.0):
            return _Family("reverse_kl")
        case Linear():
            name = "linear"
        case Mixture(share, of_p, of_q):
            level = of_p * (1 - share) - of_q * share
            name = "mixture" if abs(level) > 1e-12 else "jensen_shannon"
            # Each logarithm is off by up to 2^-22, that is of_p + exp(d) of_q of them in v, and v / p about this times
            # d^2 / 2. At the reach, 6 is where the one comes to 1e-5 of the other.
            curvature = of_p * (1 - share) ** 2 + of_q * share**2
            careful = of_p + math.exp(family.reach) * of_q > 6 * curvature
        case AlphaBetaFamily(a, b):
            name = "alpha" if abs(a + b - 1) < 1e-9 else "alpha_beta"
            careful = a * b < 0.15 * (a + b) ** 2  # where a p^k + b q^k - k p^a q^b cancels
        case Variation():
            return _Family("variation", second=True)
        case _:
            raise TypeError(f"the Triton kernels do not have {family}")
    return _Family(name, True, True, careful, kernel_numbers(family))


def _launch(columns: int, student: Tensor, teacher: Tensor, *out: Tensor) -> Launch:
    launch = launch_for(columns, max(student.element_size(), teacher.element_size()), _warp(student.device))
    past = [_past_vectors(launch.vector, logits) for logits in (student, teacher, *out)]
    return launch._replace(shifted=any(past[0]) or any(past[1]), alike=len(set(past)) == 1)


def _past_vectors(vector: int, logits: Tensor) -> tuple[int, ...]:
    """How many columns rows start past multiples of a vector's bytes: the first one, and what each stride adds."""
    first = logits.data_ptr() // logits.element_size() % vector
    leading = zip(logits.shape[:-1], logits.stride()[:-1], strict=True)
    return first, *(stride % vector for size, stride in leading if size > 1)


def _rows(logits: Tensor) -> Rows:
    layout = leading_layout(logits) or [(1, 0)]
    flat = [number for size, stride in reversed(layout) for number in (stride, size)]
    return Rows(logits, tuple(flat[:-1]))


def _numbers(one_a_row: Tensor) -> Rows:
    return Rows(one_a_row, one_a_row.stride())


def _on(device: torch.device) -> Any:
    """Triton launches on the current device, which need not be the logits'."""
    return torch.cuda.device(device) if device.type == "cuda" else _nowhere


class _Nowhere:
    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


_nowhere = _Nowhere()
