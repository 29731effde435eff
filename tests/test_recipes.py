"""The recipes run as they stand, and come to the curves of the same loops with the loss as others write it."""

import importlib
import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_same_as_others import definitions
from torch import Tensor

RECIPES = Path(__file__).parent.parent / "examples" / "recipes"
# What rounding makes of six steps in float32: 2e-7 was seen.
CURVE = 1e-6
GRADIENT = 1e-5


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    monkeypatch.syspath_prepend(RECIPES)
    return importlib.import_module


def needs(package: str, install: str) -> None:
    pytest.importorskip(package, reason=f"the recipe needs {package}; pip install {install}", exc_type=ImportError)


def eager(reduction: str) -> Callable[..., Tensor]:
    """0.5 * 4 * KL at temperature 2 + 0.5 * CE, of hidden states and heads: over the labelled positions, or summed."""

    def loss(hidden: Tensor, head: Tensor, taught: Tensor, taught_head: Tensor, labels: Tensor, **_: Any) -> Tensor:
        student, teacher = (hidden @ head.T)[:, :-1].flatten(0, 1), (taught @ taught_head.T)[:, :-1].flatten(0, 1)
        labels = labels[:, 1:].flatten()
        student, teacher, labels = (x[labels != -100] for x in (student, teacher, labels))
        log_q, log_p = F.log_softmax(student / 2, -1), F.log_softmax(teacher / 2, -1)
        soft = 4 * F.kl_div(log_q, log_p, log_target=True, reduction="sum")
        total = 0.5 * soft + 0.5 * F.cross_entropy(student, labels, reduction="sum")
        return total / len(labels) if reduction == "mean" else total

    return loss


def check(ours: list[float], theirs: list[float]) -> None:
    assert len(ours) == 6
    assert ours == pytest.approx(theirs, rel=CURVE)
    assert len(set(ours)) == 6
    print("largest distance", max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True)))


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_plain_loop(accumulation: int, recipe: Any) -> None:
    train = recipe("plain_loop").train
    check(train(accumulation=accumulation), train(eager("mean"), accumulation=1))


@pytest.fixture
def lightning_module(recipe: Any) -> Any:
    needs("lightning", "lightning")
    return recipe("lightning_module")


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_lightning(accumulation: int, lightning_module: Any) -> None:
    ours, _ = lightning_module.fit(accumulation=accumulation)
    theirs, _ = lightning_module.fit(eager("sum"), accumulation=1)
    check(ours.curve, theirs.curve)


def test_lightning_gradients(lightning_module: Any, recipe: Any) -> None:
    """Of one step, whatever the accumulation: that of the loss of all rows at once."""
    student, teacher = recipe("tiny").language_models()
    ((ids, labels),) = recipe("tiny").token_batches(1)
    (hidden, head), (taught, taught_head) = ((x.hidden(ids), x.lm_head.weight) for x in (student, teacher))
    eager("mean")(hidden, head, taught.detach(), taught_head.detach(), labels).backward()
    expected = torch.cat([x.grad.flatten() for x in student.parameters()])
    for accumulation in (1, 2, 4):
        module, _ = lightning_module.fit(accumulation=accumulation, steps=1)
        gradient = torch.cat([x.grad.flatten() for x in module.student.parameters()])
        assert (gradient - expected).norm() <= GRADIENT * expected.norm()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch was built without torch.distributed")
def test_lightning_in_two_processes(lightning_module: Any, recipe: Any) -> None:
    """Each has every other row, and steps as one with all of them."""
    tiny, lightning = recipe("tiny"), lightning_module.lightning
    module = lightning_module.Distillation(*tiny.language_models())
    before = torch.nn.utils.parameters_to_vector(module.student.parameters()).detach().clone()
    rows = list(zip(*tiny.token_batches(1)[0], strict=True))
    trainer = lightning.Trainer(
        accelerator="cpu", devices=2, strategy="ddp_spawn", max_epochs=1, accumulate_grad_batches=2, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=2))
    alone, _ = lightning_module.fit(accumulation=1, steps=1)
    step, expected = (
        torch.nn.utils.parameters_to_vector(x.student.parameters()).detach() - before for x in (module, alone)
    )
    assert expected.norm() > 0
    assert (step - expected).norm() <= GRADIENT * expected.norm()


def test_lightning_keeps_the_teacher_out(lightning_module: Any) -> None:
    module, checkpoint = lightning_module.fit()
    (teacher,) = module._teacher
    of_student = {f"student.{name}" for name, _ in module.student.named_parameters()}
    assert {name for name, _ in module.named_parameters()} == of_student
    assert set(checkpoint["state_dict"]) == of_student
    (group,) = checkpoint["optimizer_states"][0]["param_groups"]
    assert len(group["params"]) == len(list(module.student.parameters()))
    assert not teacher.training
    assert all(x.grad is None and not x.requires_grad for x in teacher.parameters())
    module.train()
    assert not teacher.training


def test_lightning_steps_without_labels(lightning_module: Any, recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (ids, labels), *_ = recipe("tiny").token_batches(1)
    monkeypatch.setattr(lightning_module, "token_batches", lambda _: [(ids, torch.full_like(labels, -100))])
    before, _ = recipe("tiny").language_models()
    module, _ = lightning_module.fit(steps=1)
    assert module.curve == [0.0]
    for now, then in zip(module.student.parameters(), before.parameters(), strict=True):
        assert torch.equal(now, then)


def test_lightning_moves_the_teacher(lightning_module: Any, recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = lightning_module.Distillation(*recipe("tiny").language_models())
    monkeypatch.setattr(lightning_module.Distillation, "device", torch.device("meta"))
    module.on_fit_start()
    assert {x.device.type for x in module._teacher[0].parameters()} == {"meta"}


@pytest.fixture
def torchtune_config(recipe: Any) -> Any:
    needs("torchtune", "torchtune torchao==0.10.0")
    return recipe("torchtune_config")


def changed(config: Path, folder: Path, old: str, new: str) -> Path:
    text = config.read_text()
    assert old in text
    other = folder / config.name
    other.write_text(text.replace(old, new))
    return other


@pytest.mark.parametrize(("kd_loss", "theirs"), [("forward", "ForwardKLLoss"), ("reverse", "ReverseKLLoss")])
def test_torchtune(kd_loss: str, theirs: str, torchtune_config: Any, tmp_path: Path) -> None:
    lines = "fused_kd.presets.torchtune  # instead of ForwardKLWithChunkedOutputLoss\n  kd_ratio: 1"
    config = changed(torchtune_config.CONFIG, tmp_path, lines, f"{lines}\n  kd_loss: {kd_loss}\n  #")
    ours = torchtune_config.train(config)
    config = changed(torchtune_config.CONFIG, tmp_path, lines, f"torchtune.modules.loss.{theirs}\n  #")
    check(ours, torchtune_config.train(config))


def test_torchtune_calls_it_so(torchtune_config: Any) -> None:
    """The recipe's own step, with the losses of the config."""
    step = definitions("torchtune", "../recipes/knowledge_distillation_single_device.py", "_loss_step", Dict=dict)
    cfg = torchtune_config.OmegaConf.load(torchtune_config.CONFIG)
    generator = torch.Generator().manual_seed(0)
    logits, teacher_logits = (torch.randn(2, 7, 50, generator=generator) for _ in range(2))
    labels = torch.randint(50, (2, 7), generator=generator)
    labels[0, 3:] = -100
    of_recipe = SimpleNamespace(
        _model=lambda *args, **kwargs: logits,
        _teacher_model=lambda *args, **kwargs: teacher_logits,
        _loss_fn=torchtune_config.instantiate(cfg.loss),
        _kd_loss_fn=torchtune_config.instantiate(cfg.kd_loss),
        ignore_labels_cache=torch.full((2, 1), -100),
    )
    hard, soft = step._loss_step(of_recipe, {"tokens": labels, "labels": labels})
    student, teacher, y = logits[:, :-1].flatten(0, 1), teacher_logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    kept = -(F.softmax(teacher.double(), -1) * F.log_softmax(student.double(), -1)).sum(-1)[y != -100].mean()
    assert float(soft) == pytest.approx(float(kept), rel=CURVE)
    assert float(hard) == pytest.approx(float(F.cross_entropy(student, y)), rel=CURVE)


def test_torchdistill(recipe: Any, tmp_path: Path) -> None:
    needs("torchvision", "torchvision")
    needs("torchdistill.core.distillation", "torchdistill")
    module = recipe("torchdistill_config")
    theirs = changed(module.CONFIG, tmp_path, "key: FusedKDLoss ", "key: KDLoss ")
    check(module.train(), module.train(theirs))


@pytest.mark.parametrize("distill_type", ["soft", "hard"])
def test_timm(distill_type: str, recipe: Any) -> None:
    needs("timm.task", "timm")
    module = recipe("timm_task")
    ours = module.train(distill_type=distill_type)
    check(ours, module.train(module.TokenDistillationTask, distill_type))


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("plain_loop", "torch"),
        ("lightning_module", "lightning"),
        ("torchtune_config", "torchtune"),
        ("torchdistill_config", "torchdistill.core.distillation"),
        ("timm_task", "timm.task"),
    ],
)
def test_by_itself(name: str, package: str, recipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    needs(package, package.split(".", maxsplit=1)[0])
    runpy.run_path(str(RECIPES / f"{name}.py"), run_name="__main__")
    losses = [float(word) for word in capsys.readouterr().out.splitlines()[0].split()]
    assert len(losses) == 6
    assert all(0 < loss < 100 for loss in losses)


def test_every_recipe_is_tested() -> None:
    of_this = Path(__file__).read_text()
    for file in RECIPES.glob("*.py"):
        assert f'"{file.stem}"' in of_this, file
