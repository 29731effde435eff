"""The losses as modules."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fused_kd.divergences import Divergence, DivergenceName
from fused_kd.functional import KDLossOutput, compute
from fused_kd.linear import LinearOptions, OneOrMore, check_linear, compute_linear
from fused_kd.options import OPTIONS, Ensemble, KDOptions, Reduction, VocabMismatch, options_of
from fused_kd.teachers import TeacherLogits

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

    from fused_kd.options import LossOptions


class _Loss(torch.nn.Module):
    """A module that holds options, under their names."""

    options: KDOptions

    def __getattr__(self, name: str) -> Any:
        """The options by their names: `loss_fn.temperature`."""
        return getattr(self._held("options", name), name) if name in OPTIONS else super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        """`loss_fn.temperature = 3.0`: checked as at construction, and what the next call takes."""
        if name in OPTIONS:
            options = replace(self._held("options", name), **{name: value})
            self._check(options)
            self.options = options
        else:
            super().__setattr__(name, value)

    def _check(self, options: KDOptions) -> None:
        """Raises for options that this loss does not have."""

    def _held(self, options: str, name: str) -> Any:
        """The attribute `options`, which has this name."""
        if options not in self.__dict__:
            raise AttributeError(f"{name} is an option of the loss, which has none before super().__init__(...)")
        return self.__dict__[options]

    def extra_repr(self) -> str:
        changed: dict[str, Any] = {
            name: value for name, value in vars(self.options).items() if value != getattr(KDOptions, name)
        }
        return ", ".join(f"{name}={value!r}" for name, value in changed.items())


class FusedKDLoss(_Loss):
    """Knowledge distillation of Hinton, Vinyals and Dean (2015) over a large vocabulary, as a module.

    The options, their defaults and the errors are those of `fused_kd.fused_kd_loss`, which documents them.

        loss_fn = FusedKDLoss(temperature=2.0, alpha=0.9)
        loss = loss_fn(student_logits, teacher_logits, labels)
    """

    def __init__(
        self,
        temperature: float = KDOptions.temperature,
        *,
        alpha: float = KDOptions.alpha,
        hard_weight: float | None = KDOptions.hard_weight,
        teacher_temperature: float | None = KDOptions.teacher_temperature,
        t2_scaling: bool = KDOptions.t2_scaling,
        divergence: DivergenceName | Divergence = KDOptions.divergence,
        ensemble: Ensemble = KDOptions.ensemble,
        reduction: Reduction = KDOptions.reduction,
        ignore_index: int = KDOptions.ignore_index,
        soft_on_ignored: bool = KDOptions.soft_on_ignored,
        shift: bool = KDOptions.shift,
        label_smoothing: float = KDOptions.label_smoothing,
        student_logit_scale: float = KDOptions.student_logit_scale,
        teacher_logit_scale: float = KDOptions.teacher_logit_scale,
        student_softcap: float | None = KDOptions.student_softcap,
        teacher_softcap: float | None = KDOptions.teacher_softcap,
        vocab_mismatch: VocabMismatch = KDOptions.vocab_mismatch,
        inplace: bool = KDOptions.inplace,
        return_parts: bool = KDOptions.return_parts,
        entropies: bool = KDOptions.entropies,
        process_group: "ProcessGroup | None" = KDOptions.process_group,
        backend: str = KDOptions.backend,
    ) -> None:
        super().__init__()
        self.options = KDOptions(
            temperature=temperature,
            alpha=alpha,
            hard_weight=hard_weight,
            teacher_temperature=teacher_temperature,
            t2_scaling=t2_scaling,
            divergence=divergence,
            ensemble=ensemble,
            reduction=reduction,
            ignore_index=ignore_index,
            soft_on_ignored=soft_on_ignored,
            shift=shift,
            label_smoothing=label_smoothing,
            student_logit_scale=student_logit_scale,
            teacher_logit_scale=teacher_logit_scale,
            student_softcap=student_softcap,
            teacher_softcap=teacher_softcap,
            vocab_mismatch=vocab_mismatch,
            inplace=inplace,
            return_parts=return_parts,
            entropies=entropies,
            process_group=process_group,
            backend=backend,
        )

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: TeacherLogits,
        labels: Tensor | None = None,
        *,
        num_items: float | Tensor | None = None,
        weights: Tensor | None = None,
        teacher_weights: Sequence[float] | Tensor | None = None,
    ) -> Tensor | KDLossOutput:
        """The loss of logits [..., V]; see `fused_kd.fused_kd_loss`."""
        return compute(student_logits, teacher_logits, labels, num_items, weights, teacher_weights, self.options)


class FusedLinearKDLoss(_Loss):
    """`FusedKDLoss` from hidden states and heads: no logits are held but those of a chunk of rows.

    The options, their defaults and the errors are those of `fused_kd.fused_linear_kd_loss`, which documents them.

        loss_fn = FusedLinearKDLoss(temperature=2.0, alpha=0.9)
        loss = loss_fn(student_hidden, student.lm_head.weight, teacher_hidden, teacher.lm_head.weight, labels)
    """

    def __init__(
        self,
        temperature: float = KDOptions.temperature,
        *,
        chunk_rows: int | None = None,
        recompute: bool = False,
        **options: "Unpack[LossOptions]",
    ) -> None:
        super().__init__()
        self.options = options_of(temperature, options)
        self.linear = LinearOptions(chunk_rows, recompute)
        check_linear(self.linear, self.options)

    def __getattr__(self, name: str) -> Any:
        fields = LinearOptions._fields
        return getattr(self._held("linear", name), name) if name in fields else super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in LinearOptions._fields:
            linear = self._held("linear", name)._replace(**{name: value})
            check_linear(linear, self.options)
            self.linear = linear
        else:
            super().__setattr__(name, value)

    def _check(self, options: KDOptions) -> None:
        check_linear(self.linear, options)

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: OneOrMore | None = None,
        teacher_weight: OneOrMore | None = None,
        labels: Tensor | None = None,
        *,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | Sequence[Tensor | None] | None = None,
        teacher_logits: TeacherLogits | None = None,
        num_items: float | Tensor | None = None,
        weights: Tensor | None = None,
        teacher_weights: Sequence[float] | Tensor | None = None,
    ) -> Tensor | KDLossOutput:
        """The loss of hidden states [..., H] and weights [V, H]; see `fused_kd.fused_linear_kd_loss`."""
        return compute_linear(
            (student_hidden, student_weight, student_bias),
            (teacher_hidden, teacher_weight, teacher_bias, teacher_logits),
            labels,
            num_items,
            weights,
            teacher_weights,
            self.linear,
            self.options,
        )

    def extra_repr(self) -> str:
        changed = [f"{k}={v!r}" for k, v in self.linear._asdict().items() if v != getattr(LinearOptions(), k)]
        return ", ".join(filter(None, [super().extra_repr(), *changed]))
