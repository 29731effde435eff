"""The torch.autograd.Function under both public forms."""

from typing import Any

import torch
from torch import Tensor

from fused_kd import ops
from fused_kd.backends.rows import RowOptions


class FusedKDFunction(torch.autograd.Function):
    """(student [..., V], teacher [..., V], targets [N], options, inplace) -> soft[N], hard[N], stats[N, k].

    `targets` are labels, or SKIP or NO_LABEL of `fused_kd.backends.rows`. Differentiable once, in the student alone.
    With `inplace` the gradient is written over the student's logits.
    """

    @staticmethod
    def forward(
        student: Tensor, teacher: Tensor, targets: Tensor, options: RowOptions, inplace: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        result: tuple[Tensor, Tensor, Tensor] = ops.rows_forward(student, teacher, targets, *options)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        student, teacher, targets, ctx.options, ctx.inplace = inputs
        stats = output[2]
        ctx.mark_non_differentiable(stats)
        ctx.save_for_backward(student, teacher, targets, stats)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, targets, stats = ctx.saved_tensors
        arguments = (student, teacher, targets, stats, grads[0], grads[1], ctx.options)
        if not ctx.inplace:
            gradient = _Gradient.apply(*arguments) if torch.is_grad_enabled() else _gradient(*arguments)
        elif torch.is_grad_enabled():
            raise RuntimeError("inplace=True cannot be used with create_graph=True: the logits would be lost")
        else:
            ops.rows_backward_(*arguments[:-1], *ctx.options)
            gradient = student.detach()
        return gradient, None, None, None, None


def _gradient(*arguments: Any) -> Tensor:
    *tensors, options = arguments
    gradient: Tensor = ops.rows_backward(*tensors, *options)
    return gradient


class _Gradient(torch.autograd.Function):
    """The gradient where a graph of it is asked for: there is no second derivative, and it says so when used."""

    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        return _gradient(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        return None

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        raise RuntimeError(
            "fused_kd has no second derivative (double backward); use fused_kd.reference.kd_loss where you need one"
        )
