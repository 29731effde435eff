"""Loss and gradient at tau = 2, alpha = 0.9: fused_kd beside what a user would use instead.

    pytest benchmarks --benchmark-only [--shapes 256x128256,1024x151936] [--dtypes float32,bfloat16] [--scaling]

On a GPU where there is one. The yardstick is one torch.softmax of the student's logits; the floor is
torch.add(s, t, out=g), which reads both tensors and writes one, as any loss with a gradient must.
"""

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial

import pytest
import torch
from memory import peak_extra_bytes
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax, softmax

from fused_kd import FusedKDLoss, ops
from fused_kd.backends import PREFERENCE, refusal
from fused_kd.backends.rows import RowOptions

TAU, ALPHA = 2.0, 0.9
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Inputs:
    """Logits as models make them, a graph behind the student's, and a buffer for the floor."""

    def __init__(self, rows: int, vocabulary: int, dtype: torch.dtype) -> None:
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
        generator = torch.Generator(DEVICE).manual_seed(0)

        def logits() -> Tensor:
            return (torch.randn(rows, vocabulary, generator=generator, device=DEVICE) * 3).to(dtype)

        self.leaf = logits().requires_grad_()
        self.teacher = logits()
        self.labels = torch.randint(vocabulary, (rows,), generator=generator, device=DEVICE)
        self.buffer = torch.empty_like(self.teacher)
        self.soft = torch.full((rows,), ALPHA * TAU**2 / rows, device=DEVICE)
        self.hard = torch.full((rows,), (1 - ALPHA) / rows, device=DEVICE)


def eager_loss(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    s = s.float()  # as trainers do: in bf16 PyTorch rounds the log-sum-exp too
    soft = kl_div(log_softmax(s / TAU, -1), softmax(t.float() / TAU, -1), reduction="batchmean")
    return ALPHA * TAU**2 * soft + (1 - ALPHA) * cross_entropy(s, y)


def gradient(loss_fn: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: Inputs) -> Callable[[], object]:
    return lambda: torch.autograd.grad(loss_fn(inputs.leaf, inputs.teacher, inputs.labels), inputs.leaf)


def fused_kd(inputs: Inputs, backend: str) -> Callable[[], object]:
    return gradient(FusedKDLoss(TAU, alpha=ALPHA, backend=backend), inputs)


def fused_kd_inplace(inputs: Inputs, backend: str) -> Callable[[], object]:
    return overwriting(FusedKDLoss(TAU, alpha=ALPHA, inplace=True, backend=backend), inputs)


def overwriting(loss_fn: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: Inputs) -> Callable[[], object]:
    """`gradient` for a loss that overwrites the student's logits."""
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


def fused_kd_fused_verb(inputs: Inputs, backend: str) -> Callable[[], object]:
    options = RowOptions(TAU, TAU, "forward_kl", 0.0, True, True, backend)
    student = inputs.leaf.detach()
    return lambda: ops.rows_fused(student, inputs.teacher, inputs.labels, inputs.soft, inputs.hard, *options)


def eager(inputs: Inputs) -> Callable[[], object]:
    return gradient(eager_loss, inputs)


def compiled(inputs: Inputs) -> Callable[[], object]:
    torch._dynamo.reset()
    return gradient(torch.compile(eager_loss, fullgraph=True, dynamic=False), inputs)


def liger(inputs: Inputs) -> Callable[[], object]:
    """liger-kernel's losses of whole logits that come closest; its cross entropy overwrites them."""
    losses = importlib.import_module("liger_kernel.transformers")
    kl, ce = losses.LigerKLDIVLoss(reduction="batchmean"), losses.LigerCrossEntropyLoss()

    def loss(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
        soft = kl(log_softmax(s / TAU, -1, dtype=torch.float32), softmax(t / TAU, -1, dtype=torch.float32))
        return ALPHA * TAU**2 * soft + (1 - ALPHA) * ce(s, y)

    return overwriting(loss, inputs)


def softmax_yardstick(inputs: Inputs) -> Callable[[], object]:
    student = inputs.leaf.detach()
    return lambda: torch.softmax(student, -1)


def floor(inputs: Inputs) -> Callable[[], object]:
    student = inputs.leaf.detach()
    return lambda: torch.add(student, inputs.teacher, out=inputs.buffer)


def copy(inputs: Inputs) -> Callable[[], object]:
    return lambda: inputs.buffer.copy_(inputs.teacher)


def of_each_backend() -> dict[str, Callable[[Inputs], Callable[[], object]]]:
    """fused_kd on each backend for this device; on the CPU the one that "auto" takes."""
    tensor = torch.empty(1, 2, device=DEVICE)
    fitting = [name for name, backend in PREFERENCE.items() if refusal(backend, tensor, tensor) is None]
    names = {f" {name}": name for name in fitting} if DEVICE == "cuda" else {"": "auto"}
    verbs = {"": fused_kd, " inplace": fused_kd_inplace, " fused verb": fused_kd_fused_verb}
    return {
        f"fused_kd{label}{verb}": partial(function, backend=name)
        for label, name in names.items()
        for verb, function in verbs.items()
    }


CONTENDERS: dict[str, Callable[[Inputs], Callable[[], object]]] = {
    **of_each_backend(),
    "eager": eager,
    "torch.compile": compiled,
    "softmax": softmax_yardstick,
    "floor: add(s, t, out=g)": floor,
}
if DEVICE == "cuda":
    CONTENDERS["floor: copy"] = copy
    if importlib.util.find_spec("liger_kernel"):
        CONTENDERS["liger-kernel"] = liger
# Tensors of the logits' size that have to cross the memory's bus: both are read, the gradient is written, and without
# one visit for both both are read again.
CROSSINGS = {"fused verb": 3, "softmax": 2, "floor: add(s, t, out=g)": 3, "floor: copy": 2}


@pytest.mark.parametrize("contender", CONTENDERS)
def test_loss_and_gradient(benchmark: object, shape: tuple[int, int], dtype: torch.dtype, contender: str) -> None:
    rows, vocabulary = shape
    try:
        inputs = Inputs(rows, vocabulary, dtype)
        work = CONTENDERS[contender](inputs)

        def function() -> object:
            result = work()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            return result

        function()  # compiles, starts threads, takes memory from the system
        peak = peak_extra_bytes(function, DEVICE)
        benchmark.group = f"{rows} x {vocabulary}, {str(dtype).removeprefix('torch.')}"
        benchmark.extra_info["contender"] = contender
        benchmark.extra_info["peak_extra_bytes"] = peak
        benchmark.extra_info["logits_bytes"] = inputs.teacher.nbytes
        crossings = next((n for name, n in CROSSINGS.items() if contender.endswith(name)), 5)
        benchmark.extra_info["bytes"] = crossings * inputs.teacher.nbytes
        large = rows * vocabulary > 10**7
        benchmark.pedantic(function, rounds=25 if large else 200, iterations=1, warmup_rounds=5)
    except torch.cuda.OutOfMemoryError:
        pytest.skip(f"{contender}: out of memory at {rows} x {vocabulary}, {dtype}")
