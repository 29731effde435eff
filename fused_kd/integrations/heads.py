"""What a model would have made its logits from: its hidden states, its head, and what it does to the logits after.

The head is asked of the model, and its input is seen on the way, in the model's own forward. So adapters, a scale of
the hidden states and whatever else lies before the head are in it, and no model needs a word here.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Linear, Module

# A factor shows at a power of two that no tanh bends, a cap where tanh is 1 (and float16 still has a number); at the
# other points the two must explain what the model does.
_SMALL, _LARGE, _LARGER = 2.0**-20, 3e4, 6e4
_POINTS = (_SMALL, _LARGE, _LARGER, -50.0, -3.0, -0.25, 0.0, 1.0, 20.0)


class Caps(NamedTuple):
    """softcap * tanh(scale * logit / softcap), as the options of the loss have it."""

    scale: float
    softcap: float | None


class Projection(NamedTuple):
    """logits = hidden @ weight.T + bias, and then `caps`."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    caps: Caps


def projection(
    model: Module, forward: Callable[..., Any], inputs: Mapping[str, Any], caps: Caps | None, name: str
) -> Projection:
    """Of `forward`, that of the model, on these inputs; no logits are made. `caps`: those that an earlier call found.

    Raises ValueError for a model that does not end with a plain head; `name` is what errors call it.
    """
    head = _head(model, name)
    seen: list[Tensor] = []

    def see(hidden: Tensor) -> Tensor:
        seen.append(hidden)
        if caps is not None:
            return hidden.new_zeros(1, 1, 1)
        exact = torch.float32 if hidden.device.type == "mps" else torch.float64  # which mps does not have
        points = torch.tensor(_POINTS, dtype=exact, device=hidden.device)
        return points[None, :, None].expand(1, -1, head.weight.shape[0])

    with replaced(head, "forward", see):
        outputs = forward(**inputs)
    if len(seen) != 1:
        raise ValueError(f"the head of the {name} was called {len(seen)} times in a forward, not once; {_INSTEAD}")
    if caps is None:
        caps = _caps(outputs["logits"] if isinstance(outputs, Mapping) else outputs[0], name)
    return Projection(seen[0], head.weight, head.bias, caps)


_INSTEAD = "pass loss_fn=FusedKDLoss(...), which takes the logits that the model makes"


def _head(model: Module, name: str) -> Linear:
    get = getattr(model, "get_output_embeddings", None)
    head = None if get is None else get()
    if not isinstance(head, Linear) or type(head).forward is not Linear.forward:
        what = "no head" if head is None else f"a {type(head).__name__}"
        raise ValueError(f"get_output_embeddings() of the {name} must give a torch.nn.Linear, got {what}; {_INSTEAD}")
    return head


def _caps(logits: Tensor, name: str) -> Caps:
    """What was done to `_POINTS` in each column."""
    found = logits.detach().double().cpu()
    if found.dim() == 3 and found.shape[1] == len(_POINTS):
        of = dict(zip(_POINTS, found[0, :, 0].tolist(), strict=True))
        capped = of[_LARGE] == of[_LARGER]
        caps = Caps(_rounded(of[_SMALL] / _SMALL), _rounded(of[_LARGE]) if capped else None)
        points = torch.tensor(_POINTS, dtype=torch.float64)
        expected = caps.scale * points
        if caps.softcap:
            expected = caps.softcap * torch.tanh(expected / caps.softcap)
        if torch.allclose(found, expected[None, :, None].expand_as(found), rtol=1e-5, atol=1e-9):
            return caps
    raise ValueError(
        f"the {name} does to its logits, after its head, what is no softcap * tanh(scale * logit / softcap); {_INSTEAD}"
    )


def _rounded(value: float) -> float:
    """Without what a division and a tanh round off."""
    return float(f"{value:.12g}") if math.isfinite(value) else value


@contextmanager
def replaced(module: Any, name: str, value: object) -> Iterator[None]:
    """The attribute is `value` inside, and afterwards what it was."""
    had, before = name in vars(module), vars(module).get(name)
    setattr(module, name, value)
    try:
        yield
    finally:
        if had:
            setattr(module, name, before)
        else:
            delattr(module, name)
