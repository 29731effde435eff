"""Calling somebody's loss on small random inputs, in float64: what `fused_kd.identify` sees of it."""

import inspect
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

ROLES = ("student", "teacher", "labels", "mask")

# What authors call these parameters; looked for in this order.
_NAMES = {
    "mask": r"mask|^weights?$",
    "teacher": r"teach|tutor|expert|^t$|^t_|_t$|^tea|^tgt_logits|^ref_|large",
    "labels": r"label|^y$|^y_true|^gt|ground|^targets?$|^hard",
    "student": r"stud|^s$|^s_|_s$|^stu|output|logits|pred|small|^x$|^inputs?$",
}


@dataclass(frozen=True)
class Data:
    """One input: logits [..., V] in float64, labels and a mask [...]."""

    student: Tensor
    teacher: Tensor
    labels: Tensor
    mask: Tensor

    @property
    def positions(self) -> torch.Size:
        return self.labels.shape

    @property
    def vocabulary(self) -> int:
        return self.student.shape[-1]

    def but(self, **changes: Tensor) -> "Data":
        return replace(self, **changes)


def random_data(*shape: int, seed: int, scale: float = 2.0, classes: Sequence[int] | None = None) -> Data:
    """[..., V]; labels among `classes`."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn((2, *shape), generator=generator, dtype=torch.float64) * scale
    choices = torch.tensor(range(shape[-1]) if classes is None else [c for c in classes if c < shape[-1]])
    labels = choices[torch.randint(len(choices), shape[:-1], generator=generator)]
    return Data(student, teacher, labels, torch.ones(shape[:-1], dtype=torch.bool))


class Reading(NamedTuple):
    value: Tensor  # a scalar, or one number a position
    gradient: Tensor  # of the values' sum, or of what `upstream` makes of them
    teacher_gradient: Tensor | None


class ProbeError(Exception):
    """The loss cannot be called like this; the message says why."""


class _InFloat64(TorchFunctionMode):
    """float64 where the code asks for float32, so that its rounding does not hide what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tuple(map(self._wider, args)), {k: self._wider(v) for k, v in (kwargs or {}).items()}
        if func is torch.Tensor.float:
            self.asked, func = True, torch.Tensor.double
        return func(*args, **kwargs)

    def _wider(self, x: Any) -> Any:
        if x is torch.float32:
            self.asked = True
            return torch.float64
        return x


class Loss:
    """Somebody's function, with the roles that its arguments have."""

    def __init__(self, function: Callable[..., Any], roles: Sequence[str], names: Sequence[str | None]) -> None:
        self.function, self.roles, self.names = function, tuple(roles), tuple(names)
        self.rounds = False  # asks for float32 inside
        self.mask_dtype = torch.bool
        self.calls = 0

    def __call__(self, data: Data, upstream: Tensor | None = None) -> Reading:
        """Raises ProbeError where the function raises, or gives no loss that depends on the student."""
        student, teacher = (x.detach().clone().requires_grad_() for x in (data.student, data.teacher))
        given = {
            "student": student,
            "teacher": teacher,
            "labels": data.labels.clone(),
            "mask": data.mask.to(self.mask_dtype),
        }
        positional = [given[role] for role, name in zip(self.roles, self.names, strict=True) if name is None]
        named = {name: given[role] for role, name in zip(self.roles, self.names, strict=True) if name is not None}
        self.calls += 1
        mode = _InFloat64()
        needed = self.rounds or self.calls < 4  # it doubles the time of everything
        try:
            with _default_float64(), mode if needed else nullcontext(), torch.enable_grad():
                value = _loss_of(self.function(*positional, **named))
        except Exception as error:  # it may raise anything
            raise ProbeError(f"{type(error).__name__}: {error}") from error
        self.rounds |= mode.asked
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise ProbeError(f"it returns {type(value).__name__}, not a tensor with the loss")
        if not value.requires_grad:
            raise ProbeError("its result has no gradient")
        value = value.double()
        total = value.sum() if upstream is None else (value * upstream).sum()
        try:
            gradient, of_teacher = torch.autograd.grad(total, (student, teacher), allow_unused=True)
        except Exception as error:  # a backward of its own may raise anything too
            raise ProbeError(f"its backward raises {type(error).__name__}: {error}") from error
        if gradient is None:
            raise ProbeError("the student's logits have no gradient")
        return Reading(value.detach(), gradient, of_teacher)


def _loss_of(result: Any) -> Any:
    """The loss, where it comes with other things."""
    if isinstance(result, dict):
        return result.get("loss", result)
    if hasattr(result, "loss"):
        return result.loss
    return result[0] if isinstance(result, tuple | list) and result else result


@contextmanager
def _default_float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def ways_to_call(function: Callable[..., Any], arguments: Sequence[str] | None, data: Data) -> list[Loss]:
    """The function with each assignment of roles under which it can be called, the likeliest first.

    Raises ProbeError with what the likeliest raised where there is none.
    """
    first: ProbeError | None = None
    found = []
    for roles, names in _assignments(function, arguments):
        for dtype in (torch.bool, torch.float64) if "mask" in roles else (torch.bool,):
            loss = Loss(function, roles, names)
            loss.mask_dtype = dtype
            try:
                reading = loss(data)
            except ProbeError as error:
                first = first or error
                continue
            if (reading.gradient != 0).any():
                found.append(loss)
                break
    if not found:
        raise first or ProbeError("the student's gradient is 0 everywhere")
    return found


def _assignments(
    function: Callable[..., Any], arguments: Sequence[str] | None
) -> list[tuple[tuple[str, ...], tuple[str | None, ...]]]:
    """(roles, the keyword of each or None where it is positional), the likeliest first."""
    if arguments is not None:
        unknown = [role for role in arguments if role not in ROLES]
        if unknown:
            raise ValueError(f"arguments must be some of {', '.join(ROLES)}, got {unknown[0]!r}")
        return [(tuple(arguments), (None,) * len(arguments))]
    required, optional = _parameters(function)
    if not 2 <= len(required) <= 4:
        raise ProbeError(
            f"it needs {len(required)} arguments ({', '.join(required)}); it can be given a student, a teacher, labels "
            "and a mask. Bind the others: lambda student, teacher, labels: your_loss(student, teacher, labels, config)"
        )
    guesses = [role_of(name) for name in required]
    extra = {role: name for name in reversed(optional) for role in [role_of(name)] if role in ("labels", "mask")}
    orders = [order for order in itertools.permutations(ROLES, len(required)) if {"student", "teacher"} <= {*order}]
    orders.sort(key=lambda order: (-sum(map(str.__eq__, order, map(str, guesses))), "mask" in order, _rank(order)))
    results: list[tuple[tuple[str, ...], tuple[str | None, ...]]] = []
    for order in orders:
        none: tuple[str | None, ...] = (None,) * len(order)
        for chosen in (("labels", "mask"), ("labels",), ("mask",), ()):
            more = [role for role in chosen if role in extra and role not in (*order, *guesses)]
            way = (order + tuple(more), none + tuple(extra[role] for role in more))
            if way not in results:
                results.append(way)
    return results


def _rank(order: tuple[str, ...]) -> int:
    return 0 if order.index("student") < order.index("teacher") else 1


def role_of(name: str) -> str | None:
    return next((role for role, pattern in _NAMES.items() if re.search(pattern, name.lower())), None)


def _parameters(function: Callable[..., Any]) -> tuple[list[str], list[str]]:
    """Names of the parameters that must be given, and of those that need not be."""
    try:
        parameters = inspect.signature(_forward_of(function)).parameters.values()
    except (TypeError, ValueError):
        return ["a", "b", "c"], []
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [p.name for p in parameters if p.kind in positional and p.default is inspect.Parameter.empty]
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    optional = [p.name for p in parameters if p.kind in named and p.default is not inspect.Parameter.empty]
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters) and len(required) < 2:
        required = ["a", "b", "c"]
    return required, optional


def _forward_of(function: Callable[..., Any]) -> Callable[..., Any]:
    return function.forward if isinstance(function, torch.nn.Module) else function
