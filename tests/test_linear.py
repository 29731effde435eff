"""The loss from hidden states: that of the logits they give, its gradients, and what it does not compute."""

import math
from typing import Any

import pytest
import torch
from support import BACKENDS, make_labels
from test_divergences import ONE_OF_EACH
from torch import Tensor

from fused_kd import (
    FusedLinearKDLoss,
    KDLossOutput,
    SparseTeacher,
    fused_kd_loss,
    fused_linear_kd_loss,
    linear_rows,
)
from fused_kd.divergences import Divergence
from fused_kd.options import KDOptions, LossOptions

SHAPE, COLUMNS, STUDENT, TEACHER = (3, 7), 90, 12, 8
DOUBLE = torch.float64


def operands(
    dtype: torch.dtype = DOUBLE, shape: tuple[int, ...] = SHAPE, seed: int = 0, biases: bool = True
) -> dict[str, Any]:
    """Of a student and a teacher that is sure of some tokens."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=DOUBLE).to(dtype)

    result: dict[str, Any] = {
        "student_hidden": normal(*shape, STUDENT),
        "student_weight": normal(COLUMNS, STUDENT),
        "teacher_hidden": normal(*shape, TEACHER) * 2,
        "teacher_weight": normal(COLUMNS, TEACHER),
    }
    if biases:
        result |= {"student_bias": normal(COLUMNS) * 3, "teacher_bias": normal(COLUMNS)}
    return result


def projected(x: dict[str, Any], side: str) -> Tensor:
    return torch.nn.functional.linear(x[f"{side}_hidden"], x[f"{side}_weight"], x.get(f"{side}_bias"))


GRADIENTS = ("student_hidden", "student_weight", "student_bias")


def gradients(loss: Tensor, x: dict[str, Any], upstream: Tensor | None = None, **how: Any) -> list[Tensor]:
    wanted = [x[name] for name in GRADIENTS if name in x and x[name].requires_grad]
    return list(torch.autograd.grad(loss, wanted, torch.ones_like(loss) if upstream is None else upstream, **how))


def tracked(x: dict[str, Any], *names: str) -> dict[str, Any]:
    """The same numbers, with those of these names (all of the student's) wanting a gradient."""
    return {k: v.detach().clone().requires_grad_(k in (names or GRADIENTS)) for k, v in x.items()}


def loss_of(output: Tensor | KDLossOutput) -> Tensor:
    return output.loss if isinstance(output, KDLossOutput) else output


def compare(x: dict[str, Any], labels: Tensor | None, *, linear: dict[str, Any] | None = None, **options: Any) -> None:
    """Loss, parts and gradients are those of the logits, for some upstream gradient."""
    logits, hidden = tracked(x), tracked(x)
    given = {k: options.pop(k) for k in ("teacher_logits",) if k in options}
    teacher = given.get("teacher_logits")
    expected = fused_kd_loss(
        projected(logits, "student"), projected(x, "teacher") if teacher is None else teacher, labels, **options
    )
    if teacher is not None:
        hidden = {k: v for k, v in hidden.items() if not k.startswith("teacher")}
    output = fused_linear_kd_loss(**hidden, labels=labels, **given, **options, **(linear or {}))
    for a, b in zip(
        expected if isinstance(expected, KDLossOutput) else (expected,),
        output if isinstance(output, KDLossOutput) else (output,),
        strict=True,
    ):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-14)
    loss = loss_of(expected)
    upstream = torch.linspace(-1.0, 2.0, max(1, loss.numel()), dtype=loss.dtype).reshape(loss.shape)
    for a, b in zip(gradients(loss, logits, upstream), gradients(loss_of(output), hidden, upstream), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10 * float(a.norm()))


class Products:
    """Adds up the multiplications of matrix products, within operators too."""

    def __enter__(self) -> "Products":
        self.profile = torch.profiler.profile(record_shapes=True)
        self.profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.profile.__exit__(*error)
        self.number = 0
        for event in self.profile.events():
            if event.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
                first = 0 if event.name == "aten::mm" else 1
                (rows, inner), (_, columns) = event.input_shapes[first : first + 2]
                self.number += rows * inner * columns


OPTIONS: list[dict[str, Any]] = [
    {},
    {"alpha": 0.0, "label_smoothing": 0.1},
    {"alpha": 1.0},
    {"alpha": 2.0, "hard_weight": 0.5, "t2_scaling": False},
    {"teacher_temperature": 3.0, "temperature": 1.0},
    {"reduction": "sum"},
    {"reduction": "batchmean"},
    {"reduction": "none"},
    {"reduction": "none", "weights": True, "shift": True},
    {"shift": True},
    {"soft_on_ignored": True},
    {"weights": True},
    {"num_items": 5.0},
    {"num_items": torch.tensor(5)},
    {"ignore_index": 3},
    {"return_parts": True},
    {"return_parts": True, "entropies": True},
    {"return_parts": True, "entropies": True, "alpha": 0.0},
    {"student_softcap": 5.0, "teacher_logit_scale": 0.5},
]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(options: dict[str, Any], recompute: bool) -> None:
    options = dict(options)
    if options.get("weights") is True:
        options["weights"] = torch.linspace(0.0, 1.0, math.prod(SHAPE)).view(SHAPE)
    labels = make_labels(*SHAPE, vocabulary=COLUMNS)
    if "ignore_index" in options:
        labels = labels.masked_fill(labels == -100, options["ignore_index"])
    compare(operands(), labels, linear={"chunk_rows": 4, "recompute": recompute}, **options)


@pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=repr)
@pytest.mark.parametrize("chunk_rows", [1, 7, math.prod(SHAPE), 10**20, None])
def test_divergences_and_chunks(divergence: Divergence, chunk_rows: int | None) -> None:
    labels = make_labels(*SHAPE, vocabulary=COLUMNS)
    compare(operands(), labels, linear={"chunk_rows": chunk_rows}, divergence=divergence)


@pytest.mark.parametrize("biases", [(), ("student_bias",), ("teacher_bias",), ("student_bias", "teacher_bias")])
def test_biases(biases: tuple[str, ...]) -> None:
    x = {k: v for k, v in operands().items() if "bias" not in k or k in biases}
    compare(x, make_labels(*SHAPE, vocabulary=COLUMNS), linear={"chunk_rows": 4})


@pytest.mark.parametrize("shape", [(), (5,), (2, 1, 3, 2), (0,), (2, 0)])
def test_shapes(shape: tuple[int, ...]) -> None:
    compare(operands(shape=shape), make_labels(*shape, vocabulary=COLUMNS), linear={"chunk_rows": 4})


@pytest.mark.parametrize("ignored", [False, True])
def test_views(ignored: bool) -> None:
    """Hidden states and given logits that do not lie row after row."""
    x = operands(shape=(4, 9))
    logits = projected(x, "teacher").detach()[:, 1:].transpose(0, 1)
    x = {k: v[:, 1:].transpose(0, 1) if "hidden" in k else v for k, v in x.items()}
    labels = make_labels(8, 4, vocabulary=COLUMNS, ignored=0.3 if ignored else 0.0)
    compare(x, labels, linear={"chunk_rows": 5})
    compare(x, labels, linear={"chunk_rows": 5}, teacher_logits=logits)


@pytest.mark.parametrize("alpha", [0.0, 0.9])
def test_all_rows_are_ignored(alpha: float) -> None:
    x = tracked(operands())
    loss = loss_of(fused_linear_kd_loss(**x, labels=torch.full(SHAPE, -100), alpha=alpha))
    assert loss == 0
    assert all((g == 0).all() for g in gradients(loss, x))


@pytest.mark.parametrize(
    "options",
    [{}, {"ensemble": "geometric", "teacher_weights": [1.0, 3.0]}, {"alpha": 0.0}, {"divergence": "jsd"}],
    ids=str,
)
def test_several_teachers(options: dict[str, Any]) -> None:
    x, other = operands(), operands(seed=1)
    labels = make_labels(*SHAPE, vocabulary=COLUMNS)
    logits = [projected(x, "teacher"), torch.nn.functional.linear(other["teacher_hidden"], other["teacher_weight"])]
    hidden, again = tracked(x), tracked(x)
    expected = loss_of(fused_kd_loss(projected(again, "student"), logits, labels, **options))
    student = {k: v for k, v in hidden.items() if k.startswith("student")}
    teachers = {
        "teacher_hidden": [x["teacher_hidden"], other["teacher_hidden"]],
        "teacher_weight": [x["teacher_weight"], other["teacher_weight"]],
        "teacher_bias": [x["teacher_bias"], None],
    }
    for given in (teachers, {"teacher_logits": logits}):
        loss = loss_of(fused_linear_kd_loss(**student, **given, labels=labels, chunk_rows=5, **options))
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
        for a, b in zip(gradients(expected, again, retain_graph=True), gradients(loss, hidden), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("missing", ["rest", "renormalize", "both", "truncate"])
@pytest.mark.parametrize("ignored", [0.0, 0.3])
def test_a_sparse_teacher(missing: Any, ignored: float) -> None:
    x = operands()
    teacher = SparseTeacher.from_logits(projected(x, "teacher"), 6, temperature=2.0, missing=missing)
    labels = make_labels(*SHAPE, vocabulary=COLUMNS, ignored=ignored)
    compare(x, labels, linear={"chunk_rows": 4}, teacher_logits=teacher)


@pytest.mark.parametrize("dtype", [DOUBLE, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"entropies": True, "return_parts": True, "alpha": 0.5}], ids=str)
@pytest.mark.parametrize("number", [1, 2])
def test_several_capped_teachers(number: int, options: dict[str, Any], dtype: torch.dtype) -> None:
    x, other = operands(dtype, biases=False), operands(dtype, seed=1, biases=False)
    labels = make_labels(*SHAPE, vocabulary=COLUMNS)
    teachers: dict[str, Any] = {k: [x[k], other[k]][:number] for k in ("teacher_hidden", "teacher_weight")}
    logits = [projected(each, "teacher") for each in (x, other)][:number]
    options = {**options, "student_softcap": 5.0, "teacher_logit_scale": 0.5, "teacher_weights": [1.0, 2.0][:number]}
    expected = fused_kd_loss(projected(x, "student"), logits, labels, **options)
    student = {k: v for k, v in x.items() if k.startswith("student")}
    output = fused_linear_kd_loss(**student, **teachers, labels=labels, chunk_rows=5, **options)
    exact = dtype == DOUBLE
    for a, b in zip(*((x if isinstance(x, KDLossOutput) else (x,)) for x in (expected, output)), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-10 if exact else 1e-2, atol=0)


def test_parameters_are_checked_as_tensors_are() -> None:
    x = operands()
    x["student_weight"] = torch.nn.Parameter(x["student_weight"])
    with pytest.raises(ValueError, match="weights must be finite"):
        fused_linear_kd_loss(**x, labels=make_labels(*SHAPE, vocabulary=COLUMNS), weights=torch.full(SHAPE, -1.0))


def test_given_logits() -> None:
    x = operands()
    logits = projected(x, "teacher").float()
    compare(x, make_labels(*SHAPE, vocabulary=COLUMNS), linear={"chunk_rows": 4}, teacher_logits=logits)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_vocabularies_of_different_sizes(side: str) -> None:
    """The columns that both have; the others of the student's head have a gradient of 0."""
    x = operands()
    for name in (f"{side}_weight", f"{side}_bias"):
        x[name] = x[name][:70]
    compare(x, make_labels(*SHAPE, vocabulary=70), vocab_mismatch="truncate", linear={"chunk_rows": 4})
    with pytest.raises(ValueError, match="teacher_hidden @ teacher_weight.T must have the student's vocabulary"):
        fused_linear_kd_loss(**x, labels=make_labels(*SHAPE, vocabulary=70))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "reverse_kl"])
def test_as_exact_as_a_linear_layer(divergence: Any, dtype: torch.dtype, backend: str) -> None:
    """No further from float64 than PyTorch's own layer and the loss of its logits, but for a tenth."""
    x = operands(dtype, shape=(4, 40))
    labels = make_labels(4, 40, vocabulary=COLUMNS)
    options: dict[str, Any] = {"divergence": divergence, "backend": backend}
    results = []
    for kind in (DOUBLE, dtype):
        y = tracked({k: v.to(kind) for k, v in x.items()})
        how = {**options, "backend": "torch"} if kind == DOUBLE else options
        loss = loss_of(fused_kd_loss(projected(y, "student"), projected(y, "teacher").detach(), labels, **how))
        results.append([loss, *gradients(loss, y)])
    y = tracked(x)
    loss = loss_of(fused_linear_kd_loss(**y, labels=labels, chunk_rows=50, **options))
    ours = [loss, *gradients(loss, y)]
    for exact, theirs, mine in zip(*results, ours, strict=True):
        assert mine.dtype == theirs.dtype
        assert mine.shape == theirs.shape
        bound = (theirs.double() - exact).norm() * 1.1
        # One number may be right by chance; and 16-bit logits that differ in a last bit are as good.
        bound = bound + (2e-6 if dtype == torch.float32 else 2e-3) * exact.norm() * (mine.dim() == 0)
        assert (mine.double() - exact).norm() <= bound


@pytest.mark.parametrize("options", [{}, {"temperature": 2.0**-17, "alpha": 1.0}], ids=str)
def test_a_small_rate_in_float16(options: dict[str, Any]) -> None:
    """A mean over many tokens has gradients that float16 does not have, and so a low temperature, whose are too large:
    only what is asked for may be either."""
    x = operands(torch.float16)
    exact = tracked({k: v.double() for k, v in x.items()})
    labels = make_labels(*SHAPE, vocabulary=COLUMNS)
    y = tracked(x)
    options = {"num_items": 1e8, **options}
    scale = 2.0**24 / options.get("temperature", 1.0)
    expected = gradients(loss_of(fused_linear_kd_loss(**exact, labels=labels, **options)) * scale, exact)
    ours = gradients(loss_of(fused_linear_kd_loss(**y, labels=labels, **options)) * scale, y)
    for a, b in zip(expected, ours, strict=True):
        assert (b.double() - a).norm() < 5e-3 * a.norm()


@pytest.mark.parametrize(
    "wanted", [("student_hidden",), ("student_weight",), ("student_bias",), ("student_hidden", "student_bias")]
)
@pytest.mark.parametrize("recompute", [False, True])
def test_what_is_frozen_has_no_product(wanted: tuple[str, ...], recompute: bool) -> None:
    labels = make_labels(*SHAPE, vocabulary=COLUMNS, ignored=0.0)
    all_of_them, some = tracked(operands()), tracked(operands(), *wanted)
    expected = dict(
        zip(GRADIENTS, gradients(loss_of(fused_linear_kd_loss(**all_of_them, labels=labels)), all_of_them), strict=True)
    )
    with Products() as products:
        loss = loss_of(fused_linear_kd_loss(**some, labels=labels, recompute=recompute))
        ours = gradients(loss, some)
    for name, gradient in zip(wanted, ours, strict=True):
        torch.testing.assert_close(gradient, expected[name])
    widths = [STUDENT, TEACHER] * (2 if recompute else 1) + [STUDENT] * sum("bias" not in name for name in wanted)
    assert products.number == math.prod(SHAPE) * COLUMNS * sum(widths)


def test_without_gradients_there_are_two_products() -> None:
    x = tracked(operands())
    labels = make_labels(*SHAPE, vocabulary=COLUMNS, ignored=0.0)
    with torch.no_grad(), Products() as products:
        loss = loss_of(fused_linear_kd_loss(**x, labels=labels))
    assert not loss.requires_grad
    assert products.number == math.prod(SHAPE) * COLUMNS * (STUDENT + TEACHER)


def test_rows_without_a_term_are_not_projected() -> None:
    x = tracked(operands())
    labels = make_labels(*SHAPE, vocabulary=COLUMNS, ignored=0.5)
    ignored = labels == -100
    with torch.no_grad():
        x["student_hidden"][ignored] = torch.nan
        x["teacher_hidden"][ignored] = torch.nan
    with Products() as products:
        loss = loss_of(fused_linear_kd_loss(**x, labels=labels, chunk_rows=3))
        of_hidden, of_weight, _ = gradients(loss, x)
    assert products.number == int((~ignored).sum()) * COLUMNS * (3 * STUDENT + TEACHER)
    assert (of_hidden[ignored] == 0).all()
    assert of_hidden.isfinite().all()
    assert of_weight.isfinite().all()


def test_alpha_zero_does_not_read_the_teacher() -> None:
    x = tracked(operands())
    labels = make_labels(*SHAPE, vocabulary=COLUMNS, ignored=0.0)
    with Products() as products:
        gradients(loss_of(fused_linear_kd_loss(**x, labels=labels, alpha=0.0)), x)
    assert products.number == math.prod(SHAPE) * COLUMNS * 3 * STUDENT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", [False, True])
def test_backward_more_than_once(dtype: torch.dtype, recompute: bool) -> None:
    """What is saved stays what it is while the graph is kept."""
    x = tracked(operands(dtype))
    loss = loss_of(fused_linear_kd_loss(**x, labels=make_labels(*SHAPE, vocabulary=COLUMNS), recompute=recompute))
    first = gradients(loss, x, torch.tensor(4.0), retain_graph=True)
    kept = [g.clone() for g in first]
    second = gradients(loss, x, torch.tensor(2.0), retain_graph=True)
    third = gradients(loss, x, torch.tensor(4.0))
    for a, b, c, d in zip(first, second, third, kept, strict=True):
        assert torch.equal(a, d)
        assert torch.equal(a, c)
        assert torch.equal(a, b * 2)
    with pytest.raises(RuntimeError, match="second time"):
        gradients(loss, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", [False, True])
def test_no_second_derivative(dtype: torch.dtype, recompute: bool) -> None:
    x = tracked(operands(dtype))
    loss = loss_of(fused_linear_kd_loss(**x, labels=make_labels(*SHAPE, vocabulary=COLUMNS), recompute=recompute))
    first = gradients(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradients(first[0].sum(), x)


def test_no_other_derivative() -> None:
    x = operands()
    hidden, rest = x.pop("student_hidden"), {**x, "labels": make_labels(*SHAPE, vocabulary=COLUMNS)}

    def loss(h: Tensor) -> Tensor:
        return loss_of(fused_linear_kd_loss(h, **rest))

    with pytest.raises(NotImplementedError, match="use fused_kd_loss on the logits"):
        torch.func.jvp(loss, (hidden,), (hidden,))
    with pytest.raises(NotImplementedError, match="use fused_kd_loss on the logits"):
        torch.func.grad(loss)(hidden)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="use fused_kd_loss"):
        loss(torch.autograd.forward_ad.make_dual(hidden, hidden))


@pytest.mark.parametrize("keep", [False, True])
def test_batched_upstream_gradients(keep: bool) -> None:
    x = tracked(operands(torch.float32))
    labels = make_labels(*SHAPE, vocabulary=COLUMNS)
    upstream = torch.tensor([1.0, -2.0])
    first = gradients(loss_of(fused_linear_kd_loss(**x, labels=labels)), x)
    loss = loss_of(fused_linear_kd_loss(**x, labels=labels))
    batched = gradients(loss, x, upstream, is_grads_batched=True, retain_graph=keep)
    for a, b in zip(first, batched, strict=True):
        torch.testing.assert_close(b, torch.stack([a, -2 * a]))


@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"reduction": "none"}], ids=str)
def test_a_teacher_of_inference_mode(options: dict[str, Any]) -> None:
    x = tracked(operands())
    labels = make_labels(*SHAPE, vocabulary=COLUMNS)
    expected = gradients(loss_of(fused_linear_kd_loss(**x, labels=labels, **options)).sum(), x)
    with torch.inference_mode():
        x |= {k: v.clone() for k, v in x.items() if k.startswith("teacher")}
    for a, b in zip(
        expected, gradients(loss_of(fused_linear_kd_loss(**x, labels=labels, **options)).sum(), x), strict=True
    ):
        assert torch.equal(a, b)


def test_ignored_rows_where_finding_them_would_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU they are projected, and have no part whatever they hold."""
    monkeypatch.setattr(
        linear_rows, "_spans", lambda targets, size: [slice(i, i + 3) for i in range(0, len(targets), 3)]
    )
    labels = make_labels(*SHAPE, vocabulary=COLUMNS, ignored=0.5)
    expected, x = tracked(operands()), tracked(operands())
    with torch.no_grad():
        x["student_hidden"][labels == -100] = torch.nan
    losses = [loss_of(fused_linear_kd_loss(**each, labels=labels)) for each in (expected, x)]
    assert torch.equal(*losses)
    for a, b in zip(gradients(losses[0], expected), gradients(losses[1], x), strict=True):
        assert torch.equal(a, b)


def test_gradient_of_weights() -> None:
    x = operands()
    labels = make_labels(*SHAPE, vocabulary=COLUMNS)
    weights = [torch.linspace(0.5, 1.0, math.prod(SHAPE), dtype=DOUBLE).view(SHAPE).requires_grad_() for _ in range(2)]
    logits = projected(x, "student"), projected(x, "teacher")
    expected = loss_of(fused_kd_loss(*logits, labels, weights=weights[0], reduction="sum"))
    loss = loss_of(fused_linear_kd_loss(**x, labels=labels, weights=weights[1], reduction="sum"))
    a, b = torch.autograd.grad(expected, weights[0])[0], torch.autograd.grad(loss, weights[1])[0]
    torch.testing.assert_close(b, a)


def test_tied_embeddings() -> None:
    """The head's gradient adds up with that of the embedding."""
    labels = make_labels(*SHAPE, vocabulary=COLUMNS)
    tokens = make_labels(*SHAPE, vocabulary=COLUMNS, ignored=0.0)
    x = operands(biases=False)
    results = []
    for linear in (False, True):
        table = torch.nn.Embedding.from_pretrained(x["student_weight"].clone(), freeze=False)
        hidden = torch.tanh(table(tokens))
        if linear:
            loss = fused_linear_kd_loss(hidden, table.weight, x["teacher_hidden"], x["teacher_weight"], labels)
        else:
            loss = fused_kd_loss(hidden @ table.weight.T, projected(x, "teacher"), labels)
        loss_of(loss).backward()
        assert table.weight.grad is not None
        results.append(table.weight.grad)
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("inside", [torch.float32, torch.bfloat16])
def test_autocast(inside: torch.dtype) -> None:
    """As torch.nn.Linear: the products in bfloat16, of whatever the parameters are; gradients in the parameters'."""
    x = operands(torch.float32, shape=(4, 40))
    x["teacher_hidden"] = x["teacher_hidden"].to(inside)
    labels = make_labels(4, 40, vocabulary=COLUMNS)
    exact = tracked({k: v.double() for k, v in x.items()})
    loss = loss_of(fused_linear_kd_loss(**exact, labels=labels))
    expected = [loss.detach(), *gradients(loss, exact)]
    results = []
    for linear in (False, True):
        y = tracked(x)
        with torch.autocast("cpu", torch.bfloat16):
            if linear:
                loss = loss_of(fused_linear_kd_loss(**y, labels=labels))
            else:
                loss = loss_of(fused_kd_loss(projected(y, "student"), projected(y, "teacher").detach(), labels))
        results.append([loss.detach(), *gradients(loss, y)])
    for a, theirs, ours in zip(expected, *results, strict=True):
        assert ours.dtype == torch.float32
        slack = 2e-3 * a.norm() * (a.dim() == 0)  # one number may be right by chance
        assert (ours.double() - a).norm() <= 1.1 * (theirs.double() - a).norm() + slack


@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"reduction": "none"}, {"temperature": 3.0}], ids=str)
def test_compile(options: dict[str, Any]) -> None:
    labels = make_labels(*SHAPE, vocabulary=COLUMNS)
    loss_fn = torch.compile(FusedLinearKDLoss(**options), fullgraph=True)
    for shape in (SHAPE, (2, 5)):
        labels = make_labels(*shape, vocabulary=COLUMNS)
        x, y = tracked(operands(torch.float32, shape)), tracked(operands(torch.float32, shape))
        loss = loss_fn(**x, labels=labels).sum() * 2.0
        expected = loss_of(fused_linear_kd_loss(**y, labels=labels, **options)).sum() * 2.0
        torch.testing.assert_close(loss, expected)
        for a, b in zip(gradients(expected, y), gradients(loss, x), strict=True):
            torch.testing.assert_close(b, a)


@pytest.mark.parametrize("sigma", [0.01, 0.05])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "reverse_kl"])
def test_near_convergence(divergence: Any, sigma: float) -> None:
    """On the same logits: the hidden state is one-hot, and picks a column of the weight."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(4096, 8, generator=generator) * 3
    student = teacher + sigma * torch.randn(4096, 8, generator=generator)
    one_hot = torch.eye(8)
    for dtype in (torch.float32, torch.bfloat16):
        weights = student.to(dtype), teacher.to(dtype)
        logits = [x.double().T.contiguous() for x in weights]
        exact = loss_of(fused_kd_loss(*logits, alpha=1.0, divergence=divergence))
        hidden = one_hot.to(dtype)
        loss = loss_of(fused_linear_kd_loss(hidden, weights[0], hidden, weights[1], alpha=1.0, divergence=divergence))
        torch.testing.assert_close(loss.double(), exact, rtol=1e-4, atol=0)


def test_the_forms_agree() -> None:
    assert {"temperature", *LossOptions.__annotations__} == set(KDOptions.__dataclass_fields__)
    x, labels = operands(), make_labels(*SHAPE, vocabulary=COLUMNS)
    loss_fn = FusedLinearKDLoss(3.0, alpha=0.5, chunk_rows=4, divergence="jsd")
    assert repr(loss_fn) == "FusedLinearKDLoss(temperature=3.0, alpha=0.5, divergence='jsd', chunk_rows=4)"
    assert loss_fn(**x, labels=labels) == fused_linear_kd_loss(
        **x, labels=labels, temperature=3.0, alpha=0.5, divergence="jsd"
    )
    loss_fn.chunk_rows = 2
    loss_fn.recompute = True
    assert repr(loss_fn).endswith("chunk_rows=2, recompute=True)")
    assert (loss_fn.chunk_rows, loss_fn.recompute, loss_fn.alpha) == (2, True, 0.5)
    for name, value in (("chunk_rows", 0), ("inplace", True), ("alpha", -1.0)):
        with pytest.raises(ValueError, match=name):
            setattr(loss_fn, name, value)
    assert (loss_fn.chunk_rows, loss_fn.inplace, loss_fn.alpha) == (2, False, 0.5)
    loss_fn.temperature = 1.0
    assert loss_fn(**x, labels=labels) == fused_linear_kd_loss(
        **x, labels=labels, temperature=1.0, alpha=0.5, divergence="jsd"
    )


class _Sharded(torch.Tensor):
    def full_tensor(self) -> Tensor:
        return self


def _zeros(*sizes: int, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.zeros(sizes, dtype=dtype)


ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"student_weight": _zeros(COLUMNS, 5)}, ValueError, r"student_weight must have the shape \[V, 12\]"),
    ({"student_weight": _zeros(0)}, ValueError, "GatheredParameters"),
    ({"student_weight": _zeros(90, 12, dtype=torch.float32)}, TypeError, "must have the dtype of student_hidden"),
    ({"student_weight": _zeros(90, 12, dtype=torch.int64)}, TypeError, "student_weight must be float32"),
    ({"student_weight": None}, TypeError, "student_weight must be a tensor"),
    ({"student_weight": _zeros(90, 12).as_subclass(_Sharded)}, TypeError, r"full_tensor\(\)"),
    ({"student_hidden": _zeros()}, ValueError, r"student_hidden must have the shape \[..., H\]"),
    ({"student_hidden": _zeros(3, 7, 12).to_sparse()}, TypeError, "student_hidden must be a dense"),
    ({"student_bias": _zeros(5)}, ValueError, r"student_bias must have the shape \(90,\)"),
    ({"teacher_bias": _zeros(90, dtype=torch.float32)}, TypeError, "teacher_bias must have the dtype"),
    ({"teacher_hidden": _zeros(3, 6, TEACHER)}, ValueError, "must have the student's leading shape"),
    ({"teacher_hidden": None}, ValueError, "teacher_hidden must be given"),
    ({"teacher_weight": None}, ValueError, "teacher_weight must be given"),
    ({"teacher_weight": [None, None]}, TypeError, "teacher_weight must be a tensor"),
    ({"teacher_hidden": [_zeros(3, 7, TEACHER)] * 2}, ValueError, "teacher_weight must be a list of as many"),
    ({"teacher_hidden": [], "teacher_weight": [], "teacher_bias": []}, ValueError, "at least one"),
    ({"teacher_logits": _zeros(3, 7, COLUMNS)}, ValueError, "stand in place of teacher_hidden"),
    ({"teacher_weights": [1.0]}, ValueError, "teacher_weights"),
    ({"labels": _zeros(3, 6, dtype=torch.int64)}, ValueError, "labels must have"),
    ({"labels": None}, ValueError, "labels must be given"),
    ({"labels": torch.full(SHAPE, COLUMNS)}, IndexError, "row 0 has the label 90"),
    ({"weights": torch.full(SHAPE, -1.0)}, ValueError, "weights must be finite"),
    ({"inplace": True}, ValueError, "inplace=True overwrites the student's logits"),
    ({"chunk_rows": 0}, ValueError, "chunk_rows must be None or an int of at least 1"),
    ({"chunk_rows": 1.5}, ValueError, "chunk_rows must be None or an int of at least 1"),
    ({"recompute": 1}, TypeError, "recompute must be True or False"),
    ({"temperatur": 1.0}, TypeError, "there is no option 'temperatur'; the options are alpha"),
    ({"student_weight": torch.nn.Linear(12, 90)}, TypeError, r"got Linear; a layer has .weight"),
    ({"backend": "cpu"}, ValueError, "cannot be used"),
]


@pytest.mark.parametrize(("change", "kind", "message"), ERRORS, ids=lambda x: "")
def test_errors(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    if change.get("backend") == "cpu" and "cpu" not in BACKENDS:
        pytest.skip("no compiler: another error")
    x = {**operands(), "labels": make_labels(*SHAPE, vocabulary=COLUMNS), **change}
    with pytest.raises(kind, match=message):
        fused_linear_kd_loss(**x)


def test_a_row_is_named_by_its_number_among_all() -> None:
    x = operands()
    labels = torch.full(SHAPE, -100)
    labels[2, 3] = COLUMNS + 1
    with pytest.raises(IndexError, match="row 17 has the label 91"):
        fused_linear_kd_loss(**x, labels=labels, chunk_rows=2)
    ids = torch.zeros(3, 7, 1, dtype=torch.int64)
    ids[1, 1] = COLUMNS
    sparse = SparseTeacher(ids, torch.full((3, 7, 1), -1.0))
    student = {k: v for k, v in x.items() if k.startswith("student")}
    with pytest.raises(IndexError, match="row 8 has an id in slot 0"):
        fused_linear_kd_loss(**student, teacher_logits=sparse, alpha=1.0, chunk_rows=2)
