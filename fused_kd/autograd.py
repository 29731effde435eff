"""The torch.autograd.Function under both public forms."""

from typing import Any

import torch
from torch import Tensor

from fused_kd import capped, ops
from fused_kd.backends.rows import RowOptions
from fused_kd.checks import lazy, plain
from fused_kd.gradient_memory import empty_gradient
from fused_kd.positions import Coefficient, as_vector
from fused_kd.saving import save, saved
from fused_kd.taught import LOGITS, TaughtRows, Teacher


class FusedKDFunction(torch.autograd.Function):
    """(student [..., V], targets [N], coef_soft, coef_hard, symbolic, kind, options, inplace, summed, *teacher)
    -> coef_soft * soft + coef_hard * hard, [N] or their sum, soft[N], hard[N], stats[N, k].

    `targets` are labels, or SKIP or NO_LABEL of `fused_kd.backends.rows`; `symbolic` is explained in `ops.py`, `kind`
    and the tensors of the `teacher` in `teachers.py`.
    Differentiable once, in the student and in coefficients [N]; only the first result has a gradient. With `inplace` it
    is written over the student's logits.
    """

    generate_vmap_rule = True  # from those of the operators

    @staticmethod
    def forward(
        student: Tensor,
        targets: Tensor,
        coef_soft: Coefficient,
        coef_hard: Coefficient,
        symbolic: Tensor | None,
        kind: str,
        options: RowOptions,
        inplace: bool,
        summed: bool,
        *teacher: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if kind == LOGITS:
            soft, hard, stats = ops.rows_forward(student, *teacher, targets, *options, symbolic)
        else:
            soft, hard, stats = ops.teachers_forward(student, teacher, targets, kind, *options, symbolic)
        return _losses(soft, hard, coef_soft, coef_hard, options, summed), soft, hard, stats

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.kind, ctx.options, ctx.inplace, _ = inputs[5:9]
        ctx.eager = False
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        save(ctx, *inputs[:5], *output[1:], *inputs[9:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        tensors = saved(ctx)
        switches = (ctx.kind, ctx.options, ctx.inplace, ctx.needs_input_grad[2:4], ctx.eager)
        arguments = (*tensors[:8], grad, *switches, *tensors[8:])
        if not torch.is_grad_enabled():
            gradient, of_soft, of_hard = _gradients(*arguments)
        elif ctx.inplace:
            raise RuntimeError("inplace=True cannot be used with create_graph=True: the logits would be lost")
        else:
            gradient, of_soft, of_hard = _Gradients.apply(*arguments)
        return gradient, None, of_soft, of_hard, *(None,) * (len(ctx.needs_input_grad) - 4)


class _EagerFunction(FusedKDFunction):
    """The same where nothing but autograd sees the tensors: calls the backend without an operator in between, and has a
    forward with ctx, since Function.apply binds the arguments of one without to its signature at every call. Each takes
    longer than a small loss."""

    generate_vmap_rule = False
    setup_context = staticmethod(torch.autograd.Function.setup_context)

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        student, targets, coef_soft, coef_hard, _, kind, options, _, summed, *teacher = inputs
        soft, hard, stats = capped.rows_forward(TaughtRows(student, Teacher(kind, teacher), targets, options))
        output = (_losses(soft, hard, coef_soft, coef_hard, options, summed), soft, hard, stats)
        FusedKDFunction.setup_context(ctx, inputs, output)
        ctx.eager = True
        return output


def rows_loss(
    eager: bool,
    student: Tensor,
    teacher: Teacher,
    targets: Tensor,
    coef_soft: Coefficient,
    coef_hard: Coefficient,
    symbolic: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """The first three results of FusedKDFunction, for its arguments. `eager`: what `checks.plain` says of the tensors,
    and none is `checks.lazy`; options.backend is then a name."""
    arguments = (student, targets, coef_soft, coef_hard, symbolic, teacher.kind, *options, *teacher.tensors)
    run = _EagerFunction.apply if eager else FusedKDFunction.apply
    if torch.compiler.is_compiling() and not (
        torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments)
    ):
        run = FusedKDFunction.forward  # where no gradient is wanted dynamo would give one with *teacher a ctx
    losses, soft, hard, _ = run(*arguments)
    return losses, soft, hard


def _losses(
    soft: Tensor, hard: Tensor, coef_soft: Coefficient, coef_hard: Coefficient, options: RowOptions, summed: bool
) -> Tensor:
    losses = soft * coef_soft if options.soft else hard * coef_hard
    if options.soft and options.hard:
        # Not in place: under torch.compile of PyTorch 2.11 a result that was written to has a gradient of 0.
        if isinstance(coef_hard, Tensor):
            losses = torch.addcmul(losses, hard, coef_hard)
        else:
            losses = torch.add(losses, hard, alpha=coef_hard)
    return losses.sum() if summed else losses


def _gradients(
    student: Tensor,
    targets: Tensor,
    coef_soft: Coefficient,
    coef_hard: Coefficient,
    symbolic: Tensor | None,
    soft: Tensor,
    hard: Tensor,
    stats: Tensor,
    grad: Tensor,
    kind: str,
    options: RowOptions,
    inplace: bool,
    wanted: tuple[bool, bool],
    eager: bool,
    *teacher: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Of the student, and of those coefficients of which it is wanted."""
    if not plain(student, grad) or lazy(grad) or torch._C._functorch.is_legacy_batchedtensor(grad):
        eager = False
    of_loss: Coefficient = grad  # of each row's loss; or of their sum, and then a number where nobody waits for it
    if eager and grad.dim() == 0 and grad.device.type == "cpu":
        of_loss = float(grad)
    grad_soft, grad_hard = as_vector(of_loss * coef_soft, soft), as_vector(of_loss * coef_hard, soft)
    of_coefficients = (of_loss * soft if wanted[0] else None, of_loss * hard if wanted[1] else None)
    vectors = (stats, grad_soft, grad_hard)
    if eager:
        gradient = student if inplace else empty_gradient(student)
        if inplace:
            torch.autograd.graph.increment_version(student)
        capped.rows_backward(TaughtRows(student, Teacher(kind, teacher), targets, options), *vectors, gradient)
        return gradient.detach() if inplace else gradient, *of_coefficients
    if inplace:
        # A graph may return the logits too, or need them for another loss. Where it does not, inductor elides the copy.
        student = student.clone() if torch.compiler.is_compiling() else student
    if kind == LOGITS:
        operator = ops.rows_backward_ if inplace else ops.rows_backward
        gradient = operator(student, *teacher, targets, *vectors, *options, symbolic)
    else:
        operator = ops.teachers_backward_ if inplace else ops.teachers_backward
        gradient = operator(student, teacher, targets, *vectors, kind, *options, symbolic)
    # (The operator tells autograd of the write.)
    return student.detach() if inplace else gradient, *of_coefficients


class _Gradients(torch.autograd.Function):
    """The gradients where a graph of them is asked for: there is no second derivative, and it says so when used."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return _gradients(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        return None

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        ops.no_second_derivative()
