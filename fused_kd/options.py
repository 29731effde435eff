"""The options of the loss: their names, defaults and checks, in the one place that both public forms take them from."""

import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypedDict, get_args

from fused_kd.divergences import Divergence, DivergenceName, divergence_of
from fused_kd.real_numbers import described, number

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Reduction = Literal["mean", "sum", "none", "batchmean"]
VocabMismatch = Literal["error", "truncate"]
Ensemble = Literal["arithmetic", "geometric"]

_CHOICES = {
    "ensemble": get_args(Ensemble),
    "reduction": get_args(Reduction),
    "vocab_mismatch": get_args(VocabMismatch),
}
_CAPS = ("student_logit_scale", "student_softcap", "teacher_logit_scale", "teacher_softcap")  # as RowOptions has them
_NUMBERS = ("temperature", "teacher_temperature", "alpha", "hard_weight", "label_smoothing", *_CAPS)
_SWITCHES = ("t2_scaling", "soft_on_ignored", "shift", "inplace", "return_parts", "entropies")


_INFINITY = float("inf")


@dataclass(frozen=True)
class KDOptions:
    """What `FusedKDLoss` holds and `fused_kd_loss` builds; `fused_kd_loss` documents each option."""

    temperature: float = 2.0
    alpha: float = 0.9
    hard_weight: float | None = None
    teacher_temperature: float | None = None
    t2_scaling: bool = True
    divergence: DivergenceName | Divergence = "forward_kl"
    ensemble: Ensemble = "arithmetic"
    reduction: Reduction = "mean"
    ignore_index: int = -100
    soft_on_ignored: bool = False
    shift: bool = False
    label_smoothing: float = 0.0
    student_logit_scale: float = 1.0
    teacher_logit_scale: float = 1.0
    student_softcap: float | None = None
    teacher_softcap: float | None = None
    vocab_mismatch: VocabMismatch = "error"
    inplace: bool = False
    return_parts: bool = False
    entropies: bool = False
    process_group: "ProcessGroup | None" = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name in _NUMBERS:
            value, default = getattr(self, name), getattr(KDOptions, name)
            if value is not default:
                self._set(name, value, number(name, value))
        check_temperature("temperature", self.temperature)
        if self.teacher_temperature is not None:
            check_temperature("teacher_temperature", self.teacher_temperature)
        _check_weight("alpha", self.alpha)
        if self.hard_weight is not None:
            _check_weight("hard_weight", self.hard_weight)
        elif self.alpha > 1:
            raise ValueError(
                f"alpha must be in [0, 1] while hard_weight is None (it is then 1 - alpha), got {self.alpha}; "
                "give hard_weight to weigh the two terms freely"
            )
        if self.alpha == 0 and self.weight_of_hard() == 0:
            raise ValueError("alpha and hard_weight are both 0: no term is left; give one of them a weight")
        check_smoothing(self.label_smoothing)
        if self.caps:
            check_caps(self.caps)
        if isinstance(self.ignore_index, bool) or not isinstance(self.ignore_index, numbers.Integral):
            raise TypeError(f"ignore_index must be an int, got {described(self.ignore_index)}")
        self._set("ignore_index", self.ignore_index, int(self.ignore_index))
        if not -(2**63) <= self.ignore_index < 2**63:
            raise ValueError(f"ignore_index must fit int64, as labels do, got {self.ignore_index}")
        divergence_of(self.divergence)
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                got = f"got {getattr(self, name)!r}"
                raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, {got}")
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {described(getattr(self, name))}")
        if self.entropies and not self.return_parts:
            raise ValueError("entropies=True needs return_parts=True: they are two of the parts")
        if self.process_group is not None:
            _check_group(self.process_group)
        if not isinstance(self.backend, str):
            raise TypeError(f"backend must be a string, got {described(self.backend)}")

    def _set(self, name: str, value: object, known: object) -> None:
        if known is not value:
            object.__setattr__(self, name, known)

    @property
    def caps(self) -> tuple[float, ...]:
        """As RowOptions has them: none where nothing is scaled or capped."""
        if (
            self.student_softcap is self.teacher_softcap is None
            and self.student_logit_scale == self.teacher_logit_scale == 1
        ):
            return ()
        return tuple(_INFINITY if value is None else value for value in (getattr(self, name) for name in _CAPS))

    # (A branch makes of a symbolic condition a known one.)
    @property
    def has_soft(self) -> bool:
        return True if self.alpha > 0 else False  # noqa: SIM210

    @property
    def has_hard(self) -> bool:
        return True if self.weight_of_hard() > 0 else False  # noqa: SIM210

    # What the terms are multiplied by; `taken` makes of the options that it is computed from what is computed with.
    def weight_of_soft(self, taken: Callable[[float], Any] = float) -> Any:
        alpha = taken(self.alpha)
        return alpha * taken(self.temperature) ** 2 if self.t2_scaling else alpha

    def weight_of_hard(self, taken: Callable[[float], Any] = float) -> Any:
        return 1 - taken(self.alpha) if self.hard_weight is None else taken(self.hard_weight)


class LossOptions(TypedDict, total=False):
    """The fields of KDOptions but the temperature, for type checkers."""

    alpha: float
    hard_weight: float | None
    teacher_temperature: float | None
    t2_scaling: bool
    divergence: DivergenceName | Divergence
    ensemble: Ensemble
    reduction: Reduction
    ignore_index: int
    soft_on_ignored: bool
    shift: bool
    label_smoothing: float
    student_logit_scale: float
    teacher_logit_scale: float
    student_softcap: float | None
    teacher_softcap: float | None
    vocab_mismatch: VocabMismatch
    inplace: bool
    return_parts: bool
    entropies: bool
    process_group: "ProcessGroup | None"
    backend: str


def options_of(temperature: float, others: Any) -> KDOptions:
    """Of the LossOptions. Raises TypeError for a name that is none."""
    unknown = sorted(set(others) - OPTIONS)
    if unknown:
        raise TypeError(f"there is no option {unknown[0]!r}; the options are {', '.join(sorted(OPTIONS))}")
    return KDOptions(temperature, **others)


OPTIONS = frozenset(KDOptions.__dataclass_fields__)


# Comparisons, not math.isfinite: under torch.compile a number that changes from call to call is symbolic.
def check_temperature(name: str, value: float) -> None:
    if not 0 < value < _INFINITY:
        raise ValueError(f"{name} must be finite and greater than 0, got {value}")
    if not 1e-10 <= value <= 1e10:
        raise ValueError(f"{name} must be between 1e-10 and 1e10, where float32 can follow it, got {value}")


def check_smoothing(value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {value}")


def check_caps(caps: Sequence[float]) -> None:
    if len(caps) not in (0, len(_CAPS)):
        raise ValueError(f"caps must be {len(_CAPS)} numbers or none, got {len(caps)}")
    for name, value in zip(_CAPS, caps, strict=False):
        if not 1e-10 <= value <= 1e10 and not ("softcap" in name and value == _INFINITY):
            raise ValueError(f"{name} must be between 1e-10 and 1e10, got {value}")


def _check_group(group: object) -> None:
    from torch import distributed  # noqa: PLC0415

    if not (distributed.is_available() and isinstance(group, distributed.ProcessGroup)):
        raise TypeError(f"process_group must be a torch.distributed.ProcessGroup, got {type(group).__name__}")


def _check_weight(name: str, value: float) -> None:
    if not 0 <= value < _INFINITY:
        raise ValueError(f"{name} must be finite and at least 0, got {value}")
    if value > 1e30:
        raise ValueError(f"{name} must be at most 1e30, where float32 can follow it, got {value}")
