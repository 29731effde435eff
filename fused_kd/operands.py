"""What the row operators may be called with. Anybody can call them, and a kernel believes what it is told.

The loss does not come through here where it calls a backend by itself: `fused_kd.checks` has seen its arguments.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import SymBool, Tensor

from fused_kd.backends import check_name
from fused_kd.backends.rows import REST, RowOptions
from fused_kd.checks import check_columns, check_dense, lazy
from fused_kd.divergences import with_parameters
from fused_kd.options import check_caps, check_smoothing, check_temperature
from fused_kd.taught import LOGITS, Teacher
from fused_kd.teachers import check_teacher, row_dtypes

# What an operator's `symbolic` replaces, in its order.
SYMBOLIC = ("temperature", "teacher_temperature", "label_smoothing")  # the parameters, and the caps
_OPTIONS = len(RowOptions._fields)


def checked(names: list[str], arguments: tuple[Any, ...], read: bool) -> tuple[Any, ...]:
    """The arguments with these names and the RowOptions, of which an operator's arguments consist (`ops.py`).

    Raises ValueError or TypeError for what no backend can take. Rows are counted and not laid out: student [..., V] and
    teacher [..., V2] need as many, not the same shape, and targets [N]. All others are stats [N, k] or vectors [N], of
    any strides, and the `kind` of a teacher that is a list of tensors, of the student's leading shape. A fake kernel
    does not `read` what is symbolic; nor sizes, which are looked at when they are known.
    """
    *named, rows = with_options(names, arguments, read)
    values = dict(zip(names, named, strict=True))
    student, tensors, kind = values.pop("student"), values.pop("teacher"), values.pop("kind", LOGITS)
    check_columns("student", student)
    if kind == LOGITS and isinstance(tensors, Tensor):
        if rows.divergence != REST:
            check_columns("teacher", tensors)
        elif tensors.dtype != torch.int64 or tensors.dim() == 0:
            got = f"{tensors.dtype} {tuple(tensors.shape)}"
            raise TypeError(f"teacher must be int64 ids [..., k] for the divergence {REST!r}, got {got}")
        tensors = (tensors,)
    else:
        check_teacher(student, Teacher(kind, tensors))
    check_vectors(student, Teacher(kind, tensors), values)
    return *named, rows


def check_vectors(student: Tensor, teacher: Teacher, vectors: dict[str, Tensor]) -> None:
    """Whether the teacher has the student's rows, and the vectors one number for each of them: `targets`, `stats`, and
    others by their names. Raises ValueError or TypeError."""
    count = math.prod(student.shape[:-1])
    for each in teacher.tensors:
        _check_device("teacher", each, student)
        _check_size("teacher", each, math.prod(each.shape[:-1]), count, student)
    dtype, stats_dtype, width = row_dtypes(student, teacher)
    for name, vector in vectors.items():
        if name == "stats":
            _check_rows(name, vector, count, student, stats_dtype, width)
        else:
            _check_rows(name, vector, count, student, torch.int64 if name == "targets" else dtype)


def with_options(names: list[str], arguments: tuple[Any, ...], read: bool) -> tuple[Any, ...]:
    """The arguments with these names, and the RowOptions that come after them."""
    named, options = arguments[: len(names)], arguments[len(names) :]
    rows, symbolic = RowOptions(*options[:_OPTIONS]), [x for x in options[_OPTIONS:] if x is not None]
    rows = rows._replace(parameters=tuple(rows.parameters), caps=tuple(rows.caps))
    for numbers in symbolic:
        check_dense("symbolic", numbers)
        shape = (len(SYMBOLIC) + len(rows.parameters) + len(rows.caps),)
        if numbers.dtype != torch.float64 or numbers.shape != shape or numbers.device.type != "cpu":
            got = f"{numbers.dtype} {tuple(numbers.shape)} on {numbers.device}"
            raise ValueError(f"symbolic must be torch.float64 of the shape {shape} on the CPU, got {got}")
        if read:
            values = numbers.tolist()
            first, last = len(SYMBOLIC), len(SYMBOLIC) + len(rows.parameters)
            named_values = dict(zip(SYMBOLIC, values, strict=False))
            rows = rows._replace(**named_values, parameters=tuple(values[first:last]), caps=tuple(values[last:]))
    _check_options(rows)
    return *named, rows


def _check_rows(
    name: str, values: Tensor, count: int, student: Tensor, dtype: torch.dtype, width: int | None = None
) -> None:
    shape = "[N]" if width is None else f"[N, {width}]"
    check_dense(name, values)
    _check_device(name, values, student)
    if values.dtype != dtype:
        why = "" if name == "targets" else ", as rows_forward gives for these logits"
        raise TypeError(f"{name} must be {dtype}{why}, got {values.dtype}; pass {name}.to({dtype})")
    if values.dim() != (1 if width is None else 2):
        raise ValueError(f"{name} must have the shape {shape}, a row each, got {tuple(values.shape)}")
    if width is not None:
        _require(values.shape[1] == width, lambda: f"stats must have the shape {shape}, got {tuple(values.shape)}")
    _check_size(name, values, values.shape[0], count, student)


def _check_device(name: str, values: Tensor, student: Tensor) -> None:
    if values.device != student.device:
        raise ValueError(f"{name} must be on the student's device {student.device}, got {values.device}")


def _check_size(name: str, values: Tensor, got: int, count: int, student: Tensor) -> None:
    _require(
        got == count,
        lambda: (
            f"{name} must have as many rows as the student, {count} of shape {tuple(student.shape)}, got {got} "
            f"of shape {tuple(values.shape)}"
        ),
    )


def _require(condition: bool | SymBool, message: Callable[[], str]) -> None:
    if isinstance(condition, SymBool):
        torch._check_value(condition, message)
    elif not condition:
        raise ValueError(message())


@functools.lru_cache(maxsize=64)
def _check_options(options: RowOptions) -> None:
    check_temperature("temperature", options.temperature)
    check_temperature("teacher_temperature", options.teacher_temperature)
    if options.divergence != REST:
        with_parameters(options.divergence, options.parameters)
    check_smoothing(options.label_smoothing)
    check_caps(options.caps)
    check_name(options.backend)


def register_odd_operands(name: str, operator: Any, names: list[str], mutates: Sequence[str]) -> None:
    """What becomes of tensors that PyTorch does not bring to an operator as they are.

    It would lay zeros without memory out as one number, expanded, which no kernel reads; and for an operator that
    writes into its operand and returns nothing, it does not get on with a negated one. Nested and masked tensors would
    have errors of its own.
    """

    def lay_out(*arguments: Any) -> Any:
        values = dict(zip(names, arguments, strict=False))
        for written in mutates:
            if lazy(values[written]):
                raise ValueError(
                    f"{written} will be written to, and its values must lie in memory, but it is the lazy negative of "
                    f"what does, or zeros without memory; pass {written}.resolve_neg() or {written}.clone()"
                )
        return operator(*map(_laid_out, arguments))

    def refuse(*arguments: Any) -> NoReturn:
        for operand, values in zip(names, arguments, strict=False):
            for each in values if isinstance(values, list | tuple) else [values]:
                if isinstance(each, Tensor):
                    check_dense(operand, each)
        raise AssertionError("unreachable: one of them is nested or masked")

    def refuse_subclass(_kind: Any, _operator: Any, _types: Any, arguments: tuple[Any, ...], _: Any) -> NoReturn:
        refuse(*arguments)

    torch.library.impl(name, ("ZeroTensor", "Negative"), lay_out)
    torch.library.impl(name, "CompositeImplicitAutogradNestedTensor", refuse)
    operator.register_torch_dispatch(torch.masked.MaskedTensor, refuse_subclass)
    # Jagged ones have a class that has no public name: where it has moved, PyTorch's own error is what they get.
    module = getattr(getattr(torch.nested, "_internal", None), "nested_tensor", None)
    jagged = getattr(module, "NestedTensor", None)
    if jagged is not None:
        operator.register_torch_dispatch(jagged, refuse_subclass)


def _laid_out(value: Any) -> Any:
    if isinstance(value, list):
        return [_laid_out(x) for x in value]
    if not isinstance(value, Tensor):
        return value
    return value.new_zeros(value.shape) if value._is_zerotensor() else value.resolve_neg()
