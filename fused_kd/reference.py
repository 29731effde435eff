"""The definition of the loss, in plain PyTorch: the oracle of every test, never used for speed.

Geoffrey Hinton, Oriol Vinyals, Jeff Dean, "Distilling the Knowledge in a Neural Network", 2015. For one position with
student logits s, teacher logits t and label y:

    p = softmax(t / tau_t)        q = softmax(s / tau)        q1 = softmax(s)
    soft = KL(p || q) = sum p (log p - log q)    or another of `fused_kd.divergences`
    hard = -log q1[y]
    loss = alpha tau^2 soft + hard_weight hard

Everything is computed in the dtype of the logits; give it float64.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

from fused_kd.divergences import (
    JSD,
    AlphaBeta,
    AlphaDivergence,
    CrossEntropy,
    Divergence,
    ForwardKL,
    LogitMSE,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
    SymmetricKL,
    TotalVariation,
    divergence_of,
)
from fused_kd.sparse import SparseTeacher


def soft_term(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float,
    teacher_temperature: float,
    divergence: str | Divergence,
) -> Tensor:
    """How far the student is from the teacher, for rows [N, V]: [N]."""
    divergence = divergence_of(divergence)
    x, y = student / temperature, teacher / teacher_temperature
    if isinstance(divergence, LogitMSE):
        return mean_squared_difference(x, y, divergence.centred)
    return divergence_terms(log_softmax(y, -1), log_softmax(x, -1), divergence).sum(-1)


def divergence_terms(log_p: Tensor, log_q: Tensor, divergence: Divergence) -> Tensor:
    """What each column adds to the divergence, in the shape of `log_p`."""
    p, q = log_p.exp(), log_q.exp()

    def kl(a: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
        return torch.where(a == 0, 0.0, a * torch.where(a == 0, 0.0, log_a - log_b))  # 0 log 0 = 0; a NaN is kept

    def log_mean(share: float) -> Tensor:
        """log(share p + (1 - share) q)."""
        none = (p == 0) & (q == 0)
        a, b = (torch.where(none, 0.0, log) for log in (log_p, log_q))
        return torch.logaddexp(a + math.log(share), b + math.log1p(-share))

    match divergence:
        case ForwardKL():
            return kl(p, log_p, log_q)
        case CrossEntropy():
            return kl(p, torch.zeros_like(log_p), log_q)
        case ReverseKL():
            return kl(q, log_q, log_p)
        case SymmetricKL(ratio):
            shares = [(ratio, kl(p, log_p, log_q)), (1 - ratio, kl(q, log_q, log_p))]
            return sum((share * terms for share, terms in shares if share > 0), torch.zeros_like(p))  # 0 inf = 0 here
        case JSD(beta):
            log_m = log_mean(beta)
            return beta * kl(p, log_p, log_m) + (1 - beta) * kl(q, log_q, log_m)
        case SkewKL(alpha):
            return kl(p, log_p, log_mean(alpha))
        case SkewReverseKL(alpha):
            return kl(q, log_q, log_mean(1 - alpha))
        case TotalVariation():
            return (p - q).abs() / 2
        case AlphaDivergence(alpha):
            both = ((1 - alpha) * log_p + alpha * log_q).exp()
            return ((1 - alpha) * p + alpha * q - both) / (alpha * (1 - alpha))
        case AlphaBeta(a, b):
            k = a + b
            both = (a * log_p + b * log_q).exp()
            return -(both - a / k * (k * log_p).exp() - b / k * (k * log_q).exp()) / (a * b)
    raise ValueError(f"unknown divergence {divergence!r}")


def capped(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    """What a model does to its logits before a softmax, as Gemma 2 (Gemma Team, 2024) has it."""
    return scale * logits if softcap is None else softcap * torch.tanh(scale * logits / softcap)


def mean_squared_difference(x: Tensor, y: Tensor, centred: bool) -> Tensor:
    """Half of it, over the columns of [N, V] where neither is -inf: [N]."""
    left_out = (x == -torch.inf) | (y == -torch.inf)
    count = (~left_out).sum(-1)
    difference = torch.where(left_out, 0.0, torch.where(left_out, 0.0, x) - torch.where(left_out, 0.0, y))
    if centred:
        mean = difference.sum(-1, keepdim=True) / count.unsqueeze(-1)
        difference = torch.where(left_out, 0.0, difference - mean)
    return (difference**2).sum(-1) / (2 * count)


def mean_logits(
    teachers: Sequence[Tensor], weights: Sequence[float] | Tensor | None, *, ensemble: str, temperature: float
) -> Tensor:
    """Logits, softmax(logits / temperature) = p, of the mean of several teachers' distributions, for weights w_k that
    are divided by their sum; None: equal. Arithmetic: p = sum w_k softmax(t_k / temperature), and the logits are
    temperature log p. Geometric: p ~ prod softmax(t_k / temperature)^w_k, and they are sum w_k t_k."""
    shares = [1.0] * len(teachers) if weights is None else [float(w) for w in weights]
    pairs = [(w / sum(shares), t) for w, t in zip(shares, teachers, strict=True) if w > 0]
    if ensemble == "geometric":
        return sum((w * t for w, t in pairs), torch.zeros_like(pairs[0][1]))
    return temperature * torch.stack([math.log(w) + log_softmax(t / temperature, -1) for w, t in pairs]).logsumexp(0)


def sparse_soft_term(
    student: Tensor, ids: Tensor, log_probs: Tensor, *, missing: str, temperature: float, divergence: str | Divergence
) -> Tensor:
    """How far the student [N, V] is from a teacher of whom log-probabilities [N, k] are known, at the columns `ids`; a
    slot with id -1 or log_prob -inf is empty: [N]. `fused_kd.SparseTeacher` says what is `missing`."""
    rows = zip(student / temperature, ids.long(), log_probs, strict=True)
    divergence = divergence_of(divergence)
    losses = [_sparse_row(x, i[known], p[known], missing, divergence) for x, i, p in rows for known in [_known(i, p)]]
    return torch.stack(losses) if losses else student[:, :1].squeeze(1)


def _known(ids: Tensor, log_probs: Tensor) -> Tensor:
    return (ids != -1) & (log_probs != -torch.inf)


def _sparse_row(x: Tensor, ids: Tensor, log_p: Tensor, missing: str, divergence: Divergence) -> Tensor:
    log_q = log_softmax(x, -1)
    others = torch.ones_like(x, dtype=torch.bool).index_fill(0, ids, False)
    if missing == "both":
        log_p, log_q = log_softmax(log_p, -1), log_softmax(x[ids], -1)
    elif missing == "truncate":
        log_q = log_q[ids]
    elif missing == "renormalize":
        log_p = torch.full_like(x, -torch.inf).index_put((ids,), log_softmax(log_p, -1))
    elif others.any() and log_p.exp().sum() <= 1:
        log_p = torch.cat([log_p, torch.log1p(-log_p.exp().sum(0, keepdim=True))])
        log_q = torch.cat([log_q[ids], log_q[others].logsumexp(0, keepdim=True)])
    else:  # nothing is left, but for rounding
        log_p = torch.cat([log_softmax(log_p, -1), torch.full_like(log_p[:1], -torch.inf)])
        log_q = torch.cat([log_q[ids], log_q.masked_fill(~others, -torch.inf).logsumexp(0, keepdim=True)])
    return divergence_terms(log_p, log_q, divergence).sum()


def hard_term(student: Tensor, labels: Tensor, *, label_smoothing: float) -> Tensor:
    """Cross entropy with the labels [N] at temperature 1, for rows [N, V]: [N]."""
    return cross_entropy(student, labels, label_smoothing=label_smoothing, reduction="none")


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | Sequence[Tensor] | SparseTeacher,
    labels: Tensor | None = None,
    *,
    temperature: float = 2.0,
    alpha: float = 0.9,
    hard_weight: float | None = None,
    teacher_temperature: float | None = None,
    t2_scaling: bool = True,
    divergence: str | Divergence = "forward_kl",
    ensemble: str = "arithmetic",
    reduction: str = "mean",
    ignore_index: int = -100,
    soft_on_ignored: bool = False,
    shift: bool = False,
    label_smoothing: float = 0.0,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    num_items: float | None = None,
    weights: Tensor | None = None,
    teacher_weights: Sequence[float] | Tensor | None = None,
) -> Tensor:
    """The loss of logits [..., V]; the options are those of `fused_kd.fused_kd_loss`.

    Vocabularies of different sizes are cut to the columns that both have.
    """
    if teacher_temperature is None:
        teacher_temperature = temperature
    student = capped(student_logits, student_logit_scale, student_softcap)
    if isinstance(teacher_logits, SparseTeacher):
        tensors = [teacher_logits.ids, teacher_logits.log_probs.to(student.dtype)]
    else:
        teachers = [teacher_logits] if isinstance(teacher_logits, Tensor) else teacher_logits
        teachers = [capped(x, teacher_logit_scale, teacher_softcap) for x in teachers]
        vocabulary = min(x.shape[-1] for x in (student, *teachers))
        student, tensors = student[..., :vocabulary], [x.detach()[..., :vocabulary] for x in teachers]
        if len(tensors) > 1:
            tensors = [mean_logits(tensors, teacher_weights, ensemble=ensemble, temperature=teacher_temperature)]
    shift = shift and student.shape[-2] > 0
    if shift:
        student, tensors = student[..., :-1, :], [x[..., :-1, :] for x in tensors]
        labels = None if labels is None else labels[..., 1:]
        weights = None if weights is None else weights[..., 1:]
    positions = student.shape[:-1]
    student, *tensors = (x.reshape(math.prod(positions), x.shape[-1]) for x in (student, *tensors))
    y = student.new_full(positions, ignore_index, dtype=torch.long).flatten() if labels is None else labels.reshape(-1)
    w = student.new_ones(positions).flatten() if weights is None else weights.reshape(-1).to(student.dtype)

    labelled = (y != ignore_index) & (w > 0)
    counted = w > 0 if labels is None or soft_on_ignored else labelled
    if hard_weight is None:
        hard_weight = 1 - alpha
    factor = alpha * (temperature**2 if t2_scaling else 1.0)

    # Only the rows that count are looked at: what stands in the others has no part in the value or the gradient.
    seen = [x[counted] for x in tensors]
    how: dict[str, Any] = {"temperature": temperature, "divergence": divergence}
    if isinstance(teacher_logits, SparseTeacher):
        soft = sparse_soft_term(student[counted], *seen, missing=teacher_logits.missing, **how)
    else:
        soft = soft_term(student[counted], *seen, teacher_temperature=teacher_temperature, **how)
    hard = student.new_zeros(0)
    if hard_weight > 0:
        hard = hard_term(student[labelled], y[labelled], label_smoothing=label_smoothing)

    if reduction == "none":
        rows = student.new_zeros(len(y)) + student[:0].sum()  # 0, with a graph
        if alpha > 0:
            rows = rows.index_put((counted,), factor * w[counted] * soft)
        if hard_weight > 0:
            rows = rows.index_put((labelled,), rows[labelled] + hard_weight * w[labelled] * hard)
        rows = rows.reshape(positions)
        return torch.cat([rows, rows.new_zeros(*positions[:-1], 1)], -1) if shift else rows

    def term(values: Tensor, rows: Tensor) -> Tensor:
        total = (w[rows] * values).sum()
        if num_items is not None:
            return total / (num_items or 1)
        if reduction == "mean":
            return total / w[rows].sum() if rows.any() else total
        return total / max(1, student_logits.shape[0]) if reduction == "batchmean" else total

    loss = student[:0].sum()  # 0, with a graph
    if alpha > 0:
        loss = loss + factor * term(soft, counted)
    if hard_weight > 0:
        loss = loss + hard_weight * term(hard, labelled)
    return loss
