"""How far the student is from the teacher: the divergences of the soft term.

With p = softmax(t / teacher_temperature) and q = softmax(s / temperature) over the vocabulary. All are 0 where p = q,
but for the cross entropy, and greater elsewhere. `divergence=` of the loss takes one of these objects, or its name:
the class with its defaults.
"""

from dataclasses import dataclass, fields
from functools import lru_cache
from typing import ClassVar, Literal, get_args

from fused_kd.families import AlphaBetaFamily, Family, Linear, Mixture, Variation
from fused_kd.real_numbers import number

_LEAST = 1e-6


@dataclass(frozen=True)
class Divergence:
    """What all of them are. Raises TypeError and ValueError for a parameter that is no number or out of its range."""

    name: ClassVar[str]

    def __post_init__(self) -> None:
        for field in fields(self):
            value = number(f"{type(self).__name__}: {field.name}", getattr(self, field.name))
            object.__setattr__(self, field.name, value)

    @property
    def parameters(self) -> tuple[float, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))

    @property
    def family(self) -> Family | None:
        """Whose member it is; None for those that the kernels have statistics of their own for."""
        return None

    def _between(self, name: str, low: float, high: float, instead: str) -> None:
        value, kind = getattr(self, name), type(self).__name__
        if not low < value < high:
            raise ValueError(f"{kind}: {name} must be between {low} and {high}, got {value}; {instead}")
        if not low + _LEAST <= value <= high - _LEAST:
            raise ValueError(
                f"{kind}: {name} must be at least {_LEAST} from {low} and {high}, where float32 can follow it, got "
                f"{value}; {instead}"
            )


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """KL(p || q) = sum p (log p - log q). Hinton, Vinyals and Dean (2015); TRL with beta=0, verl, ms-swift, axolotl."""

    name = "forward_kl"


@dataclass(frozen=True)
class CrossEntropy(Divergence):
    """-sum p log q: the gradient of ForwardKL, and the teacher's entropy added to the value. torchtune's ForwardKL."""

    name = "cross_entropy"


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """KL(q || p) = sum q (log q - log p). MiniLLM (Gu et al., 2023), on-policy distillation, TRL with beta=1."""

    name = "reverse_kl"


@dataclass(frozen=True)
class SymmetricKL(Divergence):
    """ratio KL(p || q) + (1 - ratio) KL(q || p), ratio in [0, 1]: torchtune's sym_kd_ratio. Jeffreys' divergence is
    twice that of 1/2."""

    name = "symmetric_kl"
    ratio: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"SymmetricKL: ratio must be in [0, 1], got {self.ratio}")

    @property
    def family(self) -> Family:
        return Linear(self.ratio)


@dataclass(frozen=True)
class JSD(Divergence):
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q, 0 < beta < 1: the generalised Jensen-Shannon
    divergence of GKD (Agarwal et al., 2023), as TRL and Liger have it."""

    name = "jsd"
    beta: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self._between("beta", 0, 1, "TRL's beta=0 is ForwardKL(), its beta=1 is ReverseKL()")

    @property
    def family(self) -> Family:
        return Mixture(self.beta, self.beta, 1 - self.beta)


@dataclass(frozen=True)
class SkewKL(Divergence):
    """KL(p || alpha p + (1 - alpha) q), 0 < alpha < 1. DistiLLM (Ko et al., 2024)."""

    name = "skew_kl"
    alpha: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._between("alpha", 0, 1, "alpha=0 would be ForwardKL()")

    @property
    def family(self) -> Family:
        return Mixture(self.alpha, 1.0, 0.0)


@dataclass(frozen=True)
class SkewReverseKL(Divergence):
    """KL(q || alpha q + (1 - alpha) p), 0 < alpha < 1. DistiLLM (Ko et al., 2024)."""

    name = "skew_reverse_kl"
    alpha: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._between("alpha", 0, 1, "alpha=0 would be ReverseKL()")

    @property
    def family(self) -> Family:
        return Mixture(1 - self.alpha, 0.0, 1.0)


@dataclass(frozen=True)
class TotalVariation(Divergence):
    """sum |p - q| / 2. Liger, speculators."""

    name = "total_variation"

    @property
    def family(self) -> Family:
        return Variation()


@dataclass(frozen=True)
class AlphaDivergence(Divergence):
    """(1 - sum p^(1 - alpha) q^alpha) / (alpha (1 - alpha)), 0 < alpha < 1: towards 0 KL(p || q), towards 1 KL(q || p),
    and at 1/2 four times the squared Hellinger distance. Amari (1985)."""

    name = "alpha_divergence"
    alpha: float

    def __post_init__(self) -> None:
        super().__post_init__()
        self._between("alpha", 0, 1, "its limits are ForwardKL() at 0 and ReverseKL() at 1")

    @property
    def family(self) -> Family:
        return AlphaBetaFamily(1 - self.alpha, self.alpha)


@dataclass(frozen=True)
class AlphaBeta(Divergence):
    """-1 / (alpha beta) sum (p^alpha q^beta - (alpha p^k + beta q^k) / k), k = alpha + beta, both greater than 0.
    ABKD (Wang et al., 2025)."""

    name = "alpha_beta"
    alpha: float
    beta: float

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha", "beta"):
            self._between(name, 0, 100, "ForwardKL() and ReverseKL() are its limits where one is 0 and the other 1")

    @property
    def family(self) -> Family:
        return AlphaBetaFamily(self.alpha, self.beta)


@dataclass(frozen=True)
class LogitMSE(Divergence):
    """sum (x - y)^2 / (2 n), x = s / temperature and y = t / teacher_temperature, over the n columns that are finite in
    both; `centred`: each less its mean over these. Ba and Caruana (2013); what temperature^2 KL(p || q) becomes as both
    temperatures grow, section 2.1 of Hinton, Vinyals and Dean (2015)."""

    name = "logit_mse"
    centred: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.centred, bool):
            raise TypeError(f"LogitMSE: centred must be True or False, got {self.centred!r}")

    @property
    def parameters(self) -> tuple[float, ...]:
        return (float(self.centred),)


DivergenceName = Literal[
    "forward_kl", "cross_entropy", "reverse_kl", "symmetric_kl", "jsd", "skew_kl", "skew_reverse_kl",
    "total_variation", "logit_mse",
]  # fmt: skip

# The one list of them. Those without a name in DivergenceName have no defaults.
DIVERGENCES: dict[str, type[Divergence]] = {
    kind.name: kind
    for kind in (
        ForwardKL, CrossEntropy, ReverseKL, SymmetricKL, JSD, SkewKL, SkewReverseKL, TotalVariation, AlphaDivergence,
        AlphaBeta, LogitMSE,
    )
}  # fmt: skip

_BY_NAME: dict[object, Divergence] = {name: DIVERGENCES[name]() for name in get_args(DivergenceName)}


def divergence_of(value: object) -> Divergence:
    """The object that `value` is or names. Raises ValueError for an unknown name, and for what is not in the list:
    the operators know a divergence by its name and parameters."""
    # (By its name: that a class is among others torch.compile of PyTorch 2.11 cannot trace.)
    if isinstance(value, Divergence) and DIVERGENCES.get(getattr(value, "name", "")) is type(value):
        return value
    if not isinstance(value, str) or value not in _BY_NAME:
        needs = ""
        if isinstance(value, str) and value in DIVERGENCES:
            needs = f"; {value!r} has no defaults, pass {DIVERGENCES[value].__name__}(...)"
        elif value in DIVERGENCES.values():
            needs = f"; pass {value.__name__}(...)"  # type: ignore[attr-defined]
        raise ValueError(
            f"divergence must be one of {', '.join(map(repr, _BY_NAME))} or an object of fused_kd.divergences, "
            f"got {value!r}{needs}"
        )
    return _BY_NAME[value]


@lru_cache(maxsize=64)
def with_parameters(name: str, parameters: tuple[float, ...]) -> Divergence:
    """The divergence that an operator's arguments say. Raises ValueError for others."""
    if not parameters:
        return divergence_of(name)
    if name not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(map(repr, DIVERGENCES))}, got {name!r}")
    kind = DIVERGENCES[name]
    names = [field.name for field in fields(kind)]
    if len(parameters) != len(names):
        expected = ", ".join(names) or "none"
        raise ValueError(f"parameters of divergence {name!r} must be {expected}, got {parameters}")
    return LogitMSE(bool(parameters[0])) if kind is LogitMSE else kind(*parameters)
