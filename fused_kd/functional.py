"""The loss as a function of logits: arguments are checked, and what the rows give is reduced.

Everything here but the two tensors of logits is a vector with one number a row, in ordinary PyTorch.
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fused_kd.autograd import rows_loss
from fused_kd.backends.rows import RowOptions
from fused_kd.checks import (
    check_inplace,
    check_labels,
    check_num_items,
    check_student,
    check_weights,
    lazy,
    plain,
)
from fused_kd.divergences import Divergence, DivergenceName, divergence_of
from fused_kd.entropies import row_entropies
from fused_kd.options import Ensemble, KDOptions, Reduction, VocabMismatch
from fused_kd.positions import Coefficient, Counted, counted, known
from fused_kd.taught import TaughtRows
from fused_kd.teachers import TeacherLogits, backend_name, row_dtypes, teacher_of, tensors_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class KDLossOutput(NamedTuple):
    """What `return_parts=True` gives: loss = alpha * temperature**2 * soft + hard_weight * hard.

    `soft` (without the factor) and `hard` are reduced like the loss, and detached. A term whose weight is 0 is not
    computed: None. With `entropies=True` those of the student and the teacher, -sum q log q and -sum p log p, in nats,
    at their temperatures, reduced like soft, and detached.
    """

    loss: Tensor
    soft: Tensor | None
    hard: Tensor | None
    student_entropy: Tensor | None = None
    teacher_entropy: Tensor | None = None


def fused_kd_loss(
    student_logits: Tensor,
    teacher_logits: TeacherLogits,
    labels: Tensor | None = None,
    *,
    temperature: float = KDOptions.temperature,
    alpha: float = KDOptions.alpha,
    hard_weight: float | None = KDOptions.hard_weight,
    teacher_temperature: float | None = KDOptions.teacher_temperature,
    t2_scaling: bool = KDOptions.t2_scaling,
    divergence: DivergenceName | Divergence = KDOptions.divergence,
    ensemble: Ensemble = KDOptions.ensemble,
    reduction: Reduction = KDOptions.reduction,
    ignore_index: int = KDOptions.ignore_index,
    soft_on_ignored: bool = KDOptions.soft_on_ignored,
    shift: bool = KDOptions.shift,
    label_smoothing: float = KDOptions.label_smoothing,
    student_logit_scale: float = KDOptions.student_logit_scale,
    teacher_logit_scale: float = KDOptions.teacher_logit_scale,
    student_softcap: float | None = KDOptions.student_softcap,
    teacher_softcap: float | None = KDOptions.teacher_softcap,
    vocab_mismatch: VocabMismatch = KDOptions.vocab_mismatch,
    inplace: bool = KDOptions.inplace,
    return_parts: bool = KDOptions.return_parts,
    entropies: bool = KDOptions.entropies,
    process_group: "ProcessGroup | None" = KDOptions.process_group,
    backend: str = KDOptions.backend,
    num_items: float | Tensor | None = None,
    weights: Tensor | None = None,
    teacher_weights: Sequence[float] | Tensor | None = None,
) -> Tensor | KDLossOutput:
    """The distillation loss of Hinton, Vinyals and Dean (2015), "Distilling the Knowledge in a Neural Network".

    For one position, with p = softmax(t / teacher_temperature), q = softmax(s / temperature), q1 = softmax(s):

        alpha * temperature**2 * KL(p || q)  +  hard_weight * -log q1[label]

    Neither the forward nor the backward allocates anything of the logits' size but the gradient. Differentiable once,
    in the student's logits; the teacher is a constant, whatever its requires_grad.

    Args:
        student_logits: [..., V], float32, float16, bfloat16 or float64, any strides with unit stride in V. Nothing is
            copied but what is not in memory as it is, as by PyTorch's own operators: a tensor whose is_neg() is true,
            and zeros without memory, which derivatives make.
        teacher_logits: [..., V] with the same leading shape, on the same device; its dtype may differ. Several
            teachers: a list of such tensors, whose distributions' mean is p. They are combined for a few rows at a
            time; with a float32 student in float64, by the torch backend. Or a `SparseTeacher`: a few
            log-probabilities a position, at the teacher's temperature, so that `teacher_temperature` stays None. The
            loss is then float64 only if the student is.
        labels: the logits' leading shape, int64. None needs hard_weight == 0.
        temperature: tau of both softmaxes of the soft term, between 1e-10 and 1e10.
        alpha: weight of the soft term, in [0, 1] unless hard_weight is given.
        hard_weight: weight of the hard term; None: 1 - alpha. The paper's L = KD + w CE is alpha=1, hard_weight=w.
        teacher_temperature: the teacher's own tau; None: temperature.
        t2_scaling: multiply the soft term by temperature**2, which keeps its gradient's size when tau changes.
        divergence: an object of `fused_kd.divergences`, or the name of one with its defaults: "forward_kl",
            "cross_entropy", "reverse_kl", "symmetric_kl", "jsd", "skew_kl", "skew_reverse_kl", "total_variation" or
            "logit_mse", which stands in place of KL(p || q) above.
        ensemble: the mean of several teachers' distributions, weighted by `teacher_weights` w: "arithmetic", p = sum
            w_k softmax(t_k / teacher_temperature), or "geometric", p = softmax(sum w_k t_k / teacher_temperature).
        reduction: "mean": each term over its own rows, weighted by `weights`. "sum". "batchmean": the sum divided by
            student_logits.shape[0]. "none": one loss a position, in the leading shape, 0 where nothing counts.
        ignore_index: a position with this label has no term.
        soft_on_ignored: ... but keeps the soft term: a transfer set of which only a part is labelled.
        shift: score position i against the label (and weight) of position i + 1, without a copy. The last position
            has no term.
        label_smoothing: of the hard term, in [0, 1], as in torch.nn.functional.cross_entropy.
        student_logit_scale, student_softcap, teacher_logit_scale, teacher_softcap: what a model does to its logits
            before a softmax: softcap * tanh(scale * logit / softcap), as Gemma 2; a softcap of None: scale * logit.
            Before the temperature, and the hard term's logits too. Applied to a few rows at a time; those of the
            teacher to each of several, and not to a SparseTeacher, whose log-probabilities have had them.
        vocab_mismatch: "error", or "truncate" to the columns that both have.
        inplace: the backward overwrites student_logits with the gradient instead of allocating it.
        return_parts: return a KDLossOutput.
        entropies: with return_parts, the entropies of student and teacher too: each logit is read once more. Of several
            teachers that of their mean, of a SparseTeacher that of its classes.
        process_group: tensor parallelism: the logits are this rank's slice of the vocabulary. Slices lie in the order
            of the ranks, one column or more, student and teacher cut alike; labels are those of the whole vocabulary.
            Every rank calls with the same options, positions, labels and weights, gets the loss over the whole
            vocabulary, to the same bits, and the gradient of its slice. Each of several teachers is cut as the student;
            a `SparseTeacher` is whole, with ids of the whole vocabulary, and the same on every rank. In eager mode. Of
            logits, the "cuda" backend has forward and reverse KL, cross entropy and logit MSE; with the other
            divergences "auto" takes "torch" there, and for capped logits everywhere. DTensors that are sharded on the
            vocabulary say it by themselves; their loss is an ordinary tensor, the same on every rank.
        backend: "auto", "cpu", "triton", "cuda" or "torch"; "auto" takes the environment variable FUSED_KD_BACKEND,
            else the first that fits. `fused-kd info` lists them.
        num_items: with reduction="mean", divide the sum by this instead: a number or a tensor of one element, such as
            the count of labelled positions over all micro-batches of a step. 0 counts as 1.
        weights: the logits' leading shape, floating, finite and at least 0; 0 is an ignored position.
        teacher_weights: one number for each of several teachers, a sequence or a floating tensor [K], finite and at
            least 0, not all 0; None: equal. Divided by their sum; a constant. A teacher of weight 0 has no part.

    Returns:
        The loss, float32 (float64 if either logits are): a scalar, or the leading shape with reduction="none".
        No counted position: 0, with a zero gradient.

    Raises:
        ValueError, TypeError: an argument that does not fit; the message names it and what to do.
        IndexError: on the CPU, a label outside [0, V) that is not ignore_index. On other devices, and for weights
            that are negative or not finite, the position is NaN instead: telling would need a synchronisation.
    """
    options = KDOptions(
        temperature=temperature,
        alpha=alpha,
        hard_weight=hard_weight,
        teacher_temperature=teacher_temperature,
        t2_scaling=t2_scaling,
        divergence=divergence,
        ensemble=ensemble,
        reduction=reduction,
        ignore_index=ignore_index,
        soft_on_ignored=soft_on_ignored,
        shift=shift,
        label_smoothing=label_smoothing,
        student_logit_scale=student_logit_scale,
        teacher_logit_scale=teacher_logit_scale,
        student_softcap=student_softcap,
        teacher_softcap=teacher_softcap,
        vocab_mismatch=vocab_mismatch,
        inplace=inplace,
        return_parts=return_parts,
        entropies=entropies,
        process_group=process_group,
        backend=backend,
    )
    return compute(student_logits, teacher_logits, labels, num_items, weights, teacher_weights, options)


def compute(
    student_logits: Tensor,
    teacher_logits: TeacherLogits,
    labels: Tensor | None,
    num_items: float | Tensor | None,
    weights: Tensor | None,
    teacher_weights: Sequence[float] | Tensor | None,
    options: KDOptions,
) -> Tensor | KDLossOutput:
    """`fused_kd_loss` with its options checked."""
    distributed = options.process_group is not None or hasattr(student_logits, "full_tensor")
    if distributed and torch.compiler.is_compiling():
        arguments = (student_logits, teacher_logits, labels, num_items, weights, teacher_weights, options)
        result: Tensor | KDLossOutput = torch.compiler.disable(compute)(*arguments)  # type: ignore[no-untyped-call]
        return result
    if hasattr(student_logits, "full_tensor"):  # a DTensor
        from fused_kd import parallel  # noqa: PLC0415  (PyTorch may be built without torch.distributed)

        given = (student_logits, teacher_logits, labels, num_items, weights)
        (student_logits, teacher_logits, labels, num_items, weights), options = parallel.of_dtensors(*given, options)
    check_student(student_logits, options)
    eager = plain(student_logits, *tensors_of(teacher_logits), labels, num_items, weights, teacher_weights)
    readable = eager and student_logits.device.type == "cpu"  # values, and without waiting for them
    teacher = teacher_of(student_logits, teacher_logits, teacher_weights, options, readable)
    check_labels(labels, student_logits, options)
    num_items = check_num_items(num_items, student_logits, options, readable)
    weights = check_weights(weights, student_logits, readable)
    if options.inplace:
        check_inplace(student_logits, teacher.tensors)

    # Chosen once, for both directions; an operator chooses when it runs.
    divergence = divergence_of(options.divergence)
    backend = options.backend
    if eager:
        chosen = backend_name(backend, student_logits, teacher, divergence.name)
        backend = backend if options.caps else chosen  # capped logits have another dtype
    rows, symbolic = row_options(options, divergence, backend, eager)
    dtype, *_ = row_dtypes(student_logits, teacher)
    counts = counted(student_logits, labels, num_items, weights, options, dtype, eager)
    plainly = eager and not any(map(lazy, (student_logits, counts.targets, *teacher.tensors)))
    run, entropies_of = partial(rows_loss, plainly), row_entropies
    if options.process_group is not None:
        from fused_kd import parallel  # noqa: PLC0415  (PyTorch may be built without torch.distributed)

        slices = parallel.slices_of(student_logits, teacher, options, eager)
        run, entropies_of = partial(parallel.rows_loss, slices), slices.row_entropies
    loss, *terms = run(
        student_logits,
        teacher,
        counts.targets,
        counts.coef_soft,
        counts.coef_hard,
        symbolic,
        rows,
        options.inplace,
        options.reduction != "none",
    )
    if options.entropies:
        auto = rows._replace(backend=options.backend)
        terms += entropies_of(TaughtRows(student_logits.detach(), teacher, counts.targets, auto), symbolic)
    return output(loss, terms, counts, student_logits.shape[:-1], options)


def output(
    loss: Tensor, terms: Sequence[Tensor], counts: Counted, positions: Sequence[int], options: KDOptions
) -> Tensor | KDLossOutput:
    """What the caller gets of a loss, or of one for each row, and of the `terms`, [N] each: soft, hard and, if wanted,
    both entropies."""
    summed = options.reduction != "none"
    if not summed:
        loss = loss.reshape(positions)
    if not options.return_parts:
        return loss
    soft, hard, *entropies = terms

    def reduced(term: Tensor, of_term: Coefficient) -> Tensor:
        values = (term * of_term).detach()
        return values.sum() if summed else values.reshape(positions)

    return KDLossOutput(
        loss,
        reduced(soft, counts.of_soft) if options.has_soft else None,
        reduced(hard, counts.of_hard) if options.has_hard else None,
        *(reduced(entropy, counts.of_soft) for entropy in entropies),
    )


def row_options(
    options: KDOptions, divergence: Divergence, backend: str, eager: bool
) -> tuple[RowOptions, Tensor | None]:
    """What the operators take; their numbers as a tensor where one of them is symbolic (`ops.py`)."""
    temperatures = (options.temperature, options.teacher_temperature or options.temperature)
    numbers, caps = (*temperatures, options.label_smoothing, *divergence.parameters), options.caps
    symbolic = None
    if not (eager or all(map(known, (*numbers, *caps)))):
        symbolic = torch.stack([torch.ones((), dtype=torch.float64, device="cpu") * x for x in (*numbers, *caps)])
        numbers, caps = (1.0, 1.0, 0.0, *(0.5 for _ in divergence.parameters)), tuple(1.0 for _ in caps)
    temperature, teacher_temperature, label_smoothing, *parameters = map(float, numbers)
    rows = RowOptions(
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        divergence=divergence.name,
        label_smoothing=label_smoothing,
        soft=options.has_soft,
        hard=options.has_hard,
        backend=backend,
        parameters=tuple(parameters),
        caps=tuple(map(float, caps)),
    )
    return rows, symbolic
