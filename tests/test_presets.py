"""Each preset has the value and the gradient of its project's formula, in float64: written out here as the project has
it, and as it is installed where it is."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import make_labels, make_logits
from test_same_as_others import definitions
from torch import Tensor, nn

from fused_kd import FusedKDLoss, presets

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
Presented = tuple[Tensor, Tensor, Tensor]

SHAPES = [(1, 3), (7, 300), (13, 1001)]  # [N, C]
TOKENS = [(1, 5, 33), (3, 7, 301)]  # [B, T, V]


def present(*shape: int, ignored: float = 0.3) -> Presented:
    student, teacher = (x.double() for x in make_logits("wide", *shape))
    labels = make_labels(*shape[:-1], vocabulary=shape[-1], ignored=ignored)
    labels.view(-1)[0] = shape[-1] - 1  # one counts
    return student, teacher, labels


def rows(student: Tensor, teacher: Tensor, labels: Tensor) -> Presented:
    vocabulary = student.shape[-1]
    return student.reshape(-1, vocabulary), teacher.reshape(-1, vocabulary), labels.reshape(-1)


def check(ours: Loss, theirs: Loss, data: Presented) -> None:
    student, teacher, labels = data
    student = student.clone().requires_grad_()
    loss, expected = ours(student, teacher, labels), theirs(student, teacher, labels)
    assert loss.shape == expected.shape
    (gradient,), (exact,) = (torch.autograd.grad(x.sum(), student) for x in (loss, expected))
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    assert exact.norm() > 0
    assert (gradient - exact).norm() <= 1e-9 * exact.norm()


# What the projects share: forward and reverse KL, cross entropy, JSD of rows as they write them.
def soft_cross_entropy(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """torchtune's ForwardKLLoss, DistiLLM's forward_kl, MiniLLM."""
    x = (F.softmax(teacher, -1) * F.log_softmax(student, -1)).sum(-1).view(-1)
    mask = (labels != -100).int().view(-1)
    return -(x * mask).sum() / mask.sum()


def reverse_kl(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    q = F.softmax(student, -1)
    x = (q * F.log_softmax(teacher, -1) - q * F.log_softmax(student, -1)).sum(-1).view(-1)
    mask = (labels != -100).int().view(-1)
    return -(x * mask).sum() / mask.sum()


def cross_entropy(student: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(student.flatten(0, -2), labels.flatten())


def token_mean_with(soft: Loss, kd_ratio: float) -> Loss:
    """The recipes of torchtune, DistiLLM and MiniLLM."""
    return lambda s, t, y: (1 - kd_ratio) * cross_entropy(s, y) + kd_ratio * soft(s, t, y)


def kl_div(student: Tensor, teacher: Tensor, temperature: float, reduction: str) -> Tensor:
    return F.kl_div(
        F.log_softmax(student / temperature, dim=-1), F.softmax(teacher / temperature, dim=-1), reduction=reduction
    )


def test_every_preset_is_tested_and_documented() -> None:
    for name, preset in public().items():
        assert f"| {name} |" in (presets.__doc__ or ""), name
        assert preset.__doc__, name
        assert f"presets.{name}(" in inspect.getsource(inspect.getmodule(present)), name  # type: ignore[arg-type]


def public() -> dict[str, Callable[..., FusedKDLoss]]:
    return {
        name: value
        for name, value in vars(presets).items()
        if inspect.isfunction(value) and value.__module__ == presets.__name__ and not name.startswith("_")
    }


@pytest.mark.parametrize("shape", SHAPES + TOKENS)
@pytest.mark.parametrize(("alpha", "temperature"), [(0.9, 2.0), (0.5, 20.0), (1.0, 0.7), (0.0, 3.0)])
def test_hinton(alpha: float, temperature: float, shape: tuple[int, ...]) -> None:
    def theirs(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
        s, t, y = rows(s, t, y)
        soft = -(F.softmax(t / temperature, -1) * F.log_softmax(s / temperature, -1)).sum(-1)[y != -100].mean()
        return alpha * temperature**2 * soft + (1 - alpha) * cross_entropy(s, y)

    check(presets.hinton(alpha, temperature), theirs, present(*shape))


@pytest.mark.parametrize("shape", SHAPES + TOKENS)
@pytest.mark.parametrize("kd_ratio", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("kd_loss", "soft"), [("forward", soft_cross_entropy), ("reverse", reverse_kl)])
def test_torchtune(kd_loss: Any, soft: Loss, kd_ratio: float, shape: tuple[int, ...]) -> None:
    check(presets.torchtune(kd_ratio, kd_loss), token_mean_with(soft, kd_ratio), present(*shape))


@pytest.mark.parametrize(("kd_loss", "name"), [("forward", "ForwardKLLoss"), ("reverse", "ReverseKLLoss")])
def test_installed_torchtune(kd_loss: Any, name: str) -> None:
    theirs = getattr(definitions("torchtune", "modules/loss/kd_losses.py", name), name)()
    check(presets.torchtune(0.4, kd_loss), token_mean_with(lambda *x: theirs(*rows(*x)), 0.4), present(3, 7, 301))


def gkd(beta: float, temperature: float, num_items: int | None = None) -> Loss:
    def jsd(s: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        log_q, log_p = F.log_softmax(s / temperature, -1), F.log_softmax(t / temperature, -1)
        if beta == 0:
            each = F.kl_div(log_q, log_p, reduction="none", log_target=True)
        elif beta == 1:
            each = F.kl_div(log_p, log_q, reduction="none", log_target=True)
        else:
            log_m = ((1 - beta) * log_q.exp() + beta * log_p.exp()).log()
            each = beta * F.kl_div(log_m, log_p, reduction="none", log_target=True)
            each = each + (1 - beta) * F.kl_div(log_m, log_q, reduction="none", log_target=True)
        if y is not None:
            each = each[y != -100]
        rows = each.shape[0]  # of all where there are no labels: the batch
        return each.sum() / (num_items or rows)

    return jsd


@pytest.mark.parametrize("shape", TOKENS)
@pytest.mark.parametrize("temperature", [0.9, 3.0])
@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 0.9, 1])
class TestTRL:
    def test_labels(self, beta: float, temperature: float, shape: tuple[int, ...]) -> None:
        check(presets.trl_gkd(beta, temperature), gkd(beta, temperature), present(*shape))

    def test_num_items(self, beta: float, temperature: float, shape: tuple[int, ...]) -> None:
        ours = presets.trl_gkd(beta, temperature)
        check(lambda *x: ours(*x, num_items=41), gkd(beta, temperature, 41), present(*shape))  # type: ignore[return-value]

    def test_no_labels(self, beta: float, temperature: float, shape: tuple[int, ...]) -> None:
        ours = presets.trl_gkd(beta, temperature)
        ours.reduction = "batchmean"
        theirs = gkd(beta, temperature)
        check(lambda s, t, y: ours(s, t), lambda s, t, y: theirs(s, t, None), present(*shape))  # type: ignore[arg-type, return-value]

    def test_shift(self, beta: float, temperature: float, shape: tuple[int, ...]) -> None:
        ours = presets.trl_gkd(beta, temperature)
        ours.shift = True
        theirs = gkd(beta, temperature)
        check(ours, lambda s, t, y: theirs(s[:, :-1], t[:, :-1], y[:, 1:]), present(*shape, ignored=0))

    def test_installed(self, beta: float, temperature: float, shape: tuple[int, ...]) -> None:
        file = "experimental/gkd/gkd_trainer.py"
        theirs = definitions("trl", file, "generalized_jsd_loss").generalized_jsd_loss
        check(
            presets.trl_gkd(beta, temperature),
            lambda s, t, y: theirs(s, t, y, beta=beta, temperature=temperature),
            present(*shape),
        )


TORCHDISTILL = [
    (0.5, 4.0, None),
    (0.9, 1.0, None),
    (0.3, 2.0, 5.0),
    (1.0, 3.0, None),
    (0.0, 3.0, None),
    (0.0, 3.0, 2.0),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("alpha", "temperature", "beta"), TORCHDISTILL)
class TestTorchdistill:
    def test_formula(self, alpha: float, temperature: float, beta: float | None, shape: tuple[int, ...]) -> None:
        def theirs(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
            soft = kl_div(s, t, temperature, "batchmean")
            if alpha == 0:
                return soft
            return alpha * F.cross_entropy(s, y) + (1 - alpha if beta is None else beta) * temperature**2 * soft

        check(presets.torchdistill(alpha, temperature, beta), theirs, present(*shape))

    def test_installed(self, alpha: float, temperature: float, beta: float | None, shape: tuple[int, ...]) -> None:
        kind = definitions("torchdistill", "losses/mid_level.py", "KDLoss").KDLoss
        loss = kind("head", "output", "head", "output", temperature, alpha, beta)

        def theirs(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
            result: Tensor = loss({"head": {"output": s}}, {"head": {"output": t}}, y)
            return result

        check(presets.torchdistill(alpha, temperature, beta), theirs, present(*shape))


def deit_soft(student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    log_q, log_p = F.log_softmax(student / tau, dim=1), F.log_softmax(teacher / tau, dim=1)
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True) * (tau * tau) / student.numel()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("alpha", "tau"), [(0.5, 1.0), (0.1, 3.0)])
def test_deit(alpha: float, tau: float, shape: tuple[int, ...]) -> None:
    ours = presets.deit(alpha, tau, shape[-1])
    check(lambda s, t, y: ours(s, t), lambda s, t, y: alpha * deit_soft(s, t, tau), present(*shape))  # type: ignore[return-value]
    ours.hard_weight = 1 - alpha  # one head
    check(ours, lambda s, t, y: F.cross_entropy(s, y) * (1 - alpha) + alpha * deit_soft(s, t, tau), present(*shape))


def test_deit_hard() -> None:
    ours = FusedKDLoss(alpha=0, hard_weight=0.3)
    check(
        lambda s, t, y: ours(s, t, t.argmax(1)),  # type: ignore[return-value]
        lambda s, t, y: 0.3 * F.cross_entropy(s, t.argmax(dim=1)),
        present(7, 300),
    )


def distilbert(s: Tensor, t: Tensor, y: Tensor, mask: Tensor, alphas: tuple[float, float], tau: float) -> Tensor:
    mask = mask.unsqueeze(-1).expand_as(s)
    chosen_s = torch.masked_select(s, mask).view(-1, s.size(-1))
    chosen_t = torch.masked_select(t, mask).view(-1, t.size(-1))
    soft = kl_div(chosen_s, chosen_t, tau, "batchmean") * tau**2
    return alphas[0] * soft + alphas[1] * F.cross_entropy(s.view(-1, s.size(-1)), y.view(-1), ignore_index=-100)


@pytest.mark.parametrize("shape", TOKENS)
@pytest.mark.parametrize("alphas", [(0.5, 0.0), (5.0, 2.0), (1.0, 0.5)])
class TestDistilBERT:
    def test_attended(self, alphas: tuple[float, float], shape: tuple[int, ...]) -> None:
        ours = presets.distilbert(*alphas, temperature=2.0)
        attended = torch.ones(shape[:-1], dtype=torch.bool)
        attended[:, shape[1] - 2 :] = False
        student, teacher, labels = present(*shape, ignored=0.6)
        labels[~attended] = -100
        check(
            lambda s, t, y: ours(s, t, y, weights=attended.float()),  # type: ignore[return-value]
            lambda s, t, y: distilbert(s, t, y, attended, alphas, 2.0),
            (student, teacher, labels),
        )

    def test_labelled(self, alphas: tuple[float, float], shape: tuple[int, ...]) -> None:
        ours = presets.distilbert(*alphas, temperature=3.0, restrict_ce_to_mask=True)
        check(ours, lambda s, t, y: distilbert(s, t, y, y > -1, alphas, 3.0), present(*shape))

    def test_clm(self, alphas: tuple[float, float], shape: tuple[int, ...]) -> None:
        ours = presets.distilbert(*alphas, temperature=2.0)
        attended = torch.ones(shape[:-1], dtype=torch.bool)

        def theirs(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
            soft = distilbert(s, t, y, attended, (alphas[0], 0), 2.0)
            return soft + alphas[1] * cross_entropy(s[:, :-1], y[:, 1:])

        def shifted(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
            result = ours(s, t, torch.cat([y[:, 1:], torch.full_like(y[:, :1], -100)], 1), weights=attended.float())
            assert isinstance(result, Tensor)
            return result

        check(shifted, theirs, present(*shape, ignored=0))


@pytest.mark.parametrize("shape", SHAPES + TOKENS)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.filterwarnings("ignore:reduction")
@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum", "none"])
class TestModelOpt:
    def test_formula(self, reduction: Any, temperature: float, shape: tuple[int, ...]) -> None:
        def theirs(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
            loss = kl_div(s, t, temperature, reduction)
            return (loss.sum(-1) if reduction == "none" else loss) * temperature**2

        check(presets.modelopt(temperature, reduction, num_classes=shape[-1]), theirs, present(*shape))

    def test_installed(self, reduction: Any, temperature: float, shape: tuple[int, ...]) -> None:
        names = ("modelopt", "torch/distill/losses.py", "LogitsDistillationLoss")
        theirs = definitions(*names, Loss=nn.modules.loss._Loss).LogitsDistillationLoss(temperature, reduction)
        ours = presets.modelopt(temperature, reduction, num_classes=shape[-1])
        check(lambda s, t, y: ours(s, t), lambda s, t, y: theirs(s, t), present(*shape))  # type: ignore[return-value]


@pytest.mark.parametrize("shape", TOKENS)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("reverse", [False, True])
def test_megatron(reverse: bool, temperature: float, shape: tuple[int, ...]) -> None:
    def theirs(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
        p, q = F.log_softmax(s / temperature, dim=-1), F.log_softmax(t / temperature, dim=-1)
        if reverse:
            p, q = q, p
        return torch.sum(F.kl_div(p, q, reduction="none", log_target=True), dim=-1).transpose(0, 1).contiguous()

    ours = presets.megatron(temperature, reverse)

    def transposed(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
        loss = ours(s, t)
        assert isinstance(loss, Tensor)
        return loss.transpose(0, 1).contiguous()

    check(transposed, theirs, present(*shape))


def nemo(s: Tensor, t: Tensor, y: Tensor, kd_ratio: float, temperature: float, num_items: int | None) -> Tensor:
    s, t, y = rows(s, t, y)
    valid = y != -100
    log_q = F.log_softmax(s[valid] / temperature, -1)
    log_p = F.log_softmax(t[valid] / temperature, -1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1) * temperature**2
    count = num_items or int(valid.sum())
    return ((1 - kd_ratio) * F.cross_entropy(s, y, reduction="sum") + kd_ratio * kl.sum()) / count


@pytest.mark.parametrize("shape", SHAPES + TOKENS)
@pytest.mark.parametrize("num_items", [None, 57])
@pytest.mark.parametrize(("kd_ratio", "temperature"), [(0.5, 1.0), (0.2, 4.0), (1.0, 0.5)])
def test_nemo_automodel(kd_ratio: float, temperature: float, num_items: int | None, shape: tuple[int, ...]) -> None:
    ours = presets.nemo_automodel(kd_ratio, temperature)
    check(
        lambda *x: ours(*x, num_items=num_items),  # type: ignore[return-value]
        lambda s, t, y: nemo(s, t, y, kd_ratio, temperature, num_items),
        present(*shape),
    )


@pytest.mark.parametrize("num_items", [None, 57])
def test_installed_nemo_automodel(num_items: int | None) -> None:
    names = ("components/loss/kd_loss.py", "KDLoss", "_forward_kl_from_log_probs")
    loss = definitions("nemo_automodel", *names, _HAVE_DTENSOR=False).KDLoss(temperature=3.0, fp32_upcast=False)
    ours = presets.nemo_automodel(1.0, 3.0)
    check(
        lambda *x: ours(*x, num_items=num_items),  # type: ignore[return-value]
        lambda s, t, y: loss(s, t, y, num_items),
        present(3, 7, 301),
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("weight", "temperature"), [(0.5, 5.0), (0.9, 2.0), (0.0, 3.0), (1.0, 1.5)])
class TestClassifiers:
    def test_huggingface_docs(self, weight: float, temperature: float, shape: tuple[int, ...]) -> None:
        def theirs(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
            soft = kl_div(s, t, temperature, "batchmean") * (temperature**2)
            return (1.0 - weight) * F.cross_entropy(s, y) + weight * soft

        check(presets.huggingface_docs(weight, temperature), theirs, present(*shape))

    @pytest.mark.filterwarnings("ignore:reduction")
    def test_haitongli(self, weight: float, temperature: float, shape: tuple[int, ...]) -> None:
        def theirs(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
            soft = nn.KLDivLoss()(F.log_softmax(s / temperature, dim=1), F.softmax(t / temperature, dim=1))
            result: Tensor = soft * (weight * temperature * temperature) + F.cross_entropy(s, y) * (1.0 - weight)
            return result

        check(presets.haitongli(weight, temperature, shape[-1]), theirs, present(*shape))

    def test_mdistiller(self, weight: float, temperature: float, shape: tuple[int, ...]) -> None:
        def theirs(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
            loss_kd = kl_div(s, t, temperature, "none").sum(1).mean() * temperature**2
            return 0.1 * F.cross_entropy(s, y) + weight * loss_kd

        check(presets.mdistiller(0.1, weight, temperature), theirs, present(*shape))


def distillm(kind: str, lam: float) -> Loss:
    def soft(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if kind == "fkl":
            return soft_cross_entropy(s, t, y)
        if kind == "rkl":
            return reverse_kl(s, t, y)
        mask = (y != -100).int().view(-1)
        p, q = F.softmax(t, -1), F.softmax(s, -1)
        mixed = (1 - lam) * p + lam * q
        of_student = (q * mixed.log() - q * F.log_softmax(s, -1)).sum(-1).view(-1)
        of_teacher = (p * mixed.log() - p * F.log_softmax(t, -1)).sum(-1).view(-1)
        x = {
            "srkl": -of_student,
            "jsd": -lam * of_student - (1 - lam) * of_teacher,
            "tvd": (0.5 * (p - q).abs()).sum(-1).view(-1),
        }[kind]
        return (x * mask).sum() / mask.sum()

    return soft


@pytest.mark.parametrize("shape", TOKENS)
@pytest.mark.parametrize(
    ("kind", "lam", "default"),
    [
        ("fkl", None, 0), ("rkl", None, 0), ("tvd", None, 0), ("jsd", None, 0.9), ("jsd", 0.3, 0), ("srkl", None, 0.1),
        ("srkl", 0.4, 0),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kd_ratio", [0.5, 1.0])
def test_distillm(kd_ratio: float, kind: Any, lam: float | None, default: float, shape: tuple[int, ...]) -> None:
    ours = presets.distillm(kind, kd_ratio, lam=lam)
    check(ours, token_mean_with(distillm(kind, lam or default), kd_ratio), present(*shape))


@pytest.mark.parametrize("shape", TOKENS)
@pytest.mark.parametrize("kd_ratio", [0.0, 0.5, 1.0])
def test_minillm(kd_ratio: float, shape: tuple[int, ...]) -> None:
    check(presets.minillm(kd_ratio), token_mean_with(soft_cross_entropy, kd_ratio), present(*shape))


def test_unequal_vocabularies() -> None:
    """None of the projects has them; what is set on a preset serves all: the columns that both have."""
    student, _, labels = present(3, 7, 301)
    teacher = present(3, 7, 289)[1]
    labels = labels.clamp(max=288)
    ours = presets.nemo_automodel(0.4, 2.0)
    ours.vocab_mismatch = "truncate"
    check(ours, lambda s, t, y: nemo(s[..., :289], t, y, 0.4, 2.0, None), (student, teacher, labels))
    check(ours, lambda s, t, y: nemo(s, t[..., :289], y, 0.4, 2.0, None), (student[..., :289], student, labels))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: presets.torchtune(0.5, "symmetric"), "kd_loss must be one of 'forward', 'reverse', got 'symmetric'"),  # type: ignore[arg-type]
        (lambda: presets.distillm("sfkl"), "kind must be one of .* got 'sfkl'"),  # type: ignore[arg-type]
        (lambda: presets.distillm("fkl", lam=0.1), 'lam is for kind="jsd" and "srkl"'),
        (lambda: presets.modelopt(2.0), 'num_classes is needed with reduction="mean"'),
        (lambda: presets.haitongli(0.5, 2.0, 0), "num_classes must be the size"),
        (lambda: presets.hinton(1.5, 2.0), "alpha must be in"),
    ],
)
def test_errors(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
