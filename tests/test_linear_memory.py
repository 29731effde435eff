"""What the loss from hidden states allocates, at a real size on tensors without memory; and its gradients in two
processes."""

import math
import os
import weakref
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from support import before, make_labels
from test_linear import COLUMNS, SHAPE, gradients, loss_of, operands, tracked
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fused_kd import capped, fused_linear_kd_loss, linear_op, linear_rows
from fused_kd.backends.rows import RowOptions
from fused_kd.linear_op import linear_loss
from fused_kd.linear_rows import CHUNK_BYTES, Head, Heads

ROWS, WIDTH, VOCABULARY = 8192, 4096, 151936


class Live(TorchDispatchMode):
    """The bytes of the storages that were made and are not freed: now, and at the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for storage in (x.untyped_storage() for x in tree_leaves(result) if isinstance(x, Tensor)):
            key, size = storage._cdata, storage.nbytes()
            if key not in given and key not in self.known:
                self.known.add(key)
                weakref.finalize(storage, self._freed, key, size)
                self.now += size
                self.peak = max(self.peak, self.now)
        return result

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def heads(device: str) -> tuple[Head, Heads]:
    of: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
    student, teacher = (
        Head(torch.empty(ROWS, WIDTH, **of), torch.empty(VOCABULARY, WIDTH, **of), None, torch.bfloat16)
        for _ in range(2)
    )
    return student, Heads("logits", (), (teacher,))


def peak_of_both(monkeypatch: pytest.MonkeyPatch, wanted: tuple[bool, bool, bool]) -> int:
    """Of forward and backward."""
    new = lambda rows, *_: tuple(rows.student.new_empty(rows.targets.shape) for _ in range(2))  # noqa: E731
    monkeypatch.setattr(capped, "rows_fused", new)
    monkeypatch.setattr(capped, "rows_forward", lambda *a: (*new(*a), None))
    monkeypatch.setattr(linear_op, "plain", lambda *_: True)  # as without the mode that counts
    if before(torch.__version__, 2, 14):  # addmm with an out_dtype has no fake kernel that works
        monkeypatch.setattr(linear_rows, "_product", lambda out, *_, **__: out)
    options = RowOptions(2.0, 2.0, "forward_kl", 0.0, True, True, "torch")
    with FakeTensorMode(), torch.no_grad():
        student, teacher = heads("cuda")
        targets = torch.empty(ROWS, dtype=torch.int64, device="cuda")
        coef = torch.empty(ROWS, device="cuda")
        with Live() as live:
            gradients = linear_rows.linear_rows(
                student, teacher, targets, coef, coef, options, wanted, False, None
            ).gradients
            vectors = 20 * 8 * ROWS
            kept = 4 * WIDTH * (ROWS * wanted[0] + VOCABULARY * wanted[1])
            assert kept <= live.now <= kept + vectors
            pieces = [p for p in ([gradients.hidden], [gradients.first, gradients.others]) if p[0] is not None]
            del gradients
            while pieces:
                result = linear_op._rounded(pieces.pop(), torch.bfloat16, None)
                assert result.untyped_storage().nbytes() == result.nbytes
    return live.peak


@pytest.mark.parametrize("wanted", [(True, True, False), (True, False, False), (False, False, False)])
def test_peak(wanted: tuple[bool, bool, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of forward and backward, beyond what is given: the chunks, and one float32 gradient each of the hidden states and
    the weight."""
    peak = peak_of_both(monkeypatch, wanted)
    others = (
        20 * 8 * ROWS + 2 * WIDTH * CHUNK_BYTES // VOCABULARY // 10 + 8 * VOCABULARY
    )  # a chunk's hidden states, too
    kept = 4 * WIDTH * (ROWS * wanted[0] + VOCABULARY * wanted[1])
    print(f"{peak / 1e9:.2f} GB")
    assert peak <= CHUNK_BYTES + kept + others
    if wanted[1]:
        assert 20 * peak < eager_peak()


def eager_peak() -> int:
    """Of the plain expression of JSD, as trainers have it, in float32."""
    with FakeTensorMode():
        student, teacher = heads("cpu")
        hidden, weight = (x.requires_grad_() for x in student[:2])
        with Live() as live:
            logits = (hidden @ weight.T).float() / 2
            with torch.no_grad():
                others = (teacher.heads[0].hidden @ teacher.heads[0].weight.T).float() / 2
            log_p, log_q = torch.log_softmax(others, -1), torch.log_softmax(logits, -1)
            half = math.log(0.5)
            log_m = torch.logsumexp(torch.stack([log_p + half, log_q + half]), 0)
            kl = torch.nn.functional.kl_div
            of_p = kl(log_m, log_p, reduction="none", log_target=True)
            of_q = kl(log_m, log_q, reduction="none", log_target=True)
            (0.5 * of_p + 0.5 * of_q).sum().backward()
    return live.peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keep", [False, True])
def test_the_backward_allocates_what_it_returns(
    dtype: torch.dtype, keep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And of float32 not that, nor the weight's of 16 bits, unless the graph is kept."""
    monkeypatch.setattr(linear_rows, "_BLOCK", 1)
    x = tracked(operands(dtype))
    loss = loss_of(fused_linear_kd_loss(**x, labels=make_labels(*SHAPE, vocabulary=COLUMNS)))
    with torch.profiler.profile(profile_memory=True) as profile:
        result = gradients(loss, x, retain_graph=keep)
    allocated = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    peak, weight = max(accumulate(allocated)), x["student_weight"]
    returned = sum(g.nbytes for g in result)
    block = 6 * x["student_hidden"][0].numel()  # the largest that is rounded
    if keep:
        assert peak >= returned
    else:
        assert peak <= 4 if dtype == torch.float32 else 0 <= peak - (returned - weight.nbytes) <= block + 4
        assert result[1].shape == weight.shape
        assert result[1].untyped_storage().nbytes() == weight.nbytes


class _Calls(TorchDispatchMode):
    """What the operator is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.arguments: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is linear_loss._opoverload:
            self.arguments.append(args)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{}, {"recompute": True}, {"reduction": "none"}, {"entropies": True, "return_parts": True}], ids=str
)
def test_the_fake_operator_gives_what_the_real_one_gives(options: dict[str, Any], dtype: torch.dtype) -> None:
    with _Calls() as calls:
        fused_linear_kd_loss(**tracked(operands(dtype)), labels=make_labels(*SHAPE, vocabulary=COLUMNS), **options)
    (arguments,) = calls.arguments
    torch.library.opcheck(linear_loss._opoverload, arguments, test_utils=("test_schema", "test_faketensor"))


def _of_a_rank(rank: int, file: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)

    class Student(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = torch.nn.Linear(12, 12, dtype=torch.float64)
            self.head = torch.nn.Linear(12, COLUMNS, dtype=torch.float64)

        def forward(self, x: Tensor, teacher: Tensor, weight: Tensor, labels: Tensor) -> Any:
            hidden = torch.tanh(self.body(x))
            return fused_linear_kd_loss(
                hidden, self.head.weight, teacher, weight, labels, student_bias=self.head.bias, chunk_rows=4
            )

    torch.manual_seed(0)
    model = Student()
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    x = operands()
    labels = make_labels(*SHAPE, vocabulary=COLUMNS, ignored=0.0)
    given = [x["student_hidden"], x["teacher_hidden"], x["teacher_weight"], labels]
    half = slice(rank * 10, rank * 10 + 10)
    mine = [v if i == 2 else v.flatten(0, len(SHAPE) - 1)[half] for i, v in enumerate(given)]
    parallel(*mine).backward()
    ours = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    whole = [v if i == 2 else v.flatten(0, len(SHAPE) - 1)[:20] for i, v in enumerate(given)]
    model(*whole).backward()
    for a, p in zip(ours, model.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-10, atol=1e-13)
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch was built without torch.distributed")
def test_two_processes(tmp_path: Path) -> None:
    """DistributedDataParallel's mean of the gradients is the gradient of the whole batch."""
    torch.multiprocessing.spawn(_of_a_rank, (os.fspath(tmp_path / "store"),), nprocs=2)
