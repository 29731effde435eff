"""Where a residual is smallest: the search in a few numbers that all fits here are."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def minimised(
    residual: Callable[[Sequence[float]], Tensor],
    start: Sequence[float],
    *,
    steps: int = 40,
    limit: float = 7.0,
    rest: float = 0.01,
) -> list[float]:
    """Levenberg and Marquardt, with derivatives from differences; no number is beyond `limit`, and a step that makes
    the residual smaller by less than `rest` of it is the last."""
    x = torch.tensor(start, dtype=torch.float64)
    value, damping = residual(x.tolist()), 1e-3
    for _ in range(steps):
        if value.norm() < 1e-13:
            break
        step = 1e-6
        moved = [residual((x + step * torch.eye(len(x), dtype=torch.float64)[i]).tolist()) for i in range(len(x))]
        jacobian = torch.stack([(m - value) / step for m in moved], -1)
        normal, slope = jacobian.T @ jacobian, jacobian.T @ value
        if not (normal.isfinite().all() and slope.isfinite().all()):
            break
        for _ in range(6):
            move = torch.linalg.lstsq(normal + damping * torch.diag(normal.diagonal() + 1e-12), -slope).solution
            after = (x + move.clamp(-1, 1)).clamp(-limit, limit)
            there = residual(after.tolist())
            if there.norm() < value.norm():
                better = 1 - float(there.norm() / value.norm())
                x, value, damping = after, there, damping / 10
                break
            damping *= 10
        else:
            break
        if better < rest and value.norm() > 1e-6:  # it has come to rest, and not at 0
            break
    return x.tolist()
