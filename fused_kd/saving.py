"""What a backward needs of its forward."""

from typing import Any

import torch
from torch import Tensor


def save(ctx: Any, *tensors: Tensor | None) -> None:
    # An inference tensor cannot be saved, and need not be: nothing that autograd sees writes to it.
    traced = torch.compiler.is_compiling()
    kept = [x if isinstance(x, Tensor) and (traced or not x.is_inference()) else None for x in tensors]
    ctx.others = [x if y is None else None for x, y in zip(tensors, kept, strict=True)]
    ctx.save_for_backward(*kept)


def saved(ctx: Any) -> list[Any]:
    return [x if x is not None else other for x, other in zip(ctx.saved_tensors, ctx.others, strict=True)]
