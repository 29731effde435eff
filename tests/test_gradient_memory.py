"""The memory of a large gradient serves the next one, and nobody ever sees it in two hands."""

from collections.abc import Iterator

import pytest
import torch
from support import BACKENDS
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fused_kd import fused_kd_loss, gradient_memory
from fused_kd.gradient_memory import empty_gradient

pytestmark = pytest.mark.skipif(not gradient_memory._AVAILABLE, reason="the system has no MADV_FREE")
LARGE = (40, 2**18)  # 40 MiB of float32


@pytest.fixture(autouse=True)
def _no_spare() -> Iterator[None]:
    gradient_memory.release()
    yield
    gradient_memory.release()


def gradient_of(student: Tensor) -> Tensor:
    loss = fused_kd_loss(student, torch.zeros(student.shape), alpha=1.0)
    (gradient,) = torch.autograd.grad(loss, student)
    return gradient


def test_a_freed_gradients_memory_serves_the_next() -> None:
    student = torch.randn(LARGE, requires_grad=True)
    gradient = gradient_of(student)
    first, values = gradient.data_ptr(), gradient.clone()
    del gradient
    gradient = gradient_of(student)
    assert gradient.data_ptr() == first
    assert torch.equal(gradient, values)


@pytest.mark.parametrize("how", ["view", "detached", "storage", "numpy"])
def test_what_still_refers_to_a_gradient_keeps_its_memory(how: str) -> None:
    gradient = empty_gradient(torch.empty(LARGE)).fill_(3)
    take = {"view": lambda x: x[1:, ::2], "detached": Tensor.detach, "storage": Tensor.untyped_storage}
    kept = take.get(how, Tensor.numpy)(gradient)
    address = gradient.data_ptr()
    del gradient
    other = empty_gradient(torch.empty(LARGE)).fill_(5)
    assert other.data_ptr() != address
    if how != "storage":
        assert (kept == 3).all()
    del kept
    assert empty_gradient(torch.empty(LARGE)).data_ptr() == address


def test_one_mapping_is_kept_and_smaller_gradients_fit_it() -> None:
    gradients = [empty_gradient(torch.empty(LARGE)) for _ in range(3)]
    addresses = {gradient.data_ptr() for gradient in gradients}
    assert len(addresses) == 3
    del gradients
    assert len(gradient_memory._spare) == 1
    smaller = empty_gradient(torch.empty(33, 2**19, dtype=torch.bfloat16)[:, : 2**19 - 8])
    assert smaller.data_ptr() in addresses
    assert (smaller.dtype, smaller.shape, smaller.is_contiguous()) == (torch.bfloat16, (33, 2**19 - 8), True)
    del smaller
    larger = empty_gradient(torch.empty(64, 2**18))  # the spare one is too small, and is unmapped
    larger[-1, -1] = 1
    assert not gradient_memory._spare


def test_a_small_gradient_is_pytorchs() -> None:
    gradient = empty_gradient(torch.empty(31, 2**18))
    assert gradient.untyped_storage().resizable()
    del gradient
    assert not gradient_memory._spare


def test_a_gradient_is_a_tensor_like_any_other() -> None:
    student = torch.randn(LARGE, requires_grad=True)
    for _ in range(2):
        fused_kd_loss(student, torch.zeros(LARGE), alpha=1.0).backward()
    assert student.grad is not None
    assert not student.grad._is_view()
    torch.testing.assert_close(student.grad, 2 * gradient_of(student))


@pytest.mark.skipif("cpu" not in BACKENDS, reason="there is no native CPU kernel")
def test_pytorchs_default_device_and_dtype_do_not_matter() -> None:
    student, teacher = torch.randn(LARGE, requires_grad=True), torch.zeros(LARGE)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            loss = fused_kd_loss(student, teacher, alpha=1.0, backend="cpu")
            (gradient,) = torch.autograd.grad(loss, student)
    finally:
        torch.set_default_dtype(torch.float32)
    assert gradient.device.type == "cpu"
    assert torch.equal(gradient, gradient_of(student))


def test_a_profiler_sees_the_gradient() -> None:
    student = torch.randn(LARGE, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        gradient_of(student)
    assert recorded.profiler is not None
    sizes = [e.nbytes() for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert sizes.count(student.nbytes) >= 2  # the teacher's zeros, and the gradient
