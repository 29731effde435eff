"""The trainers of TRL with their divergences computed here: values and gradients are TRL's own.

    from fused_kd.integrations.trl import DistillationTrainer, GKDTrainer

in place of TRL's classes of these names, with the same arguments; so are ServerDistillationTrainer and
AsyncDistillationTrainer. Or, around code that is not yours:

    with patched():
        main()                 # TRL's own classes compute their divergences here

Where these differ from TRL 1.16: GKDTrainer under several processes steps with the gradient and not with 1 / processes
of it, as averaging gradients makes of it; entropies and divergences of 16-bit logits are not rounded to 16 bits.
"""

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from fused_kd.functional import KDLossOutput, fused_kd_loss
from fused_kd.integrations import missing
from fused_kd.integrations.heads import replaced
from fused_kd.linear import fused_linear_kd_loss
from fused_kd.presets import trl_gkd
from fused_kd.sparse import SparseTeacher

try:
    from trl.experimental import gkd, server_distillation
    from trl.experimental.async_distillation import async_distillation_trainer
    from trl.trainer import distillation_trainer
except ImportError as error:
    raise missing("trl", "trl", error) from error

_theirs = gkd.GKDTrainer.generalized_jsd_loss
_their_loss = gkd.GKDTrainer.compute_loss
_CHUNKED, _SPARSE = "_chunked_divergence_loss", "_chunked_jsd_loss"


def generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """`GKDTrainer.generalized_jsd_loss`."""
    if num_items_in_batch is None and reduction not in ("batchmean", "sum", "mean"):
        # One number for each logit, as only TRL's own has it.
        result: Tensor = _theirs(student_logits, teacher_logits, labels, beta, temperature, reduction)
        return result
    total = _sum(student_logits, teacher_logits, labels, beta, temperature)
    if num_items_in_batch is not None:
        return total / num_items_in_batch
    if reduction == "sum":
        return total
    rows = student_logits[..., 0].numel() if labels is None else (labels != -100).sum()
    if reduction == "mean":
        return total / (rows * student_logits.shape[-1])
    return total / (max(student_logits.shape[0], 1) if labels is None else rows.clamp(min=1))  # type: ignore[union-attr]


def _sum(student_logits: Tensor, teacher: Any, labels: Tensor | None, beta: float, temperature: float) -> Tensor:
    options = vars(trl_gkd(beta, temperature).options) | {"reduction": "sum"}
    if labels is not None:  # of which only the -100 mean something
        labels = torch.where(labels == -100, labels, 0)
    result = fused_kd_loss(student_logits, teacher, labels, **options)
    assert isinstance(result, Tensor)
    return result


def chunked_divergence_loss(
    student_hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    student_lm_head_weight: Tensor,
    teacher_lm_head_weight: Tensor,
    completion_mask: Tensor,
    beta: float,
    num_items_in_batch: Tensor | int | None = None,
    student_lm_head_bias: Tensor | None = None,
    teacher_lm_head_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """`_chunked_divergence_loss` of DistillationTrainer's module: the loss, the sum of the student's entropies, and the
    number of positions that count."""
    valid = completion_mask.flatten() != 0
    count = valid.sum()
    hidden = [x.flatten(0, -2) for x in (student_hidden_states, teacher_hidden_states)]
    labels = torch.where(valid, 0, -100)
    if valid.device.type != "cpu":  # as TRL does there; on the CPU positions that do not count are found for free
        hidden, labels = [x[valid] for x in hidden], labels[valid]
    weights = [
        _whole(weight, states.dtype)
        for weight, states in zip((student_lm_head_weight, teacher_lm_head_weight), hidden, strict=True)
    ]
    biases = [
        None if bias is None else _whole(bias, states.dtype)
        for bias, states in zip((student_lm_head_bias, teacher_lm_head_bias), hidden, strict=True)
    ]
    options: dict[str, Any] = vars(trl_gkd(beta, temperature).options) | {
        "reduction": "sum",
        "return_parts": True,
        "entropies": True,
        "student_logit_scale": student_logit_scale,
        "teacher_logit_scale": teacher_logit_scale,
        "student_softcap": student_final_logit_softcapping,
        "teacher_softcap": teacher_final_logit_softcapping,
    }
    result = fused_linear_kd_loss(
        hidden[0],
        weights[0],
        hidden[1],
        weights[1],
        labels,
        student_bias=biases[0],
        teacher_bias=biases[1],
        **options,
    )
    assert isinstance(result, KDLossOutput)
    assert result.student_entropy is not None
    divisor = count.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    if isinstance(divisor, Tensor):
        divisor = divisor.to(result.loss.device)
    return result.loss / divisor, result.student_entropy, count


def _whole(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """FSDP2's are gathered here, once."""
    full: Tensor = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    return full.to(dtype)


def _gkd_loss(
    self: Any, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Tensor | int | None = None
) -> Any:
    """`GKDTrainer.compute_loss`, and what the Trainer leaves to who overrides it: where num_items_in_batch is that of
    all processes, over which gradients are averaged, the loss is multiplied by their number."""
    result = _their_loss(self, model, inputs, return_outputs, num_items_in_batch)
    if num_items_in_batch is None or not self.args.average_tokens_across_devices:
        return result
    processes = self.accelerator.num_processes // self.get_tp_size()
    return (result[0] * processes, *result[1:]) if return_outputs else result * processes


def _sparse_loss(self: Any, logits: Tensor, teacher: SparseTeacher, labels: Tensor, beta: float, items: Any) -> Tensor:
    """The mean over the labelled positions, or the sum divided by `items`; 0 in those of which nothing is known."""
    known = ((teacher.log_probs > -torch.inf) & (teacher.ids >= 0)).any(-1)
    # (Log-probabilities at the trainer's temperature are logits whose softmax at 1 is the same.)
    total = _sum(logits, teacher, labels.masked_fill(~known, -100), beta, 1.0)
    return total / ((labels != -100).sum().clamp(min=1) if items is None else items)


def _server_forward_kl(
    self: Any, teacher_result: dict[str, Tensor], student_log_probs: Tensor, labels: Tensor
) -> Tensor:
    """`ServerDistillationTrainer._compute_server_forward_kl_loss`."""
    teacher = SparseTeacher(
        teacher_result["topk_token_ids"], teacher_result["topk_logprobs"], "rest" if self.loss_add_tail else "both"
    )
    return _sparse_loss(self, student_log_probs, teacher, labels, 0.0, None)


def _server_top_1(
    self: Any,
    student_log_probs: Tensor,
    teacher_top1_token_ids: Tensor,
    teacher_top1_logprobs: Tensor,
    reverse_token_ids: Tensor,
    reverse_teacher_logprobs: Tensor,
    labels: Tensor,
    num_items_in_batch: Any = None,
) -> Tensor:
    """`ServerDistillationTrainer._compute_sparse_top_1_divergence_loss`."""
    ids, log_probs = reverse_token_ids[..., None], reverse_teacher_logprobs[..., None]
    if self.beta != 1:
        ids = ids.masked_fill(ids == teacher_top1_token_ids[..., None], -1)  # counted once
        ids = torch.cat([teacher_top1_token_ids[..., None], ids], -1)
        log_probs = torch.cat([teacher_top1_logprobs[..., None], log_probs], -1)
    teacher = SparseTeacher(ids, log_probs, "rest" if self.loss_add_tail else "both")
    return _sparse_loss(self, student_log_probs, teacher, labels, self.beta, num_items_in_batch)


def chunked_jsd_loss(
    hidden_valid: Tensor,
    lm_head_weight: Tensor,
    lm_head_bias: Tensor | None,
    logit_scale: float,
    final_logit_softcapping: float | None,
    target_ids: Tensor,
    teacher_target_logps: Tensor,
    valid_candidate_mask: Tensor,
    beta: float,
    temperature: float,
    add_tail_bucket: bool,
    teacher_id_idx: Tensor | None,
    num_teachers: int,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`_chunked_jsd_loss` of AsyncDistillationTrainer's module: sums of the loss, the divergence, and the entropies of
    the student and the teacher; and of each of several teachers the positions, the divergence and the entropy. A
    position without a candidate has no part, nor in the student's entropy, where it has one in TRL's."""
    ids = target_ids.masked_fill(~valid_candidate_mask, -1)
    teacher = SparseTeacher(ids, teacher_target_logps, "rest" if add_tail_bucket else "both")
    options: dict[str, Any] = vars(trl_gkd(beta, temperature).options) | {
        "reduction": "sum" if teacher_id_idx is None else "none",
        "return_parts": True,
        "entropies": True,
        "student_logit_scale": logit_scale,
        "student_softcap": final_logit_softcapping,
    }
    result = fused_linear_kd_loss(
        hidden_valid.float(),
        lm_head_weight.float(),
        labels=torch.where(valid_candidate_mask.any(-1), 0, -100),
        student_bias=None if lm_head_bias is None else lm_head_bias.float(),
        teacher_logits=teacher,
        chunk_rows=chunk_size,
        **options,
    )
    assert isinstance(result, KDLossOutput)
    loss, soft, _, of_student, of_teacher = result
    assert soft is not None
    assert of_student is not None
    assert of_teacher is not None
    of_each = hidden_valid.new_zeros(3 * num_teachers)
    if teacher_id_idx is not None:
        of = torch.nn.functional.one_hot(teacher_id_idx, num_teachers).to(soft.dtype)
        of_each = (of.T @ torch.stack([torch.ones_like(soft), soft, of_teacher], -1)).flatten()
    return loss.sum(), soft.sum(), of_student.sum(), of_teacher.sum(), of_each


def patched() -> ExitStack:
    """TRL's own trainers compute their divergences here: within `with patched():`, or from the call on until
    `.close()` of what it returns."""
    stack = ExitStack()
    for of, name, ours in (
        (gkd.GKDTrainer, "generalized_jsd_loss", staticmethod(generalized_jsd_loss)),
        (gkd.GKDTrainer, "compute_loss", _gkd_loss),
        (distillation_trainer, _CHUNKED, chunked_divergence_loss),
        (async_distillation_trainer, _SPARSE, chunked_jsd_loss),
        (server_distillation.ServerDistillationTrainer, "_compute_server_forward_kl_loss", _server_forward_kl),
        (server_distillation.ServerDistillationTrainer, "_compute_sparse_top_1_divergence_loss", _server_top_1),
    ):
        stack.enter_context(replaced(of, name, ours))
    return stack


class GKDTrainer(gkd.GKDTrainer):
    """TRL's, whose divergence allocates nothing of the logits' size but their gradient."""

    generalized_jsd_loss = staticmethod(generalized_jsd_loss)
    compute_loss = _gkd_loss


class DistillationTrainer(distillation_trainer.DistillationTrainer):
    """TRL's, whose divergence projects hidden states four times and not seven or more."""

    def _compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        with replaced(distillation_trainer, _CHUNKED, chunked_divergence_loss):
            return super()._compute_loss(*args, **kwargs)


class ServerDistillationTrainer(server_distillation.ServerDistillationTrainer):
    """TRL's, with the server's log-probabilities as a `SparseTeacher`."""

    _compute_server_forward_kl_loss = _server_forward_kl
    _compute_sparse_top_1_divergence_loss = _server_top_1


class AsyncDistillationTrainer(async_distillation_trainer.AsyncDistillationTrainer):
    """TRL's, with the servers' log-probabilities as a `SparseTeacher`."""

    def _compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        with replaced(async_distillation_trainer, _SPARSE, chunked_jsd_loss):
            return super()._compute_loss(*args, **kwargs)
