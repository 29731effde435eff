"""Value and gradient are those of the functions that others install, in float64.

Their packages need much to be imported, of which these functions use nothing: so they are taken out of their files.
CI installs the packages, pinned and without their dependencies, for a step of its own.
"""

import ast
import importlib.util
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import before, make_labels, make_logits
from test_linear_memory import Live, heads, peak_of_both
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_kd import SparseTeacher, fused_kd_loss, fused_linear_kd_loss
from fused_kd.divergences import JSD, CrossEntropy, Divergence, ForwardKL, ReverseKL, SymmetricKL


class _InFloat64:
    """torch, for code that would round to float32."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def definitions(package: str, file: str, *names: str, **used: Any) -> SimpleNamespace:
    """Classes and functions (of a class: its static methods) with these names out of an installed file, without their
    decorators; `used`: what they take from elsewhere."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"{package} is not installed")
    tree = ast.parse((Path(spec.origin).parent / file).read_text())
    wanted = [
        node for node in ast.walk(tree) if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name in names
    ]
    for node in wanted:
        node.decorator_list = []
    found: dict[str, Any] = {"torch": _InFloat64(), "F": torch.nn.functional, "nn": torch.nn, "math": math} | used
    exec(compile(ast.Module(wanted, []), file, "exec"), found)
    return SimpleNamespace(**{name: found[name] for name in names})


def check_same(
    theirs: Callable[[Tensor, Any, Tensor], Tensor],
    taught: Callable[[Tensor, Tensor], Any] = lambda teacher, labels: teacher,
    **options: Any,
) -> None:
    """`taught` makes of the teacher's logits, and the labels, what both losses get."""
    student, teacher = (x.double() for x in make_logits("wide", 4, 7, 300))
    labels = make_labels(4, 7, vocabulary=300)
    teacher = taught(teacher, labels)
    student.requires_grad_()
    options = {"alpha": 1.0, "t2_scaling": False, "temperature": 1.0} | options
    losses = [fused_kd_loss(student, teacher, labels, **options), theirs(student, teacher, labels)]
    (loss, gradient), (expected, exact) = ((x, torch.autograd.grad(x, student)[0]) for x in losses)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    assert (gradient - exact).norm() <= 1e-9 * exact.norm()


OF_BETA = [(0, ForwardKL()), (0.1, JSD(0.1)), (0.5, JSD(0.5)), (0.9, JSD(0.9)), (1, ReverseKL())]


@pytest.mark.parametrize(("beta", "divergence"), OF_BETA)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("trainer", ["gkd", "gold"])
def test_trl(trainer: str, temperature: float, beta: float, divergence: Divergence) -> None:
    file = f"experimental/{trainer}/{trainer}_trainer.py"
    generalized_jsd_loss = definitions("trl", file, "generalized_jsd_loss").generalized_jsd_loss

    def theirs(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        loss = generalized_jsd_loss(student, teacher, labels, beta=beta, temperature=temperature, reduction="sum")
        assert isinstance(loss, Tensor)
        return loss

    check_same(theirs, divergence=divergence, temperature=temperature, reduction="sum")


@pytest.mark.parametrize(
    ("name", "arguments", "divergence"),
    [
        ("ForwardKLLoss", (), CrossEntropy()),
        ("ReverseKLLoss", (), ReverseKL()),
        ("SymmetricKLLoss", (0.0,), ReverseKL()),
        ("SymmetricKLLoss", (1.0,), CrossEntropy()),
    ],
)
def test_torchtune(name: str, arguments: tuple[float, ...], divergence: Divergence) -> None:
    classes = definitions("torchtune", "modules/loss/kd_losses.py", "ForwardKLLoss", "ReverseKLLoss", "SymmetricKLLoss")
    theirs = getattr(classes, name)(*arguments)
    check_same(lambda s, t, y: theirs(s.flatten(0, 1), t.flatten(0, 1), y.flatten()), divergence=divergence)


@pytest.mark.parametrize("ratio", [0.3, 0.5])
def test_torchtune_symmetric(ratio: float) -> None:
    """Theirs has the cross entropy for the forward KL: the teacher's entropy is added."""
    classes = definitions("torchtune", "modules/loss/kd_losses.py", "ForwardKLLoss", "ReverseKLLoss", "SymmetricKLLoss")
    theirs = classes.SymmetricKLLoss(ratio)

    def without_entropy(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        p = torch.softmax(teacher, -1)
        entropy = -(p * p.log()).sum(-1)[labels != -100].mean()
        loss: Tensor = theirs(student.flatten(0, 1), teacher.flatten(0, 1), labels.flatten())
        return loss - ratio * entropy

    check_same(without_entropy, divergence=SymmetricKL(ratio))


@pytest.mark.parametrize(("beta", "divergence"), OF_BETA)
def test_liger(beta: float, divergence: Divergence) -> None:
    loss = definitions("liger_kernel", "chunked_loss/jsd_loss.py", "distillation_loss_fn").distillation_loss_fn

    def theirs(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        result: Tensor = loss(student.flatten(0, 1), teacher.flatten(0, 1), beta=beta, target=labels.flatten())
        return result

    check_same(theirs, divergence=divergence, reduction="sum")


def top_5_and_fewer(teacher: Tensor, labels: Tensor) -> SparseTeacher:
    top = SparseTeacher.from_logits(teacher, 5)
    empty = torch.zeros_like(top.ids, dtype=torch.bool)
    empty[0, :, 3:] = True
    return SparseTeacher(top.ids, top.log_probs.masked_fill(empty, -torch.inf), top.missing)


def top_1_and_label(teacher: Tensor, labels: Tensor) -> SparseTeacher:
    top = SparseTeacher.from_logits(teacher, 1)
    own = labels.clamp(min=0).unsqueeze(-1)
    log_p = torch.log_softmax(teacher, -1).gather(-1, own)
    return SparseTeacher(
        torch.cat([top.ids, own.masked_fill(own == top.ids, -1)], -1), torch.cat([top.log_probs, log_p], -1)
    )


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize(("beta", "divergence"), OF_BETA)
def test_trl_from_a_server(beta: float, divergence: Divergence, tail: bool) -> None:
    names = (
        "_jsd_divergence", "_add_tail_bucket", "_compute_server_forward_kl_loss",
        "_compute_sparse_top_1_divergence_loss", "_reduce_divergence_loss",
    )  # fmt: skip
    theirs = definitions("trl", "experimental/server_distillation/server_distillation_trainer.py", *names)
    trainer = SimpleNamespace(loss_add_tail=tail, beta=beta, _reduce_divergence_loss=theirs._reduce_divergence_loss)

    def loss(student: Tensor, teacher: SparseTeacher, labels: Tensor) -> Tensor:
        log_q, ids, log_p = torch.log_softmax(student, -1), teacher.ids, teacher.log_probs
        result: Tensor
        if beta == 0:
            server = {"topk_logprobs": log_p, "topk_token_ids": ids}
            result = theirs._compute_server_forward_kl_loss(trainer, server, log_q, labels)
            return result
        own = torch.where(ids[..., 1] == -1, ids[..., 0], ids[..., 1])
        arguments = (log_q, ids[..., 0], log_p[..., 0], own, log_p[..., 1], labels)
        result = theirs._compute_sparse_top_1_divergence_loss(trainer, *arguments)
        return result

    def taught(teacher: Tensor, labels: Tensor) -> SparseTeacher:
        made = (top_5_and_fewer if beta == 0 else top_1_and_label)(teacher, labels)
        if beta == 1:  # the label alone
            own = labels.clamp(min=0).unsqueeze(-1)
            made = SparseTeacher(torch.cat([torch.full_like(own, -1), own], -1), made.log_probs)
        return SparseTeacher(made.ids, made.log_probs, "rest" if tail else "both")

    check_same(loss, taught, divergence=divergence)


def trl_function() -> Any:
    """Of its DistillationTrainer: the divergence from hidden states, in tiles of float32."""
    names = ("_use_triton", "_addmm_fp32", "_torch_transform")
    others = vars(definitions("trl", "kernels/chunked_logprob.py", *names))
    names = ("ChunkedDivergenceFunction", "_compute_dtype", "_project", "_stats_tile", "_jsd_tile", "_backward_tile")
    found = definitions("trl", "kernels/chunked_divergence.py", *names)
    tiles = {"TOKEN_CHUNK_SIZE": 4096, "VOCAB_CHUNK_SIZE": 32768, "_BLOCK_SIZE": 1024, "_MM_OUT_DTYPE": False}
    for function in (found._project, others["_addmm_fp32"]):
        function.__globals__.update(torch=torch, **vars(found), **others, **tiles)
        function.__globals__.update(_TRITON_AVAILABLE=False, maybe_gather_lm_head_ctx=lambda *_: nullcontext())
    return found.ChunkedDivergenceFunction


@pytest.mark.parametrize(("beta", "divergence"), [(0.0, ForwardKL()), (0.5, JSD(0.5)), (1.0, ReverseKL())])
def test_trl_from_hidden_states(beta: float, divergence: Divergence) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, taught, head = (torch.randn(*x, generator=generator) for x in [(9, 16), (300, 16)] * 2)
    hidden.requires_grad_()
    weight.requires_grad_()
    loss = fused_linear_kd_loss(hidden, weight, taught, head, alpha=1.0, t2_scaling=False, divergence=divergence)
    expected = trl_function().apply(hidden, weight, None, taught, head, None, beta, 2.0)[0].mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    gradients = [torch.autograd.grad(x, (hidden, weight)) for x in (loss, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize(("beta", "divergence"), [(0.0, ForwardKL()), (0.5, JSD(0.5)), (1.0, ReverseKL())])
def test_trl_near_convergence(beta: float, divergence: Divergence) -> None:
    """On the same logits, which lie 0.01 apart: hidden states are one-hot, and pick a column of the weight."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(32768, 16, generator=generator) * 3
    student, hidden = teacher + 0.01 * torch.randn(32768, 16, generator=generator), torch.eye(16)
    logits = [x.double().T.contiguous() for x in (student, teacher)]
    how: dict[str, Any] = {"alpha": 1.0, "temperature": 1.0, "divergence": divergence}
    exact = fused_kd_loss(*logits, **how)
    ours = fused_linear_kd_loss(hidden, student, hidden, teacher, **how)
    theirs = trl_function().apply(hidden, student, None, hidden, teacher, None, beta)[0].mean()
    error, other = (float((x.double() - exact).abs() / exact) for x in (ours, theirs))
    print(f"{divergence!r}: off by {error:.1e}, TRL's function by {other:.1e}")
    assert error < 1e-5 < other


class _Context(SimpleNamespace):
    """Of an autograd.Function: the engine does not run on devices that are not there."""

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors


@pytest.mark.skipif(before(torch.__version__, 2, 14), reason="addmm with an out_dtype has no fake kernel that works")
def test_less_memory_than_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, of tensors without memory; neither's kernels run."""
    function = trl_function()
    skipped = dict.fromkeys(("_stats_tile", "_backward_tile"), lambda *args, **kwargs: None)
    for method in (function.forward, function.backward):
        method.__globals__.update(_MM_OUT_DTYPE=True, **skipped)
    with FakeTensorMode():
        student, teacher = heads("cuda")
        context = _Context(needs_input_grad=(True, True, False), set_materialize_grads=id, mark_non_differentiable=id)
        with Live() as live:
            divergence, _ = function.forward(context, *student[:2], None, *teacher.heads[0][:3], 0.0)
            gradients = function.backward(context, torch.empty_like(divergence), None)[:2]
    assert [g.dtype for g in gradients] == [torch.bfloat16] * 2
    ours = peak_of_both(monkeypatch, (True, True, False))
    print(f"{ours / 1e9:.2f} GB, TRL's function {live.peak / 1e9:.2f} GB")
    assert ours < 0.7 * live.peak
