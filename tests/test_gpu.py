"""What only a GPU can show: memory, streams, graphs, waiting. The shared cases run there too: pytest -m gpu."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import GPU_BACKENDS, check, make_logits

from fused_kd import FusedKDLoss, KDLossOutput, fused_kd_loss, fused_linear_kd_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU, or PyTorch no support for it"),
]

ROWS, COLUMNS = 256, 50257


@pytest.fixture(params=GPU_BACKENDS, autouse=True)
def name(request: pytest.FixtureRequest) -> Iterator[str]:
    torch.set_default_device("cuda")
    torch.cuda.synchronize()
    yield request.param
    torch.set_default_device(None)


def inputs(dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    student, teacher = (x.to(dtype) for x in make_logits("wide", ROWS, COLUMNS))
    labels = torch.arange(ROWS) * 7
    labels[3] = -100
    return student.requires_grad_(), teacher, labels


def loss_of(*arguments: Any, **options: Any) -> torch.Tensor:
    loss = fused_kd_loss(*arguments, **options)
    assert not isinstance(loss, KDLossOutput)
    return loss


def peak(function: Any) -> int:
    """Bytes that `function` holds at its peak beyond what was there before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "options", [{}, {"divergence": "jsd"}, {"recompute": True}, {"student_softcap": 20.0}], ids=str
)
def test_from_hidden_states(name: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Products with a float32 result, gradients of 16 bits beside the logits, several chunks, ignored rows."""
    generator = torch.Generator("cuda").manual_seed(0)
    hidden, weight, taught, head = (
        torch.randn(*shape, generator=generator).to(dtype) for shape in [(ROWS, 64), (COLUMNS, 64)] * 2
    )
    labels = torch.arange(ROWS) * 7
    labels[3] = -100
    results = []
    for kind in (torch.float64, dtype):
        leaves = [x.to(kind).requires_grad_() for x in (hidden, weight)]
        given: dict[str, Any] = {**options, "backend": "torch" if kind == torch.float64 else name, "chunk_rows": 100}
        loss = fused_linear_kd_loss(*leaves, taught.to(kind), head.to(kind), labels, **given)
        assert not isinstance(loss, KDLossOutput)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    # Of the products' rounding: PyTorch's float32 products on a GPU may take TF32.
    bound = {torch.float32: 1e-3, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    for exact, ours in zip(*results, strict=True):
        assert (ours.double() - exact).norm() <= bound * exact.norm()


@pytest.mark.parametrize("inplace", [False, True])
def test_memory(name: str, inplace: bool) -> None:
    if name == "torch":
        pytest.skip("it works through chunks: test_memory.py")
    leaf, teacher, labels = inputs()
    loss_of(leaf * 1, teacher, labels, inplace=inplace, backend=name).backward()  # compiles
    leaf.grad = None
    student = leaf * 1
    losses: list[torch.Tensor] = []
    vectors = ROWS * 8 * 200
    assert peak(lambda: losses.append(loss_of(student, teacher, labels, inplace=inplace, backend=name))) < vectors
    backward = peak(lambda: torch.autograd.grad(losses[0], student))
    gradient = 0 if inplace else student.numel() * student.element_size()
    assert gradient <= backward < gradient + vectors + 2**21  # the allocator's rounding


@pytest.mark.parametrize("options", [{}, {"shift": True}, {"weights": True, "reduction": "sum"}], ids=str)
def test_nothing_waits(name: str, options: dict[str, Any]) -> None:
    student, teacher, labels = inputs()
    student, teacher, labels = student[None], teacher[None], labels[None]
    options = {**options, "weights": torch.rand(1, ROWS)} if "weights" in options else options
    loss_of(student, teacher, labels, backend=name, **options).sum().backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss_of(student, teacher, labels, backend=name, **options).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("label", [COLUMNS, -5, 2**40])
def test_a_label_out_of_range_is_nan_in_its_row(name: str, label: int) -> None:
    student, teacher, labels = inputs()
    labels[7] = label
    loss = loss_of(student, teacher, labels, reduction="none", backend=name)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert loss.isnan().nonzero().flatten().tolist() == [7]
    assert gradient.isnan().any(-1).nonzero().flatten().tolist() == [7]


def test_another_stream(name: str) -> None:
    student, teacher, labels = inputs()
    expected = loss_of(student, teacher, labels, backend=name)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)
        moved = student * 1  # not there yet when the loss is launched
        loss = loss_of(moved, teacher, labels, backend=name)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(loss, expected)


def test_cuda_graph(name: str) -> None:
    student, teacher, labels = inputs(torch.float32)

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        loss = loss_of(student, teacher, labels, backend=name)
        return loss.detach(), torch.autograd.grad(loss, student)[0]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        student.mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(captured, step(), strict=True):
        assert torch.equal(a, b)


def test_compile(name: str) -> None:
    torch._dynamo.reset()
    student, teacher, labels = inputs()
    loss_fn = FusedKDLoss(backend=name)

    def step(x: torch.Tensor) -> torch.Tensor:
        loss = loss_fn(x * 1.5, teacher, labels)
        assert isinstance(loss, torch.Tensor)
        return loss

    results = []
    for function in (step, torch.compile(step, fullgraph=True)):
        loss = function(student)
        results.append((loss.detach(), torch.autograd.grad(loss, student)[0]))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("columns", [1000, COLUMNS])
def test_a_rows_bits_are_its_own(name: str, columns: int) -> None:
    student, teacher, labels = inputs()
    student, teacher, labels = student.detach()[:, :columns], teacher[:, :columns], labels % columns
    whole = loss_of(student, teacher, labels, reduction="none", backend=name)
    for begin, end in ((0, 1), (5, 8), (100, ROWS)):
        part = slice(begin, end)
        assert torch.equal(
            loss_of(student[part], teacher[part], labels[part], reduction="none", backend=name), whole[part]
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 20.0, 100.0])
def test_a_language_models_vocabulary(name: str, temperature: float, dtype: torch.dtype) -> None:
    student, teacher = (x.to(dtype) for x in make_logits("close", 40, 151936))
    check(student, teacher, None, alpha=1.0, temperature=temperature, backend=name, relative=1e-4)


@pytest.mark.large
def test_more_than_two_to_the_31_elements(name: str) -> None:
    rows, columns = 17000, 131072
    last = make_logits("wide", 2, columns)
    student, teacher = (torch.zeros(rows, columns, dtype=torch.bfloat16) for _ in range(2))
    student[-2:], teacher[-2:] = last[0].bfloat16(), last[1].bfloat16()
    labels = torch.full((rows,), 5)
    losses = loss_of(student, teacher, labels, reduction="none", backend=name)
    few = loss_of(student[-2:], teacher[-2:], labels[-2:], reduction="none", backend=name)
    assert torch.equal(losses[-2:], few)
    check(student[-2:], teacher[-2:], labels[-2:], backend=name)
