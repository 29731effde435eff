"""Bad input: the error names the argument, what it was and what it should be."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import INF, NOT_IN_MEMORY, make_logits
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_kd import FusedKDLoss, FusedLinearKDLoss, fused_kd_loss, ops
from fused_kd.backends.rows import STATS, RowOptions
from fused_kd.divergences import JSD, Divergence

NAN = float("nan")


class Own(Divergence):
    name = "own"


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
    ({"divergence": "kl"}, ValueError, "divergence must be one of 'forward_kl', .*fused_kd.divergences, got 'kl'"),
    (
        {"divergence": "alpha_beta"},
        ValueError,
        r"got 'alpha_beta'; 'alpha_beta' has no defaults, pass AlphaBeta\(...\)",
    ),
    ({"divergence": 0.5}, ValueError, "or an object of fused_kd.divergences, got 0.5"),
    ({"divergence": JSD}, ValueError, r"got <class .*JSD'>; pass JSD\(\.\.\.\)"),
    ({"divergence": Divergence()}, ValueError, r"or an object of fused_kd.divergences, got Divergence\(\)"),
    ({"divergence": Own()}, ValueError, r"or an object of fused_kd.divergences, got Own\(\)"),
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
    ((S, T, Y[:, :2]), {}, ValueError, r"labels must have the student's leading shape \(2, 3\), got \(2, 2\)"),
    ((S, T, Y.to("meta")), {}, ValueError, "labels must be on the student's device cpu, got meta"),
    ((S, T, Y), {"weights": Y}, TypeError, r"weights must be a floating tensor, got torch.int64.*mask.float\(\)"),
    ((S, T, Y), {"weights": W[0]}, ValueError, r"weights must have the student's leading shape \(2, 3\), got \(3,\)"),
    ((S, T, Y), {"weights": W * -1}, ValueError, "weights must be finite and at least 0, got -1.0 in row 0"),
    ((S, T, Y), {"weights": W * float("nan")}, ValueError, "weights must be finite and at least 0, got nan in row 0"),
    ((S, T, Y), {"num_items": -1}, ValueError, "num_items must be finite and at least 0, got -1"),
    ((S, T, Y), {"num_items": "7"}, TypeError, "num_items must be a number or a tensor, got '7' of type str"),
    ((S, T, Y), {"num_items": torch.ones(2)}, ValueError, r"num_items must have one element, got the shape \(2,\)"),
    ((S, T, Y), {"num_items": torch.tensor(-4)}, ValueError, "num_items must be finite and at least 0, got -4"),
    ((S, T, Y), {"num_items": torch.tensor(NAN)}, ValueError, "num_items must be finite and at least 0, got nan"),
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


@pytest.mark.parametrize("how", NOT_IN_MEMORY)
def test_inplace_on_values_that_do_not_lie_in_memory(how: str) -> None:
    logits = torch.randn(4, 10, requires_grad=True) * 1
    lazy = NOT_IN_MEMORY[how](logits) if how == "negated" else NOT_IN_MEMORY[how](logits).requires_grad_() * logits
    assert lazy.is_neg() or lazy._is_zerotensor()
    with pytest.raises(ValueError, match="inplace=True needs student_logits whose values lie in memory"):
        fused_kd_loss(lazy, torch.zeros(4, 10), alpha=1.0, inplace=True)
    with torch.no_grad():  # evaluation: nothing will be overwritten
        fused_kd_loss(lazy, torch.zeros(4, 10), alpha=1.0, inplace=True)


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
    for name in ("temperature", "chunk_rows"):
        with pytest.raises(AttributeError, match=f"{name} is an option .* none before"):
            getattr(FusedLinearKDLoss.__new__(FusedLinearKDLoss), name)


OPERATORS: dict[Any, tuple[str, ...]] = {
    ops.rows_forward: (),
    ops.rows_backward: ("stats", "grad_soft", "grad_hard"),
    ops.rows_backward_: ("stats", "grad_soft", "grad_hard"),
    ops.rows_fused: ("coef_soft", "coef_hard"),
}
VECTORS = ("grad_soft", "grad_hard", "coef_soft", "coef_hard")


def operands(operator: Any) -> dict[str, Tensor]:
    """What the operator takes, its options left out."""
    student, teacher = make_logits("wide", 2, 3, 10)
    values = {"student": student, "teacher": teacher, "targets": torch.arange(6)}
    return values | {name: torch.rand(6, STATS) if name == "stats" else torch.rand(6) for name in OPERATORS[operator]}


def row_options(**changes: Any) -> RowOptions:
    return RowOptions(2.0, 2.0, "forward_kl", 0.0, True, True, "auto")._replace(**changes)


def check_refusal(operator: Any, values: Any, options: RowOptions, error: type[Exception], message: str) -> None:
    """The operator refuses these, and so does its fake kernel."""
    with pytest.raises(error, match=message):
        operator(*values, *options)
    with FakeTensorMode() as mode, pytest.raises(error, match=message):
        operator(*map(mode.from_tensor, values), *options)


Change = Callable[[Tensor], Tensor]
OPERANDS: list[tuple[tuple[str, ...], Change, type[Exception], str]] = [
    (
        ("student", "teacher"),
        lambda x: x[..., :1].expand(x.shape),
        ValueError,
        r"{} must have unit stride.*\(30, 10, 0\)",
    ),
    (("student", "teacher"), lambda x: x[..., :1].expand(2, 3, 2**40), ValueError, r"{} must have unit stride"),
    (("student", "teacher"), lambda x: x.transpose(0, 2), ValueError, r"{} must have unit stride.*{}.contiguous\(\)"),
    (("student", "teacher"), lambda x: x[..., :0], ValueError, r"{} must have the shape .*got \(2, 3, 0\)"),
    (("student", "teacher"), lambda x: x[0, 0, 0], ValueError, r"{} must have the shape \[..., V\].*got \(\)"),
    (("student", "teacher"), lambda x: x.int(), TypeError, r"{} must be float32.*got torch.int32"),
    (("student", "teacher"), lambda x: x.to(torch.complex64), TypeError, r"{} must be float32.*got torch.complex64"),
    (("teacher",), lambda x: x[:1], ValueError, "{} must have as many rows as the student, 6 of shape.*got 3 of shape"),
    (
        ("teacher", "targets", "stats", *VECTORS),
        lambda x: x.to("meta"),
        ValueError,
        "{} must be on the student's device",
    ),
    (("targets", "stats", *VECTORS), lambda x: x[:5], ValueError, "{} must have as many rows as the student, 6.*got 5"),
    (("targets", *VECTORS), lambda x: x.reshape(2, 3), ValueError, r"{} must have the shape \[N\].*got \(2, 3\)"),
    (("targets", *VECTORS), lambda x: x.new_zeros(6, 0), ValueError, r"{} must have the shape \[N\].*got \(6, 0\)"),
    (("targets", *VECTORS), lambda x: x[0], ValueError, r"{} must have the shape \[N\].*got \(\)"),
    (("targets",), lambda x: x.int(), TypeError, r"{} must be torch.int64, got torch.int32; pass {}.to\(torch.int64\)"),
    (("stats", *VECTORS), lambda x: x.double(), TypeError, "{} must be torch.float32.*got torch.float64; pass {}.to"),
    (("stats", *VECTORS), lambda x: x.half(), TypeError, "{} must be torch.float32.*got torch.float16; pass {}.to"),
    (("stats",), lambda x: x[:, :0], ValueError, rf"stats must have the shape \[N, {STATS}\].*got \(6, 0\)"),
    (("stats",), lambda x: x[:, :1], ValueError, rf"stats must have the shape \[N, {STATS}\].*got \(6, 1\)"),
    (("stats",), lambda x: x[:, 0], ValueError, rf"stats must have the shape \[N, {STATS}\].*got \(6,\)"),
]


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator._name)
@pytest.mark.parametrize(("names", "change", "error", "message"), OPERANDS, ids=[o[3][:60] for o in OPERANDS])
def test_operands(
    names: tuple[str, ...], change: Change, error: type[Exception], message: str, operator: Any, backend: str
) -> None:
    values = operands(operator)
    for name in values.keys() & set(names):
        changed = values | {name: change(values[name])}
        check_refusal(operator, changed.values(), row_options(backend=backend), error, message.format(name, name))


ROW_OPTIONS: list[tuple[dict[str, Any], str]] = [
    *(({name: x}, f"{name} must be") for name in ("temperature", "teacher_temperature") for x in (0.0, -1.0, INF, NAN)),
    ({"temperature": 1e-30}, "temperature must be between 1e-10 and 1e10"),
    ({"divergence": "kl"}, "divergence must be one of 'forward_kl', .*, got 'kl'"),
    (
        {"divergence": "kl", "parameters": (0.5,)},
        "divergence must be one of 'forward_kl', .*'alpha_beta', .*, got 'kl'",
    ),
    ({"divergence": "jsd", "parameters": (0.5, 0.5)}, r"parameters of divergence 'jsd' must be beta, got \(0.5, 0.5\)"),
    ({"divergence": "jsd", "parameters": (1.0,)}, "JSD: beta must be between 0 and 1, got 1.0"),
    ({"divergence": "jsd", "parameters": (1e-320,)}, "JSD: beta must be at least 1e-06 from 0 and 1"),
    (
        {"divergence": "alpha_beta", "parameters": (1e-7, 1e-7)},
        "AlphaBeta: alpha must be at least 1e-06 from 0",
    ),
    ({"label_smoothing": 1.1}, r"label_smoothing must be in \[0, 1\], got 1.1"),
    ({"label_smoothing": NAN}, r"label_smoothing must be in \[0, 1\], got nan"),
    ({"backend": "gpu"}, "backend must be one of 'auto', .*'torch', got 'gpu'"),
]


@pytest.mark.parametrize(("options", "message"), ROW_OPTIONS, ids=str)
def test_options_of_the_operators(options: dict[str, Any], message: str, backend: str) -> None:
    for operator in OPERATORS:
        values = operands(operator).values()
        check_refusal(operator, values, row_options(**{"backend": backend, **options}), ValueError, message)


@pytest.mark.parametrize("numbers", [torch.tensor([2.0, 2.0, 0.0]), torch.zeros(2).double(), torch.zeros(3).double()])
def test_symbolic_numbers_of_the_operators(numbers: Tensor) -> None:
    for operator in OPERATORS:
        with pytest.raises(ValueError, match="symbolic must be torch.float64 of the shape|temperature must be finite"):
            operator(*operands(operator).values(), *row_options(), numbers)


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_sizes_that_are_not_known_when_compiled() -> None:
    torch._dynamo.reset()
    student, teacher = make_logits("wide", 6, 10)

    def soft(kept: Tensor, of_teacher: Tensor) -> Tensor:
        targets = torch.arange(6)[kept]
        result: Tensor = ops.rows_forward(student[kept], teacher[of_teacher], targets, *row_options())[0]
        return result

    compiled = torch.compile(soft, fullgraph=True, backend="aot_eager")
    kept, others = torch.arange(6) > 2, torch.arange(6) < 3
    assert torch.equal(compiled(kept, others), soft(kept, others))
    with pytest.raises((RuntimeError, ValueError), match="teacher must have as many rows|Runtime assertion failed"):
        compiled(kept, torch.arange(6) < 4)


# What has no numbers at strides in memory, and what to do about it.
DENSE: dict[str, tuple[Change, str]] = {
    "sparse_coo": (lambda x: x.to_sparse(), r"the layout torch.sparse_coo; pass {}.to_dense\(\)"),
    "sparse_csr": (lambda x: x.to_sparse_csr(), r"the layout torch.sparse_csr; pass {}.to_dense\(\)"),
    "mkldnn": (lambda x: x.to_mkldnn(), r"the layout torch._mkldnn; pass {}.to_dense\(\)"),
    "nested": (
        lambda x: torch.nested.nested_tensor([x[:2], x], layout=torch.strided),
        r"a nested tensor of layout torch.strided; pass {}.to_padded_tensor\(...\) with weights of 0",
    ),
    "jagged": (
        lambda x: torch.nested.nested_tensor([x[:2], x], layout=torch.jagged),
        r"a nested tensor of layout torch.jagged; pass {}.values\(\), .*or {}.to_padded_tensor\(...\) with weights",
    ),
    "masked": (
        lambda x: torch.masked.masked_tensor(x, x > 0),
        r"a MaskedTensor; pass {}.get_data\(\), with weights of 0",
    ),
}


@pytest.mark.parametrize("kind", DENSE)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensors_that_are_not_dense(kind: str, backend: str) -> None:
    make, message = DENSE[kind]
    student, teacher = make_logits("wide", 6, 10)
    loss = {"student_logits": student, "teacher_logits": teacher, "labels": torch.arange(6), "weights": torch.rand(6)}
    calls: list[tuple[Any, dict[str, Tensor]]] = [(lambda *values: fused_kd_loss(*values[:3], weights=values[3]), loss)]
    for operator in OPERATORS:
        calls.append((lambda *values, op=operator: op(*values, *row_options(backend=backend)), operands(operator)))
    for call, values in calls:
        for name, value in values.items():
            if (kind == "sparse_csr" and value.dim() == 1) or (kind == "mkldnn" and name in ("labels", "targets")):
                continue  # there are no such tensors
            changed = values | {name: make(value)}
            with pytest.raises(TypeError, match=f"{name} must be a dense tensor, got " + message.format(name, name)):
                call(*changed.values())
