"""The loss of logits whose vocabulary is cut over the ranks of a process group: tensor parallelism.

Each rank has a slice of the columns and visits it by the verbs of any backend, as if it were a vocabulary. With P_r and
Q_r the mass that p and q have in the slice of rank r, and p^r, q^r what they are within it,

    KL(p || q) = KL(P || Q) + sum P_r KL(p^r || q^r)        and so the cross entropy; KL(q || p) with P and Q exchanged
    -log q1[y] = -log Q1_r - log q1^r[y]                    r the rank that has the label y

No term is negative, so nothing cancels; and KL(P || Q) is that of a row with a column for each rank, whose logits are
the slices' log-sum-exps. The torch backend has it in float64, exact where the ranks are close, with every edge case.
The other divergences take a second visit, once Z_s and Z_t of the whole row are known. A sparse teacher's ids are those
of the whole vocabulary, and all ranks have all of them: a rank visits its other columns, and sends log R of these with
the logits at the ids that it has, from which all make the same k + 1 classes. Several teachers are combined with their
log-sum-exps over the whole row, for which an arithmetic mean has a visit more; a geometric one needs none.

One all-gather a visit brings each rank what all have found of a row; from there on all compute the same from the same
numbers. Stats of the whole row, measured from the slice's own points, are then what the backward verb of a slice takes:
nothing is sent backward. A rank sends, in float32 (twice as much where stats are float64: for float64 logits, and for
several teachers of a float32 student),

    forward KL, cross entropy   24 bytes a row          reverse KL   28          logit MSE   12
    the other divergences       24, and 16 of the second visit
    a sparse teacher            12, and 4 for each of its k slots, of any divergence
    an arithmetic mean          8 for each teacher, float64 whatever the logits are, for the loss and for the entropies
    the hard term               16, of which 4 are shared with the soft one but for logit MSE and a sparse teacher,
                                and 8 with label smoothing
    each of the two entropies   24; that of a sparse teacher nothing
    the widths of the slices    8 bytes a call, and 8 of what it was called with

`ranks.py` knows who has which columns, `slices.py` has the verbs, `merging.py` the equations.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed

from fused_kd import linear_op
from fused_kd.autograd import FusedKDFunction, _EagerFunction, _losses
from fused_kd.backends.rows import RowOptions
from fused_kd.divergences import divergence_of
from fused_kd.options import KDOptions
from fused_kd.parallel.ranks import Ranks
from fused_kd.parallel.slices import Slices, has_second_visit, takes_second_visit
from fused_kd.positions import Coefficient
from fused_kd.sparse import SparseTeacher
from fused_kd.taught import TaughtRows, Teacher


def of_dtensors(
    student: Any, teacher: Any, labels: Any, num_items: Any, weights: Any, options: KDOptions
) -> tuple[tuple[Any, ...], KDOptions]:
    """The local tensors of logits that are sharded on the vocabulary, and options with the group that they are sharded
    over. Raises TypeError or ValueError for any other DTensor."""
    mesh, placements = student.device_mesh, student.placements
    sharded = [i for i, placement in enumerate(placements) if not placement.is_replicate()]
    if len(sharded) != 1 or not placements[sharded[0]].is_shard(student.dim() - 1):
        raise ValueError(
            "student_logits is a DTensor, which must be sharded on the vocabulary, its last dimension, and on nothing "
            f"else, got the placements {placements}; of logits sharded on other dimensions pass to_local(), whose loss "
            "is that of this rank's positions"
        )
    group = mesh.get_group(sharded[0])
    if options.process_group not in (None, group):
        raise ValueError("process_group must be None, or the group that the DTensor student_logits is sharded over")

    def whole(name: str, value: Any) -> Any:
        if not hasattr(value, "full_tensor"):
            return value
        if not all(placement.is_replicate() for placement in value.placements):
            raise ValueError(f"{name} must be a whole tensor or a replicated DTensor, got {value.placements}")
        return value.to_local()

    def cut(name: str, logits: Any) -> Tensor:
        if getattr(logits, "placements", None) != placements or logits.device_mesh != mesh:
            got = getattr(logits, "placements", type(logits).__name__)
            raise ValueError(f"{name} must be a DTensor with the placements {placements} of student_logits, got {got}")
        local: Tensor = logits.to_local()
        return local

    if isinstance(teacher, SparseTeacher):
        tensors = whole("ids", teacher.ids), whole("log_probs", teacher.log_probs)
        teacher = SparseTeacher(*tensors, teacher.missing)
    elif isinstance(teacher, (list, tuple)):
        teacher = [cut(f"teacher_logits[{k}]", logits) for k, logits in enumerate(teacher)]
    else:
        teacher = cut("teacher_logits", teacher)
    vectors = whole("labels", labels), whole("num_items", num_items), whole("weights", weights)
    return (student.to_local(), teacher, *vectors), replace(options, process_group=group)


def slices_of(student: Tensor, teacher: Teacher, options: KDOptions, eager: bool, *others: object) -> Slices:
    """Asks all ranks for the width of their slice, and whether what they are called with is the same, `others` too.
    Raises for options that cannot be put together from slices, before that."""
    group = options.process_group
    assert group is not None
    if not eager:
        raise TypeError("process_group needs plain tensors in eager mode: no mode, no transform and no other subclass")
    if options.vocab_mismatch != "error":
        raise ValueError(
            'vocab_mismatch="truncate" has no meaning with process_group, where each rank has a slice of both '
            'vocabularies; use "error" and slices of one width'
        )
    second_visit = takes_second_visit(teacher.kind, divergence_of(options.divergence))
    if second_visit and options.backend != "auto" and not has_second_visit(options.backend):
        raise ValueError(
            f"backend={options.backend!r} has no part of divergence {options.divergence!r} for a slice of the "
            'vocabulary; with process_group it takes another one, or "auto"'
        )
    rows, dtypes = tuple(student.shape[:-1]), [x.dtype for x in (student, *teacher.tensors)]
    call = f"{replace(options, process_group=None)}, {rows}, {dtypes}, {teacher.kind}"
    return Slices(Ranks.of(group, student, ", ".join([call, *map(str, others)])))


def rows_loss(
    slices: Slices,
    student: Tensor,
    teacher: Teacher,
    targets: Tensor,
    coef_soft: Coefficient,
    coef_hard: Coefficient,
    symbolic: None,
    rows: RowOptions,
    inplace: bool,
    summed: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`fused_kd.autograd.rows_loss` with the labels of the whole vocabulary as targets: the same bits on each rank, and
    the gradient of its slice."""
    slices.check_rows(TaughtRows(student, teacher, targets, rows))
    head = student, targets, coef_soft, coef_hard, symbolic, teacher.kind, rows, inplace, summed
    losses, soft, hard, _ = _MergedFunction.apply(*head, *teacher.tensors, slices)
    return losses, soft, hard


class _MergedFunction(_EagerFunction):
    """With targets, options and teacher of the whole vocabulary; after the teacher's tensors come the slices."""

    generate_vmap_rule = False
    setup_context = staticmethod(torch.autograd.Function.setup_context)

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        student, targets, coef_soft, coef_hard, symbolic, kind, options, inplace, summed, *teacher, slices = inputs
        own = slices.of(TaughtRows(student, Teacher(kind, teacher), targets, options))
        soft, hard, stats = own.forward()
        output = (_losses(soft, hard, coef_soft, coef_hard, options, summed), soft, hard, stats)
        _, (_, tensors), local, of_backward = own.backward_rows()
        of_slice = student, local, coef_soft, coef_hard, symbolic, kind, of_backward, inplace, summed, *tensors
        FusedKDFunction.setup_context(ctx, of_slice, output)
        ctx.eager = True
        return output


def linear_loss(slices: Slices, *arguments: Any) -> tuple[Tensor, ...]:
    """The operator of this name of `linear_op.py`, for heads that are slices: its first three results."""
    results: tuple[Tensor, ...] = _LinearFunction.apply(*arguments, slices)
    return results


class _LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        *arguments, slices = inputs
        output = _linear_results(slices, *arguments)
        linear_op.save_operands(ctx, tuple(arguments), output)
        ctx.run = partial(_linear_results, slices)
        ctx.mark_non_differentiable(*output[1:3])
        return output[:3]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        return linear_op.backward(ctx, *grads)


def _linear_results(slices: Slices, *arguments: Any) -> tuple[Tensor, ...]:
    """Each rank has its slice's share in the gradient of the hidden states, which all have."""
    (operands,) = linear_op.checked(linear_op.NAMES, arguments, read=True)
    results = linear_op.results_of(operands, slices)
    of_hidden = results[linear_op.GRADIENTS][0]
    if of_hidden.numel() > 0:
        distributed.all_reduce(of_hidden, group=slices.ranks.group)
    return results
