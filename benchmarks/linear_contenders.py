"""The loss from hidden states beside what a user would do instead; loss and gradients at tau = 2, alpha = 0.9.

The yardstick is the four matrix products alone that any such loss takes: the logits of student and teacher, and the
gradients of the student's hidden states and head. TRL's function, its DistillationTrainer's default, has no hard term
and so less to do.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from contenders import ALPHA, TAU, Contender, Work, eager_loss
from torch import Tensor

from fused_kd import FusedKDLoss, FusedLinearKDLoss

LINEAR_SHAPES = {
    "cpu": "1024x576x49152,512x1024x151936",
    "cuda": "8192x4096x151936,8192x2048x128256,8192x576x49152",
}
LINEAR_YARDSTICK = "four products"


class LinearInputs:
    """Hidden states and heads whose logits are those of models: of student and teacher alike, and close."""

    def __init__(self, rows: int, width: int, vocabulary: int, dtype: torch.dtype, device: str) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=generator, device=device)

        hidden, weight = normal(rows, width), normal(vocabulary, width) * (3 / math.sqrt(width))
        self.teacher_hidden, self.teacher_weight = hidden.to(dtype), weight.to(dtype)
        self.hidden = (hidden + 0.3 * normal(rows, width)).to(dtype).requires_grad_()
        self.weight = (weight + 0.1 * normal(vocabulary, width) / math.sqrt(width)).to(dtype).requires_grad_()
        self.labels = torch.randint(vocabulary, (rows,), generator=generator, device=device)
        self.logits_bytes, self.elements = rows * vocabulary * dtype.itemsize, rows * width * vocabulary

    def gradients(self, loss: Tensor) -> object:
        return torch.autograd.grad(loss, (self.hidden, self.weight))


def of_linear() -> dict[str, Contender]:
    contenders = {
        LINEAR_YARDSTICK: _products,
        "fused_kd": partial(_fused, divergence="forward_kl"),
        "fused_kd jsd": partial(_fused, divergence="jsd"),
        "fused_kd recompute": partial(_fused, divergence="forward_kl", recompute=True),
        "linear, FusedKDLoss": partial(_of_logits, loss_fn=FusedKDLoss(TAU, alpha=ALPHA, inplace=True)),
        "linear, eager": partial(_of_logits, loss_fn=eager_loss),
        "linear, torch.compile": _compiled,
    }
    if importlib.util.find_spec("trl"):
        contenders |= {"TRL": partial(_trl, beta=0.0), "TRL jsd": partial(_trl, beta=0.5)}
    if importlib.util.find_spec("liger_kernel"):
        contenders["liger-kernel jsd"] = _liger
    return {name: Contender(work) for name, work in contenders.items()}


def _products(x: LinearInputs) -> Work:
    hidden, weight = x.hidden.detach(), x.weight.detach()

    def run() -> object:
        logits = hidden @ weight.T
        _ = x.teacher_hidden @ x.teacher_weight.T
        return logits @ weight, logits.T @ hidden

    return run


def _fused(x: LinearInputs, **options: Any) -> Work:
    loss_fn = FusedLinearKDLoss(TAU, alpha=ALPHA, **options)
    return lambda: x.gradients(loss_fn(x.hidden, x.weight, x.teacher_hidden, x.teacher_weight, x.labels))


def _of_logits(x: LinearInputs, loss_fn: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Work:
    return lambda: x.gradients(loss_fn(x.hidden @ x.weight.T, x.teacher_hidden @ x.teacher_weight.T, x.labels))


def _compiled(x: LinearInputs) -> Work:
    torch._dynamo.reset()

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return eager_loss(hidden @ weight.T, x.teacher_hidden @ x.teacher_weight.T, x.labels)

    compiled = torch.compile(loss, fullgraph=True, dynamic=False)
    return lambda: x.gradients(compiled(x.hidden, x.weight))


def trl_function() -> Any:
    """ChunkedDivergenceFunction out of its file: its package needs much to be imported of which it uses nothing."""
    spec = importlib.util.find_spec("trl")
    assert spec is not None
    assert spec.origin is not None
    triton = torch.cuda.is_available()
    found: dict[str, Any] = {
        "torch": torch,
        "math": math,
        "Version": lambda version: tuple(map(int, version.split("+")[0].split("."))),
        "is_triton_available": lambda: triton,
        "maybe_gather_lm_head_ctx": lambda *_: nullcontext(),
        "tl": importlib.import_module("triton.language") if triton else SimpleNamespace(constexpr=None),
        "triton": importlib.import_module("triton") if triton else None,
    }
    for name in ("chunked_logprob", "chunked_divergence"):
        file = Path(spec.origin).parent / "kernels" / f"{name}.py"
        tree = ast.parse(file.read_text())
        tree.body = [x for x in tree.body if not (isinstance(x, ast.If) or _imports(x)) or _is_future(x)]
        exec(compile(tree, str(file), "exec"), found)
    return found["ChunkedDivergenceFunction"]


def _imports(node: ast.stmt) -> bool:
    return isinstance(node, (ast.Import, ast.ImportFrom))


def _is_future(node: ast.stmt) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module == "__future__"


def _trl(x: LinearInputs, beta: float) -> Work:
    function = trl_function()

    def run() -> object:
        rows, _ = function.apply(x.hidden, x.weight, None, x.teacher_hidden, x.teacher_weight, None, beta, TAU)
        return x.gradients(rows.mean())

    return run


def _liger(x: LinearInputs) -> Work:
    loss_fn = importlib.import_module("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss(
        weight_hard_loss=1 - ALPHA, weight_soft_loss=ALPHA, temperature=TAU, compiled=True
    )
    return lambda: x.gradients(loss_fn(x.hidden, x.weight, x.teacher_hidden, x.teacher_weight, x.labels))
