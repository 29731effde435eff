"""The checks of the tensors that the loss is called with. Nothing here reads a value on a GPU."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_kd.options import KDOptions
from fused_kd.real_numbers import number

_FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def plain(*values: object) -> bool:
    """Whether nothing but autograd sees what is done with these: nothing that compiles, traces or transforms it, no
    mode and no subclass but that of parameters."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and all(type(value) in (Tensor, torch.nn.Parameter) for value in values if isinstance(value, Tensor))
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
    )


def lazy(values: Tensor) -> bool:
    """Whether the values are not what lies in memory: the negative of it (the .imag of a conjugate), or zeros without
    memory, which derivatives make. The operators lay them out; a backend would read what is not there."""
    return values.is_neg() or values._is_zerotensor()


def check_dense(name: str, values: Tensor) -> None:
    """Raises TypeError where there are no numbers at strides in memory."""
    if type(values) is not Tensor and isinstance(values, torch.masked.MaskedTensor):
        kind, instead = "a MaskedTensor", f"{name}.get_data(), with weights of 0 at positions that are masked"
    elif values.is_nested:
        kind = f"a nested tensor of layout {values.layout}"
        instead = f"{name}.to_padded_tensor(...) with weights of 0 (or labels of ignore_index) in the padding"
        if values.layout is torch.jagged:
            instead = f"{name}.values(), as of all other arguments, or {instead}"
    elif values.layout is not torch.strided:
        kind, instead = f"the layout {values.layout}", f"{name}.to_dense()"
    else:
        return
    raise TypeError(f"{name} must be a dense tensor, got {kind}; pass {instead}")


def check_floating(name: str, values: Tensor) -> None:
    check_dense(name, values)
    if values.dtype not in _FLOATING:
        raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, got {values.dtype}")


def check_columns(name: str, logits: Tensor) -> None:
    """What is asked of logits, the student's or the teacher's."""
    check_floating(name, logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"{name} must have the shape [..., V] with at least one column, got {tuple(logits.shape)}")
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        raise ValueError(
            f"{name} must have unit stride in its last dimension, the vocabulary, got the strides "
            f"{tuple(logits.stride())}; nothing is copied silently: pass {name}.contiguous()"
        )


def check_student(student: Tensor, options: KDOptions) -> None:
    check_logits("student_logits", student)
    check_leading("student_logits", student, options)


def check_leading(name: str, student: Tensor, options: KDOptions) -> None:
    """Of the student's logits or hidden states, whether they have the positions that the options ask for."""
    if student.dim() == 1 and (options.shift or options.reduction == "batchmean"):
        option = "shift=True" if options.shift else 'reduction="batchmean"'
        raise ValueError(f"{option} needs {name} [..., T, any], got {tuple(student.shape)}")


def check_logits(name: str, logits: object) -> Tensor:
    if not isinstance(logits, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(logits).__name__}; a model's output has .logits")
    check_columns(name, logits)
    return logits


def check_teacher_logits(name: str, given: object, student: Tensor, options: KDOptions) -> Tensor:
    """The teacher's logits that are given under this name."""
    teacher = check_logits(name, given)
    if student.shape != teacher.shape:
        shapes = f"student_logits {tuple(student.shape)}, {name} {tuple(teacher.shape)}"
        if student.shape[:-1] != teacher.shape[:-1]:
            raise ValueError(f"{name} must have the student's leading shape, got {shapes}")
        if options.vocab_mismatch == "error":
            advice = (
                'if the columns that both have mean the same tokens, vocab_mismatch="truncate" compares those'
                if options.process_group is None
                else "with process_group each rank must have the same columns of both"
            )
            raise ValueError(f"{name} must have the student's vocabulary, got {shapes}; {advice}")
    if student.device != teacher.device:
        raise ValueError(
            f"{name} must be on the student's device, got student_logits on {student.device} and "
            f"{name} on {teacher.device}"
        )
    return teacher


def check_labels(labels: Tensor | None, student: Tensor, options: KDOptions) -> None:
    if labels is None:
        if (weight := options.weight_of_hard()) > 0:
            raise ValueError(
                f"labels must be given while the hard term has a weight (hard_weight is {weight:g}); "
                "for the soft term alone use alpha=1, or hard_weight=0"
            )
        return
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels must be an int64 tensor of token ids, got {got}; use labels.long()")
    check_dense("labels", labels)
    _check_shape("labels", labels, student)


def check_weights(weights: Tensor | None, student: Tensor, readable: bool) -> Tensor | None:
    """The weights, with NaN for those that may not be and could not be refused, values not being `readable`."""
    if weights is None:
        return None
    if not isinstance(weights, Tensor) or not weights.is_floating_point():
        got = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
        raise TypeError(f"weights must be a floating tensor, got {got}; for a mask use weights=mask.float()")
    check_dense("weights", weights)
    _check_shape("weights", weights, student)
    fits = torch.isfinite(weights) & (weights >= 0)
    if readable and not fits.all():
        row = int((~fits.reshape(-1)).nonzero()[0])
        raise ValueError(f"weights must be finite and at least 0, got {float(weights.reshape(-1)[row])} in row {row}")
    return torch.where(fits, weights, torch.nan)


def check_num_items(
    num_items: float | Tensor | None, student: Tensor, options: KDOptions, readable: bool
) -> float | Tensor | None:
    if num_items is None:
        return None
    if options.reduction != "mean":
        raise ValueError(
            f'num_items replaces the denominator of reduction="mean", but reduction is {options.reduction!r}; '
            "leave one of the two out"
        )
    if not isinstance(num_items, Tensor):
        num_items = number("num_items", num_items, "a number or a tensor")
        _check_count(num_items)
        return num_items
    check_dense("num_items", num_items)
    if num_items.numel() != 1:
        raise ValueError(f"num_items must have one element, got the shape {tuple(num_items.shape)}")
    if num_items.device != student.device and (num_items.dim() > 0 or num_items.device.type != "cpu"):
        raise ValueError(f"num_items must be on the logits' device {student.device}, got {num_items.device}")
    if readable:
        _check_count(num_items.item())
    return num_items


def _check_count(num_items: float) -> None:
    if not 0 <= num_items < float("inf"):
        raise ValueError(f"num_items must be finite and at least 0, got {num_items}")


def check_teacher_weights(
    weights: Sequence[float] | Tensor | None, teachers: int, student: Tensor, readable: bool
) -> list[float] | Tensor:
    """One for each of the teachers; as a tensor NaN for those that may not be, values not being `readable`."""
    if weights is None:
        return [1.0] * teachers
    if isinstance(weights, Tensor):
        check_dense("teacher_weights", weights)
        if not weights.is_floating_point():
            raise TypeError(f"teacher_weights must be a floating tensor or numbers, got {weights.dtype}")
        if weights.device != student.device:
            raise ValueError(f"teacher_weights must be on the logits' device {student.device}, got {weights.device}")
        if weights.shape != (teachers,):
            raise ValueError(f"teacher_weights must have the shape ({teachers},), got {tuple(weights.shape)}")
        if not readable:
            return torch.where(torch.isfinite(weights) & (weights >= 0), weights, torch.nan)
        weights = weights.tolist()
    elif not isinstance(weights, Sequence) or isinstance(weights, str):
        kind = type(weights).__name__
        raise TypeError(f"teacher_weights must be a sequence of numbers or a tensor, one for each teacher, got {kind}")
    if len(weights) != teachers:
        raise ValueError(f"teacher_weights must be {teachers} numbers, one for each teacher, got {len(weights)}")
    known = [number(f"teacher_weights[{k}]", weight) for k, weight in enumerate(weights)]
    for k, weight in enumerate(known):
        if not 0 <= weight < float("inf"):
            raise ValueError(f"teacher_weights[{k}] must be finite and at least 0, got {weight}")
    if not sum(known) > 0:
        raise ValueError(f"teacher_weights must not all be 0, got {weights}: no teacher would be left")
    return known


def check_inplace(student: Tensor, teachers: Sequence[Tensor]) -> None:
    """Whether the gradient may overwrite the student's logits. Not traced: whose storage it is shows in eager mode."""
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and student.requires_grad):
        return  # without a gradient nothing will be overwritten
    if torch._C._are_functorch_transforms_active():
        raise ValueError(
            "inplace=True needs student_logits that a model computed, got those of a transform of torch.func, which "
            "have no storage to overwrite; use inplace=False"
        )
    base = student._base if student._is_view() else None
    if student.is_leaf or (base is not None and base.is_leaf and base.requires_grad):
        raise ValueError(
            "inplace=True needs student_logits that a model computed, got a leaf tensor (or a view of one), whose "
            "storage is its owner's; use inplace=False"
        )
    if lazy(student):
        raise ValueError(
            "inplace=True needs student_logits whose values lie in memory, got the lazy negative of what does, or "
            "zeros without memory; pass student_logits.resolve_neg() or .clone(), or use inplace=False"
        )
    memory = student.untyped_storage().data_ptr()
    if memory != 0 and any(memory == teacher.untyped_storage().data_ptr() for teacher in teachers):
        raise ValueError(
            "inplace=True would overwrite teacher_logits, which share the student's storage; use inplace=False"
        )
    check_no_overlap(student)


def check_no_overlap(student: Tensor) -> None:
    """Raises ValueError where two elements may share a place: each stride must reach past what smaller ones span."""
    if student.numel() == 0:
        return
    reach = 1
    for stride, size in sorted(zip(student.stride(), student.shape, strict=True)):
        if size > 1 and stride < reach:
            raise ValueError(
                "inplace=True needs student_logits whose elements are all apart in memory, got an expanded or "
                f"overlapping tensor of shape {tuple(student.shape)} and strides {tuple(student.stride())}; "
                "use inplace=False"
            )
        reach += stride * (size - 1)


def _check_shape(name: str, values: Tensor, student: Tensor) -> None:
    if values.shape != student.shape[:-1]:
        raise ValueError(
            f"{name} must have the student's leading shape {tuple(student.shape[:-1])}, got {tuple(values.shape)}"
        )
    if values.device != student.device:
        raise ValueError(f"{name} must be on the student's device {student.device}, got {values.device}")
