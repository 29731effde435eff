"""Each verb of one backend against the float64 reference, on the device itself, at a language model's vocabulary.

A stage of gpu_report.py, in one process for each backend, dtype and vocabulary, so that the ones that fail leave the
others alone. It says which share of the bounds in tests/support.py an error takes, and whether a second run gives the
same bits. What it has Triton compile is what the timings then run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
from contenders import ALPHA, TAU, row_options
from gpu_device import failed, require
from records import emit
from support import LOSS_ABSOLUTE, LOSS_RELATIVE, gradient_bound, make_labels, make_logits
from torch import Tensor

from fused_kd import FusedKDLoss, ops
from fused_kd.backends.rows import SKIP
from fused_kd.reference import hard_term, kd_loss, soft_term

Results = tuple[Tensor, ...]


class Case:
    """Inputs, and what is exact for them: soft[N], hard[N], a gradient with its coefficients, the loss and its own."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype) -> None:
        self.student, self.teacher = (x.to(dtype) for x in make_logits("wide", rows, columns))
        self.labels = make_labels(rows, vocabulary=columns)
        weights = torch.linspace(0.5, 2.0, rows)
        self.coefficients = (weights, weights.flip(0).contiguous())

        s, t = self.student.double().requires_grad_(), self.teacher.double()
        counted = self.labels != SKIP
        soft, hard = torch.zeros(rows, dtype=torch.float64), torch.zeros(rows, dtype=torch.float64)
        temperatures = {"temperature": TAU, "teacher_temperature": TAU}
        soft = soft.index_put((counted,), soft_term(s[counted], t[counted], **temperatures, divergence="forward_kl"))
        hard = hard.index_put((counted,), hard_term(s[counted], self.labels[counted], label_smoothing=0.0))
        total = (soft * self.coefficients[0] + hard * self.coefficients[1]).sum()
        self.soft, self.hard = soft.detach(), hard.detach()
        (self.gradient,) = torch.autograd.grad(total, s)
        loss = kd_loss(s, t, self.labels, temperature=TAU, alpha=ALPHA)
        (self.loss_gradient,) = torch.autograd.grad(loss, s)
        self.loss = loss.detach()


def verbs(case: Case, backend: str) -> Iterator[tuple[str, Callable[[], Results], Results]]:
    """Names, what to run, and what it has to give."""
    rows, options = (case.student, case.teacher, case.labels), row_options(backend)

    def backward() -> Results:
        stats = ops.rows_forward(*rows, *options)[2]
        return (ops.rows_backward(*rows, stats, *case.coefficients, *options),)

    def inplace() -> Results:
        stats, student = ops.rows_forward(*rows, *options)[2], case.student.clone()
        ops.rows_backward_(student, *rows[1:], stats, *case.coefficients, *options)
        return (student,)

    def loss() -> Results:
        logits = case.student.detach().requires_grad_()
        value = FusedKDLoss(TAU, alpha=ALPHA, backend=backend)(logits, *rows[1:])
        return value.detach(), *torch.autograd.grad(value, logits)

    yield "forward", lambda: ops.rows_forward(*rows, *options)[:2], (case.soft, case.hard)
    yield "backward", backward, (case.gradient,)
    yield "inplace", inplace, (case.gradient,)
    yield (
        "fused verb",
        lambda: ops.rows_fused(*rows, *case.coefficients, *options),
        (case.soft, case.hard, case.gradient),
    )
    yield "loss", loss, (case.loss, case.loss_gradient)


def share_of_bound(result: Tensor, exact: Tensor) -> float:
    if result.shape != exact.shape:
        raise RuntimeError(f"a result has the shape {tuple(result.shape)}, not {tuple(exact.shape)}")
    error = (result.double() - exact).abs()
    if exact.dim() < 2:
        return float((error / (LOSS_RELATIVE * exact.abs() + LOSS_ABSOLUTE)).max())
    return float(error.norm() / gradient_bound(exact, result.dtype))


def poison(like: Tensor) -> None:
    """Leaves NaN in memory that PyTorch is about to hand out, for a verb that does not write all of its result."""
    torch.full_like(like, torch.nan)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--shapes", required=True, help="comma-separated ROWSxVOCABULARY")
    options = parser.parse_args()
    require(options.device)
    torch.set_default_device(options.device)
    bad = []
    for shape in options.shapes.split(","):
        rows, columns = map(int, shape.split("x"))
        case = Case(rows, columns, getattr(torch, options.dtype))
        for verb, run, exact in verbs(case, options.backend):
            about = {"backend": options.backend, "dtype": options.dtype, "shape": shape, "verb": verb}
            try:
                poison(case.student)
                results, again = run(), run()
                shares = [share_of_bound(*pair) for pair in zip(results, exact, strict=True)]
                share = float(torch.tensor(shares).max())  # NaN if one is, as Python's max may not be
                same = all(torch.equal(*pair) for pair in zip(results, again, strict=True))
            except Exception as error:
                emit("smoke", **about, error=failed(error, options.device))
                bad.append(f"{shape} {verb}")
                continue
            emit("smoke", **about, share=share, same=same)
            if not (share <= 1 and same):  # nor is NaN
                bad.append(f"{shape} {verb}")
    if bad:
        raise SystemExit(f"wrong: {', '.join(bad)}")


if __name__ == "__main__":
    main()
