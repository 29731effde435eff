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
# And what they call numbers and the like, which identify does not give.
_SETTINGS = (
    r"temperature|^temp$|_temp$|^tau|alpha|beta|gamma|lambda|lambd|smooth|reduction|config|cfg|^args$|param|epoch|step|"
    r"ignore|_id$|^eps|ratio|vocab|_size$|scale|softcap"
)


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


_SHORT = {torch.float32, torch.bfloat16, torch.float16}
_CASTS = {torch.Tensor.float, torch.Tensor.bfloat16, torch.Tensor.half}


class _InFloat64(TorchFunctionMode):
    """float64 where the code asks for float32 or less, so that its rounding does not hide what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tuple(map(self._wider, args)), {k: self._wider(v) for k, v in (kwargs or {}).items()}
        if func in _CASTS:
            self.asked, func = True, torch.Tensor.double
        return func(*args, **kwargs)

    def _wider(self, x: Any) -> Any:
        if (type(x) is torch.dtype and x in _SHORT) or x is torch.FloatTensor:
            self.asked = True
            return torch.float64
        return x


_Takes = tuple[list[tuple[str, bool]], list[str]]  # must be given: name, whether as a keyword; need not be: names


class Parameter(NamedTuple):
    """Of somebody's function."""

    name: str
    role: str
    by_name: bool  # passed as a keyword


class Loss:
    """Somebody's function, with the roles that its arguments have."""

    def __init__(self, function: Callable[..., Any], parameters: Sequence[Parameter], mask_dtype: torch.dtype) -> None:
        self.function, self.parameters, self.mask_dtype = function, parameters, mask_dtype
        self.roles = tuple(x.role for x in parameters)
        self.rounds = False  # asks for less than float64 inside
        self.overwritten: set[str] = set()  # the roles of arguments that it changed
        self.calls = 0

    def __call__(self, data: Data, upstream: Tensor | None = None) -> Reading:
        """Raises ProbeError where the function raises, or gives no loss that depends on the student."""
        leaves = [x.detach().clone().requires_grad_() for x in (data.student, data.teacher)]
        # Not the leaves themselves, as no model's logits are: it may change them in place.
        mask = data.mask.to(self.mask_dtype, copy=True)
        given = dict(zip(ROLES, (*(x * 1 for x in leaves), data.labels.clone(), mask), strict=True))
        self.calls += 1
        mode = _InFloat64()
        needed = self.rounds or self.calls < 4  # it doubles the time of everything
        with _default_float64(), mode if needed else nullcontext(), torch.enable_grad():
            value = self._value(given)
            total = value.sum() if upstream is None else (value * upstream).sum()
            try:
                gradient, of_teacher = torch.autograd.grad(total, leaves, allow_unused=True)
            except Exception as error:  # a backward of its own may raise anything too
                raise ProbeError(f"its backward raises {type(error).__name__}: {error}") from error
        self.rounds |= mode.asked
        before = dict(zip(ROLES, (*leaves, data.labels, data.mask.to(self.mask_dtype)), strict=True))
        self.overwritten |= {role for role in self.roles if not torch.equal(given[role], before[role])}
        if gradient is None:
            raise ProbeError("the student's logits have no gradient")
        return Reading(value.detach(), gradient, of_teacher)

    def _value(self, given: dict[str, Tensor]) -> Tensor:
        positional = [given[x.role] for x in self.parameters if not x.by_name]
        try:
            value = _loss_of(
                self.function(*positional, **{x.name: given[x.role] for x in self.parameters if x.by_name})
            )
        except Exception as error:  # it may raise anything
            hint = ""
            if isinstance(error, AttributeError) and isinstance(error.obj, Tensor):
                hint = (
                    ". It gets tensors: where it takes models' outputs, wrap it: lambda student, teacher, labels: "
                    f"your_loss(SimpleNamespace({error.name}=student), SimpleNamespace({error.name}=teacher), labels)"
                )
            raise ProbeError(f"{type(error).__name__}: {error}{hint}") from error
        if isinstance(value, dict):
            raise ProbeError(f'it returns a dict with {", ".join(map(repr, value))}, and no "loss" among them')
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise ProbeError(f"it returns {type(value).__name__}, not a tensor with the loss")
        if not value.requires_grad:
            raise ProbeError("its result has no gradient")
        return value.double()


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
    for parameters in _assignments(function, arguments):
        for dtype in (torch.bool, torch.float64) if "mask" in [x.role for x in parameters] else (torch.bool,):
            loss = Loss(function, parameters, dtype)
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


def _assignments(function: Callable[..., Any], arguments: Sequence[str] | None) -> list[list[Parameter]]:
    """The likeliest first."""
    if arguments is not None:
        unknown = [role for role in arguments if role not in ROLES]
        if unknown:
            raise ValueError(f"arguments must be some of {', '.join(ROLES)}, got {unknown[0]!r}")
    takes = _parameters(function)
    if arguments is not None:
        known = [*takes[0], *((name, True) for name in takes[1])] if takes else _nameless(len(arguments))
        return [[Parameter(name, role, by_name) for (name, by_name), role in zip(known, arguments, strict=False)]]
    if takes:
        return _orders(*takes)
    return [way for count in (2, 3, 4) for way in _orders(_nameless(count), [])]


def _nameless(count: int) -> list[tuple[str, bool]]:
    return [(f"argument {k + 1}", False) for k in range(count)]


def _orders(required: list[tuple[str, bool]], optional: list[str]) -> list[list[Parameter]]:
    guesses = [role_of(name) for name, _ in required]
    extra = {role: name for name in reversed(optional) for role in [role_of(name)] if role is not None}
    for role in ("teacher", "student"):
        if role in extra and role not in guesses and len(required) < len(ROLES):
            required, guesses = [*required, (extra[role], True)], [*guesses, role]
    names = [name for name, _ in required]
    if not 2 <= len(required) <= len(ROLES) or any(_is_setting(name, names) for name in names):
        raise ProbeError(
            f"it needs {len(required)} arguments ({', '.join(names)}); it can be given a student, a teacher, labels "
            "and a mask. Bind the others: lambda student, teacher, labels: your_loss(student, teacher, labels, config)"
        )
    orders = [order for order in itertools.permutations(ROLES, len(required)) if {"student", "teacher"} <= {*order}]
    # Labels are no mask, whose numbers would weigh positions; only `arguments` may say so.
    named = [order for order in orders if ("labels", "mask") not in zip(guesses, order, strict=True)]
    orders = named or orders
    orders.sort(key=lambda order: (-sum(map(str.__eq__, order, map(str, guesses))), "mask" in order, _rank(order)))
    results: list[list[Parameter]] = []
    for order in orders:
        for chosen in (("labels", "mask"), ("labels",), ("mask",), ()):
            more = [role for role in chosen if role in extra and role not in (*order, *guesses)]
            way = [Parameter(name, role, by_name) for (name, by_name), role in zip(required, order, strict=True)]
            way += [Parameter(extra[role], role, True) for role in more]
            if way not in results:
                results.append(way)
    return results


def _rank(order: tuple[str, ...]) -> int:
    return 0 if order.index("student") < order.index("teacher") else 1


def role_of(name: str) -> str | None:
    if re.search(_SETTINGS, name.lower()):
        return None
    return next((role for role, pattern in _NAMES.items() if re.search(pattern, name.lower())), None)


def _is_setting(name: str, names: Sequence[str]) -> bool:
    """Whether it is a number or the like, and no tensor; T is, beside another teacher."""
    of_teacher = [other for other in names if role_of(other) == "teacher" and other != name]
    return bool(re.search(_SETTINGS, name.lower()) or (name == "T" and of_teacher))


def _parameters(function: Callable[..., Any]) -> _Takes | None:
    """Those that must be given, with whether as a keyword, and those that need not be; None: it does not say."""
    try:
        parameters = inspect.signature(_forward_of(function)).parameters.values()
    except (TypeError, ValueError):
        return None
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    empty = inspect.Parameter.empty
    required = [(p.name, False) for p in parameters if p.kind in positional and p.default is empty]
    required += [(p.name, True) for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY and p.default is empty]
    optional = [p.name for p in parameters if p.kind in named and p.default is not empty]
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters) and len(required) < 2:
        return None
    return required, optional


def _forward_of(function: Callable[..., Any]) -> Callable[..., Any]:
    return function.forward if isinstance(function, torch.nn.Module) else function
