"""The loss as a function of hidden states and heads, whose logits are never held as a whole."""

import numbers
import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fused_kd.checks import (
    check_floating,
    check_labels,
    check_leading,
    check_num_items,
    check_weights,
    plain,
)
from fused_kd.divergences import divergence_of
from fused_kd.functional import KDLossOutput, output, row_options
from fused_kd.linear_op import linear_loss
from fused_kd.linear_rows import Head, product_dtype
from fused_kd.options import KDOptions, options_of
from fused_kd.positions import as_vector, counted
from fused_kd.real_numbers import described
from fused_kd.taught import LOGITS
from fused_kd.teachers import TeacherLogits, backend_name, row_dtypes, teacher_of, tensors_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fused_kd.options import LossOptions

OneOrMore: TypeAlias = Tensor | Sequence[Tensor]


def fused_linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: OneOrMore | None = None,
    teacher_weight: OneOrMore | None = None,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | Sequence[Tensor | None] | None = None,
    teacher_logits: TeacherLogits | None = None,
    num_items: float | Tensor | None = None,
    weights: Tensor | None = None,
    teacher_weights: Sequence[float] | Tensor | None = None,
    temperature: float = KDOptions.temperature,
    chunk_rows: int | None = None,
    recompute: bool = False,
    **options: "Unpack[LossOptions]",
) -> Tensor | KDLossOutput:
    """`fused_kd_loss` of the logits hidden @ weight.T + bias, of which only a chunk of rows exists at a time.

    Gradients of the student's hidden states, weight and bias are computed in the forward, while a chunk's logits are
    there, and multiplied by the upstream gradient in the backward: four matrix products of N x H x V in all (six with
    `recompute`, two where no gradient is needed), no memory of N x V. What needs no gradient has neither its product
    nor its buffer. Differentiable once; the teacher is a constant. Under autocast the products take its dtype, as those
    of torch.nn.Linear; on a GPU the logits of 16-bit products come out in float32. On the CPU positions without a term
    are not projected; on a GPU, where to find them would wait, pass the positions that count.

    Args:
        student_hidden: [..., H_s], float32, float16, bfloat16 or float64: what the head would be applied to.
        student_weight: [V, H_s], of the same dtype: the weight of the head (of tied embeddings the embeddings').
        teacher_hidden: [..., H_t] with the same leading shape, on the same device. Several teachers: a list.
        teacher_weight: [V, H_t], in the dtype of teacher_hidden, or a list.
        labels, num_items, weights, teacher_weights, temperature: as in `fused_kd_loss`.
        student_bias: [V]; None: 0.
        teacher_bias: [V], or a list, in which None is 0.
        teacher_logits: in place of teacher_hidden and teacher_weight, what `fused_kd_loss` takes: a tensor, a list, or
            a `SparseTeacher`.
        chunk_rows: how many rows' logits exist at a time; None: as many as fit 768 MiB with their gradient. The result
            does not depend on it beyond rounding.
        recompute: keep no gradient between forward and backward, which projects everything again. reduction="none"
            always does, since its upstream gradient is not one number.
        options: those of `fused_kd_loss`, with its defaults; inplace=True has no meaning here. With `process_group`
            weights, biases and `teacher_logits` are this rank's slice of the vocabulary (a `SparseTeacher` is whole),
            and the hidden states are whole; so is their gradient, which is summed over the ranks here, in float32 (by
            nobody else, then).

    Returns:
        As `fused_kd_loss` does.

    Raises:
        ValueError, TypeError, IndexError: as `fused_kd_loss` does, and for hidden states, weights and biases that do
            not fit; the message names the argument and what to do.
    """
    return compute_linear(
        (student_hidden, student_weight, student_bias),
        (teacher_hidden, teacher_weight, teacher_bias, teacher_logits),
        labels,
        num_items,
        weights,
        teacher_weights,
        LinearOptions(chunk_rows, recompute),
        options_of(temperature, options),
    )


class LinearOptions(NamedTuple):
    chunk_rows: int | None = None
    recompute: bool = False


def compute_linear(
    given_student: tuple[object, object, object],
    given_teacher: tuple[object, object, object, TeacherLogits | None],
    labels: Tensor | None,
    num_items: float | Tensor | None,
    weights: Tensor | None,
    teacher_weights: Sequence[float] | Tensor | None,
    linear: LinearOptions,
    options: KDOptions,
) -> Tensor | KDLossOutput:
    """`fused_linear_kd_loss` with its options checked: hidden states, weight, bias; of the teacher its logits too."""
    if options.process_group is not None and torch.compiler.is_compiling():
        arguments = (given_student, given_teacher, labels, num_items, weights, teacher_weights, linear, options)
        result: Tensor | KDLossOutput = torch.compiler.disable(compute_linear)(*arguments)  # type: ignore[no-untyped-call]
        return result
    check_linear(linear, options)
    student, heads, teacher_logits = _head("student", *given_student), _heads(*given_teacher), given_teacher[3]
    like, name = student.logits_like(), "teacher_logits"
    if teacher_logits is None:
        name = "teacher_hidden @ teacher_weight.T"
        of_heads = [head.logits_like() for head in heads]
        teacher_logits = of_heads if isinstance(given_teacher[0], (list, tuple)) else of_heads[0]
    check_leading("student_hidden", student.hidden, options)
    tensors = (*student[:3], *(x for head in heads for x in head[:3]), *tensors_of(teacher_logits))
    _check_transforms(student)
    eager = plain(*tensors, labels, num_items, weights, teacher_weights)
    readable = eager and like.device.type == "cpu"
    teacher = teacher_of(like, teacher_logits, teacher_weights, options, readable, name)
    check_labels(labels, like, options)
    num_items = check_num_items(num_items, like, options, readable)
    weights = check_weights(weights, like, readable)
    divergence = divergence_of(options.divergence)
    if eager:
        backend_name(options.backend, like, teacher, divergence.name)  # raises where the named one cannot be used
    rows, symbolic = row_options(options, divergence, options.backend, eager)
    dtype, *_ = row_dtypes(like, teacher)
    counts = counted(student.hidden, labels, num_items, weights, options, dtype, eager)

    given = teacher.tensors
    if heads and (len(heads) == 1 or teacher.kind != LOGITS):  # else the teachers will not be read
        given = given[: len(given) - len(heads)]
    else:
        heads = []
    summed, row = options.reduction != "none", torch.empty_like(counts.targets, dtype=dtype)
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in student[:3]]
    run = linear_loss
    if options.process_group is not None:
        from fused_kd import parallel  # noqa: PLC0415  (PyTorch may be built without torch.distributed)

        run = partial(parallel.linear_loss, parallel.slices_of(like, teacher, options, eager, linear, wanted))
    results: tuple[Tensor, ...] = run(
        *student[:3],
        [*given, *(head.hidden.detach() for head in heads)],
        [head.weight.detach() for head in heads],
        [None if head.bias is None else head.bias.detach() for head in heads],
        teacher.kind,
        counts.targets,
        as_vector(counts.coef_soft, row),
        as_vector(counts.coef_hard, row),
        wanted,
        linear.recompute or not summed,
        summed,
        options.entropies,
        None if linear.chunk_rows is None else min(int(linear.chunk_rows), sys.maxsize),
        _autocast(like.device),
        *rows,
        symbolic,
    )
    loss, *terms = results[: 5 if options.entropies else 3]
    return output(loss, terms, counts, like.shape[:-1], options)


def _check_transforms(student: Head) -> None:
    """Gradients are computed in the forward: nobody else's derivative would see them."""
    if torch.compiler.is_compiling():
        return
    dual = torch.autograd.forward_ad._current_level >= 0 and any(
        x is not None and torch._VF._unpack_dual(x, level=0)[1] is not None for x in student[:3]
    )
    if dual or torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            "the loss from hidden states has no forward-mode derivative and no transform of torch.func; use "
            "fused_kd_loss on the logits there"
        )


def _autocast(device: torch.device) -> torch.dtype | None:
    if device.type == "meta":  # has none, and says so by an error
        return None
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def check_linear(linear: LinearOptions, options: KDOptions) -> None:
    rows = linear.chunk_rows
    if rows is not None and (isinstance(rows, bool) or not isinstance(rows, numbers.Integral) or rows < 1):
        raise ValueError(f"chunk_rows must be None or an int of at least 1, got {rows!r}")
    if not isinstance(linear.recompute, bool):
        raise TypeError(f"recompute must be True or False, got {described(linear.recompute)}")
    if options.inplace:
        raise ValueError(
            "inplace=True overwrites the student's logits, which a loss from hidden states does not have; leave it out"
        )


def _head(name: str, hidden: object, weight: object, bias: object, index: str = "") -> Head:
    """The `name`: student or teacher. Raises ValueError or TypeError."""
    hidden = _operand(f"{name}_hidden{index}", hidden)
    weight = _operand(f"{name}_weight{index}", weight)
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        raise ValueError(f"{name}_hidden{index} must have the shape [..., H], got {tuple(hidden.shape)}")
    operands = {f"{name}_weight{index}": weight}
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[-1]:
        sharded = (
            "; an empty or flat weight is one that ZeRO-3 or FSDP has sharded, and it has to be whole in the forward "
            "and in the backward: call the loss in the forward of the module that FSDP wraps, or within "
            "deepspeed.zero.GatheredParameters"
        )
        raise ValueError(
            f"{name}_weight{index} must have the shape [V, {hidden.shape[-1]}], as {name}_hidden{index} "
            f"{tuple(hidden.shape)} asks for, got {tuple(weight.shape)}{sharded if weight.dim() < 2 else ''}"
        )
    if bias is not None:
        bias = operands[f"{name}_bias{index}"] = _operand(f"{name}_bias{index}", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{name}_bias{index} must have the shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    autocast = _autocast(hidden.device)
    for operand, values in operands.items():
        if values.device != hidden.device:
            raise ValueError(
                f"{operand} must be on the device of {name}_hidden{index}, {hidden.device}, got {values.device}"
            )
        if values.dtype != hidden.dtype and (autocast is None or torch.float64 in (values.dtype, hidden.dtype)):
            raise TypeError(
                f"{operand} must have the dtype of {name}_hidden{index}, {hidden.dtype}, got {values.dtype}; "
                "convert one of them, or call the loss under torch.autocast"
            )
    return Head(hidden, weight, bias, product_dtype(hidden, autocast))


def _operand(name: str, values: object) -> Tensor:
    if not isinstance(values, Tensor):
        instead = "; a layer has .weight and .bias" if isinstance(values, torch.nn.Module) else ""
        raise TypeError(f"{name} must be a tensor, got {type(values).__name__}{instead}")
    if hasattr(values, "full_tensor"):
        raise TypeError(
            f"{name} must be a whole tensor, got a DTensor; pass {name}.full_tensor(), with grad_placements where its "
            "gradients are to be summed over processes"
        )
    check_floating(name, values)
    return values


def _heads(hidden: object, weight: object, bias: object, logits: object) -> list[Head]:
    """Those of the teachers; none where their logits are given. Raises ValueError or TypeError."""
    if logits is not None:
        for name, values in (("teacher_hidden", hidden), ("teacher_weight", weight), ("teacher_bias", bias)):
            if values is not None:
                raise ValueError(f"teacher_logits stand in place of {name}; leave one of the two out")
        return []
    if hidden is None or weight is None:
        missing = "teacher_hidden" if hidden is None else "teacher_weight"
        raise ValueError(f"{missing} must be given; or pass teacher_logits in place of hidden states and weight")
    if not isinstance(hidden, (list, tuple)):
        return [_head("teacher", hidden, weight, bias)]
    weights = weight if isinstance(weight, (list, tuple)) else [weight]
    biases = bias if isinstance(bias, (list, tuple)) else [bias] * len(hidden) if bias is None else [bias]
    for name, values in (("teacher_weight", weights), ("teacher_bias", biases)):
        if len(values) != len(hidden) or not hidden:
            raise ValueError(
                f"{name} must be a list of as many as teacher_hidden, and at least one, got {len(values)} for "
                f"{len(hidden)}"
            )
    rows = zip(hidden, weights, biases, strict=True)
    return [_head("teacher", *each, f"[{k}]") for k, each in enumerate(rows)]
