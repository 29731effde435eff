"""TRL's trainers with and without this package's divergences: the same losses, gradients and training."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import make_labels, make_logits
from torch import Tensor

pytest.importorskip("transformers", reason="needs transformers; pip install 'fused_kd[trl]'")
pytest.importorskip("trl", reason="needs trl; pip install 'fused_kd[trl]'")
pytest.importorskip("datasets", reason="needs datasets; pip install 'fused_kd[trl]'")

from datasets import Dataset
from test_integrations import Watch, distance, free_port, llama
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from trl.experimental import gkd, server_distillation
from trl.experimental.async_distillation import async_distillation_trainer
from trl.trainer import DistillationConfig, distillation_trainer

from fused_kd import linear_rows
from fused_kd.integrations import trl as ours

BETAS = [0.0, 0.3, 1.0]
TEXTS = [
    "the quick brown fox",
    "jumps over the lazy dog",
    "while the cat sleeps on",
    "a mat in the sun, all day",
    "until the rain begins",
    "and then, of course, it leaves",
    "for the house and a bowl",
    "of milk, and the fire",
]
# What rounding makes of three steps; 2.2e-7 and 3.5e-6 were seen.
CURVE = 1e-6
GRADIENT = 1e-5


def gradient(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, inputs))


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean", "none", "num_items"])
def test_generalized_jsd_loss(reduction: str, labelled: bool, beta: float) -> None:
    """In float64, on the views that GKDTrainer has."""
    student, teacher = (x.double() for x in make_logits("wide", 3, 8, 101))
    labels = make_labels(3, 8, vocabulary=101)[:, 1:] if labelled else None
    student.requires_grad_()
    options: dict[str, Any] = {"labels": labels, "beta": beta, "temperature": 1.7, "reduction": reduction}
    if reduction == "num_items":
        options |= {"reduction": "batchmean", "num_items_in_batch": torch.tensor(11)}
    results = []
    for function in (gkd.GKDTrainer.generalized_jsd_loss, ours.generalized_jsd_loss):
        loss = function(student[:, :-1], teacher[:, :-1], **options)
        results.append((loss, *gradient(loss.sum(), student)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("masked", [False, True])
def test_chunked_divergence_loss(beta: float, masked: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    make = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    hidden, of_teacher = make(2, 7, 12).requires_grad_(), make(2, 7, 16)
    weight, bias = make(301, 12).requires_grad_(), make(301).requires_grad_()
    mask = torch.zeros(2, 7) if masked else (torch.arange(14) % 3 > 0).view(2, 7).long()
    options: dict[str, Any] = {
        "student_lm_head_bias": bias,
        "student_logit_scale": 0.7,
        "teacher_logit_scale": 1.3,
        "student_final_logit_softcapping": 20.0,
        "temperature": 1.5,
    }
    for items in (None, torch.tensor(4.5), 9):
        results = []
        for function in (distillation_trainer._chunked_divergence_loss, ours.chunked_divergence_loss):
            loss, entropy, count = function(
                hidden, of_teacher, weight, make_weight(), mask, beta, num_items_in_batch=items, **options
            )
            results.append((loss, entropy, count, *gradient(loss, hidden, weight, bias)))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(other.detach(), one.detach(), rtol=2e-5, atol=1e-6)


def make_weight() -> Tensor:
    return torch.randn(301, 16, generator=torch.Generator().manual_seed(4))


def allocations(step: Callable[[], Tensor]) -> list[int]:
    step()  # what is made once
    with torch.profiler.profile(profile_memory=True) as profile:
        step().backward()
    return [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]


def test_what_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of logits their gradient alone, which replaces TRL's many; from hidden states nothing of their size."""
    rows, columns = 64, 1009
    logits = 4 * rows * columns
    student, teacher = torch.randn(4, rows // 4, columns, requires_grad=True), torch.randn(4, rows // 4, columns)
    large = []
    for function in (gkd.GKDTrainer.generalized_jsd_loss, ours.generalized_jsd_loss):
        student.grad = None
        sizes = allocations(lambda: function(student, teacher, beta=0.5))  # noqa: B023
        large.append(sum(size >= logits for size in sizes))
    assert large[1] == 1
    assert large[0] > 10

    monkeypatch.setattr(linear_rows, "CHUNK_BYTES", 8 * 8 * columns)  # eight rows of them, student's and teacher's
    hidden, of_teacher = torch.randn(4, rows // 4, 12, requires_grad=True), torch.randn(4, rows // 4, 16)
    weight, mask = torch.randn(columns, 12, requires_grad=True), torch.ones(4, rows // 4)
    given = (hidden, of_teacher, weight, torch.randn(columns, 16), mask, 1.0)
    assert max(allocations(lambda: ours.chunked_divergence_loss(*given)[0])) < logits / 2


def server_trainer(cls: Any, beta: float, tail: bool) -> Any:
    """Without the server that its constructor asks."""
    trainer = object.__new__(cls)
    trainer.beta, trainer.loss_add_tail, trainer.reverse_kl_top_1_mode = beta, tail, "sampled"
    return trainer


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("beta", BETAS)
def test_losses_of_the_server_trainer(beta: float, tail: bool) -> None:
    logits, teacher = (x.double() for x in make_logits("wide", 3, 8, 101))
    labels = make_labels(3, 8, vocabulary=101)
    k = 5 if beta == 0 else 1
    top = torch.log_softmax(teacher, -1).topk(k, -1)
    values, ids = top.values.clone(), top.indices.clone()
    tokens = labels.clamp(min=0)
    tokens[0, :4] = ids[0, :4, 0]  # the token itself is the teacher's first
    actual = torch.log_softmax(teacher, -1).gather(-1, tokens[..., None]).squeeze(-1)
    if beta == 0:
        values[1, 2, 3:] = -torch.inf  # fewer were sent
        values[2, 1], labels[2, 1] = -torch.inf, 7  # none were
        ids[2, 1] = 0
    values[labels == -100], actual[labels == -100] = -torch.inf, -torch.inf
    sent = {"topk_logprobs": values, "topk_token_ids": ids, "actual_logprobs": actual}
    results = []
    for cls in (server_distillation.ServerDistillationTrainer, ours.ServerDistillationTrainer):
        trainer = server_trainer(cls, beta, tail)
        student = logits.clone().requires_grad_()
        log_probs = torch.log_softmax(student / 1.3, -1)
        if beta == 0:
            loss = trainer._compute_server_forward_kl_loss(sent, log_probs, labels)
        else:
            loss = trainer._compute_server_sparse_top_1_divergence_loss(sent, log_probs, tokens, labels)
        results.append((loss, *gradient(loss, student)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("teachers", [None, 3])
@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("empty", [False, True])
def test_loss_of_the_async_trainer(empty: bool, beta: float, tail: bool, teachers: int | None) -> None:
    generator = torch.Generator().manual_seed(3)
    hidden, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((11, 12), (301, 12), (301,)))
    log_probs, ids = torch.log_softmax(2 * torch.randn(11, 301, generator=generator), -1).topk(4, -1)
    mask = torch.arange(44).view(11, 4) % 5 != 2
    mask[3, :] = False if empty else torch.tensor([True, False, False, True])
    ids[~mask] = 7  # twice in a row, if it were looked at
    of = None if teachers is None else torch.arange(11) % 2
    rest = (0.7, 15.0, ids, log_probs, mask, beta, 1.4, tail, of, teachers or 0, 4)
    results = []
    for function in (async_distillation_trainer._chunked_jsd_loss, ours.chunked_jsd_loss):
        given = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        sums = function(*given, *rest)
        metrics = (*sums[:2], *sums[3:]) if empty else sums
        results.append((*metrics, *gradient(sums[0], *given)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other.detach(), one.detach(), rtol=2e-5, atol=2e-5)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def make_tokenizer() -> Any:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<eos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")
    wrapped.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return wrapped


def gkd_trained(cls: Any, tokenizer: Any, folder: Path, batch: int, accumulation: int = 1, **options: Any) -> Any:
    messages = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        for text, answer in zip(TEXTS, TEXTS[1:] + TEXTS[:1], strict=True)
    ]
    args = gkd.GKDConfig(
        **{
            "output_dir": os.fspath(folder),
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": accumulation,
            "max_length": 64,
            "lmbda": 0.0,
            "beta": 0.5,
            "max_steps": 3,
            **COMMON,
            **options,
        }
    )
    watch = Watch()
    trainer = cls(
        llama(16, 1),
        teacher_model=llama(24, 2),
        args=args,
        train_dataset=Dataset.from_dict({"messages": messages}),
        processing_class=tokenizer,
        callbacks=[watch],
    )
    trainer.train()
    return watch


COMMON: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "logging_steps": 1,
    "optim": "sgd",  # AdamW divides rounding errors by their own size
    "learning_rate": 0.5,
    "save_strategy": "no",
    "disable_tqdm": True,
    "max_grad_norm": 0.0,
    "gradient_checkpointing": False,
}


@pytest.mark.parametrize(("beta", "accumulation"), [(0.0, 1), (0.5, 2), (1.0, 4)])
def test_gkd_trainer(beta: float, accumulation: int, tokenizer: Any, tmp_path: Path) -> None:
    found = []
    for cls in (gkd.GKDTrainer, ours.GKDTrainer):
        found.append(gkd_trained(cls, tokenizer, tmp_path, 4 // accumulation, accumulation, beta=beta))
    with ours.patched():
        found.append(gkd_trained(gkd.GKDTrainer, tokenizer, tmp_path, 4 // accumulation, accumulation, beta=beta))
    assert len(found[0].curve) == 3
    for watch in found[1:]:
        assert watch.curve == pytest.approx(found[0].curve, rel=CURVE)
        for a, b in zip(watch.gradients, found[0].gradients, strict=True):
            assert distance(a, b) < GRADIENT


def _of_a_rank(rank: int, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    tokenizer, results = make_tokenizer(), {}
    for cls, accumulation in ((gkd.GKDTrainer, 1), (ours.GKDTrainer, 1), (ours.GKDTrainer, 2)):
        watch = gkd_trained(cls, tokenizer, Path(folder), 4 // accumulation, accumulation, max_steps=1)
        results[cls.__module__, accumulation] = watch.gradients[0], watch.curve
    for trainer in (distillation_trainer.DistillationTrainer, ours.DistillationTrainer):
        watch = distilled(trainer, tokenizer, Path(folder), 0.5, max_steps=1)
        results[trainer.__module__, "distilled"] = watch.gradients[0], watch.curve
    if rank == 0:
        torch.save(results, Path(folder) / "results")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch was built without torch.distributed")
def test_two_processes(tokenizer: Any, tmp_path: Path) -> None:
    """GKDTrainer's own averages gradients of losses that are already divided by the labels of all processes."""
    alone = gkd_trained(ours.GKDTrainer, tokenizer, tmp_path, 8, max_steps=1)
    torch.multiprocessing.spawn(_of_a_rank, (os.fspath(tmp_path), free_port()), nprocs=2)
    results = torch.load(tmp_path / "results")
    for accumulation in (1, 2):
        found, curve = results[ours.__name__, accumulation]
        assert distance(found, alone.gradients[0]) < GRADIENT
        assert curve == pytest.approx(alone.curve, rel=CURVE)
    of_theirs, of_ours = (results[of.__name__, "distilled"] for of in (distillation_trainer, ours))
    assert distance(of_ours[0], of_theirs[0]) < GRADIENT
    assert of_ours[1] == pytest.approx(of_theirs[1], rel=CURVE)
    theirs, _ = results[gkd.GKDTrainer.__module__, 1]
    assert distance(2 * theirs, alone.gradients[0]) < GRADIENT


def distilled(cls: Any, tokenizer: Any, folder: Path, beta: float, accumulation: int = 1, max_steps: int = 3) -> Any:
    args = DistillationConfig(
        os.fspath(folder),
        per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation,
        max_completion_length=8,
        beta=beta,
        max_steps=max_steps,
        **COMMON,
    )
    watch = Watch()
    trainer = cls(
        llama(16, 1),
        teacher_model=llama(24, 2),
        args=args,
        train_dataset=Dataset.from_dict({"prompt": TEXTS}),
        processing_class=tokenizer,
        callbacks=[watch],
    )
    trainer.train()
    return watch


@pytest.mark.parametrize(("beta", "accumulation"), [(0.0, 1), (0.5, 2), (1.0, 4)])
def test_distillation_trainer(beta: float, accumulation: int, tokenizer: Any, tmp_path: Path) -> None:
    """On-policy: what the student generates is the same as long as its weights are."""
    theirs = distilled(distillation_trainer.DistillationTrainer, tokenizer, tmp_path, beta, accumulation)
    found = [distilled(ours.DistillationTrainer, tokenizer, tmp_path, beta, accumulation)]
    with ours.patched():
        found.append(distilled(distillation_trainer.DistillationTrainer, tokenizer, tmp_path, beta, accumulation))
    assert len(theirs.curve) == 3
    for watch in found:
        assert watch.curve == pytest.approx(theirs.curve, rel=CURVE)
        for a, b in zip(watch.gradients, theirs.gradients, strict=True):
            assert distance(a, b) < GRADIENT
        for a, b in zip(watch.logs[:3], theirs.logs[:3], strict=True):
            assert a["entropy"] == pytest.approx(b["entropy"], rel=1e-5)


@pytest.mark.parametrize(
    ("module", "name", "loss"),
    [
        (distillation_trainer, "DistillationTrainer", "chunked_divergence_loss"),
        (async_distillation_trainer, "AsyncDistillationTrainer", "chunked_jsd_loss"),
    ],
)
def test_a_subclass_takes_our_loss(module: Any, name: str, loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the class above it, at the same time, its own."""
    monkeypatch.setattr(getattr(module, name), "_compute_loss", lambda self: getattr(module, f"_{loss}"))
    taken = object.__new__(getattr(ours, name))._compute_loss()
    assert taken is getattr(ours, loss)
    assert object.__new__(getattr(module, name))._compute_loss() is not taken


def test_patched_undoes_itself() -> None:
    of = [
        lambda: gkd.GKDTrainer.generalized_jsd_loss,
        lambda: gkd.GKDTrainer.compute_loss,
        lambda: distillation_trainer._chunked_divergence_loss,
        lambda: async_distillation_trainer._chunked_jsd_loss,
        lambda: server_distillation.ServerDistillationTrainer._compute_server_forward_kl_loss,
        lambda: server_distillation.ServerDistillationTrainer._compute_sparse_top_1_divergence_loss,
    ]
    before = [get() for get in of]
    undo = ours.patched()
    assert all("fused_kd" in get().__module__ for get in of)
    undo.close()
    assert [get() for get in of] == before
    with pytest.raises(ZeroDivisionError), ours.patched():
        raise ZeroDivisionError
    assert [get() for get in of] == before


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "trl"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "fused_kd.integrations.trl")
    with pytest.raises(ImportError, match=r"needs trl.*pip install 'fused_kd\[trl\]'"):
        __import__("fused_kd.integrations.trl")
