"""The loss inside PyTorch: autograd's checks, torch.compile, torch.func, autocast, operators."""

import contextlib
import inspect
from typing import Any

import pytest
import torch
from support import DTYPES, NOT_IN_MEMORY, assert_gradient, make_labels, make_logits
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export.experimental import _export_forward_backward
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fused_kd import FusedKDLoss, fused_kd_loss, ops
from fused_kd.backends.rows import NO_LABEL, SKIP, RowOptions, row_dtype
from fused_kd.options import KDOptions
from fused_kd.reference import hard_term, kd_loss, soft_term

OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 3.0, "divergence": "cross_entropy"},
    {"soft_on_ignored": True, "label_smoothing": 0.1, "teacher_temperature": 1.5},
    {"shift": True, "alpha": 0.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", ["wide", "close"])
def test_gradcheck(kind: str, options: dict[str, Any]) -> None:
    student, teacher = (x.double() for x in make_logits(kind, 2, 3, 11))
    labels = make_labels(2, 3, vocabulary=11)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: fused_kd_loss(s, teacher, labels, **options), student)


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"soft_on_ignored": True}, {"num_items": 3}], ids=str)
def test_gradient_in_the_weights(options: dict[str, Any]) -> None:
    student, teacher = (x.double() for x in make_logits("wide", 6, 50))
    labels = make_labels(6, vocabulary=50)
    weights = torch.rand(6, dtype=torch.float64, requires_grad=True)
    student.requires_grad_()
    for loss_fn in (fused_kd_loss, kd_loss):
        loss = loss_fn(student, teacher, labels, weights=weights, **options)
        assert isinstance(loss, torch.Tensor)
        gradients = torch.autograd.grad(loss.sum(), (weights, student))
        if loss_fn is fused_kd_loss:
            ours = gradients
    torch.testing.assert_close(ours, gradients)


def options_of(*, temperature: float = 2.0, **changes: Any) -> tuple[Any, ...]:
    return RowOptions(temperature, temperature, "forward_kl", 0.0, True, True, "auto")._replace(**changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_opcheck(dtype: torch.dtype, backend: str) -> None:
    if dtype == torch.float64 and backend != "torch":
        return
    student, teacher = (x.to(dtype) for x in make_logits("wide", 2, 3, 50))
    targets = torch.tensor([1, 2, SKIP, NO_LABEL, 4, 49])
    vector = torch.rand(6, dtype=row_dtype(student, teacher))
    symbolic = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64)
    for options in (
        options_of(backend=backend),
        options_of(temperature=3.0, soft=False, backend=backend),
        (*options_of(backend=backend), symbolic),
    ):
        stats = ops.rows_forward(student, teacher, targets, *options)[2]
        for logits in (student, student.clone().requires_grad_()):
            torch.library.opcheck(ops.rows_forward, (logits, teacher, targets, *options))
        torch.library.opcheck(ops.rows_backward, (student, teacher, targets, stats, vector, vector, *options))
        torch.library.opcheck(ops.rows_fused, (student, teacher, targets, vector, vector, *options))
        torch.library.opcheck(ops.rows_backward_, (student.clone(), teacher, targets, stats, vector, vector, *options))


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("terms", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["wide", "peaked", "close"])
def test_the_fused_verb(
    kind: str, dtype: torch.dtype, terms: tuple[bool, bool], temperature: float, backend: str
) -> None:
    student, teacher = (x.to(dtype) for x in make_logits(kind, 9, 6001))
    labels = make_labels(9, vocabulary=6001, ignored=0)
    soft_weight, hard_weight = torch.rand(2, 9) * torch.tensor([[3.0], [1.0]])
    options = options_of(temperature=temperature, soft=terms[0], hard=terms[1], label_smoothing=0.1, backend=backend)
    soft, hard, gradient = ops.rows_fused(student, teacher, labels, soft_weight, hard_weight, *options)
    assert torch.equal(soft, ops.rows_forward(student, teacher, labels, *options)[0])
    assert torch.equal(hard, ops.rows_forward(student, teacher, labels, *options)[1])
    exact = student.double().requires_grad_()
    total = exact[:0].sum()
    if terms[0]:
        taus = {"temperature": temperature, "teacher_temperature": temperature, "divergence": "forward_kl"}
        total = total + (soft_weight * soft_term(exact, teacher.double(), **taus)).sum()
    if terms[1]:
        total = total + (hard_weight * hard_term(exact, labels, label_smoothing=0.1)).sum()
    assert_gradient(gradient, torch.autograd.grad(total, exact)[0])


@pytest.mark.parametrize("columns", [17, 100, 5000])
def test_the_fused_verb_far_from_the_teacher(columns: int, backend: str) -> None:
    """Each row by itself: where p and q lie on different tokens, the sums B1 and B2 are large and cancel."""
    student, teacher = make_logits("wide", 300, columns)
    labels, ones = torch.zeros(300, dtype=torch.int64), torch.ones(300)
    options = options_of(temperature=1.0, hard=False, backend=backend)
    gradient = ops.rows_fused(student, teacher, labels, ones, ones, *options)[2].double()
    exact = student.double().softmax(-1) - teacher.double().softmax(-1)
    assert ((gradient - exact).norm(dim=-1) <= 2e-6 * exact.norm(dim=-1)).all()


def test_the_fused_verb_skips_rows(backend: str) -> None:
    student, teacher = make_logits("wide", 4, 6001)
    student[1] = teacher[1] = torch.nan
    targets, ones = torch.tensor([5, SKIP, NO_LABEL, 6]), torch.ones(4)
    options = options_of(backend=backend)
    soft, hard, gradient = ops.rows_fused(student, teacher, targets, ones, ones, *options)
    assert soft[1] == hard[1] == hard[2] == 0
    assert (gradient[1] == 0).all()
    stats = ops.rows_forward(student, teacher, targets, *options)[2]
    torch.testing.assert_close(gradient, ops.rows_backward(student, teacher, targets, stats, ones, ones, *options))


def test_rows_are_counted_and_not_laid_out(backend: str) -> None:
    """The operators need as many rows of student and teacher, and take vectors of any strides."""
    student, teacher = make_logits("wide", 6, 300)
    targets, ones = torch.tensor([1, 2, SKIP, NO_LABEL, 4, 49]), torch.ones(6)
    options = options_of(backend=backend)
    stats = ops.rows_forward(student, teacher, targets, *options)[2]
    rows, expanded = (student.view(2, 3, 300), teacher.view(3, 2, 300)), torch.ones(1).expand(6)
    strided = torch.stack([targets, targets], 1)[:, 1]
    result = ops.rows_backward(*rows, strided, stats.t().contiguous().t(), expanded, expanded, *options)
    expected = ops.rows_backward(student, teacher, targets, stats, ones, ones, *options)
    assert torch.equal(result, expected.view(2, 3, 300))
    result = ops.rows_fused(*rows, strided, expanded, expanded, *options)
    expected = ops.rows_fused(student, teacher, targets, ones, ones, *options)
    assert all(torch.equal(x.view(y.shape), y) for x, y in zip(result, expected, strict=True))


@pytest.mark.parametrize("how", NOT_IN_MEMORY)
def test_operands_that_do_not_lie_in_memory(how: str, backend: str) -> None:
    student, teacher = make_logits("wide", 6, 300)
    targets, vector, options = torch.tensor([1, 2, SKIP, 3, 4, 49]), torch.rand(6), options_of(backend=backend)
    stats = ops.rows_forward(student, teacher, targets, *options)[2]
    calls = {ops.rows_forward: (), ops.rows_fused: (vector, vector)}
    calls |= dict.fromkeys((ops.rows_backward, ops.rows_backward_), (stats, vector, vector))
    for operator, rest in calls.items():
        for i in range(3 + len(rest)):
            operands = [student.clone(), teacher, targets, *rest]
            operands[i], like = NOT_IN_MEMORY[how](operands[i]), operands[i]
            if i == 0 and operator is ops.rows_backward_:
                with pytest.raises(ValueError, match="student will be written to, and its values must lie in memory"):
                    operator(*operands, *options)
                continue
            expected = [*operands[:i], operands[i] + torch.zeros_like(like), *operands[i + 1 :]]
            if operator is ops.rows_backward_:
                expected[0] = student.clone()
            results = [operator(*values, *options) for values in (operands, expected)]
            if operator is ops.rows_backward_:
                results = [operands[0], expected[0]]
            torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)  # stats of zeros make NaN


def test_negated_logits_are_compiled(backend: str) -> None:
    torch._dynamo.reset()
    student, teacher = make_logits("wide", 6, 300)
    labels = torch.arange(6)

    def step(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        loss = fused_kd_loss(torch._neg_view(x), t, labels, backend=backend)
        assert isinstance(loss, torch.Tensor)
        return loss

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        logits = student.clone().requires_grad_()
        loss = function(logits, torch._neg_view(teacher))
        results.append((loss.detach(), torch.autograd.grad(loss, logits)[0]))
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[0][0], fused_kd_loss(-student, -teacher, labels, backend=backend))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("options", [*OPTIONS, {"inplace": True}, {"reduction": "none"}], ids=str)
def test_compile(options: dict[str, Any], dynamic: bool, backend: str) -> None:
    torch._dynamo.reset()
    loss_fn = FusedKDLoss(backend=backend, **options)

    def step(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        loss = loss_fn(x * 1.5, t, y)
        assert isinstance(loss, torch.Tensor)
        return loss.sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (4, 6):
        student, teacher = make_logits("wide", 2, rows, 300)
        labels = make_labels(2, rows, vocabulary=300)
        results = []
        for function in (step, compiled):
            logits = student.clone().requires_grad_()
            loss = function(logits, teacher, labels)
            results.append((loss.detach(), torch.autograd.grad(loss, logits)[0]))
        torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile_inplace_where_the_logits_are_needed_again(compiler: str, again: bool) -> None:
    """Returned, or read by a second loss: they are not overwritten before that."""
    torch._dynamo.reset()
    hidden, weight = torch.randn(5, 8), torch.randn(30, 8)
    teacher = make_logits("wide", 5, 30)[1]
    labels = make_labels(5, vocabulary=30, ignored=0)

    def step(h: torch.Tensor, inplace: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        logits = h @ weight.T
        loss = fused_kd_loss(logits, teacher, labels, inplace=inplace)
        assert isinstance(loss, torch.Tensor)
        if again:
            loss = loss + torch.nn.functional.cross_entropy(logits * 0.5, labels)
        return loss, logits

    results = []
    for function in (lambda h: step(h, inplace=False), torch.compile(step, fullgraph=True, backend=compiler)):
        h = hidden.clone().requires_grad_()
        loss, logits = function(h)
        kept = logits.detach().clone()
        results.append((loss.detach(), kept, torch.autograd.grad(loss, h)[0]))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("options", [{}, {"inplace": True}], ids=str)
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile_with_activation_checkpointing(compiler: str, options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    student, teacher = make_logits("wide", 5, 30)
    labels = make_labels(5, vocabulary=30)

    def loss(x: torch.Tensor) -> torch.Tensor:
        output = fused_kd_loss(x * 2, teacher, labels, **options)
        assert isinstance(output, torch.Tensor)
        return output

    def step(x: torch.Tensor) -> torch.Tensor:
        once: torch.Tensor = checkpoint(loss, x, use_reentrant=False)
        return once + checkpoint(loss, torch.sin(x), use_reentrant=False)

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend=compiler)):
        logits = student.clone().requires_grad_()
        total = function(logits)
        results.append((total.detach(), torch.autograd.grad(total, logits)[0]))
    torch.testing.assert_close(results[1], results[0])


def test_export_forward_and_joint_graph(backend: str) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.loss_fn = torch.nn.Linear(8, 30), FusedKDLoss(backend=backend)

        def forward(self, hidden: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor) -> Any:
            return self.loss_fn(self.head(hidden), teacher, labels)

    model = Model()
    teacher, labels = make_logits("wide", 5, 30)[1], make_labels(5, vocabulary=30)
    inputs = (torch.randn(5, 8), teacher, labels)
    exported = torch.export.export(model, inputs)
    loss = model(*inputs)
    torch.testing.assert_close(exported.module()(*inputs), loss)
    joint = _export_forward_backward(exported)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    results = joint.graph_module(*exported.parameters(), *inputs)
    torch.testing.assert_close(list(results), [loss, *gradients])


def test_compile_with_inductor_and_the_function() -> None:
    torch._dynamo.reset()
    student, teacher = make_logits("wide", 5, 300)
    labels = make_labels(5, vocabulary=300)
    weights = torch.rand(5)

    def step(x: torch.Tensor) -> torch.Tensor:
        loss = fused_kd_loss(x * 2, teacher, labels, temperature=3.0, weights=weights, num_items=torch.tensor(3))
        assert isinstance(loss, torch.Tensor)
        return loss

    results = []
    for function in (step, torch.compile(step, fullgraph=True)):
        logits = student.clone().requires_grad_()
        loss = function(logits)
        results.append((loss.detach(), torch.autograd.grad(loss, logits)[0]))
    torch.testing.assert_close(results[1], results[0])


def test_the_operators_have_a_gradient(backend: str) -> None:
    student, teacher = make_logits("wide", 2, 3, 50)
    targets, weight = torch.tensor([1, 2, SKIP, NO_LABEL, 4, 49]), torch.linspace(0.5, 2, 6)
    options, symbolic = options_of(backend=backend), torch.tensor([3.0, 1.5, 0.1], dtype=torch.float64)
    rows = options._replace(temperature=3.0, teacher_temperature=1.5, label_smoothing=0.1)
    for arguments in (rows, (*options, symbolic)):
        logits = student.clone().requires_grad_()
        soft, hard, stats = ops.rows_forward(logits, teacher, targets, *arguments)
        (gradient,) = torch.autograd.grad(soft.sum() + (hard * weight).sum(), logits, create_graph=True)
        expected = ops.rows_backward(student, teacher, targets, stats, torch.ones(6), weight, *rows)
        assert torch.equal(gradient, expected)
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(gradient.sum(), logits)


def test_func_grad(backend: str) -> None:
    student, teacher = make_logits("wide", 3, 50)
    labels = torch.tensor([1, -100, 3])

    def loss(s: torch.Tensor) -> torch.Tensor:
        result = fused_kd_loss(s, teacher, labels, backend=backend)
        assert isinstance(result, torch.Tensor)
        return result

    gradient = torch.func.grad(loss)(student)
    logits = student.clone().requires_grad_()
    assert torch.equal(gradient, torch.autograd.grad(loss(logits), logits)[0])


# What differs in a batch of three: None for what all share.
MAPPED: list[tuple[dict[str, Any], tuple[int | None, ...]]] = [
    ({}, (0, 0, 0, 0)),
    ({"reduction": "none"}, (1, 0, 1, 0)),
    ({"reduction": "sum", "alpha": 1.0}, (0, None, None, None)),
    ({"soft_on_ignored": True, "label_smoothing": 0.1}, (None, 0, None, None)),
    ({"shift": True, "temperature": 1.0}, (None, None, 0, None)),
    ({"alpha": 0.0}, (0, None, None, 1)),
]


def _mapped_inputs(in_dims: tuple[int | None, ...]) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
    """Student, teacher, labels and weights, each with a dimension of three where it is mapped; and the three sets."""
    student, teacher = make_logits("wide", 3, 5, 30)
    whole = [student, teacher, make_labels(3, 5, vocabulary=30), 0.1 + torch.rand(3, 5)]
    sets = [[x[0 if dim is None else i] for x, dim in zip(whole, in_dims, strict=True)] for i in range(3)]
    inputs = [x[0] if dim is None else x.movedim(0, dim) for x, dim in zip(whole, in_dims, strict=True)]
    return [x.contiguous() for x in inputs], sets


@pytest.mark.parametrize(("options", "in_dims"), MAPPED, ids=str)
def test_vmap(options: dict[str, Any], in_dims: tuple[int | None, ...], backend: str) -> None:
    def loss(s: torch.Tensor, t: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> Any:
        return fused_kd_loss(s, t, y, weights=w, backend=backend, **options)

    def summed(*inputs: torch.Tensor) -> torch.Tensor:
        return loss(*inputs).sum()  # type: ignore[no-any-return]

    inputs, sets = _mapped_inputs(in_dims)
    for function in (loss, torch.func.grad(summed, argnums=(0, 3))):
        each = [function(*one) for one in sets]
        expected = (
            [torch.stack(x) for x in zip(*each, strict=True)] if isinstance(each[0], tuple) else [torch.stack(each)]
        )
        mapped = torch.func.vmap(function, in_dims)(*inputs)
        torch.testing.assert_close(list(mapped) if isinstance(mapped, tuple) else [mapped], expected)

    def of_all(*inputs: torch.Tensor) -> torch.Tensor:
        return torch.func.vmap(summed, in_dims)(*inputs).sum()

    gradient = torch.func.grad(of_all)(*inputs)
    by_one = torch.stack([torch.func.grad(summed)(*one) for one in sets])
    torch.testing.assert_close(gradient, by_one.sum(0) if in_dims[0] is None else by_one.movedim(0, in_dims[0]))


def test_vmap_in_vmap_and_a_jacobian(backend: str) -> None:
    student, teacher = make_logits("wide", 2, 3, 4, 30)
    labels = make_labels(2, 3, 4, vocabulary=30)

    def loss(s: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        result = fused_kd_loss(s, t, y, backend=backend, reduction="none")
        assert isinstance(result, torch.Tensor)
        return result

    whole = loss(student, teacher, labels)
    torch.testing.assert_close(torch.func.vmap(torch.func.vmap(loss))(student, teacher, labels), whole)
    rows = (student[0, 0], teacher[0, 0], labels[0, 0])
    jacobian = torch.func.jacrev(loss)(*rows)
    logits = rows[0].clone().requires_grad_()
    losses = loss(logits, *rows[1:])
    one_by_one = torch.stack([torch.autograd.grad(x, logits, retain_graph=True)[0] for x in losses])
    torch.testing.assert_close(jacobian, one_by_one)
    (batched,) = torch.autograd.grad(losses, logits, torch.eye(4), is_grads_batched=True)
    torch.testing.assert_close(batched, one_by_one)


def test_inplace_under_vmap_says_what_to_do(backend: str) -> None:
    student, teacher = make_logits("wide", 2, 3, 30)

    def loss(s: torch.Tensor, t: torch.Tensor) -> Any:
        return fused_kd_loss(s * 1, t, alpha=1.0, inplace=True, backend=backend)

    with pytest.raises(ValueError, match="inplace=True .* use inplace=False"):
        torch.func.vmap(torch.func.grad(loss))(student, teacher)


class _Seen(TorchDispatchMode):
    """Collects the names of fused_kd's operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "fused_kd":
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("in_forward", "in_backward"), [(True, False), (False, True), (True, True)])
def test_a_mode_sees_operators(in_forward: bool, in_backward: bool, inplace: bool, backend: str) -> None:
    student, teacher = make_logits("wide", 3, 50)
    labels = torch.tensor([1, -100, 3])
    results = []
    for forward, backward in ((False, False), (in_forward, in_backward)):
        seen, nothing = _Seen(), contextlib.nullcontext()
        logits = student.clone().requires_grad_()
        with seen if forward else nothing:
            loss = fused_kd_loss(logits * 1, teacher, labels, inplace=inplace, backend=backend)
        assert isinstance(loss, torch.Tensor)
        with seen if backward else nothing:
            (gradient,) = torch.autograd.grad(loss, logits)
        results.append((loss, gradient))
        verb = "rows_backward_" if inplace else "rows_backward"
        assert seen.names == ["rows_forward"] * forward + [verb] * backward
    assert all(map(torch.equal, *results))


def test_autocast_changes_nothing(backend: str) -> None:
    student, teacher = make_logits("close", 3, 3000)
    labels, weights = torch.tensor([1, 2, 3]), torch.tensor([1.0, 0.3, 0.7])
    results = []
    for enabled in (False, True):
        logits = student.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = fused_kd_loss(logits, teacher, labels, weights=weights, backend=backend)
        assert isinstance(loss, torch.Tensor)
        assert loss.dtype == torch.float32
        results.append((loss.detach(), torch.autograd.grad(loss, logits)[0]))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_module_and_function_have_the_same_options() -> None:
    fields = {name: field.default for name, field in KDOptions.__dataclass_fields__.items()}
    module = inspect.signature(FusedKDLoss.__init__).parameters
    function = inspect.signature(fused_kd_loss).parameters
    call = inspect.signature(FusedKDLoss.forward).parameters
    assert {name: p.default for name, p in module.items() if name != "self"} == fields
    for name, default in fields.items():
        assert function[name].default == default
    assert set(function) - set(fields) == set(call) - {"self"}
    assert all(function[name].kind == call[name].kind for name in call if name != "self")


def test_repr_names_what_differs_from_the_defaults() -> None:
    assert repr(FusedKDLoss(4.0, shift=True)) == "FusedKDLoss(temperature=4.0, shift=True)"


ANNEALED = {
    "temperature": [1.5 + 0.3 * i for i in range(12)],
    "teacher_temperature": [0.5 + 0.3 * i for i in range(12)],
    "alpha": [0.3 + 0.05 * i for i in range(12)],
    "hard_weight": [0.3 + 0.05 * i for i in range(12)],
    "label_smoothing": [0.05 + 0.02 * i for i in range(12)],
    "num_items": [3.5 + 0.7 * i for i in range(12)],
}


@pytest.mark.parametrize("name", ANNEALED)
def test_a_number_that_changes_is_not_compiled_again_and_again(name: str, backend: str) -> None:
    torch._dynamo.reset()
    student, teacher = make_logits("wide", 5, 30)
    labels = make_labels(5, vocabulary=30)

    def step(x: torch.Tensor, value: float) -> torch.Tensor:
        loss = fused_kd_loss(x * 2, teacher, labels, backend=backend, **{name: value})
        assert isinstance(loss, torch.Tensor)
        return loss

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for value in ANNEALED[name]:
        results = []
        for function in (step, compiled):
            logits = student.clone().requires_grad_()
            loss = function(logits, value)
            results.append((loss.detach(), torch.autograd.grad(loss, logits)[0]))
        torch.testing.assert_close(results[1], results[0])
    assert counter.frame_count <= 2  # for the first value, and for all others


def test_an_option_that_is_set_reaches_a_compiled_module(backend: str) -> None:
    torch._dynamo.reset()
    student, teacher = make_logits("wide", 5, 30)
    loss_fn = FusedKDLoss(alpha=1.0, backend=backend)
    compiled = torch.compile(loss_fn, fullgraph=True, backend="aot_eager")
    for temperature in (2.0, 3.0, 4.5):
        loss_fn.temperature = temperature
        torch.testing.assert_close(compiled(student, teacher), loss_fn(student, teacher))


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"weights": True, "return_parts": True}], ids=str)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace:DeprecationWarning")
def test_a_trace_counts_the_labels_it_gets(options: dict[str, Any], backend: str) -> None:
    student, teacher = make_logits("wide", 6, 30)
    first, then = torch.tensor([1, 2, -100, -100, 3, 4]), torch.tensor([5, -100, -100, -100, -100, -100])
    weights = torch.linspace(0.5, 2, 6)

    def loss(s: torch.Tensor, t: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> Any:
        output = fused_kd_loss(
            s, t, y, backend=backend, **{**options, "weights": w} if "weights" in options else options
        )
        return tuple(x for x in output if x is not None) if isinstance(output, tuple) else output

    traced = torch.jit.trace(loss, (student, teacher, first, weights))
    arguments = (student * 2, teacher, then, weights * 3)
    torch.testing.assert_close(traced(*arguments), loss(*arguments))
