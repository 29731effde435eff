"""What is compared: fused_kd, what a user would use instead, and floors; loss and gradient at tau = 2, alpha = 0.9.

A contender takes `Inputs` and gives the function to be timed. The yardstick is one torch.softmax of the student's
logits. Floors are torch.add(s, t, out=g), which reads both tensors and writes one, as any loss with a gradient must;
and a copy, which shows the bandwidth that the memory has.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax, softmax

from fused_kd import FusedKDLoss, SparseTeacher, ops
from fused_kd.backends.rows import RowOptions
from fused_kd.divergences import (
    JSD,
    AlphaBeta,
    AlphaDivergence,
    Divergence,
    ForwardKL,
    LogitMSE,
    ReverseKL,
    SkewKL,
    SymmetricKL,
    TotalVariation,
)
from fused_kd.reference import soft_term

TAU, ALPHA = 2.0, 0.9
SHAPES = {
    "cpu": "256x128256,256x1000,128x100",
    "cuda": "8192x151936,8192x128256,8192x50257,8192x32000,8x151936",
}
YARDSTICK = "softmax"
COPY = "floor: copy"

Work = Callable[[], object]


class Inputs:
    """Logits as models make them, a graph behind the student's, and a buffer for the floors."""

    def __init__(self, rows: int, vocabulary: int, dtype: torch.dtype, device: str) -> None:
        if device == "cuda":
            torch.cuda.empty_cache()
        generator = torch.Generator(device).manual_seed(0)

        def logits() -> Tensor:
            return (torch.randn(rows, vocabulary, generator=generator, device=device) * 3).to(dtype)

        self.leaf = logits().requires_grad_()
        self.student = self.leaf.detach()
        self.teacher = logits()
        self.labels = torch.randint(vocabulary, (rows,), generator=generator, device=device)
        self.buffer = torch.empty_like(self.teacher)
        self.logits_bytes, self.elements = self.teacher.nbytes, self.teacher.numel()
        self.soft = torch.full((rows,), ALPHA * TAU**2 / rows, device=device)
        self.hard = torch.full((rows,), (1 - ALPHA) / rows, device=device)


@dataclass(frozen=True)
class Contender:
    work: Callable[[Any], Work]  # of Inputs, or LinearInputs
    # Tensors of the logits' size that have to cross the memory's bus: for the gradient both are read and one is
    # written, for the loss both are read, and without one visit for both that is once more.
    crossings: int = 5


def of_backend(backend: str, label: str) -> dict[str, Contender]:
    """fused_kd on one backend: the verbs, and the loss that is made of them."""
    kinds = {
        " forward": Contender(partial(_forward, backend=backend), 2),
        " backward": Contender(partial(_backward, backend=backend), 3),
        "": Contender(partial(_both, backend=backend)),
        " inplace": Contender(partial(_inplace, backend=backend)),
        " fused verb": Contender(partial(_fused_verb, backend=backend), 3),
    }
    return {label + kind: contender for kind, contender in kinds.items()}


def of_others(device: str) -> dict[str, Contender]:
    others = {
        YARDSTICK: Contender(lambda inputs: lambda: torch.softmax(inputs.student, -1), 2),
        "floor: add(s, t, out=g)": Contender(_add, 3),
        "eager": Contender(lambda inputs: _gradient(eager_loss, inputs)),
        "torch.compile": Contender(_compiled),
    }
    if device == "cuda" and importlib.util.find_spec("liger_kernel"):
        others["liger-kernel"] = Contender(_liger)
    return others


def copies() -> dict[str, Contender]:
    return {COPY: Contender(lambda inputs: lambda: inputs.buffer.copy_(inputs.teacher), 2)}


def row_options(backend: str) -> RowOptions:
    return RowOptions(TAU, TAU, "forward_kl", 0.0, True, True, backend)


def _forward(inputs: Inputs, backend: str) -> Work:
    return lambda: ops.rows_forward(inputs.student, inputs.teacher, inputs.labels, *row_options(backend))


def _backward(inputs: Inputs, backend: str) -> Work:
    rows = (inputs.student, inputs.teacher, inputs.labels)
    _, _, stats = ops.rows_forward(*rows, *row_options(backend))
    return lambda: ops.rows_backward(*rows, stats, inputs.soft, inputs.hard, *row_options(backend))


def _fused_verb(inputs: Inputs, backend: str) -> Work:
    rows = (inputs.student, inputs.teacher, inputs.labels)
    return lambda: ops.rows_fused(*rows, inputs.soft, inputs.hard, *row_options(backend))


def _both(inputs: Inputs, backend: str) -> Work:
    return _gradient(FusedKDLoss(TAU, alpha=ALPHA, backend=backend), inputs)


def _inplace(inputs: Inputs, backend: str) -> Work:
    return _overwriting(FusedKDLoss(TAU, alpha=ALPHA, inplace=True, backend=backend), inputs)


def of_divergences() -> dict[str, Contender]:
    """The loss with each family of divergences, and the plain expression of it; a sparse teacher, and none."""
    contenders = {}
    for divergence in DIVERGENCES:
        loss_fn = FusedKDLoss(TAU, alpha=ALPHA, divergence=divergence)
        contenders[divergence.name] = Contender(partial(_gradient, loss_fn))
        contenders[f"eager {divergence.name}"] = Contender(partial(_gradient, partial(_plain_loss, divergence)))
    return {
        **contenders,
        "no teacher: alpha=0": Contender(partial(_gradient, FusedKDLoss(alpha=0.0)), 2),
        "sparse teacher, k = 64": Contender(_sparse, 3),
    }


DIVERGENCES = (
    ForwardKL(), ReverseKL(), SymmetricKL(), JSD(), SkewKL(), TotalVariation(), AlphaDivergence(0.5),
    AlphaBeta(0.2, 0.7), LogitMSE(),
)  # fmt: skip


def _plain_loss(divergence: Divergence, s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    s, t = s.float(), t.float()
    soft = soft_term(s, t, temperature=TAU, teacher_temperature=TAU, divergence=divergence)
    return ALPHA * TAU**2 * soft.mean() + (1 - ALPHA) * cross_entropy(s, y)


def _sparse(inputs: Inputs) -> Work:
    teacher, loss_fn = SparseTeacher.from_logits(inputs.teacher, 64, TAU), FusedKDLoss(TAU, alpha=ALPHA)
    return lambda: torch.autograd.grad(loss_fn(inputs.leaf, teacher, inputs.labels), inputs.leaf)


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def _gradient(loss_fn: Loss, inputs: Inputs) -> Work:
    return lambda: torch.autograd.grad(loss_fn(inputs.leaf, inputs.teacher, inputs.labels), inputs.leaf)


def _overwriting(loss_fn: Loss, inputs: Inputs) -> Work:
    """`_gradient` for a loss that overwrites the student's logits."""
    logits = inputs.student.clone()

    def run() -> object:
        # What a model's output is: no leaf. The first call leaves a gradient behind, and that is logits as good.
        leaf = logits.requires_grad_()
        return torch.autograd.grad(loss_fn(_Output.apply(leaf), inputs.teacher, inputs.labels), leaf)

    return run


class _Output(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, logits: Tensor) -> Tensor:
        return logits.detach()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient


def eager_loss(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    s = s.float()  # as trainers do: in bf16 PyTorch rounds the log-sum-exp too
    soft = kl_div(log_softmax(s / TAU, -1), softmax(t.float() / TAU, -1), reduction="batchmean")
    return ALPHA * TAU**2 * soft + (1 - ALPHA) * cross_entropy(s, y)


def _compiled(inputs: Inputs) -> Work:
    torch._dynamo.reset()
    return _gradient(torch.compile(eager_loss, fullgraph=True, dynamic=False), inputs)


def _liger(inputs: Inputs) -> Work:
    """liger-kernel's losses of whole logits that come closest; its cross entropy overwrites them."""
    losses = importlib.import_module("liger_kernel.transformers")
    kl, ce = losses.LigerKLDIVLoss(reduction="batchmean"), losses.LigerCrossEntropyLoss()

    def loss(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
        soft = kl(log_softmax(s / TAU, -1, dtype=torch.float32), softmax(t / TAU, -1, dtype=torch.float32))
        return ALPHA * TAU**2 * soft + (1 - ALPHA) * ce(s, y)

    return _overwriting(loss, inputs)


def _add(inputs: Inputs) -> Work:
    return lambda: torch.add(inputs.student, inputs.teacher, out=inputs.buffer)
