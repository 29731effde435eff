"""A plain PyTorch loop: from hidden states and heads, with gradient accumulation.

    python examples/recipes/plain_loop.py

From logits it is FusedKDLoss and `loss_fn(student(ids), teacher(ids), labels, num_items=num_items)`.
"""

from typing import Any

import torch
from tiny import language_models, token_batches

from fused_kd import FusedLinearKDLoss

LOSS = FusedLinearKDLoss(temperature=2.0, alpha=0.5, shift=True)


def train(loss_fn: Any = LOSS, accumulation: int = 2, steps: int = 6) -> list[float]:
    """The loss of each step."""
    student, teacher = language_models()
    teacher.eval().requires_grad_(False)
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    curve = []
    for ids, labels in token_batches(steps):
        # The labelled positions of the whole step: a mean over each micro-batch would weigh those of one with few more.
        # Under DDP, which averages gradients, it is those of all ranks, divided by the number of ranks.
        num_items = (labels[:, 1:] != -100).sum()
        losses = []
        for some_ids, some_labels in zip(ids.chunk(accumulation), labels.chunk(accumulation), strict=True):
            with torch.no_grad():
                teacher_hidden = teacher.hidden(some_ids)
            loss = loss_fn(
                student.hidden(some_ids),
                student.lm_head.weight,
                teacher_hidden,
                teacher.lm_head.weight,
                some_labels,
                num_items=num_items,
            )
            loss.backward()
            losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        curve.append(float(sum(losses)))
    return curve


if __name__ == "__main__":
    print(*(f"{loss:.4f}" for loss in train()))
