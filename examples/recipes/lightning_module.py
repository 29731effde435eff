"""Distillation as a LightningModule: the teacher is in neither its parameters nor its checkpoints.

    pip install lightning
    python examples/recipes/lightning_module.py

Trainer(accumulate_grad_batches=n) averages the losses of n micro-batches: a mean over the labelled positions of each
would weigh those of a micro-batch with few more. Here the losses are sums, and the gradient is divided once, before the
step (and before it is clipped), by the labelled positions of all micro-batches and processes.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning
import torch
from tiny import LanguageModel, language_models, token_batches
from torch import Tensor

from fused_kd import FusedLinearKDLoss

LOSS = FusedLinearKDLoss(temperature=2.0, alpha=0.5, shift=True, reduction="sum")


class Distillation(lightning.LightningModule):
    def __init__(self, student: LanguageModel, teacher: LanguageModel, loss_fn: Any = LOSS) -> None:
        super().__init__()
        self.student = student
        self.loss_fn = loss_fn
        # In a list it is no submodule: not optimised, not saved, not put in train mode, not moved.
        self._teacher = [teacher.eval().requires_grad_(False)]
        self._sums: list[Tensor] = []  # of the loss, and of the labelled positions, of each micro-batch
        self.curve: list[float] = []

    def on_fit_start(self) -> None:
        self._teacher[0].to(self.device)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        ids, labels = batch
        (teacher,) = self._teacher
        with torch.no_grad():
            teacher_hidden = teacher.hidden(ids)
        loss: Tensor = self.loss_fn(
            self.student.hidden(ids), self.student.lm_head.weight, teacher_hidden, teacher.lm_head.weight, labels
        )
        self._sums.append(torch.stack([loss.detach(), (labels[:, 1:] != -100).sum().to(loss.dtype)]))
        return loss * self.trainer.accumulate_grad_batches  # by which Lightning divides

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        total, items = self.trainer.strategy.reduce(torch.stack(self._sums).sum(0), reduce_op="sum")
        self._sums = []
        items = items.clamp(min=1)  # a step without any label is one of 0, and not of NaN
        for parameter in self.student.parameters():
            if parameter.grad is not None:
                parameter.grad *= self.trainer.world_size / items  # DDP divides by the number of processes
        self.log("loss", total / items)
        self.curve.append(float(total / items))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.student.parameters(), lr=1.0)


def fit(loss_fn: Any = LOSS, accumulation: int = 2, steps: int = 6) -> tuple[Distillation, dict[str, Any]]:
    """The module after training, and its checkpoint."""
    module = Distillation(*language_models(), loss_fn)
    rows = [row for batch in token_batches(steps) for row in zip(*batch, strict=True)]
    loader = torch.utils.data.DataLoader(rows, batch_size=8 // accumulation)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        accumulate_grad_batches=accumulation,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    with TemporaryDirectory() as folder:
        file = Path(folder) / "last.ckpt"
        trainer.save_checkpoint(file)
        return module, torch.load(file)


if __name__ == "__main__":
    module, checkpoint = fit()
    print(*(f"{loss:.4f}" for loss in module.curve))
    print("in the checkpoint:", *checkpoint["state_dict"])
