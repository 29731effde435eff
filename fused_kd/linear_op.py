"""The rows of a loss from hidden states as one PyTorch operator, with its gradient.

Gradients are computed in the forward, while the logits of a chunk are there, and the upstream gradient, a number, is
applied in the backward. With `recompute` the backward computes them, and projects everything again; the upstream
gradient may then be one number a row.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from fused_kd import teachers
from fused_kd.backends.rows import RowOptions
from fused_kd.checks import plain
from fused_kd.linear_rows import Gradients, Head, Heads, block_rows, linear_rows, product_dtype, rows_of_first
from fused_kd.operands import check_vectors, with_options
from fused_kd.ops import no_second_derivative, operator
from fused_kd.saving import save, saved

if TYPE_CHECKING:
    from fused_kd.parallel.slices import Slices


class _Operands(NamedTuple):
    student: Head
    teacher: Heads
    targets: Tensor
    coef_soft: Tensor
    coef_hard: Tensor
    wanted: tuple[bool, bool, bool]
    recompute: bool
    summed: bool
    entropies: bool
    chunk_rows: int | None
    options: RowOptions


_SIGNATURE = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor[] teacher, Tensor[] teacher_weights, Tensor?[] teacher_biases, "
    "str kind, Tensor targets, Tensor coef_soft, Tensor coef_hard, bool[] wanted, bool recompute, bool summed, "
    "bool entropies, int? chunk_rows, ScalarType? dtype"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
NAMES = [argument.split()[-1] for argument in _SIGNATURE.partition(" -> ")[0].split(", ")]
_COEF_SOFT, _COEF_HARD = 8, 9  # among the arguments
GRADIENTS = slice(5, 9)  # of the results: `fused_kd.linear_rows.Gradients`


def checked(names: list[str], arguments: tuple[Any, ...], read: bool) -> tuple[_Operands]:
    """`teacher` ends with the hidden states of its heads. Raises ValueError or TypeError."""
    *named, options = with_options(names, arguments, read)
    hidden, weight, bias, teacher, weights, biases, kind, targets, coef_soft, coef_hard, *switches, dtype = named
    wanted, recompute, summed, entropies, chunk_rows = switches
    student = Head(hidden, weight, bias, product_dtype(hidden, dtype))
    given = len(teacher) - len(weights)
    heads = zip(teacher[given:], weights, biases, strict=True)
    of_teacher = Heads(
        kind, tuple(teacher[:given]), tuple(Head(*head, product_dtype(head[0], dtype)) for head in heads)
    )
    vectors = {"targets": targets, "coef_soft": coef_soft, "coef_hard": coef_hard}
    check_vectors(student.logits_like(), of_teacher.as_teacher(), vectors)
    operands = (student, of_teacher, targets, coef_soft, coef_hard, tuple(wanted), recompute, summed, entropies)
    return (_Operands(*operands, chunk_rows, options),)


def results_of(a: _Operands, slices: "Slices | None" = None) -> tuple[Tensor, ...]:
    wanted = (False, False, False) if a.recompute else a.wanted
    vectors = (a.targets, a.coef_soft, a.coef_hard)
    rows = linear_rows(a.student, a.teacher, *vectors, a.options, wanted, a.entropies, a.chunk_rows, slices)
    losses = rows.soft * a.coef_soft + rows.hard * a.coef_hard
    of_hidden, *others = rows.gradients
    gradients = (None if of_hidden is None else of_hidden.view(a.student.hidden.shape), *others)
    loss = losses.sum() if a.summed else losses
    return _results(loss, rows.soft, rows.hard, *(rows.entropies or (None, None)), *gradients)


def _fake(a: _Operands) -> tuple[Tensor, ...]:
    like, logits = a.student.logits_like(), a.teacher.as_teacher()
    dtype, *_ = teachers.row_dtypes(like, logits)
    soft, hard, *entropies = (a.targets.new_empty(a.targets.shape, dtype=dtype) for _ in range(4))
    exact = torch.promote_types(a.student.dtype, torch.float32)
    hidden, weight, bias = (
        None if x is None or a.recompute or not wanted else x.new_empty(x.shape, dtype=exact)
        for x, wanted in zip(a.student[:3], a.wanted, strict=True)
    )
    n = rows_of_first(a.student.weight)
    first, others = (None, None) if weight is None else (torch.empty_like(x) for x in (weight[:n], weight[n:]))
    gradients = Gradients(hidden, first, others, bias)
    loss = soft.new_empty(()) if a.summed else torch.empty_like(soft)
    return _results(loss, soft, hard, *(entropies if a.entropies else (None, None)), *gradients)


def _results(loss: Tensor, *others: Tensor | None) -> tuple[Tensor, ...]:
    """An operator has no None among its results; and each of them has a memory of its own."""
    return loss, *(loss.new_empty(0) if x is None else x for x in others)


linear_loss = operator("linear_loss", results_of, _fake, _SIGNATURE, check=checked)


def save_operands(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    student, (teacher, weights, biases), rest = inputs[:3], inputs[3:6], inputs[6:]
    kind, targets, coef_soft, coef_hard, _, ctx.recompute, _, _, chunk_rows, dtype, *options, symbolic = rest
    ctx.set_materialize_grads(False)
    ctx.run = linear_loss
    ctx.dtypes = [None if x is None else x.dtype for x in student]
    ctx.lengths = [len(teacher), len(weights), len(biases)]
    ctx.call = kind, chunk_rows, dtype, options
    lists = (*teacher, *weights, *biases)
    again = (*student, targets, coef_soft, coef_hard, symbolic, *lists) if ctx.recompute else ()
    save(ctx, *output[1:3], *output[GRADIENTS], *again)


def backward(ctx: Any, grad: Tensor | None, *others: Tensor | None) -> tuple[Any, ...]:
    if any(x is not None for x in others):
        no_second_derivative()
    # (In the structure that PyTorch asks for: a list of tensors has a list of gradients.)
    results: list[Any] = [[None] * len(x) if isinstance(x, list) else None for x in ctx.needs_input_grad]
    if grad is not None:
        needed = [bool(x) for x in ctx.needs_input_grad[:3]]
        soft, hard, hidden, first, rest, bias, *inputs = saved(ctx)
        if ctx.recompute:
            hidden, first, rest, bias = _computed(ctx, grad, inputs, needed)
        pieces = ([hidden], [first, rest], [bias])
        for i in range(3):
            if needed[i]:
                results[i] = _rounded(pieces[i], ctx.dtypes[i], None if ctx.recompute else grad)
        for i, term in ((_COEF_SOFT, soft), (_COEF_HARD, hard)):
            if ctx.needs_input_grad[i]:
                results[i] = grad * term
    return tuple(results)


def _computed(ctx: Any, grad: Tensor, inputs: list[Any], wanted: list[bool]) -> list[Tensor]:
    *student, targets, coef_soft, coef_hard, symbolic = inputs[:7]
    lists, rest = [], inputs[7:]
    for length in ctx.lengths:
        lists.append(rest[:length])
        del rest[:length]
    kind, chunk_rows, dtype, options = ctx.call
    switches = (wanted, False, True, False, chunk_rows, dtype)
    coefs = (coef_soft * grad, coef_hard * grad)
    return list(ctx.run(*student, *lists, kind, targets, *coefs, *switches, *options, symbolic)[GRADIENTS])


def _rounded(pieces: Sequence[Tensor], dtype: torch.dtype, by: Tensor | None) -> Tensor:
    """`by` times the gradient that is in two pieces of rows, or in one. It is ours where `by` is None; and where the
    graph is not kept: nobody will ask for it again, and it need not be there twice."""
    first, *others = pieces
    plainly = plain(*pieces, by) and not (torch.is_grad_enabled() or (by is not None and is_legacy_batchedtensor(by)))
    ours = plainly and (by is None or not torch._C._autograd._get_current_graph_task_keep_graph())
    if first.dtype == dtype or not plainly:
        whole = torch.cat(tuple(pieces)) if any(len(piece) for piece in others) else first
        if ours and by is not None:
            return whole.detach().mul_(by)
        return (whole if by is None else whole * by).to(dtype)
    shape = (sum(len(piece) for piece in pieces), *first.shape[1:])
    # The gradient is half as large once it is rounded. What is written there was read before.
    out = first.detach().view(dtype).flatten()[: math.prod(shape)].view(shape) if ours and others else None
    out = first.new_empty(shape, dtype=dtype) if out is None else out
    begin = 0
    for piece in pieces:
        for some in torch.split(piece, block_rows(piece)):
            out[begin : begin + len(some)] = (some if by is None else some * by).to(dtype)
            begin += len(some)
    return out


linear_loss.register_autograd(backward, setup_context=save_operands)
