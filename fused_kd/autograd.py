"""The torch.autograd.Function under both public forms."""

from typing import Any

import torch
from torch import Tensor

from fused_kd import ops
from fused_kd.backends.rows import RowOptions
from fused_kd.checks import plain

# What a term of each row is multiplied by: one number for all rows, or a vector [N].
Coefficient = float | Tensor


class FusedKDFunction(torch.autograd.Function):
    """(student [..., V], teacher [..., V], targets [N], coef_soft, coef_hard, options, inplace, summed)
    -> coef_soft * soft + coef_hard * hard, [N] or their sum, soft[N], hard[N], stats[N, k].

    `targets` are labels, or SKIP or NO_LABEL of `fused_kd.backends.rows`. Differentiable once, in the student and in
    coefficients [N]; only the first result has a gradient. With `inplace` it is written over the student's logits.
    """

    @staticmethod
    def forward(
        student: Tensor,
        teacher: Tensor,
        targets: Tensor,
        coef_soft: Coefficient,
        coef_hard: Coefficient,
        options: RowOptions,
        inplace: bool,
        summed: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        verb = ops.forward if plain(student, teacher) else ops.rows_forward
        soft, hard, stats = verb(student, teacher, targets, *options)
        losses = soft * coef_soft if options.soft else hard * coef_hard
        if options.soft and options.hard:
            if isinstance(coef_hard, Tensor):
                losses.addcmul_(hard, coef_hard)
            else:
                losses.add_(hard, alpha=coef_hard)
        return losses.sum() if summed else losses, soft, hard, stats

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        student, teacher, targets, coef_soft, coef_hard, ctx.options, ctx.inplace, _ = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        # An inference tensor cannot be saved, and need not be: nothing that autograd sees writes to it.
        tensors = (student, teacher, targets, coef_soft, coef_hard, *output[1:])
        traced = torch.compiler.is_compiling()
        kept = [isinstance(x, Tensor) and (traced or not x.is_inference()) for x in tensors]
        ctx.others = [None if keep else x for keep, x in zip(kept, tensors, strict=True)]
        ctx.save_for_backward(*(x if keep else None for keep, x in zip(kept, tensors, strict=True)))

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 8
        saved = [x if x is not None else other for x, other in zip(ctx.saved_tensors, ctx.others, strict=True)]
        arguments = (*saved, grad, ctx.options, ctx.inplace, ctx.needs_input_grad[3:5])
        if not torch.is_grad_enabled():
            gradient, of_soft, of_hard = _gradients(*arguments)
        elif ctx.inplace:
            raise RuntimeError("inplace=True cannot be used with create_graph=True: the logits would be lost")
        else:
            gradient, of_soft, of_hard = _Gradients.apply(*arguments)
        return gradient, None, None, of_soft, of_hard, None, None, None


class _EagerFunction(FusedKDFunction):
    """The same where no torch.func transform is active. Function.apply binds the arguments of a forward without ctx to
    its signature at every call, which takes longer than a small loss."""

    setup_context = staticmethod(torch.autograd.Function.setup_context)

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        output = FusedKDFunction.forward(*inputs)
        FusedKDFunction.setup_context(ctx, inputs, output)
        return output


def rows_loss(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The first three results of FusedKDFunction, for its arguments."""
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    function = FusedKDFunction if traced else _EagerFunction
    losses, soft, hard, _ = function.apply(*arguments)
    return losses, soft, hard


def _gradients(
    student: Tensor,
    teacher: Tensor,
    targets: Tensor,
    coef_soft: Coefficient,
    coef_hard: Coefficient,
    soft: Tensor,
    hard: Tensor,
    stats: Tensor,
    grad: Tensor,
    options: RowOptions,
    inplace: bool,
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Of the student, and of those coefficients of which it is wanted."""
    grad = grad.expand(targets.shape)  # of the rows' sum, or of each row's loss
    rows = (student, teacher, targets, stats, grad * coef_soft, grad * coef_hard, *options)
    if inplace:
        ops.rows_backward_(*rows)  # the operator: it tells autograd of the write
        gradient = student.detach()
    else:
        gradient = (ops.backward if plain(student, teacher) else ops.rows_backward)(*rows)
    return gradient, grad * soft if wanted[0] else None, grad * hard if wanted[1] else None


class _Gradients(torch.autograd.Function):
    """The gradients where a graph of them is asked for: there is no second derivative, and it says so when used."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return _gradients(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        return None

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        raise RuntimeError(
            "fused_kd has no second derivative (double backward); use fused_kd.reference.kd_loss where you need one"
        )
