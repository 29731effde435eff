"""The row operations, and the one place that chooses who runs them.

A backend is a module with a `NAME`, a `DESCRIPTION` in one line, `unavailable()`, `refuses(student, teacher,
divergence)` and the same three verbs over the rows of logits [..., V], `fused_kd.backends.rows.LogitRows`:

    rows_forward (rows)                                  -> soft[N], hard[N], stats[N, k]
    rows_backward(rows, stats, grad_soft[N], grad_hard[N], out)  writes d(sum grad_soft soft + grad_hard hard)/d student
    rows_fused   (rows, coef_soft[N], coef_hard[N], out) -> soft[N], hard[N], and writes the same

The gradient has the student's dtype; that of float32 logits may be of 16 bits, rounded once. It may have one more, the
second visit of a divergence that takes one, by itself: with the stats of a first one, which may be those of longer rows
of which these are some columns (`fused_kd.parallel`):

    rows_terms   (rows, stats) -> [N, 4]: what the columns add up to, for `fused_kd.backends.pytorch.concluded`

Adding a backend is one file, and its name in `PREFERENCE`.
"""

import os

from torch import Tensor

from fused_kd.backends import cpu, cuda, pytorch, triton
from fused_kd.backends.rows import Backend

# In the order in which "auto" tries them.
PREFERENCE: dict[str, Backend] = {backend.NAME: backend for backend in (cpu, triton, cuda, pytorch)}

VARIABLE = "FUSED_KD_BACKEND"


def refusal(backend: Backend, student: Tensor, teacher: Tensor, divergence: str = "forward_kl") -> str | None:
    """Why this backend cannot take these tensors with this divergence (a name), or None."""
    return backend.unavailable() or backend.refuses(student, teacher, divergence)


def check_name(name: str, source: str = "backend") -> None:
    names = ("auto", *PREFERENCE)
    if name not in names:
        raise ValueError(f"{source} must be one of {', '.join(map(repr, names))}, got {name!r}")


def choose(name: str, student: Tensor, teacher: Tensor, divergence: str = "forward_kl") -> Backend:
    """The backend for these tensors and this divergence (a name). "auto" takes the variable FUSED_KD_BACKEND, if that
    is set and not empty, else the first that can.

    Raises ValueError for an unknown name, and for a named backend that cannot take the tensors.
    """
    source, wanted = "backend", (student, teacher, divergence)
    if name == "auto":
        name, source = os.environ.get(VARIABLE) or "auto", VARIABLE
    if name == "auto":
        return next(backend for backend in PREFERENCE.values() if refusal(backend, *wanted) is None)
    check_name(name, source)
    reason = refusal(PREFERENCE[name], *wanted)
    if reason is not None:
        raise ValueError(f"{source}={name!r} cannot be used: {reason}")
    return PREFERENCE[name]
