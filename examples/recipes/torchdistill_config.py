"""torchdistill: the loss in its registry, torchdistill.yaml that names it, and its DistillationBox.

pip install torchdistill
python examples/recipes/torchdistill_config.py
"""

from pathlib import Path
from typing import Any

import torch
from tiny import image_batches
from torch import Tensor, nn
from torchdistill.common.yaml_util import load_yaml_file
from torchdistill.core.distillation import DistillationBox
from torchdistill.losses.registry import register_mid_level_loss

from fused_kd import presets

CONFIG = Path(__file__).with_name("torchdistill.yaml")
CLASSES = 500


@register_mid_level_loss
class FusedKDLoss(nn.Module):
    """Takes the arguments that torchdistill's KDLoss takes in a config (but for reduction, which is "batchmean")."""

    def __init__(
        self,
        student_module_path: str,
        student_module_io: str,
        teacher_module_path: str,
        teacher_module_io: str,
        temperature: float,
        alpha: float,
        beta: float | None = None,
    ) -> None:
        super().__init__()
        self.student, self.teacher = (student_module_path, student_module_io), (teacher_module_path, teacher_module_io)
        self.loss_fn = presets.torchdistill(alpha, temperature, beta)

    def forward(self, student_io_dict: Any, teacher_io_dict: Any, targets: Tensor, *args: Any, **kwargs: Any) -> Any:
        (student, student_io), (teacher, teacher_io) = self.student, self.teacher
        return self.loss_fn(student_io_dict[student][student_io], teacher_io_dict[teacher][teacher_io], targets)


def network(width: int, spread: float) -> nn.Module:
    head = nn.Linear(width, CLASSES)
    nn.init.normal_(head.weight, std=spread)
    return nn.Sequential(nn.Conv2d(3, width, 3, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


def train(config: Path = CONFIG, steps: int = 6) -> list[float]:
    """The loss of each step."""
    torch.manual_seed(0)
    student, teacher = network(16, 0.5), network(32, 2.0).eval()
    data = {"train": [row for batch in image_batches(steps, 8, CLASSES) for row in zip(*batch, strict=True)]}
    box = DistillationBox(teacher, student, data, load_yaml_file(config), torch.device("cpu"), None, False, 1)
    curve = []
    box.pre_epoch_process(epoch=0)
    for images, targets, extra in box.train_data_loader:
        loss = box.forward_process(images, targets, extra)
        box.post_forward_process(loss)
        curve.append(float(loss.detach()))
    return curve


if __name__ == "__main__":
    print(*(f"{loss:.4f}" for loss in train()))
