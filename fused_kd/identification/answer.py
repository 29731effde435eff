"""A FusedKDLoss with the call it needs: as something to call, and as code to paste."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fused_kd.identification.hard import nice
from fused_kd.identification.probe import Data
from fused_kd.loss import FusedKDLoss
from fused_kd.options import KDOptions

_CLOSE = 1e-9


@dataclass(frozen=True)
class Answer:
    """`options` are those of FusedKDLoss; its alpha is times T**per_length and V**per_vocabulary."""

    options: dict[str, Any]
    per_length: int
    per_vocabulary: int
    labels: bool  # passed
    weights: bool = False  # the mask
    num_items: str = ""  # the number of "all" positions, or of the "labelled" ones
    view: str = ""  # of the result, one number a position

    def but(self, *, soft_on_ignored: bool | None = None, **changes: Any) -> "Answer":
        options = self.options
        if soft_on_ignored is not None:
            options = options | {"soft_on_ignored": soft_on_ignored}
        return replace(self, options=options, **changes)

    def loss(self, vocabulary: int, length: int = 1) -> FusedKDLoss:
        """For V = `vocabulary` and sequences of so many positions that count."""
        alpha = self.options["alpha"] * float(length) ** self.per_length * float(vocabulary) ** self.per_vocabulary
        return FusedKDLoss(**self.options | {"alpha": alpha})

    def call(self, data: Data, upstream: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Value and gradient."""
        length = data.positions[-1] - self.options["shift"] if len(data.positions) > 1 else 1
        student = data.student.clone().requires_grad_()
        given: dict[str, Any] = {}
        if self.weights:
            given["weights"] = data.mask.double()
        if self.num_items:
            counted = data.labels[..., 1:] if self.options["shift"] else data.labels
            labelled = counted != self.options.get("ignore_index", KDOptions.ignore_index)
            given["num_items"] = counted.numel() if self.num_items == "all" else int(labelled.sum())
        labels = data.labels if self.labels else None
        loss = self.loss(data.vocabulary, length)(student, data.teacher, labels, **given)
        assert isinstance(loss, Tensor)
        loss = self.seen(loss, self.view)
        total = loss.sum() if upstream is None else (loss * upstream).sum()
        (gradient,) = torch.autograd.grad(total, student)
        return loss.detach(), gradient

    @staticmethod
    def seen(numbers: Tensor, view: str) -> Tensor:
        if view.startswith("[..., :-1]"):
            numbers = numbers[..., :-1]
        if view.startswith(".transpose"):
            return numbers.transpose(0, 1)
        return numbers.flatten() if view.endswith(".flatten()") else numbers

    def code(self) -> str:
        lines = ["from fused_kd import FusedKDLoss"]
        shown = self._shown()
        if "divergence" in shown:
            lines.append(f"from fused_kd.divergences import {type(self.options['divergence']).__name__}")
        if self.per_vocabulary:
            lines.append("V = student_logits.shape[-1]")
        if self.per_length:
            counted = " - 1" if self.options["shift"] else ""
            lines.append(f"T = student_logits.shape[-2]{counted}  # positions of a sequence; 1 for logits [N, V]")
        lines.append(f"loss_fn = FusedKDLoss({', '.join(f'{name}={value}' for name, value in shown.items())})")
        arguments = ["student_logits", "teacher_logits"] + ["labels"] * self.labels
        arguments += ["weights=mask.float()"] * self.weights
        if self.num_items:
            counted = ("labels" if self.labels else "mask") + "[..., 1:]" * self.options["shift"]
            labelled = f"({counted} != {self.options.get('ignore_index', KDOptions.ignore_index)}).sum()"
            arguments.append(f"num_items={counted + '.numel()' if self.num_items == 'all' else labelled}")
        view = "" if self.view == "[...]" else self.view
        lines.append(f"loss = loss_fn({', '.join(arguments)}){view}")
        return "\n".join(lines) + "\n"

    def _shown(self) -> dict[str, str]:
        """As source; without what is the default anyway."""
        shown = {}
        for name in KDOptions.__dataclass_fields__:
            if name not in self.options:
                continue
            value, default = self.options[name], getattr(KDOptions, name)
            text = repr(value)
            if name == "alpha":
                text += " * T" * (self.per_length == 1) + " / T" * (self.per_length == -1)
                text += " / V" * (self.per_vocabulary == -1)
            elif name == "divergence" and value.name == default:
                continue
            if name in ("temperature", "alpha") or value != default:
                shown[name] = text
        return shown


def weight_options(soft: float, hard: float, temperature: float, scaled_alpha: bool) -> dict[str, Any]:
    """alpha, hard_weight and t2_scaling that have these weights: the plainest of them. `scaled_alpha`: alpha is to be
    multiplied by something yet, so that hard_weight cannot be 1 - alpha."""
    scaled, plain = nice(soft / temperature**2), nice(soft)
    for alpha, t2_scaling in ((scaled, True), (plain, False)):
        if abs(alpha + hard - 1) <= _CLOSE and 0 <= alpha <= 1:
            more = {"hard_weight": hard} if scaled_alpha else {}
            return _without_default({"alpha": alpha, "t2_scaling": t2_scaling} | more)
    t2_scaling = _digits(scaled) <= _digits(plain)
    alpha = scaled if t2_scaling else plain
    return _without_default({"alpha": alpha, "hard_weight": hard, "t2_scaling": t2_scaling})


def _without_default(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "t2_scaling" or not value}


def _digits(x: float) -> int:
    return len(f"{x:.12g}".replace(".", "").lstrip("0"))
