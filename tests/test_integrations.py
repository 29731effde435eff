"""Real trainers, offline and with tiny models: the losses they report and the gradients they step with are those of the
same trainer with the loss as one writes it, whatever the accumulation and the processes."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

from fused_kd import FusedKDLoss, FusedLinearKDLoss, presets

transformers = pytest.importorskip("transformers", reason="needs transformers; pip install 'fused_kd[huggingface]'")
pytest.importorskip("accelerate", reason="needs accelerate; pip install 'fused_kd[huggingface]'")

from fused_kd.integrations.heads import Caps, projection  # noqa: E402
from fused_kd.integrations.huggingface import DistillationMixin, DistillationTrainer  # noqa: E402

VOCABULARY, LENGTH = 499, 24
TEMPERATURE, ALPHA = 2.0, 0.7
# What rounding makes of six steps; 2.2e-7 and 3.5e-6 were seen.
CURVE = 1e-6
GRADIENT = 1e-5


def llama(width: int, seed: int, **options: Any) -> Any:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.5,  # the usual 0.02 would make the distributions all but uniform
        **options,
    )
    return transformers.AutoModelForCausalLM.from_config(config)


def examples(count: int, equal: bool = False) -> list[dict[str, Tensor]]:
    """Of unequal lengths: padded, and with some labels left out."""
    generator = torch.Generator().manual_seed(5)
    rows = []
    for i in range(count):
        ids = torch.randint(VOCABULARY, (LENGTH,), generator=generator)
        attended = (torch.arange(LENGTH) < LENGTH - 2 * (3 if equal else i % 8)).long()
        labels = ids.masked_fill(attended == 0, -100)
        labels[: i % 5] = -100
        rows.append({"input_ids": ids, "attention_mask": attended, "labels": labels})
    return rows


def collated(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def eager_loss(student: Tensor, teacher: Tensor, labels: Tensor, num_items: Any, alpha: float = ALPHA) -> Tensor:
    """KL and cross entropy of shifted logits, over num_items or the labelled positions."""
    counted = labels[:, 1:] != -100
    student, teacher, labels = (x[counted] for x in (student[:, :-1], teacher[:, :-1], labels[:, 1:]))
    log_q, log_p = log_softmax(student / TEMPERATURE, -1), log_softmax(teacher / TEMPERATURE, -1)
    soft = TEMPERATURE**2 * (log_p.exp() * (log_p - log_q)).sum()
    hard = cross_entropy(student, labels, reduction="sum")
    return (alpha * soft + (1 - alpha) * hard) / (len(labels) if num_items is None else num_items)


class EagerTrainer(transformers.Trainer):  # type: ignore[misc]
    """As one writes it, with what the Trainer leaves to who overrides compute_loss."""

    def __init__(self, *args: Any, teacher: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher = teacher.eval()

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs["labels"]
        given = {k: v for k, v in inputs.items() if k != "labels"}
        with torch.no_grad():
            teacher_logits = self.teacher(**given).logits
        outputs = model(**given)
        loss = eager_loss(outputs.logits.float(), teacher_logits.float(), labels, num_items_in_batch)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss


class Watch(transformers.TrainerCallback):  # type: ignore[misc]
    """What is stepped with, and what is logged."""

    def __init__(self) -> None:
        self.gradients: list[Tensor] = []
        self.logs: list[dict[str, float]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        self.gradients.append(torch.cat([p.grad.flatten().clone() for p in model.parameters()]))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        self.logs.append(dict(logs))

    @property
    def curve(self) -> list[float]:
        return [logs["loss"] for logs in self.logs if "loss" in logs]


def arguments(output: Path, batch: int = 4, accumulation: int = 1, **options: Any) -> Any:
    return transformers.TrainingArguments(
        **{
            "output_dir": os.fspath(output),
            "per_device_train_batch_size": batch,
            "per_device_eval_batch_size": batch,
            "gradient_accumulation_steps": accumulation,
            "use_cpu": True,
            "report_to": [],
            "logging_steps": 1,
            "max_steps": 6,
            "optim": "sgd",  # AdamW divides rounding errors by their own size
            "learning_rate": 0.5,
            "save_strategy": "no",
            "disable_tqdm": True,
            "max_grad_norm": 0.0,
            **options,
        }
    )


def trained(
    cls: Any, args: Any, student: Any = None, teacher: Any = None, count: int = 32, equal: bool = False, **options: Any
) -> Any:
    """The trainer, after training, and what was seen of it."""
    watch = Watch()
    if cls is EagerTrainer:
        options = {}
    trainer = cls(
        student or llama(16, 1),
        args,
        train_dataset=examples(count, equal),
        data_collator=collated,
        teacher=teacher or llama(24, 2),
        callbacks=[watch],
        **options,
    )
    trainer.train()
    return trainer, watch


def linear(**options: Any) -> FusedLinearKDLoss:
    return FusedLinearKDLoss(TEMPERATURE, alpha=ALPHA, **options)


LOSSES = {"hidden states": linear(), "logits": FusedKDLoss(TEMPERATURE, alpha=ALPHA)}


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("loss", LOSSES)
def test_curve_and_gradients_of_a_trainer_with_the_eager_loss(loss: str, accumulation: int, tmp_path: Path) -> None:
    args = {"output": tmp_path, "batch": 4 // accumulation, "accumulation": accumulation}
    _, theirs = trained(EagerTrainer, arguments(**args))
    trainer, ours = trained(DistillationTrainer, arguments(**args), loss_fn=LOSSES[loss])
    assert len(ours.curve) == 6
    assert ours.curve == pytest.approx(theirs.curve, rel=CURVE)
    for a, b in zip(ours.gradients, theirs.gradients, strict=True):
        assert distance(a, b) < GRADIENT
    for logs in ours.logs[:-1]:
        assert logs["loss"] == pytest.approx(ALPHA * TEMPERATURE**2 * logs["soft"] + (1 - ALPHA) * logs["hard"], 1e-5)
        assert 0 < logs["student_entropy"] < 7
        assert 0 < logs["teacher_entropy"] < 7
    assert not trainer.teacher.training


def test_accumulation(tmp_path: Path) -> None:
    found = [
        trained(DistillationTrainer, arguments(tmp_path, 8 // n, n, max_steps=1), count=8, loss_fn=linear())[1]
        for n in (1, 2, 4)
    ]
    for watch in found[1:]:
        assert distance(watch.gradients[0], found[0].gradients[0]) < GRADIENT
        assert watch.logs[0] == pytest.approx(found[0].logs[0], rel=1e-5)


def test_logs_over_several_steps(tmp_path: Path) -> None:
    _, watch = trained(DistillationTrainer, arguments(tmp_path, 2, 2, logging_steps=3), loss_fn=linear())
    assert len(watch.curve) == 2
    for logs in watch.logs[:2]:
        assert logs["loss"] == pytest.approx(ALPHA * TEMPERATURE**2 * logs["soft"] + (1 - ALPHA) * logs["hard"], 1e-5)


def test_logs_of_a_run_that_goes_on_and_of_another(tmp_path: Path) -> None:
    args = arguments(tmp_path, logging_steps=2, max_steps=5, save_strategy="steps", save_steps=2)
    trainer, watch = trained(DistillationTrainer, args, loss_fn=linear())
    for checkpoint in (os.fspath(tmp_path / "checkpoint-2"), None):
        watch.logs.clear()
        trainer.train(checkpoint)
        assert len(watch.curve) == (1 if checkpoint else 2)
        for logs in watch.logs[:-1]:
            parts = ALPHA * TEMPERATURE**2 * logs["soft"] + (1 - ALPHA) * logs["hard"]
            assert logs["loss"] == pytest.approx(parts, 1e-5)


@pytest.mark.parametrize("options", [{"reduction": "batchmean"}, {"soft_on_ignored": True, "alpha": 1.0}])
def test_accumulation_of_losses_that_are_not_over_labels(options: dict[str, Any], tmp_path: Path) -> None:
    """As many attended positions in each micro-batch, so that the mean of their means is that of all."""
    loss_fn = FusedKDLoss(TEMPERATURE, **options)
    found = [
        trained(DistillationTrainer, arguments(tmp_path, 8 // n, n, max_steps=1), loss_fn=loss_fn, count=8, equal=True)
        for n in (1, 2)
    ]
    (_, one), (_, two) = found
    assert distance(two.gradients[0], one.gradients[0]) < GRADIENT
    assert two.logs[0] == pytest.approx(one.logs[0], rel=1e-5)


def _sharded(rank: int, args: Any) -> Tensor:
    """The gradient where FSDP shards the student, whose head is whole in its forward alone."""
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415 (where there is torch.distributed)

    trainer = DistillationTrainer(llama(16, 1), args, teacher=llama(24, 2), loss_fn=linear())
    student, rows = trainer.model.train(), examples(8)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    for module in (*student.model.layers, student):
        fully_shard(module, mesh=mesh)
    count = (collated(rows)["labels"][:, 1:] != -100).sum()
    trainer.compute_loss(student, collated(rows[rank::2]), num_items_in_batch=count).backward()
    return torch.cat([p.grad.full_tensor().flatten() for p in student.parameters()])


def _of_a_rank(rank: int, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    results = {}
    for average in (True, False):
        for cls, accumulation in ((DistillationTrainer, 1), (DistillationTrainer, 2), (EagerTrainer, 2)):
            args = arguments(
                Path(folder),
                4 // accumulation,
                accumulation,
                max_steps=1,
                average_tokens_across_devices=average,
                ddp_find_unused_parameters=not average,
            )
            trainer, watch = trained(cls, args, count=8, loss_fn=linear())
            assert trainer.accelerator.num_processes == 2
            results[average, cls.__name__, accumulation] = watch.gradients[0], watch.logs[0]
    results["sharded"] = _sharded(rank, arguments(Path(folder)))
    if rank == 0:
        torch.save(results, Path(folder) / "results")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch was built without torch.distributed")
def test_two_processes(tmp_path: Path) -> None:
    _, alone = trained(DistillationTrainer, arguments(tmp_path, 8, max_steps=1), count=8, loss_fn=linear())
    torch.multiprocessing.spawn(_of_a_rank, (os.fspath(tmp_path), free_port()), nprocs=2)
    results = torch.load(tmp_path / "results")
    for accumulation in (1, 2):
        gradient, logs = results[True, "DistillationTrainer", accumulation]
        assert distance(gradient, alone.gradients[0]) < GRADIENT
        for name in ("loss", "soft", "hard", "student_entropy", "teacher_entropy"):
            assert logs[name] == pytest.approx(alone.logs[0][name], rel=1e-5)
    assert distance(results["sharded"], alone.gradients[0]) < GRADIENT
    for average in (True, False):
        ours, theirs = (results[average, name, 2] for name in ("DistillationTrainer", "EagerTrainer"))
        assert distance(ours[0], theirs[0]) < GRADIENT
        assert ours[1]["loss"] == pytest.approx(theirs[1]["loss"], rel=CURVE)


def free_port() -> int:
    import socket  # noqa: PLC0415

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def test_the_teacher_is_neither_optimised_nor_saved(tmp_path: Path) -> None:
    teacher = llama(24, 2).train()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    args = arguments(tmp_path, save_strategy="steps", save_steps=6)
    trainer, _ = trained(DistillationTrainer, args, teacher=teacher)
    student = {id(p) for p in trainer.model.parameters()}
    assert {id(p) for group in trainer.optimizer.param_groups for p in group["params"]} == student
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-6")
    assert saved.config.hidden_size == 16
    files = list((tmp_path / "checkpoint-6").iterdir())
    weights = sum(p.nbytes for p in teacher.parameters())
    assert sum(file.stat().st_size for file in files if "optimizer" not in file.name) < weights
    assert {name: p.shape for name, p in saved.named_parameters()} == {
        name: p.shape for name, p in trainer.model.named_parameters()
    }


def test_a_teacher_of_another_dtype(tmp_path: Path) -> None:
    teacher = llama(24, 2).to(torch.bfloat16)
    args = arguments(tmp_path, max_steps=1)
    curves = [
        trained(cls, args, teacher=teacher, loss_fn=LOSSES["logits"])[1].curve
        for cls in (EagerTrainer, DistillationTrainer)
    ]
    assert curves[1] == pytest.approx(curves[0], rel=CURVE)
    _, watch = trained(DistillationTrainer, args, teacher=teacher, loss_fn=linear())
    assert watch.curve == pytest.approx(curves[0], rel=1e-2)  # logits that are not rounded to bfloat16
    assert next(teacher.parameters()).dtype == torch.bfloat16


def largest_allocation(cls: Any, folder: Path, **options: Any) -> int:
    return max(allocations(cls, folder, **options))


def allocations(cls: Any, folder: Path, **options: Any) -> list[int]:
    trainer, _ = trained(cls, arguments(folder, max_steps=1), count=4, **options)
    inputs = collated(examples(4))
    with torch.profiler.profile(profile_memory=True) as profile:
        trainer.compute_loss(trainer.model.train(), inputs, num_items_in_batch=torch.tensor(60)).backward()
    return [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]


def test_no_logits_are_held(tmp_path: Path) -> None:
    logits = 4 * 4 * LENGTH * VOCABULARY
    assert largest_allocation(DistillationTrainer, tmp_path, loss_fn=linear(chunk_rows=8)) < logits / 2
    assert largest_allocation(EagerTrainer, tmp_path) >= logits


def test_of_logits_nothing_is_held_but_the_gradient(tmp_path: Path) -> None:
    """(What the eager loss makes is of the labelled positions.)"""
    logits = 4 * 4 * LENGTH * VOCABULARY
    ours, theirs = (
        sum(size >= logits // 3 for size in allocations(cls, tmp_path, loss_fn=LOSSES["logits"]))
        for cls in (DistillationTrainer, EagerTrainer)
    )
    assert ours == 3  # the student's, the teacher's, the gradient
    assert theirs > 10


def test_evaluation(tmp_path: Path) -> None:
    args = arguments(tmp_path, max_steps=1)
    shapes = []

    def metrics(prediction: Any) -> dict[str, float]:
        shapes.append(prediction.predictions.shape)
        return {"seen": 1.0}

    for options in ({}, {"compute_metrics": metrics}):
        found = []
        for cls in (EagerTrainer, DistillationTrainer):
            trainer, _ = trained(cls, args, loss_fn=linear(), **(options if cls is DistillationTrainer else {}))
            found.append(trainer.evaluate(examples(8)))
        assert found[1]["eval_loss"] == pytest.approx(found[0]["eval_loss"], rel=CURVE)
        of_parts = ALPHA * TEMPERATURE**2 * found[1]["eval_soft"] + (1 - ALPHA) * found[1]["eval_hard"]
        assert of_parts == pytest.approx(found[1]["eval_loss"], rel=1e-5)
        assert found[1]["eval_teacher_entropy"] > 0
    assert shapes == [(8, LENGTH, VOCABULARY)]


def test_mixin_and_labels_that_are_left_out(tmp_path: Path) -> None:
    class Mine(DistillationMixin, transformers.Seq2SeqTrainer):  # type: ignore[misc]
        pass

    args = transformers.Seq2SeqTrainingArguments(os.fspath(tmp_path), use_cpu=True, report_to=[])
    trainer = Mine(llama(16, 1), args, teacher=llama(24, 2), loss_fn=linear(chunk_rows=8))
    inputs = collated(examples(4))
    with torch.no_grad():
        student, teacher = (
            m.eval()(inputs["input_ids"], inputs["attention_mask"]).logits for m in (trainer.model, trainer.teacher)
        )
    expected = eager_loss(student, teacher, inputs["labels"], None)
    assert trainer.compute_loss(trainer.model, inputs).item() == pytest.approx(float(expected), rel=CURVE)
    loss, outputs = trainer.compute_loss(trainer.model, inputs, return_outputs=True)
    assert torch.equal(outputs.logits, student)
    assert loss.item() == pytest.approx(float(expected), rel=CURVE)

    zeros = torch.zeros_like(inputs["labels"])  # labels that nobody reads
    shifted = dict(
        inputs, labels=zeros, shift_labels=torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
    )
    assert trainer.compute_loss(trainer.model, shifted).item() == pytest.approx(float(expected), rel=CURVE)
    with pytest.raises(ValueError, match="labels"):
        trainer.compute_loss(trainer.model, {k: v for k, v in inputs.items() if k != "labels"})
    trainer.loss_fn.alpha = 1.0
    labels = inputs.pop("labels")
    of_all = eager_loss(student, teacher, labels.masked_fill(inputs["attention_mask"] == 1, 0), None, alpha=1.0)
    assert trainer.compute_loss(trainer.model, inputs).item() == pytest.approx(float(of_all), rel=CURVE)


def encoder_decoder(name: str, seed: int) -> Any:
    torch.manual_seed(seed)
    if name == "t5":
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
        config = transformers.T5Config(vocab_size=VOCABULARY, dropout_rate=0.0, **sizes)
    else:
        sizes = {f"{part}_{what}": n for part in ("encoder", "decoder")
                 for what, n in (("layers", 1), ("ffn_dim", 16), ("attention_heads", 2))}  # fmt: skip
        config = transformers.BartConfig(vocab_size=VOCABULARY, d_model=16, dropout=0.0, init_std=0.5, **sizes)
    return transformers.AutoModelForSeq2SeqLM.from_config(config)


@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize(
    "loss_fn", [linear(), FusedKDLoss(TEMPERATURE, alpha=ALPHA, soft_on_ignored=True)], ids=["linear", "soft"]
)
def test_an_encoder_decoder_whose_inputs_are_made_of_labels(name: str, loss_fn: Any, tmp_path: Path) -> None:
    """As long as the encoder's inputs, so that its mask would fit."""
    student, teacher = encoder_decoder(name, 1), encoder_decoder(name, 2)
    trainer = DistillationTrainer(student, arguments(tmp_path), teacher=teacher, loss_fn=loss_fn)
    inputs = collated(examples(4))
    with torch.no_grad():
        outputs, of_teacher = student.eval()(**inputs), teacher.eval()(**inputs)
        options = {"soft_on_ignored": loss_fn.soft_on_ignored}
        expected = FusedKDLoss(TEMPERATURE, alpha=ALPHA, **options)(outputs.logits, of_teacher.logits, inputs["labels"])
        assert trainer.compute_loss(student, inputs).item() == pytest.approx(expected.item(), rel=CURVE)
        assert set(inputs) == {"input_ids", "attention_mask", "labels"}
        mask = inputs["labels"].ne(-100).long()
        mask[0, -1] = 0
        masked = dict(inputs, decoder_attention_mask=mask, decoder_input_ids=inputs["labels"].clamp(min=0))
        of_both = [model(**masked).logits for model in (student, teacher)]
        weights = mask.float() if loss_fn.soft_on_ignored else None
        expected = FusedKDLoss(TEMPERATURE, alpha=ALPHA, **options)(*of_both, inputs["labels"], weights=weights)
        assert trainer.compute_loss(student, masked).item() == pytest.approx(expected.item(), rel=CURVE)


def test_evaluation_where_it_generates(tmp_path: Path) -> None:
    class Mine(DistillationMixin, transformers.Seq2SeqTrainer):  # type: ignore[misc]
        pass

    args = transformers.Seq2SeqTrainingArguments(
        os.fspath(tmp_path), use_cpu=True, report_to=[], predict_with_generate=True, generation_max_length=9
    )
    found = []
    for options in ({}, {"compute_metrics": lambda prediction: {"length": prediction.predictions.shape[1]}}):
        models = encoder_decoder("bart", 1), encoder_decoder("bart", 2)
        trainer = Mine(models[0], args, teacher=models[1], data_collator=collated, loss_fn=linear(), **options)
        found.append(trainer.evaluate(examples(4)))
    assert found[1]["eval_length"] > 0
    for name in ("eval_loss", "eval_soft", "eval_hard"):
        assert found[1][name] == pytest.approx(found[0][name], rel=CURVE)


def classifier(width: int, seed: int) -> Any:
    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=VOCABULARY, **sizes, num_labels=7, initializer_range=0.5)
    return transformers.BertForSequenceClassification(config)


def test_a_text_classifier(tmp_path: Path) -> None:
    """Whose attention mask is one number a token, and whose logits are one row a text."""
    inputs = collated(examples(4))
    inputs["labels"] = torch.arange(4)
    student, teacher = classifier(16, 1).eval(), classifier(24, 2).eval()
    for loss_fn in (presets.huggingface_docs(0.3, 2.0), FusedKDLoss(2.0, alpha=0.3)):
        trainer = DistillationTrainer(student, arguments(tmp_path), teacher=teacher, loss_fn=loss_fn)
        with torch.no_grad():
            expected = loss_fn(*(model(**inputs).logits for model in (student, teacher)), inputs["labels"])
            assert trainer.compute_loss(student, inputs).item() == pytest.approx(expected.item(), rel=CURVE)


SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 1.0,  # so that a softcap of 7 bends the logits
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 1,
}
CONFIGS = {
    "llama": ("LlamaConfig", {}, Caps(1.0, None)),
    "gemma2": ("Gemma2Config", {"final_logit_softcapping": 7.0}, Caps(1.0, 7.0)),
    "cohere": ("CohereConfig", {"logit_scale": 0.0625}, Caps(0.0625, None)),
    "granite": ("GraniteConfig", {"logits_scaling": 3.0}, Caps(1 / 3.0, None)),
    "t5": ("T5Config", {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}, Caps(1.0, None)),
}


def _model(name: str) -> tuple[Any, dict[str, Tensor], Caps]:
    config, options, caps = CONFIGS[name]
    torch.manual_seed(3)
    small = SMALL if name != "t5" else {k: SMALL[k] for k in ("vocab_size", "pad_token_id", "eos_token_id")}
    made = getattr(transformers, config)(**small, **options)
    model: Any = transformers.AutoModelForSeq2SeqLM if name == "t5" else transformers.AutoModelForCausalLM
    ids = torch.randint(2, 61, (2, 9))
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if name == "t5" else {})}
    return model.from_config(made).eval(), inputs, caps


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_what_a_model_does_around_its_head_is_found(name: str) -> None:
    model, inputs, caps = _model(name)
    found = projection(model, model, inputs, None, "student")
    assert found.caps == pytest.approx(caps, rel=1e-6) if caps.softcap else found.caps.scale == pytest.approx(caps[0])
    assert (name == "granite") or found.caps == caps
    logits = found.caps.scale * torch.nn.functional.linear(found.hidden, found.weight, found.bias)
    if found.caps.softcap:
        logits = found.caps.softcap * torch.tanh(logits / found.caps.softcap)
    torch.testing.assert_close(model(**inputs).logits, logits)
    again = projection(model, model, inputs, found.caps, "student")
    assert torch.equal(again.hidden, found.hidden)
    assert "forward" not in vars(model.get_output_embeddings())


def test_a_student_and_a_teacher_that_do_something_to_their_logits(tmp_path: Path) -> None:
    (student, inputs, _), (teacher, _, _) = _model("gemma2"), _model("cohere")
    labels = inputs["input_ids"]
    for one, other in ((student, teacher), (teacher, student)):
        trainer = DistillationTrainer(one, arguments(tmp_path), teacher=other, loss_fn=linear())
        expected = eager_loss(one(**inputs).logits, other(**inputs).logits.detach(), labels, None)
        for _ in range(2):  # what is found in the first step is kept
            found = trainer.compute_loss(one, {**inputs, "labels": labels})
            assert found.item() == pytest.approx(expected.item(), rel=CURVE)


class Custom(torch.nn.Module):
    """A head and something after it."""

    def __init__(self, after: Any, head: Any = None) -> None:
        super().__init__()
        self.embed, self.after = torch.nn.Embedding(61, 8), after
        self.head = torch.nn.Linear(8, 61) if head is None else head

    def get_output_embeddings(self) -> Any:
        return self.head

    def forward(self, input_ids: Tensor) -> Mapping[str, Tensor]:
        return {"logits": self.after(self.head(self.embed(input_ids)))}


class Tuples(Custom):
    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        hidden = self.embed(input_ids)
        return self.head(hidden), hidden


def test_metrics_of_a_model_that_returns_tuples(tmp_path: Path) -> None:
    shapes = []

    def metrics(prediction: Any) -> dict[str, float]:
        shapes.append([x.shape for x in prediction.predictions])
        return {}

    rows = [{name: x.remainder(61) for name, x in row.items() if name != "attention_mask"} for row in examples(8)]
    trainer = DistillationTrainer(
        Tuples(lambda x: x),
        arguments(tmp_path),
        teacher=Tuples(lambda x: x),
        data_collator=collated,
        compute_metrics=metrics,
    )
    trainer.evaluate(rows)
    assert shapes == [[(8, LENGTH, 61), (8, LENGTH, 8)]]


def _masked(logits: Tensor) -> Tensor:
    return torch.where(torch.arange(61) < 50, logits, -1e9)


class Other(torch.nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


@pytest.mark.parametrize(
    ("model", "error"),
    [
        (Custom(_masked), "after its head"),
        (Custom(lambda x: x + 1), "after its head"),
        (Custom(lambda x: x**3), "after its head"),
        (Custom(lambda x: x, Other(8, 61)), "got a Other"),
        (torch.nn.Linear(3, 3), "got no head"),
    ],
    ids=["masked columns", "an offset", "a power", "another layer", "no head"],
)
def test_what_is_no_plain_head_is_refused(model: Any, error: str) -> None:
    with pytest.raises(ValueError, match=f"student.*{error}.*FusedKDLoss"):
        projection(model, model, {"input_ids": torch.zeros(1, 3, dtype=torch.int64)}, None, "student")


@pytest.mark.parametrize(
    ("options", "arguments_", "error"),
    [
        ({"loss_fn": FusedKDLoss(reduction="none")}, {}, "none"),
        ({"loss_fn": FusedKDLoss(ignore_index=0)}, {}, "ignore_index"),
        ({"loss_fn": FusedKDLoss(student_softcap=30.0)}, {}, "softcaps"),
        ({"compute_loss_func": lambda *_, **__: None}, {}, "compute_loss_func"),
        ({}, {"label_smoothing_factor": 0.1}, "label_smoothing"),
    ],
)
def test_what_would_be_ignored_is_refused(
    options: dict[str, Any], arguments_: dict[str, Any], error: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=error):
        DistillationTrainer(llama(16, 1), arguments(tmp_path, **arguments_), teacher=llama(16, 2), **options)


def test_other_losses_and_the_model_itself_are_refused(tmp_path: Path) -> None:
    model = llama(16, 1)
    wrapped = torch.nn.Sequential(model)  # as a model with adapters
    for student, teacher in ((model, model), (wrapped, model), (model, wrapped)):
        with pytest.raises(ValueError, match="the model itself"):
            DistillationTrainer(student, arguments(tmp_path), teacher=teacher)
    with pytest.raises(TypeError, match=r"teacher must be a torch.nn.Module, got str; load"):
        DistillationTrainer(model, arguments(tmp_path), teacher="gpt2")
    with pytest.raises(TypeError, match="got function"):
        DistillationTrainer(model, arguments(tmp_path), teacher=model, loss_fn=eager_loss)


@pytest.mark.parametrize(("module", "package"), [("huggingface", "transformers")])
def test_a_missing_package_names_the_extra(module: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"fused_kd.integrations.{module}")
    with pytest.raises(ImportError, match=rf"needs {package}.*pip install 'fused_kd\[{module}\]'"):
        importlib.import_module(f"fused_kd.integrations.{module}")


def test_fused_kd_imports_none_of_them() -> None:
    code = "import fused_kd, sys, json; print(json.dumps([m for m in ('transformers', 'trl') if m in sys.modules]))"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert json.loads(output) == []
