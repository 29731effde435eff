"""Value and gradient are those of the functions that others install, in float64.

Their packages need much to be imported, of which these functions use nothing: so they are taken out of their files.
CI installs the packages, pinned and without their dependencies, for a step of its own.
"""

import ast
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import make_labels, make_logits
from torch import Tensor

from fused_kd import fused_kd_loss
from fused_kd.divergences import JSD, CrossEntropy, Divergence, ForwardKL, ReverseKL, SymmetricKL


class _InFloat64:
    """torch, for code that would round to float32."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def definitions(package: str, file: str, *names: str) -> SimpleNamespace:
    """Classes and functions (of a class: its static methods) with these names out of an installed file."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"{package} is not installed")
    tree = ast.parse((Path(spec.origin).parent / file).read_text())
    wanted = [
        node for node in ast.walk(tree) if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name in names
    ]
    for node in wanted:
        if isinstance(node, ast.FunctionDef):
            node.decorator_list = []
    found: dict[str, Any] = {"torch": _InFloat64(), "F": torch.nn.functional, "math": __import__("math")}
    exec(compile(ast.Module(wanted, []), file, "exec"), found)
    return SimpleNamespace(**{name: found[name] for name in names})


def check_same(theirs: Callable[[Tensor, Tensor, Tensor], Tensor], **options: Any) -> None:
    student, teacher = (x.double() for x in make_logits("wide", 4, 7, 300))
    labels = make_labels(4, 7, vocabulary=300)
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
