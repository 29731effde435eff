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
        verb = ops.forward if _eager(student, teacher) else ops.rows_forward
        return verb(student, teacher, targets, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        student, teacher, targets, ctx.options, ctx.inplace = inputs
        stats = output[2]
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        # An inference tensor cannot be saved, and need not be: nothing that autograd sees writes to it.
        inference = not torch.compiler.is_compiling() and teacher.is_inference()
        ctx.teacher = teacher if inference else None
        ctx.save_for_backward(student, None if inference else teacher, targets, stats)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        student, saved, targets, stats = ctx.saved_tensors
        teacher = saved if ctx.teacher is None else ctx.teacher
        soft, hard = (stats.new_zeros(len(stats)) if grad is None else grad for grad in grads[:2])
        arguments = (student, teacher, targets, stats, soft, hard, ctx.options)
        if not ctx.inplace:
            gradient = _Gradient.apply(*arguments) if torch.is_grad_enabled() else _gradient(*arguments)
        elif torch.is_grad_enabled():
            raise RuntimeError("inplace=True cannot be used with create_graph=True: the logits would be lost")
        else:
            ops.rows_backward_(*arguments[:-1], *ctx.options)  # the operator: it tells autograd of the write
            gradient = student.detach()
        return gradient, None, None, None, None


class _EagerFunction(FusedKDFunction):
    """The same where no torch.func transform is active. Function.apply binds the arguments of a forward without ctx to
    its signature at every call, which takes longer than a small loss."""

    setup_context = staticmethod(torch.autograd.Function.setup_context)

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        output = FusedKDFunction.forward(*inputs)
        FusedKDFunction.setup_context(ctx, inputs, output)
        return output


def rows_loss(
    student: Tensor, teacher: Tensor, targets: Tensor, options: RowOptions, inplace: bool
) -> tuple[Tensor, Tensor]:
    """soft[N] and hard[N] of each row, differentiable in the student."""
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    function = FusedKDFunction if traced else _EagerFunction
    soft, hard, _ = function.apply(student, teacher, targets, options, inplace)
    return soft, hard


def _gradient(*arguments: Any) -> Tensor:
    *tensors, options = arguments
    verb = ops.backward if _eager(tensors[0], tensors[1]) else ops.rows_backward
    return verb(*tensors, *options)


def _eager(student: Tensor, teacher: Tensor) -> bool:
    """Whether nobody is watching who needs the operators: plain tensors, nothing traced. Saves their dispatch."""
    return (
        not torch.compiler.is_compiling()
        and type(student) is type(teacher) is Tensor
        and torch._C._len_torch_dispatch_stack() == 0
    )


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
