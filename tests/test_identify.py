"""`fused_kd.identify` finds what a loss is, says what is odd about it, and never claims what is not so."""

import functools
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import make_labels, make_logits
from torch import Tensor, nn

from fused_kd import FusedKDLoss, cli, identify, presets
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
from fused_kd.identification.report import Report
from fused_kd.reference import kd_loss

pytestmark = pytest.mark.filterwarnings("ignore:reduction", "ignore:Implicit dimension")


def kl(s: Tensor, t: Tensor, tau: float, tau_t: float | None = None) -> Tensor:
    """Of each position."""
    log_q, log_p = F.log_softmax(s / tau, -1), F.log_softmax(t / (tau_t or tau), -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def ce(s: Tensor, y: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(s.flatten(0, -2), y.flatten(), **options)


def cap(logits: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(logits / softcap)


def kl_div(s: Tensor, t: Tensor, tau: float, reduction: str, dim: int = -1) -> Tensor:
    return F.kl_div(F.log_softmax(s / tau, dim), F.softmax(t.detach() / tau, dim), reduction=reduction)


# The formulas that trainers have, as they write them, and what they are.


def haitongli(outputs: Tensor, labels: Tensor, teacher_outputs: Tensor) -> Tensor:
    alpha, temperature = 0.9, 4.0
    soft = nn.KLDivLoss()(F.log_softmax(outputs / temperature, dim=1), F.softmax(teacher_outputs / temperature, dim=1))
    result: Tensor = soft * (alpha * temperature * temperature) + F.cross_entropy(outputs, labels) * (1 - alpha)
    return result


def haitongli_batchmean(outputs: Tensor, labels: Tensor, teacher_outputs: Tensor) -> Tensor:
    return kl_div(outputs, teacher_outputs, 4.0, "batchmean", 1) * (0.9 * 16) + F.cross_entropy(outputs, labels) * 0.1


def huggingface_docs(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    soft = kl_div(student_logits, teacher_logits, 5.0, "batchmean") * 5.0**2
    return (1 - 0.3) * F.cross_entropy(student_logits, labels) + 0.3 * soft


def huggingface_course(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    soft = kl_div(student_logits, teacher_logits, 2.0, "batchmean") * 2.0**2
    return 0.4 * ce(student_logits, labels) + (1 - 0.4) * soft


def torchdistill(student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * F.cross_entropy(student, targets) + 3.0 * 4.0**2 * kl_div(student, teacher, 4.0, "batchmean", 1)


def pytorch_tutorial(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    p = F.softmax(teacher_logits.detach() / 2, dim=-1)
    soft = torch.sum(p * (p.log() - F.log_softmax(student_logits / 2, dim=-1))) / student_logits.size(0) * 2**2
    return 0.25 * soft + 0.75 * F.cross_entropy(student_logits, labels)


def mdistiller(logits_student: Tensor, logits_teacher: Tensor, target: Tensor) -> Tensor:
    soft = F.kl_div(F.log_softmax(logits_student / 4, 1), F.softmax(logits_teacher / 4, 1), reduction="none")
    return 0.1 * F.cross_entropy(logits_student, target) + 0.9 * soft.sum(1).mean() * 4**2


def deit(inputs_of_teacher: Tensor, outputs: Tensor, labels: Tensor) -> Tensor:
    log_q, log_p = F.log_softmax(outputs / 3, 1), F.log_softmax(inputs_of_teacher.detach() / 3, 1)
    soft = F.kl_div(log_q, log_p, reduction="sum", log_target=True) * 9 / outputs.numel()
    return F.cross_entropy(outputs, labels, label_smoothing=0.1) * 0.5 + soft * 0.5


def distilbert(s_logits: Tensor, t_logits: Tensor, lm_labels: Tensor, attention_mask: Tensor) -> Tensor:
    mask = attention_mask.unsqueeze(-1).expand_as(s_logits)
    s, t = (torch.masked_select(x, mask).view(-1, s_logits.size(-1)) for x in (s_logits, t_logits.detach()))
    return 5.0 * kl_div(s, t, 2.0, "batchmean") * 2.0**2 + 2.0 * ce(s_logits, lm_labels, ignore_index=-100)


def distilbert_of_masked(s_logits: Tensor, t_logits: Tensor, lm_labels: Tensor) -> Tensor:
    mask = (lm_labels > -1).unsqueeze(-1).expand_as(s_logits)
    s, t = (torch.masked_select(x, mask).view(-1, s_logits.size(-1)) for x in (s_logits, t_logits.detach()))
    return 5.0 * kl_div(s, t, 2.0, "batchmean") * 2.0**2 + 2.0 * ce(s_logits, lm_labels, ignore_index=-100)


def torchtune_forward(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    p = F.softmax(teacher_logits.detach(), dim=-1, dtype=torch.float32)
    inf_mask = torch.isinf(student_logits)
    log_q = F.log_softmax(student_logits, dim=-1, dtype=torch.float32)
    x = torch.sum(torch.masked_fill(p * log_q, inf_mask, 0), dim=-1).view(-1)
    mask = (labels != -100).int()
    return -torch.sum(x * mask.view(-1), dim=0) / torch.sum(mask.view(-1), dim=0)


def torchtune_reverse(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    q = F.softmax(student_logits, dim=-1, dtype=torch.float32)
    log_q, log_p = (F.log_softmax(x.float(), dim=-1) for x in (student_logits, teacher_logits.detach()))
    x = torch.sum(q * log_p - q * log_q, dim=-1).view(-1)
    mask = (labels != -100).int()
    return -torch.sum(x * mask.view(-1), dim=0) / torch.sum(mask.view(-1), dim=0)


def torchtune_recipe(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    return (1 - 0.3) * ce(student_logits, labels) + 0.3 * torchtune_forward(student_logits, teacher_logits, labels)


def gkd(beta: float, temperature: float) -> Callable[..., Tensor]:
    def generalized_jsd_loss(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None) -> Tensor:
        log_q, log_p = (F.log_softmax(x / temperature, -1) for x in (student_logits, teacher_logits.detach()))
        if beta == 0:
            jsd = F.kl_div(log_q, log_p, reduction="none", log_target=True)
        elif beta == 1:
            jsd = F.kl_div(log_p, log_q, reduction="none", log_target=True)
        else:
            share = torch.tensor(beta, dtype=log_q.dtype)
            log_m = torch.logsumexp(torch.stack([log_q + torch.log1p(-share), log_p + torch.log(share)]), dim=0)
            jsd = share * F.kl_div(log_m, log_p, reduction="none", log_target=True)
            jsd = jsd + (1 - share) * F.kl_div(log_m, log_q, reduction="none", log_target=True)
        if labels is None:
            return jsd.sum() / jsd.size(0)
        mask = labels != -100
        return jsd[mask].sum() / mask.sum()

    return generalized_jsd_loss


def gkd_shifted(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    return gkd(0.5, 0.9)(student_logits[:, :-1], teacher_logits[:, :-1], labels[:, 1:])


def modelopt(logits_s: Tensor, logits_t: Tensor) -> Tensor:
    return kl_div(logits_s, logits_t, 3.0, "mean") * 3.0**2


def modelopt_none(logits_s: Tensor, logits_t: Tensor) -> Tensor:
    return kl_div(logits_s, logits_t, 3.0, "none").sum(dim=-1) * 3.0**2


def megatron(predictions: Tensor, targets: Tensor) -> Tensor:
    return kl(predictions, targets.detach(), 2.0).transpose(0, 1).contiguous()


def nemo(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    valid = (labels != -100).view(-1)
    s, t = (x.reshape(-1, x.shape[-1])[valid].float().mul(1 / 2.0) for x in (student_logits, teacher_logits.detach()))
    return 0.7 * ce(student_logits, labels) + 0.3 * torch.mean(kl(s, t, 1.0) * 2.0**2)


def distillkit(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor) -> Tensor:
    return (kl(student_logits, teacher_logits.detach(), 2.0) * 2.0**2 * mask).sum() / mask.sum()


def hand_written(student: Tensor, teacher: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """A causal language model's."""
    hard = F.cross_entropy(student[:, :-1].transpose(1, 2), y[:, 1:], reduction="none")
    m = mask[:, 1:].float()
    return (m * (0.7 * 2.0**2 * kl(student, teacher.detach(), 2.0)[:, :-1] + 0.3 * hard)).sum() / m.sum()


def course_with_a_mask(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    mask = labels != -100
    return 0.5 * ce(student, labels) + 0.5 * (kl(student, teacher.detach(), 3.0) * mask).sum() / mask.sum()


def distillm(kind: Any) -> Callable[..., Any]:
    loss_fn = presets.distillm(kind)

    def without_weights(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        loss = loss_fn(student, teacher, labels)
        assert isinstance(loss, Tensor)
        return loss

    return without_weights


# name: (the loss, options that it has, words of its habits)
KNOWN: dict[str, tuple[Callable[..., Any], dict[str, Any], list[str]]] = {
    "haitongli": (
        haitongli,
        {"temperature": 4.0, "alpha": 0.9, "per_vocabulary": -1, "hard_weight": 0.1, "soft_on_ignored": True},
        ["divided by V", "teacher's logits receive a gradient", "Padding is counted"],
    ),
    "haitongli, batchmean": (haitongli_batchmean, {"temperature": 4.0, "alpha": 0.9, "soft_on_ignored": True}, []),
    "Hugging Face docs": (huggingface_docs, {"temperature": 5.0, "alpha": 0.3}, ["Padding is counted"]),
    "Hugging Face course": (
        huggingface_course,
        {"temperature": 2.0, "alpha": 0.6, "hard_weight": 0.4, "per_length": 1, "soft_on_ignored": True},
        ["divided by the batch's size alone"],
    ),
    "torchdistill": (torchdistill, {"temperature": 4.0, "alpha": 3.0, "hard_weight": 0.5}, []),
    "PyTorch tutorial": (pytorch_tutorial, {"temperature": 2.0, "alpha": 0.25}, []),
    "mdistiller": (mdistiller, {"temperature": 4.0, "alpha": 0.9}, []),
    "DeiT": (
        deit,
        {"temperature": 3.0, "alpha": 0.5, "hard_weight": 0.5, "per_vocabulary": -1, "label_smoothing": 0.1},
        ["divided by V"],
    ),
    "DistilBERT": (
        distilbert,
        {"temperature": 2.0, "alpha": 5.0, "hard_weight": 2.0, "soft_on_ignored": True, "weights": True},
        [],
    ),
    "DistilBERT, masked": (distilbert_of_masked, {"temperature": 2.0, "alpha": 5.0, "soft_on_ignored": False}, []),
    "torchtune, forward": (
        torchtune_forward,
        {"temperature": 1.0, "alpha": 1.0, "divergence": CrossEntropy(), "soft_on_ignored": False},
        ["teacher's entropy"],
    ),
    "torchtune, reverse": (torchtune_reverse, {"alpha": 1.0, "divergence": ReverseKL()}, []),
    "torchtune, recipe": (torchtune_recipe, {"alpha": 0.3, "divergence": CrossEntropy()}, []),
    "GKD, 0": (
        gkd(0, 0.9),
        {"temperature": 0.9, "divergence": ForwardKL(), "t2_scaling": False},
        ["No temperature**2"],
    ),
    "GKD, 0.3": (gkd(0.3, 3.0), {"temperature": 3.0, "alpha": 1.0, "divergence": JSD(0.3), "t2_scaling": False}, []),
    "GKD, 1": (gkd(1, 1.0), {"temperature": 1.0, "divergence": ReverseKL(), "ignore_index": -100}, []),
    "GKD, shifted": (gkd_shifted, {"temperature": 0.9, "divergence": JSD(), "shift": True}, []),
    "ModelOpt": (modelopt, {"temperature": 3.0, "alpha": 1.0, "per_vocabulary": -1}, ["divided by V"]),
    "ModelOpt, none": (modelopt_none, {"temperature": 3.0, "alpha": 1.0, "reduction": "none"}, []),
    "Megatron": (megatron, {"temperature": 2.0, "t2_scaling": False, "view": ".transpose(0, 1)"}, []),
    "NeMo Automodel": (nemo, {"temperature": 2.0, "alpha": 0.3, "soft_on_ignored": False}, []),
    "DistillKit": (distillkit, {"temperature": 2.0, "alpha": 1.0, "weights": True}, []),
    "DistiLLM, rkl": (distillm("rkl"), {"alpha": 0.5, "divergence": ReverseKL()}, []),
    "DistiLLM, jsd": (distillm("jsd"), {"alpha": 0.5, "divergence": JSD(0.1)}, []),
    "DistiLLM, tvd": (distillm("tvd"), {"alpha": 0.5, "divergence": TotalVariation()}, []),
    "DistiLLM, srkl": (distillm("srkl"), {"alpha": 0.5, "divergence": SkewReverseKL(0.1)}, []),
    "hand-written": (hand_written, {"temperature": 2.0, "alpha": 0.7, "shift": True, "weights": True}, []),
    "course, masked": (course_with_a_mask, {"temperature": 3.0, "t2_scaling": False, "alpha": 0.5}, []),
    "hard temperature": (
        lambda student, teacher, labels: 4 * kl(student, teacher, 2.0).mean() + ce(student / 2, labels),
        {"temperature": 1.0, "student_logit_scale": 0.5, "teacher_logit_scale": 0.5},
        ["hard term has a temperature"],
    ),
    "hard temperature of its own": (
        lambda student, teacher, labels: 4 * kl(student / 4, teacher / 4, 2.0).mean() + ce(student / 4, labels),
        {"temperature": 2.0, "alpha": 1.0, "student_logit_scale": 0.25, "teacher_logit_scale": 0.25},
        ["or its logits a scale"],
    ),
    "a scale of the student": (
        lambda student, teacher, labels: 4 * kl(student / 4, teacher, 2.0).mean() + ce(student / 4, labels),
        {"temperature": 2.0, "alpha": 1.0, "student_logit_scale": 0.25, "teacher_temperature": None},
        ["Two temperatures, or scales"],
    ),
    "Gemma 2": (
        lambda s, t, y: 2 * kl(cap(s, 30.0), cap(t, 30.0), 2.0).mean() + 0.5 * ce(cap(s, 30.0), y),
        {
            "temperature": 2.0,
            "alpha": 0.5,
            "student_softcap": 30.0,
            "teacher_softcap": 30.0,
            "student_logit_scale": None,
        },
        [],
    ),
    "Gemma 2's logits as a teacher": (
        lambda s, t: kl(s, cap(t, 50.0), 1.0).sum(),
        {"temperature": 1.0, "student_softcap": None, "teacher_softcap": 50.0, "reduction": "sum"},
        ["have not the same softcap: None and 50.0"],
    ),
    "a capped and scaled student": (
        lambda s, t, y: kl(cap(s / 4, 15.0), t, 3.0, 1.0).mean() + ce(cap(s / 4, 15.0), y),
        {"temperature": 3.0, "teacher_temperature": 1.0, "student_softcap": 15.0, "student_logit_scale": 0.25},
        ["have not the same softcap: 15.0 and None"],
    ),
    "capped labels alone": (lambda s, t, y: ce(cap(s, 30.0), y), {"alpha": 0.0, "student_softcap": 30.0}, []),
    "student's temperature": (
        lambda student, teacher: kl(student, teacher, 3.0, 1.0).mean(),
        {"temperature": 3.0, "teacher_temperature": 1.0},
        ["temperature on one side only"],
    ),
    "padding in the mean": (
        lambda s, t, labels: (kl(s, t, 2.0) * 4 * (labels != -100)).mean(),
        {"temperature": 2.0, "alpha": 1.0, "num_items": "all"},
        ["Padding is counted"],
    ),
    "padding in the sum": (
        lambda s, t, labels: ce(s, labels) + kl(s, t, 2.0).sum() / (labels != -100).sum(),
        {"alpha": 1.0, "hard_weight": 1.0, "num_items": "labelled", "soft_on_ignored": True},
        ["the more padding"],
    ),
    "padding in the mean, a mask": (
        lambda s, t, mask: (kl(s, t, 2.0)[:, :-1] * mask[:, 1:]).sum() / mask[:, 1:].numel(),
        {"shift": True, "num_items": "all", "weights": True},
        ["Padding is counted"],
    ),
    "labels unused": (lambda s, t, labels: kl(s, t, 1.0).mean(), {"alpha": 1.0}, ["labels are not used"]),
    "swapped": (
        lambda student, teacher: F.kl_div(
            F.log_softmax(teacher, -1), F.log_softmax(student, -1), reduction="batchmean", log_target=True
        ),
        {"divergence": ReverseKL(), "reduction": "batchmean"},
        ["grows with the length"],
    ),
    "logits": (F.mse_loss, {"alpha": 2.0, "divergence": LogitMSE(centred=False)}, []),
    "cross entropy alone": (lambda s, t, y: ce(s, y), {"alpha": 0.0}, []),
    "labels first": (lambda y, t, s: 0.5 * ce(s, y) + 0.5 * kl(s, t, 1.0).mean(), {"alpha": 0.5}, []),
    "a dictionary": (lambda s, t, y: {"loss": kl(s, t, 1.0).mean() + ce(s, y), "metrics": 1}, {"alpha": 1.0}, []),
    "pad token": (lambda s, t, y: ce(s, y, ignore_index=0) + 0 * t.sum(), {"alpha": 0.0, "ignore_index": 0}, []),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known(name: str) -> None:
    loss, options, habits = KNOWN[name]
    report = identify(loss)
    assert report.proved, report
    answer = report.answer
    assert answer is not None
    fields = {"per_length": 0, "per_vocabulary": 0, "weights": False, "num_items": ""} | options
    for option, value in fields.items():
        found = getattr(answer, option) if hasattr(answer, option) else answer.options.get(option)
        assert found == value, (option, found, report)
    for words in habits:
        assert any(words in habit for habit in report.habits), report


PRESETS: dict[str, FusedKDLoss] = {
    "hinton": presets.hinton(0.7, 3.0),
    "torchtune": presets.torchtune(0.4, "reverse"),
    "trl_gkd": presets.trl_gkd(0.2, 0.9),
    "torchdistill": presets.torchdistill(0.5, 4.0),
    "deit": presets.deit(0.5, 3.0, 1000),
    "distilbert": presets.distilbert(5.0, 2.0),
    "modelopt": presets.modelopt(2.0, "batchmean"),
    "megatron": presets.megatron(2.0, reverse=True),
    "nemo_automodel": presets.nemo_automodel(0.5, 2.0),
    "huggingface_docs": presets.huggingface_docs(),
    "haitongli": presets.haitongli(0.9, 4.0, 100),
    "distillm": presets.distillm(),
    "minillm": presets.minillm(),
    "mdistiller": presets.mdistiller(),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str) -> None:
    report = identify(PRESETS[name])
    assert report.proved, report
    check_options(report, vars(PRESETS[name].options))


PASTED = [
    "haitongli", "Hugging Face course", "DistilBERT", "GKD, shifted", "Megatron", "hard temperature",
    "padding in the mean", "padding in the sum", "padding in the mean, a mask",
]  # fmt: skip


@pytest.mark.parametrize("name", PASTED)
def test_code_to_paste(name: str) -> None:
    """It runs as it stands, and is the loss."""
    loss = KNOWN[name][0]
    report = identify(loss)
    shape = (3, 5, 17) if "[B, T, V]" in report.layouts else (9, 17)
    student, teacher = (x.double() for x in make_logits("wide", *shape))
    labels, mask = make_labels(*shape[:-1], vocabulary=17), torch.ones(shape[:-1], dtype=torch.bool)
    mask[..., -2:] = False
    labels[~mask] = -100
    names: dict[str, Any] = {"student_logits": student, "teacher_logits": teacher, "labels": labels, "mask": mask}
    exec(report.code, names)
    given = {
        "haitongli": (student, labels, teacher),
        "DistilBERT": (student, teacher, labels, mask),
        "Megatron": (student, teacher),
        "padding in the mean, a mask": (student, teacher, mask),
    }.get(name, (student, teacher, labels))
    torch.testing.assert_close(names["loss"], loss(*given), rtol=1e-9, atol=0)


# What no FusedKDLoss is, and what is said of it.


class OwnGradient(torch.autograd.Function):
    """As losses that compute it in the forward: whatever multiplies the loss is forgotten."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        with torch.enable_grad():
            copy = student.detach().requires_grad_()
            loss = kl(copy, teacher.detach(), 1.0).mean()
            ctx.save_for_backward(*torch.autograd.grad(loss, copy))
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0], None


class ScaledValue(torch.autograd.Function):
    """temperature**2 on the value alone, as a hand-written backward may have it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 4

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def skewed_forward_kl(logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    p, q = F.softmax(teacher_logits.detach(), -1), F.softmax(logits, -1)
    x = (p * (0.1 * p + 0.9 * q).log()).sum(-1).view(-1)
    mask = (labels != -100).view(-1)
    return -(x * mask).sum() / mask.sum()


def torchtune_symmetric(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    both = (f(student_logits, teacher_logits, labels) for f in (torchtune_forward, torchtune_reverse))
    return 0.3 * next(both) + 0.7 * next(both)


def top_k(student: Tensor, teacher: Tensor, k: int = 100) -> Tensor:
    ids = teacher.topk(min(k, teacher.shape[-1]), -1).indices
    return kl(student.gather(-1, ids), teacher.gather(-1, ids), 2.0).mean()


def means_of_chunks(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    rows = (x.split(1024) for x in (kl(student, teacher, 2.0).flatten(), labels.flatten()))
    return torch.stack([soft[y != -100].mean() for soft, y in zip(*rows, strict=True)]).mean()


def clamped_labels(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return 0.5 * ce(student, labels.clamp(min=0)) + 0.5 * kl(student, teacher, 1.0).mean()


BROKEN: dict[str, tuple[Callable[..., Any], str]] = {
    "dim=1": (lambda s, t: kl_div(s.view(2, -1, s.shape[-1]), t.view(2, -1, t.shape[-1]), 2.0, "sum", 1), "dimension"),
    "dim=0": (lambda s, t, y: kl_div(s, t, 2.0, "batchmean", 0) + ce(s, y), "Softmax over the wrong dimension"),
    "a softmax without dim": (lambda s, t: (F.softmax(s.unsqueeze(-1)) * t.unsqueeze(-1)).sum(), "wrong dimension"),
    "teacher's dim": (
        lambda s, t: -(F.softmax(t.detach(), 0) * F.log_softmax(s, -1)).sum(),
        "Softmax over the wrong dimension",
    ),
    "square in the value": (
        lambda student, teacher, y: ScaledValue.apply(0.5 * kl(student, teacher, 2.0).mean()) + 0.5 * ce(student, y),
        "temperature**2 multiplies the value of the soft term, but not its gradient",
    ),
    "DistiLLM, sfkl": (skewed_forward_kl, "times the teacher's entropy; the gradient fits"),
    "torchtune, symmetric": (torchtune_symmetric, "0.3"),
    "an offset": (lambda s, t: kl(s, t, 2.0).mean() + 0.25, "the value is greater by 0.25"),
    "probabilities in kl_div": (
        lambda s, t: F.kl_div(F.softmax(s, -1), F.softmax(t.detach(), -1), reduction="batchmean"),
        "no divergence",
    ),
    "no log_target": (
        lambda s, t: (F.log_softmax(t, -1) * (F.log_softmax(t, -1) - F.log_softmax(s, -1))).mean(),
        "no divergence",
    ),
    "an epsilon": (
        lambda s, t: (F.softmax(t, -1) * ((F.softmax(t, -1) + 1e-8).log() - (F.softmax(s, -1) + 1e-8).log())).sum(),
        "",
    ),
    "top k": (top_k, "on fresh inputs"),
    "top k, a large one": (functools.partial(top_k, k=2048), "on fresh inputs"),
    "means of chunks": (means_of_chunks, "on fresh inputs"),
    "a longest length": (lambda s, t: kl(s[:, :2048], t[:, :2048], 2.0).mean(), ""),
    "an order alone": (lambda s, t: (F.softmax(s, -1).sort(-1)[0] - F.softmax(t, -1).sort(-1)[0]).abs().mean(), ""),
    "two labels that mean none": (
        lambda student, teacher, labels: kl(student, teacher, 2.0)[(labels != -100) & (labels != 0)].mean(),
        "the labels [0] are ignored as well as -100",
    ),
    "clamped labels": (clamped_labels, ""),
    "a negative weight": (lambda s, t, y: ce(s, y) - 0.1 * kl(s, t, 1.0).mean(), "negative weight"),
    "one shift": (
        lambda s, t, y: ce(s[:, :-1], y[:, 1:]) + kl(s, t, 2.0).mean(),
        "the labels are shifted by one position, but the last position has a soft term",
    ),
    "no shift": (
        lambda s, t, y: ce(s[:, :-1], y[:, :-1]) + kl(s[:, :-1], t[:, :-1], 2.0).mean(),
        "the last position is left out, but the labels are not shifted",
    ),
    "dropout": (lambda s, t: kl(F.dropout(s), t, 2.0).mean(), "another gradient the next time"),
    "masked soft term over all": (
        lambda s, t, y: ce(s, y) + (kl(s, t, 2.0) * (y != -100)).mean(),
        "where every position counts it is equal",
    ),
    "weighted by confidence": (lambda s, t: (F.softmax(t, -1).amax(-1) * kl(s, t, 1.0)).mean(), ""),
    "two soft terms": (lambda s, t: kl(s, t, 1.0).mean() + kl(s, t, 4.0).mean(), "no divergence"),
    "a squared mean": (lambda s, t: kl(s, t, 1.0).mean() ** 2, "it is no sum over positions"),
    "binary": (
        lambda s, t: F.binary_cross_entropy_with_logits(s / 2, torch.sigmoid(t.detach() / 2)),
        "no divergence",
    ),
    "a backward of its own": (
        lambda s, t: OwnGradient.apply(s, t) * 1.0,
        "its backward ignores what it is multiplied by",
    ),
    "softcap of the soft term alone": (
        lambda s, t, y: kl(cap(s, 30.0), cap(t, 30.0), 2.0).mean() + ce(s, y),
        "with softcaps or without",
    ),
    "softcap and a clamp": (lambda s, t: kl(cap(s, 30.0).clamp(max=29.0), t, 2.0).mean(), "or a clamp"),
    "another softcap": (lambda s, t: kl(30 * (s / 30).atan(), t, 2.0).mean(), "with softcaps or without"),
    "a small epsilon, hot": (
        lambda s, t: -(F.softmax(t / 20, -1) * (F.softmax(s / 20, -1) + 1e-12).log()).sum(),
        "on fresh inputs",
    ),
    "clamped probabilities": (
        lambda s, t: -(F.softmax(t / 4, -1) * F.softmax(s / 4, -1).clamp(min=1e-30).log()).sum(),
        "an epsilon beside a probability",
    ),
    "clamped logits": (lambda s, t: kl(s.clamp(-100, 100), t, 1.0).mean(), "or a clamp"),
    "clamped logits above": (lambda s, t: kl(s, t.clamp(max=100), 1.0).mean(), "or a clamp"),
    "a root": (lambda s, t: kl(s, t, 1.0).mean().sqrt(), "it is no sum over positions"),
    "a clamped loss": (lambda s, t: kl(s, t, 1.0).clamp(max=50).mean(), "or a clamp"),
    "noise in the value": (lambda s, t: kl(s, t, 1.0).mean() + 1e-3 * torch.rand(()), "another value the next time"),
    "class weights": (
        lambda s, t, y: kl(s, t, 1.0).mean() + ce(s, y, weight=torch.linspace(0.5, 1.5, s.shape[-1])),
        "a term that depends on labels, but is no cross entropy",
    ),
    "one number a class": (
        lambda s, t: F.kl_div(F.log_softmax(s, -1), F.softmax(t, -1), reduction="none"),
        "it returns a tensor of shape",
    ),
    "too hot": (lambda s, t, y: ce(s, y) + 1e35 * kl(s, t, 2.0).mean(), "alpha must be at most 1e30"),
    "NaN": (lambda s, t: kl(s, t, 1.0).mean() * torch.nan, "NaN"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken(name: str) -> None:
    loss, words = BROKEN[name]
    report = identify(loss)
    assert not report.proved, report
    assert report.ruled_out, report
    assert words in str(report), report
    assert str(report).startswith("No FusedKDLoss was found that is this.")


def test_other_layout_is_told() -> None:
    """dim=1 is right for [N, V], wrong for [B, T, V]."""
    report = identify(lambda student, teacher: kl_div(student, teacher, 2.0, "batchmean", 1))
    assert report.proved
    assert report.layouts == ["[N, V]"]
    assert any("Softmax over the wrong dimension" in note for note in report.notes)
    assert any("On logits [B, T, V] it is something else: its positions are not" in note for note in report.notes)


def configuration(seed: int) -> dict[str, Any]:
    r = random.Random(seed)
    divergences: list[Divergence] = [
        ForwardKL(), CrossEntropy(), ReverseKL(), SymmetricKL(), SymmetricKL(0.3), JSD(), JSD(0.1), JSD(0.9), SkewKL(),
        SkewKL(0.4), SkewReverseKL(), SkewReverseKL(0.6), TotalVariation(), AlphaDivergence(0.3), AlphaBeta(0.5, 1.2),
        AlphaBeta(1.5, 0.4), LogitMSE(), LogitMSE(centred=False), JSD(r.uniform(0.05, 0.95)),
    ]  # fmt: skip
    weights: dict[str, Any] = {"alpha": r.choice([0.0, 0.1, 0.5, 0.9, 1.0, r.random()])}
    if r.random() < 0.5:
        weights = {"alpha": r.choice([0.3, 1.0, 5.0]), "hard_weight": r.choice([0.0, 0.1, 2.0])}
    softcaps = [None, None, None, 5.0, 15.0, 30.0, 50.0, r.uniform(2, 100)]
    options = weights | {
        "temperature": r.choice([0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 7.5, 20.0, r.uniform(0.4, 15)]),
        "teacher_temperature": r.choice([None, None, None, 1.0, 5.0]),
        "t2_scaling": r.random() < 0.6,
        "divergence": r.choice(divergences),
        "reduction": r.choice(["mean", "mean", "sum", "batchmean", "none"]),
        "ignore_index": r.choice([-100, -100, -1, 0, 3]),
        "soft_on_ignored": r.random() < 0.25,
        "shift": r.random() < 0.35,
        "label_smoothing": r.choice([0.0, 0.0, 0.0, 0.1]),
        "student_logit_scale": r.choice([1.0, 1.0, 1.0, 0.25, r.uniform(0.1, 2)]),
        "teacher_logit_scale": r.choice([1.0, 1.0, 1.0, 0.25]),
        "student_softcap": r.choice(softcaps),
        "teacher_softcap": r.choice(softcaps),
    }
    if options["divergence"] == LogitMSE(centred=False):
        options |= {"student_softcap": None, "teacher_softcap": None}
    return options


def check_options(report: Report, options: dict[str, Any]) -> None:
    """Those that can be told from value and gradient."""
    assert report.answer is not None
    found = FusedKDLoss(**report.answer.options).options
    assert found.reduction == options["reduction"]
    assert found.shift == options["shift"]
    given = FusedKDLoss(**options).options
    assert found.weight_of_hard() == pytest.approx(given.weight_of_hard(), rel=1e-9, abs=0)
    rates = (x.student_logit_scale / (x.student_softcap or torch.inf) for x in (found, given))
    assert next(rates) == pytest.approx(next(rates), rel=1e-7, abs=0)
    if given.weight_of_hard() > 0:
        assert found.label_smoothing == given.label_smoothing
        assert found.student_logit_scale == pytest.approx(given.student_logit_scale, rel=1e-7)
    if given.alpha == 0:
        assert found.alpha == 0
        return
    divergence, expected = divergence_of(found.divergence), divergence_of(given.divergence)
    assert type(divergence) is type(expected)
    assert divergence.parameters == pytest.approx(expected.parameters, rel=1e-7)
    rates = (x.teacher_logit_scale / (x.teacher_softcap or torch.inf) for x in (found, given))
    assert next(rates) == pytest.approx(next(rates), rel=1e-7, abs=0)
    tau, tau_t = (
        (x.temperature / x.student_logit_scale for x in (found, given)),
        ((x.teacher_temperature or x.temperature) / x.teacher_logit_scale for x in (found, given)),
    )
    if isinstance(divergence, LogitMSE):  # of the temperatures only their ratio, and the weight's with their square
        ratio = (t / s for s, t in zip(tau, tau_t, strict=True))
        assert next(ratio) == pytest.approx(next(ratio), rel=1e-9)
        return
    assert next(tau) == pytest.approx(next(tau), rel=1e-7)
    assert next(tau_t) == pytest.approx(next(tau_t), rel=1e-7)
    assert found.weight_of_soft() == pytest.approx(given.weight_of_soft(), rel=1e-7)


@pytest.mark.parametrize("seed", range(200))
def test_random_configurations(seed: int) -> None:
    options = configuration(seed)
    loss_fn = FusedKDLoss(**options)
    report = identify(loss_fn)
    assert report.proved, (options, report)
    check_options(report, options)

    student, teacher = (x.double() for x in make_logits("wide", 3, 6, 40, seed=seed))
    labels = make_labels(3, 6, vocabulary=40, seed=seed)
    labels[labels == -100] = options["ignore_index"]
    exact = kd_loss(student, teacher, labels, **options)
    assert report.answer is not None
    ours = report.answer.loss(40)(student, teacher, labels if report.answer.labels else None)
    torch.testing.assert_close(ours, exact, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("seed", range(300, 305))
@pytest.mark.parametrize("of", ["value", "gradient"])
def test_a_millionth_off_is_not_proved(of: str, seed: int) -> None:
    options = configuration(seed) | {"reduction": "mean"}
    loss_fn = FusedKDLoss(**options)

    def off(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        if of == "value":
            loss = loss_fn(student, teacher, labels)
            assert isinstance(loss, Tensor)
            return loss + 1e-6 * loss.detach()
        wrong = student.clone()
        wrong.register_hook(lambda gradient: gradient * torch.linspace(1, 1 + 1e-6, student.shape[-1]).double())
        loss = loss_fn(wrong, teacher, labels)
        assert isinstance(loss, Tensor)
        return loss

    assert not identify(off).proved


def test_overwritten_inputs_are_told() -> None:
    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        student /= 2.0
        labels[labels == -1] = -100
        return kl(student, teacher / 2, 1.0)[labels != -100].mean() + ce(2 * student, labels)

    report = identify(loss)
    assert report.proved, report
    assert report.answer is not None
    assert report.answer.options["temperature"] == 2
    assert any("overwrites the labels and student" in habit for habit in report.habits)
    assert not any("overwrites" in habit for habit in identify(lambda s, t: kl(s, t, 2.0).mean()).habits)


def test_underflow_is_told() -> None:
    """p log p of a p that is rounded to 0."""
    report = identify(lambda s, t: (F.softmax(t, -1) * (F.softmax(t, -1).log() - F.log_softmax(s, -1))).sum())
    assert report.proved, report
    assert any("NaN or infinite where a probability is rounded to 0" in habit for habit in report.habits)
    assert not any("NaN" in habit for habit in identify(lambda s, t: kl(s, t, 2.0).mean()).habits)


def test_rounding_is_looked_through() -> None:
    report = identify(lambda student, teacher: kl(student.bfloat16(), teacher.half(), 2.0).to(torch.float32).sum())
    assert report.proved, report
    assert any("It rounds to float32 or less inside" in note for note in report.notes)


class TestArguments:
    def test_given(self) -> None:
        def loss(a: Tensor, b: Tensor, c: Tensor) -> Tensor:  # the teacher first, and nothing says so
            return 0.5 * kl(c, a, 2.0).mean() + 0.5 * ce(c, b)

        assert identify(loss, arguments=("teacher", "labels", "student")).proved
        with pytest.raises(ValueError, match="arguments must be some of student, teacher, labels, mask, got 'pupil'"):
            identify(loss, arguments=("pupil", "teacher"))

    def test_the_one_without_a_gradient_is_the_teacher(self) -> None:
        report = identify(lambda a, b: kl(b, a.detach(), 2.0).mean())
        assert report.proved
        assert report.answer is not None
        assert report.answer.options["divergence"] == ForwardKL()

    def test_too_many(self) -> None:
        with pytest.raises(ValueError, match="it needs 5 arguments .*Bind the others"):
            identify(lambda s, t, y, mask, config: kl(s, t, 1.0).mean())

    def test_settings_are_none_of_them(self) -> None:
        with pytest.raises(
            ValueError, match=r"it needs 4 arguments \(student, teacher, labels, alpha\).*Bind the others"
        ):
            identify(lambda student, teacher, labels, alpha: alpha * kl(student, teacher, 1.0).mean())
        with pytest.raises(ValueError, match="it needs 3 arguments .*Bind the others"):
            identify(lambda student, teacher, T: kl(student, teacher, T).mean())

    def test_models_outputs(self) -> None:
        with pytest.raises(ValueError, match=r"'logits'. It gets tensors.*SimpleNamespace\(logits=student\)"):
            identify(lambda student, teacher, labels: kl(student.logits, teacher.logits, 1.0).mean())

    def test_by_name(self) -> None:
        def loss(*, labels: Tensor, teacher: Tensor, student: Tensor) -> Tensor:
            return kl(student, teacher, 2.0).mean() + ce(student, labels)

        def of_three(student: Tensor, teacher: Tensor, temperature: float, labels: Tensor) -> Tensor:
            return kl(student, teacher, temperature).mean() + ce(student, labels)

        def of_optional(logits: Tensor, labels: Tensor, teacher_logits: Tensor | None = None) -> Tensor:
            assert teacher_logits is not None
            return kl(logits, teacher_logits, 2.0).mean() + ce(logits, labels)

        for function in (loss, functools.partial(of_three, temperature=2.0), of_optional):
            report = identify(function)
            assert report.proved, report
            assert report.answer is not None
            assert report.answer.options["temperature"] == 2
            assert report.answer.options["hard_weight"] == 1
        assert report.arguments == {"logits": "student", "labels": "labels", "teacher_logits": "teacher"}
        assert "Taken so: logits is the student, teacher_logits is the teacher" in str(report)
        assert identify(loss, arguments=("labels", "teacher", "student")).proved

    def test_signature_that_says_nothing(self) -> None:
        assert identify(lambda *given: kl(given[0], given[1], 2.0).mean()).proved
        assert identify(lambda *given: kl(given[0], given[1], 2.0).mean() + ce(given[0], given[2])).proved

    def test_dictionary_without_a_loss(self) -> None:
        with pytest.raises(ValueError, match="it returns a dict with 'kd', 'ce', and no \"loss\" among them"):
            identify(lambda s, t, y: {"kd": kl(s, t, 1.0).mean(), "ce": ce(s, y)})

    def test_what_it_raised(self) -> None:
        def loss(student: Tensor, teacher: Tensor) -> Tensor:
            raise RuntimeError("no CUDA here")

        with pytest.raises(ValueError, match="RuntimeError: no CUDA here"):
            identify(loss)

    def test_no_gradient(self) -> None:
        with pytest.raises(ValueError, match="its result has no gradient"):
            identify(lambda student, teacher: kl(student.detach(), teacher.detach(), 1.0).mean())

    def test_number(self) -> None:
        with pytest.raises(ValueError, match="it returns float, not a tensor"):
            identify(lambda student, teacher: 1.0)


class TestCommand:
    def run(self, folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
        (folder / "my_losses.py").write_text(
            "import torch.nn.functional as F\n"
            "def mine(student, teacher, y):\n"
            "    soft = F.kl_div(F.log_softmax(student / 2, -1), F.softmax(teacher / 2, -1), reduction='batchmean')\n"
            "    return 0.7 * 4 * soft + 0.3 * F.cross_entropy(student, y)\n"
            "def odd(student, teacher, y):\n"
            "    return mine(student, teacher, y) ** 2\n"
        )
        monkeypatch.chdir(folder)
        monkeypatch.delitem(sys.modules, "my_losses", raising=False)
        return cli.main(["identify", *arguments])

    def test_found(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.run(tmp_path, monkeypatch, "my_losses:mine") == 0
        assert "FusedKDLoss(temperature=2.0, alpha=0.7, soft_on_ignored=True)" in capsys.readouterr().out
        assert self.run(tmp_path, monkeypatch, "my_losses:mine", "--arguments", "student,teacher,labels") == 0

    def test_not_found(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.run(tmp_path, monkeypatch, "my_losses:odd") == 1
        assert "No FusedKDLoss was found that is this." in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("my_losses", "MODULE:FUNCTION"),
            ("no_such_module:f", "cannot be imported: No module named"),
            ("my_losses:none", "cannot be imported"),
            ("my_losses:F.__name__", "must be a function"),
        ],
    )
    def test_errors(
        self,
        name: str,
        message: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        assert self.run(tmp_path, monkeypatch, name) == 2
        assert message in capsys.readouterr().err
