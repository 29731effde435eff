"""Loss and gradient at tau = 2, alpha = 0.9: fused_kd beside what a user would use instead.

    pytest benchmarks --benchmark-only [--shapes 256x128256,1024x151936] [--dtypes float32,bfloat16] [--scaling]

The yardstick is one torch.softmax of the student's logits; the floor is torch.add(s, t, out=g), which reads both
tensors and writes one, as any loss with a gradient must.
"""

from collections.abc import Callable

import pytest
import torch
from memory import peak_extra_bytes
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax, softmax

from fused_kd import FusedKDLoss, ops
from fused_kd.backends.rows import RowOptions

TAU, ALPHA = 2.0, 0.9


class Inputs:
    """Logits as models make them, a graph behind the student's, and a buffer for the floor."""

    def __init__(self, rows: int, vocabulary: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        self.leaf = (torch.randn(rows, vocabulary, generator=generator) * 3).to(dtype).requires_grad_()
        self.teacher = (torch.randn(rows, vocabulary, generator=generator) * 3).to(dtype)
        self.labels = torch.randint(vocabulary, (rows,), generator=generator)
        self.buffer = torch.empty_like(self.teacher)
        self.soft = torch.full((rows,), ALPHA * TAU**2 / rows)
        self.hard = torch.full((rows,), (1 - ALPHA) / rows)


def eager_loss(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    s = s.float()  # as trainers do: in bf16 PyTorch rounds the log-sum-exp too
    soft = kl_div(log_softmax(s / TAU, -1), softmax(t.float() / TAU, -1), reduction="batchmean")
    return ALPHA * TAU**2 * soft + (1 - ALPHA) * cross_entropy(s, y)


def gradient(loss_fn: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: Inputs) -> Callable[[], object]:
    return lambda: torch.autograd.grad(loss_fn(inputs.leaf, inputs.teacher, inputs.labels), inputs.leaf)


def fused_kd(inputs: Inputs) -> Callable[[], object]:
    return gradient(FusedKDLoss(TAU, alpha=ALPHA), inputs)


def fused_kd_inplace(inputs: Inputs) -> Callable[[], object]:
    loss_fn = FusedKDLoss(TAU, alpha=ALPHA, inplace=True)
    logits = inputs.leaf.detach().clone()

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


def fused_kd_fused_verb(inputs: Inputs) -> Callable[[], object]:
    options = RowOptions(TAU, TAU, "forward_kl", 0.0, True, True, "auto")
    student = inputs.leaf.detach()
    return lambda: ops.rows_fused(student, inputs.teacher, inputs.labels, inputs.soft, inputs.hard, *options)


def eager(inputs: Inputs) -> Callable[[], object]:
    return gradient(eager_loss, inputs)


def compiled(inputs: Inputs) -> Callable[[], object]:
    torch._dynamo.reset()
    return gradient(torch.compile(eager_loss, fullgraph=True, dynamic=False), inputs)


def softmax_yardstick(inputs: Inputs) -> Callable[[], object]:
    student = inputs.leaf.detach()
    return lambda: torch.softmax(student, -1)


def floor(inputs: Inputs) -> Callable[[], object]:
    student = inputs.leaf.detach()
    return lambda: torch.add(student, inputs.teacher, out=inputs.buffer)


CONTENDERS = {
    "fused_kd": fused_kd,
    "fused_kd inplace": fused_kd_inplace,
    "fused_kd fused verb": fused_kd_fused_verb,
    "eager": eager,
    "torch.compile": compiled,
    "softmax": softmax_yardstick,
    "floor: add(s, t, out=g)": floor,
}


@pytest.mark.parametrize("contender", CONTENDERS)
def test_loss_and_gradient(benchmark: object, shape: tuple[int, int], dtype: torch.dtype, contender: str) -> None:
    rows, vocabulary = shape
    inputs = Inputs(rows, vocabulary, dtype)
    function = CONTENDERS[contender](inputs)
    function()  # compiles, starts threads, takes memory from the system
    benchmark.group = f"{rows} x {vocabulary}, {str(dtype).removeprefix('torch.')}"
    benchmark.extra_info["contender"] = contender
    benchmark.extra_info["peak_extra_bytes"] = peak_extra_bytes(function)
    benchmark.extra_info["logits_bytes"] = inputs.teacher.nbytes
    large = rows * vocabulary > 10**7
    benchmark.pedantic(function, rounds=9 if large else 200, iterations=1, warmup_rounds=2)
