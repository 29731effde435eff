"""What is allocated: nothing of the logits' size but the gradient, and not that with inplace=True."""

from typing import Any

import pytest
import torch
from support import BACKENDS, make_labels, make_logits
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fused_kd import fused_kd_loss, ops
from fused_kd.backends import PREFERENCE
from fused_kd.backends.rows import SKIP, LogitRows, RowOptions
from fused_kd.divergences import AlphaBeta, Divergence, DivergenceName

ROWS, COLUMNS = 64, 2048


class Allocations(TorchDispatchMode):
    """Adds up the storages that operators return and did not get; custom operators show what they allocate inside."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in known:
                size = x.untyped_storage().nbytes()
                self.bytes += size
                self.largest = max(self.largest, size)
        return result


LAYOUTS = ["contiguous", "shifted view", "mixed dtypes", "truncated", "transposed"]


def logits_of(layout: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    student, teacher = make_logits("wide", 4, ROWS // 4, COLUMNS)
    student = student.to(torch.bfloat16).requires_grad_() * 1
    teacher = teacher.to(torch.bfloat16)
    labels = make_labels(4, ROWS // 4, vocabulary=COLUMNS)
    if layout == "shifted view":
        return student[:, :-1], teacher[:, :-1], labels[:, 1:]
    if layout == "mixed dtypes":
        return student, teacher.float(), labels
    if layout == "truncated":
        return student, torch.cat([teacher, teacher], -1), labels
    if layout == "transposed":
        return student.transpose(0, 1), teacher.transpose(0, 1), labels.transpose(0, 1)
    return student, teacher, labels


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the torch backend works through chunks: test_chunks_are_bounded")
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_allocations(layout: str, inplace: bool) -> None:
    student, teacher, labels = logits_of(layout)
    vectors = 100 * 8 * student.numel() // COLUMNS  # what all vectors of one number a row may take together
    with Allocations() as forward:
        loss = fused_kd_loss(student, teacher, labels, vocab_mismatch="truncate", inplace=inplace, backend="cpu")
    assert forward.bytes < vectors
    with Allocations() as backward:
        (gradient,) = torch.autograd.grad(loss, student)
    size = student.numel() * student.element_size()
    if inplace:
        assert gradient.untyped_storage().data_ptr() == student.untyped_storage().data_ptr()
        assert backward.bytes < vectors
    else:
        assert size <= backward.bytes < size + vectors


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the torch backend works through chunks: test_chunks_are_bounded")
@pytest.mark.parametrize(
    "divergence",
    ["reverse_kl", "symmetric_kl", "jsd", "skew_kl", "total_variation", "logit_mse", AlphaBeta(0.4, 0.8)],
    ids=str,
)
def test_allocations_of_a_divergence(divergence: DivergenceName | Divergence) -> None:
    student, teacher, labels = logits_of("contiguous")
    with Allocations() as seen:
        loss = fused_kd_loss(student, teacher, labels, divergence=divergence, backend="cpu")
        torch.autograd.grad(loss, student)
    size = student.numel() * student.element_size()
    assert size <= seen.bytes < size + 200 * 8 * student.numel() // COLUMNS


def test_fake_kernels_allocate_what_the_real_ones_do() -> None:
    student, teacher = make_logits("wide", 2, 3, 50)
    student = student.to(torch.bfloat16).transpose(0, 1)
    teacher = teacher.transpose(0, 1)
    targets, vector = torch.arange(6), torch.ones(6)
    options = RowOptions(2.0, 2.0, "forward_kl", 0.0, True, True, "auto")
    real = ops.rows_forward(student, teacher, targets, *options)
    calls = [
        (ops.rows_forward, (student, teacher, targets)),
        (ops.rows_backward, (student, teacher, targets, real[2], vector, vector)),
        (ops.rows_fused, (student, teacher, targets, vector, vector)),
    ]
    for operator, arguments in calls:
        results = tree_leaves(operator(*arguments, *options))
        with FakeTensorMode() as mode:
            fakes = tree_leaves(operator(*(mode.from_tensor(x) for x in arguments), *options))
        for fake, result in zip(fakes, results, strict=True):
            assert (fake.shape, fake.stride(), fake.dtype) == (result.shape, result.stride(), result.dtype)


def test_chunks_are_bounded() -> None:
    """The torch backend's temporaries do not grow with the number of rows."""
    largest = []
    for rows in (600, 2400):
        student, teacher = make_logits("wide", rows, 4096)
        labels = make_labels(rows, vocabulary=4096)
        targets = labels.masked_fill(labels < 0, SKIP)
        options = RowOptions(2.0, 2.0, "forward_kl", 0.0, True, True, "torch")
        with Allocations() as seen:
            PREFERENCE["torch"].rows_forward(LogitRows(student, teacher, targets, options))
        largest.append(seen.largest)
    assert largest[0] == largest[1]
