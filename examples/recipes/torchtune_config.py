"""torchtune: the losses in torchtune.yaml, instantiated and called as its distillation recipes do.

    pip install torchtune torchao==0.10.0  # torchtune 0.6.1 does not find NF4Tensor in later ones
    python examples/recipes/torchtune_config.py

torchtune's chunked losses take lists of logits, to upcast a piece at a time; ours upcasts nothing and takes them whole.
"""

from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from tiny import LENGTH, VOCABULARY, token_batches
from torchtune.config import instantiate

CONFIG = Path(__file__).with_name("torchtune.yaml")


def train(config: Path = CONFIG, steps: int = 6) -> list[float]:
    """The loss of each step."""
    cfg = OmegaConf.load(config)
    loss_fn, kd_loss_fn = instantiate(cfg.loss), instantiate(cfg.kd_loss)
    torch.manual_seed(0)
    size: dict[str, Any] = {"vocab_size": VOCABULARY, "max_seq_len": LENGTH}
    model, teacher = instantiate(cfg.model, **size), instantiate(cfg.teacher_model, **size).eval()
    teacher.output.weight.data *= 8  # else its distributions would be all but uniform
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    curve = []
    for tokens, labels in token_batches(steps):
        logits = model(tokens)
        with torch.no_grad():
            teacher_logits = teacher(tokens)
        # Labels are shifted before the loss, which gets rows: shift=True has no place here.
        shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=loss_fn.ignore_index).flatten()
        logits, teacher_logits = logits.flatten(0, 1), teacher_logits.flatten(0, 1)
        class_loss, kd_loss = loss_fn(logits, shifted), kd_loss_fn(logits, teacher_logits, shifted)
        loss = (1 - cfg.kd_ratio) * class_loss + cfg.kd_ratio * kd_loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        curve.append(float(loss.detach()))
    return curve


if __name__ == "__main__":
    print(*(f"{loss:.4f}" for loss in train()))
