"""Bad input: the error names the argument, what it was and what it should be."""

from typing import Any

import pytest
import torch
from support import BACKENDS

from fused_kd import FusedKDLoss, fused_kd_loss, ops

S, T, Y = torch.randn(2, 3, 10), torch.randn(2, 3, 10), torch.zeros(2, 3, dtype=torch.int64)

OPTIONS = [
    ({"temperature": 0}, ValueError, "temperature must be finite and greater than 0, got 0"),
    ({"temperature": -1.0}, ValueError, "temperature must be finite and greater than 0, got -1.0"),
    ({"temperature": float("inf")}, ValueError, "temperature must be finite and greater than 0, got inf"),
    ({"temperature": float("nan")}, ValueError, "temperature must be finite and greater than 0, got nan"),
    ({"temperature": 1e200}, ValueError, "temperature must be between 1e-10 and 1e10"),
    ({"hard_weight": 1e300}, ValueError, "hard_weight must be at most 1e30"),
    ({"ignore_index": 2**70}, ValueError, "ignore_index must fit int64"),
    ({"temperature": "2"}, TypeError, "temperature must be a number, got '2' of type str"),
    ({"teacher_temperature": 0.0}, ValueError, "teacher_temperature must be finite and greater than 0"),
    ({"alpha": 1.5}, ValueError, r"alpha must be in \[0, 1\] while hard_weight is None.*got 1.5; give hard_weight"),
    ({"alpha": -0.1, "hard_weight": 1.0}, ValueError, "alpha must be finite and at least 0, got -0.1"),
    ({"hard_weight": float("inf")}, ValueError, "hard_weight must be finite and at least 0, got inf"),
    ({"alpha": 0.0, "hard_weight": 0.0}, ValueError, "alpha and hard_weight are both 0"),
    ({"label_smoothing": 1.1}, ValueError, r"label_smoothing must be in \[0, 1\], got 1.1"),
    ({"divergence": "kl"}, ValueError, "divergence must be one of 'forward_kl', 'cross_entropy', got 'kl'"),
    ({"reduction": "avg"}, ValueError, "reduction must be one of 'mean', 'sum', 'none', 'batchmean', got 'avg'"),
    ({"vocab_mismatch": "pad"}, ValueError, "vocab_mismatch must be one of 'error', 'truncate', got 'pad'"),
    ({"ignore_index": None}, TypeError, "ignore_index must be an int, got None"),
    ({"shift": 1}, TypeError, "shift must be True or False, got 1 of type int"),
    ({"inplace": "yes"}, TypeError, "inplace must be True or False, got 'yes'"),
    ({"backend": 3}, TypeError, "backend must be a string, got 3"),
]


@pytest.mark.parametrize(("options", "error", "message"), OPTIONS, ids=[str(o[0]) for o in OPTIONS])
def test_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FusedKDLoss(**options)
    with pytest.raises(error, match=message):
        fused_kd_loss(S, T, Y, **options)


W = torch.ones(2, 3)

CALLS: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    (("logits", T, Y), {}, TypeError, "student_logits must be a tensor, got str; a model's output has .logits"),
    ((S.long(), T, Y), {}, TypeError, "student_logits must be float32, float16, bfloat16 or float64, got torch.int64"),
    ((S, T.to(torch.complex64), Y), {}, TypeError, "teacher_logits must be float32.*got torch.complex64"),
    ((torch.tensor(1.0), T, Y), {}, ValueError, r"student_logits must have the shape \[..., V\].*got \(\)"),
    ((S[..., :0], T[..., :0], Y), {}, ValueError, r"at least one column, got \(2, 3, 0\)"),
    ((S.transpose(1, 2), T, Y), {}, ValueError, r"student_logits must have unit stride.*\(30, 1, 10\)"),
    ((S, T[:, :2], Y), {}, ValueError, r"must have the student's leading shape.*\(2, 3, 10\).*\(2, 2, 10\)"),
    ((S, T[..., :9], Y), {}, ValueError, r"must have the student's vocabulary.*\(2, 3, 9\).*\"truncate\""),
    ((S, T.to("meta"), Y), {}, ValueError, "teacher_logits must be on the student's device.*cpu.*meta"),
    ((S[0, 0], T[0, 0], Y[0, 0]), {"shift": True}, ValueError, "shift=True needs student_logits"),
    ((S[0, 0], T[0, 0], Y[0, 0]), {"reduction": "batchmean"}, ValueError, "batchmean.*needs student_logits"),
    ((S, T), {}, ValueError, r"labels must be given while the hard term has a weight.*0.1.*alpha=1, or hard_weight=0"),
    ((S, T, Y.int()), {}, TypeError, r"labels must be an int64 tensor.*got torch.int32; use labels.long\(\)"),
    ((S, T, [[0]]), {}, TypeError, "labels must be an int64 tensor of token ids, got list"),
    ((S, T, Y[:, :2]), {}, ValueError, r"labels must have the logits' leading shape \(2, 3\), got \(2, 2\)"),
    ((S, T, Y.to("meta")), {}, ValueError, "labels must be on the logits' device cpu, got meta"),
    ((S, T, Y), {"weights": Y}, TypeError, r"weights must be a floating tensor, got torch.int64.*mask.float\(\)"),
    ((S, T, Y), {"weights": W[0]}, ValueError, r"weights must have the logits' leading shape \(2, 3\), got \(3,\)"),
    ((S, T, Y), {"weights": W * -1}, ValueError, "weights must be finite and at least 0, got -1.0 in row 0"),
    ((S, T, Y), {"weights": W * float("nan")}, ValueError, "weights must be finite and at least 0, got nan in row 0"),
    ((S, T, Y), {"num_items": -1}, ValueError, "num_items must be finite and at least 0, got -1"),
    ((S, T, Y), {"num_items": "7"}, TypeError, "num_items must be a number or a tensor, got '7' of type str"),
    ((S, T, Y), {"num_items": torch.ones(2)}, ValueError, r"num_items must have one element, got the shape \(2,\)"),
    ((S, T, Y), {"num_items": 7, "reduction": "sum"}, ValueError, "num_items replaces the denominator.*'sum'"),
    ((S, T, Y), {"backend": "gpu"}, ValueError, "backend must be one of 'auto', .*'torch', got 'gpu'"),
]


@pytest.mark.parametrize(("arguments", "options", "error", "message"), CALLS, ids=[c[3][:40] for c in CALLS])
def test_calls(arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fused_kd_loss(*arguments, **options)


def test_inplace_on_a_leaf() -> None:
    leaf = S.clone().requires_grad_()
    leaf_view = S.clone()[:1].requires_grad_()
    for logits in (leaf, leaf[:1], leaf.view(-1, 10), leaf_view):
        with pytest.raises(ValueError, match="inplace=True needs student_logits that a model computed, got a leaf"):
            fused_kd_loss(logits, torch.zeros_like(logits), alpha=1.0, inplace=True)
    with torch.no_grad():  # evaluation: nothing will be overwritten
        fused_kd_loss(leaf, T, Y, inplace=True)
    fused_kd_loss(S, T, Y, inplace=True)


def test_inplace_on_overlapping_memory() -> None:
    row = torch.randn(1, 10, requires_grad=True) * 1
    overlapping = (torch.randn(40, requires_grad=True) * 1).as_strided((4, 10), (5, 1))
    for logits in (row.expand(4, 10), overlapping):
        with pytest.raises(ValueError, match="inplace=True needs student_logits whose elements are all apart"):
            fused_kd_loss(logits, torch.zeros(4, 10), alpha=1.0, inplace=True)


def test_inplace_on_the_teachers_storage() -> None:
    logits = torch.randn(4, 10, requires_grad=True) * 1
    with pytest.raises(ValueError, match="inplace=True would overwrite teacher_logits"):
        fused_kd_loss(logits, logits.detach(), alpha=1.0, inplace=True)


def test_double_backward(backend: str) -> None:
    logits, teacher, labels = (x.to(torch.get_default_device()) for x in (S, T, Y))
    logits = logits.clone().requires_grad_()
    loss = fused_kd_loss(logits, teacher, labels, backend=backend)
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="fused_kd has no second derivative"):
        gradient.square().sum().backward()
    loss = fused_kd_loss(logits * 1, teacher, labels, inplace=True, backend=backend)
    with pytest.raises(RuntimeError, match="inplace=True cannot be used with create_graph=True"):
        torch.autograd.grad(loss, logits, create_graph=True)


def test_an_option_that_is_set_is_checked_as_at_construction() -> None:
    loss_fn = FusedKDLoss(3.0)
    with pytest.raises(ValueError, match="temperature must be finite and greater than 0, got 0"):
        loss_fn.temperature = 0
    with pytest.raises(ValueError, match="alpha must be in .*give hard_weight"):
        loss_fn.alpha = 1.5
    assert (loss_fn.temperature, loss_fn.alpha) == (3.0, 0.9)
    with pytest.raises(AttributeError, match="has no attribute 'tau'"):
        _ = loss_fn.tau

    class Early(FusedKDLoss):
        def __init__(self) -> None:
            self.temperature = 3.0
            super().__init__()

    with pytest.raises(AttributeError, match=r"temperature is an option .* none before super\(\).__init__"):
        Early()


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the native library is what would believe them")
def test_the_operators_check_their_vectors() -> None:
    targets, ones = torch.zeros(6, dtype=torch.int64), torch.ones(6)
    options = (2.0, 2.0, "forward_kl", 0.0, True, True, "cpu")
    for bad in ((targets.int(), ones, ones), (targets[:2], ones, ones), (targets, ones.double(), ones)):
        with pytest.raises((TypeError, ValueError), match="targets must be int64|each "):
            ops.rows_fused(S, T, *bad, *options)
