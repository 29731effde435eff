"""timm and DeiT: a student with a distillation token learns from a teacher, under mixup.

    pip install timm
    python examples/recipes/timm_task.py

The hard term of our losses takes classes. Soft labels, of mixup or smoothed, stay with timm's criterion, which scores
the other head; the distillation term takes no labels. For a student with one head both are of its logits; where labels
are classes, `presets.huggingface_docs` is both at once.
"""

from typing import Any

import numpy as np
import timm
import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.task import TokenDistillationTask
from tiny import image_batches
from torch import Tensor

from fused_kd import FusedKDLoss

CLASSES = 500


class FusedTokenDistillationTask(TokenDistillationTask):  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Soft as timm has it: all rows count, temperature**2. DeiT's own divides by classes too: presets.deit.
        self.kd_loss = FusedKDLoss(self.temperature, alpha=1.0)

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Any]:
        main_logits, dist_logits = self.trainable_module(input)
        with torch.no_grad():
            teacher_logits = self.teacher(self.teacher.normalize_input(input, self.student_mean, self.student_std))
        task_loss = self.criterion(main_logits, target)
        if self.distill_type == "soft":
            distill_loss = self.kd_loss(dist_logits, teacher_logits)
        else:
            distill_loss = torch.nn.functional.cross_entropy(dist_logits, teacher_logits.argmax(-1))
        loss = self.task_loss_weight * task_loss + self.distill_loss_weight * distill_loss
        return {"loss": loss, "output": main_logits, "task_loss": task_loss, "distill_loss": distill_loss}


def train(task: type = FusedTokenDistillationTask, distill_type: str = "soft", steps: int = 6) -> list[float]:
    """The loss of each step."""
    torch.manual_seed(0)
    np.random.seed(0)  # Mixup's
    size: dict[str, Any] = {"img_size": 32, "patch_size": 8, "num_heads": 2, "depth": 1, "num_classes": CLASSES}
    student = timm.create_model("deit_tiny_distilled_patch16_224", embed_dim=32, **size)
    teacher = timm.create_model("deit_tiny_patch16_224", embed_dim=64, **size)
    teacher.head.weight.data *= 20  # else its distributions would be all but uniform
    mixup = Mixup(mixup_alpha=0.8, num_classes=CLASSES)
    task = task(
        student,
        teacher,
        criterion=SoftTargetCrossEntropy(),
        distill_type=distill_type,
        task_loss_weight=0.5,
        temperature=3.0,
        device=torch.device("cpu"),
        verbose=False,
    ).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    curve = []
    for images, classes in image_batches(steps, 8, CLASSES):
        loss = task(*mixup(images, classes))["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        curve.append(float(loss.detach()))
    return curve


if __name__ == "__main__":
    print(*(f"{loss:.4f}" for loss in train()))
