"""Distillation in the Trainer of transformers.

    trainer = DistillationTrainer(model, args, train_dataset=..., data_collator=..., teacher=teacher)
    trainer.train()

`DistillationMixin` does the same to a Trainer of your own: `class MyTrainer(DistillationMixin, Seq2SeqTrainer)`.
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from fused_kd.functional import KDLossOutput
from fused_kd.integrations import missing
from fused_kd.integrations.heads import Caps, Projection, projection, replaced
from fused_kd.loss import FusedKDLoss, FusedLinearKDLoss

try:
    from transformers import Trainer
except ImportError as error:
    raise missing("transformers", "huggingface", error) from error

_LABELS = ("labels", "shift_labels")
_PARTS = ("soft", "hard", "student_entropy", "teacher_entropy")  # of a KDLossOutput
_WEIGHT = "weight"  # of what is summed


class DistillationMixin:
    """Before a Trainer among the bases, makes the model learn from a teacher; further arguments are the Trainer's.

    The loss is over all labelled positions of a step, whatever the gradient accumulation, the processes and
    `average_tokens_across_devices`, as the Trainer's own. (Without labels, with soft_on_ignored, or with another
    reduction than "mean" it is the mean of the micro-batches' losses; of positions without a label, those count that
    are attended to.) What else a model adds to a loss of its own, as mixtures of experts their routers' auxiliary loss,
    is no part of it. The decoder's inputs that an encoder-decoder makes of labels are made of them for both models. The
    logs have the loss's parts beside it, `soft` and `hard` without their weights, and the entropies in nats. Metrics
    and `compute_loss(..., return_outputs=True)` get the model's logits, which are made for them alone.

    Args:
        teacher: takes the inputs that the model takes, but for labels. It is called without gradients and in eval mode,
            in its own dtype, and is neither saved nor optimised.
        loss_fn: a `FusedLinearKDLoss` (the default, with its defaults): from hidden states and heads, no logits are
            held. Or a `FusedKDLoss`, from the models' logits; a preset too. Where the Trainer shifts labels, so does
            the loss. Scales and softcaps of logits are found out, and not given.
        log_entropies: the entropies of student and teacher too, for which each logit is read once more.
        teacher_device: None: the Trainer's, unless the teacher has a device map or is quantized. Its hidden states
            and its head (or its logits) are copied to the model's device at each step if that is another one.
    """

    args: Any
    accelerator: Any
    model: Any
    state: Any

    def __init__(
        self,
        *args: Any,
        teacher: Module,
        loss_fn: FusedLinearKDLoss | FusedKDLoss | None = None,
        log_entropies: bool = True,
        teacher_device: torch.device | str | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(teacher, Module):
            raise TypeError(f"teacher must be a torch.nn.Module, got {type(teacher).__name__}; load the model first")
        # (Before the Trainer's constructor, which may already call what it overrides.)
        self.loss_fn = _checked(FusedLinearKDLoss() if loss_fn is None else deepcopy(loss_fn))
        self.teacher = teacher
        self._caps: dict[str, Caps] = {}
        self._loss_only = False
        self._sums: dict[str, dict[str, Tensor]] = {"train": {}, "eval": {}}
        self._first_step = 0  # of those whose parts are summed
        super().__init__(*args, **kwargs)
        self._check_trainer()
        if teacher in [*self.model.modules()] or self.model in [*teacher.modules()]:
            raise ValueError(
                "teacher is the model itself, or one is a part of the other (as adapters are put into the model that "
                "they are for), and would change with it; pass a copy"
            )
        if getattr(self, "_loss_shifts_labels", False):
            self.loss_fn.shift = True
        self.loss_fn.return_parts, self.loss_fn.entropies = True, log_entropies
        # Whether it counts labels: by its own rule, whether the model takes their number, which this loss does.
        self.model_accepts_loss_kwargs = True
        # Divided by the number of labels in a step, or else a mean for each micro-batch, which the Trainer divides by
        # how many there are.
        self._by_items = self.loss_fn.reduction == "mean" and not self.loss_fn.soft_on_ignored
        self.loss_is_scaled_for_ga = None if self._by_items else False
        stays = hasattr(teacher, "hf_device_map") or getattr(teacher, "quantization_method", None) is not None
        if teacher_device is not None or not stays:
            teacher.to(teacher_device or self.args.device)
        teacher.eval()

    def _check_trainer(self) -> None:
        if getattr(self, "compute_loss_func", None) is not None:
            raise ValueError("compute_loss_func would not be called: the loss is loss_fn; leave compute_loss_func out")
        if self.args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor is {self.args.label_smoothing_factor}, but the loss is loss_fn, which has an "
                "option label_smoothing; leave label_smoothing_factor out"
            )
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} GPUs in one process would be used through torch.nn.DataParallel, whose replicas "
                "this loss does not know; start with torchrun or accelerate launch, or let CUDA_VISIBLE_DEVICES name "
                "one"
            )
        parallel = getattr(self.accelerator, "parallelism_config", None)
        if parallel is not None and (parallel.sp_enabled or parallel.cp_enabled):
            raise ValueError("sequence and context parallelism cut a sequence, which this loss does not know of")

    def compute_loss(
        self,
        model: Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        given = {k: v for k, v in inputs.items() if k not in _LABELS}
        labels, shift = inputs.get("labels"), self.loss_fn.shift
        if labels is not None and "decoder_input_ids" not in given and "decoder_inputs_embeds" not in given:
            # Which encoder-decoders make of the labels, if they get them.
            decoder_inputs = getattr(
                self.accelerator.unwrap_model(model), "prepare_decoder_input_ids_from_labels", None
            )
            if decoder_inputs is not None:
                given["decoder_input_ids"] = decoder_inputs(labels=labels)
        if inputs.get("shift_labels") is not None:  # of collators that have shifted them
            labels, shift = inputs["shift_labels"], False
        rest: dict[str, Any] = {"labels": labels}
        # Of a transfer set without labels, or with few, all that is not padding.
        mask = inputs.get("decoder_attention_mask" if "decoder_input_ids" in given else "attention_mask")
        if mask is not None and (labels is None or self.loss_fn.soft_on_ignored):
            rest["weights"] = mask.to(torch.float32)
        scale = None
        if num_items_in_batch is not None and self._by_items:
            rest["num_items"] = num_items_in_batch
            if self.args.average_tokens_across_devices:
                # They are those of all processes, over which gradients are averaged.
                scale = self.accelerator.num_processes // self.get_tp_size()  # type: ignore[attr-defined]
        if isinstance(self.loss_fn, FusedKDLoss) or (return_outputs and not self._loss_only):
            result, outputs = self._from_logits(model, given, shift, rest)
        else:
            result, outputs = self._from_hidden_states(model, given, shift, rest), {}
        if scale is not None:
            result = KDLossOutput(*(None if x is None else x * scale for x in result))  # type: ignore[arg-type]
        self._add(result, inputs, "num_items" in rest)
        return (result.loss, outputs) if return_outputs else result.loss

    def _from_logits(
        self, model: Module, inputs: dict[str, Any], shift: bool, rest: dict[str, Any]
    ) -> tuple[KDLossOutput, Any]:
        with torch.no_grad():
            teacher_logits = _logits_of(self.teacher.eval()(**self._for_teacher(inputs)))
        outputs = model(**inputs)
        logits = _logits_of(outputs)
        loss_fn = FusedKDLoss(**{**vars(self.loss_fn.options), "shift": shift})
        if isinstance(outputs, tuple):
            outputs = (None, *outputs)  # the Trainer takes the first to be the loss
        if "weights" in rest and rest["weights"].dim() >= logits.dim():
            rest = {name: value for name, value in rest.items() if name != "weights"}  # one row for a whole sequence
        return loss_fn(logits, teacher_logits.to(logits.device), **rest), outputs

    def _from_hidden_states(
        self, model: Module, inputs: dict[str, Any], shift: bool, rest: dict[str, Any]
    ) -> KDLossOutput:
        with torch.no_grad():
            teacher = self.teacher.eval()  # whatever has set it to training since the last step
            of_teacher = self._projection("teacher", teacher, teacher, self._for_teacher(inputs))
        student = self.accelerator.unwrap_model(model)
        forward = student.forward

        def loss_of(**inputs: Any) -> Any:
            with self.accelerator.autocast():  # which the model's own forward has left by now
                return self._loss_of(self._projection("student", student, forward, inputs), of_teacher, shift, rest)

        # In place of the model's own forward, so that what wraps the model (DistributedDataParallel, FSDP) sees the
        # head used in a forward, and the loss as its result.
        with replaced(student, "forward", loss_of):
            result: KDLossOutput = model(**inputs)
        return result

    def _projection(self, name: str, model: Module, forward: Any, inputs: Mapping[str, Any]) -> Projection:
        found = projection(model, forward, inputs, self._caps.get(name), name)
        self._caps[name] = found.caps
        return found

    def _loss_of(self, student: Projection, teacher: Projection, shift: bool, rest: dict[str, Any]) -> Any:
        assert isinstance(self.loss_fn, FusedLinearKDLoss)
        caps = {
            "student_logit_scale": student.caps.scale,
            "student_softcap": student.caps.softcap,
            "teacher_logit_scale": teacher.caps.scale,
            "teacher_softcap": teacher.caps.softcap,
        }
        options = {**vars(self.loss_fn.options), "shift": shift, **caps}
        loss_fn = FusedLinearKDLoss(**options, **self.loss_fn.linear._asdict())
        device = student.hidden.device
        return loss_fn(
            student.hidden,
            student.weight,
            teacher.hidden.to(device),
            teacher.weight.to(device),
            student_bias=student.bias,
            teacher_bias=None if teacher.bias is None else teacher.bias.to(device),
            **rest,
        )

    def _for_teacher(self, inputs: dict[str, Any]) -> dict[str, Any]:
        device = next(self.teacher.parameters()).device
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
        if getattr(getattr(self.teacher, "config", None), "use_cache", False):
            moved.setdefault("use_cache", False)  # keys and values that nobody would read
        return moved

    def prediction_step(
        self, model: Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        with replaced(self, "_loss_only", prediction_loss_only):
            loss, *rest = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)  # type: ignore[misc]
        if loss is not None and not prediction_loss_only and getattr(self.args, "predict_with_generate", False):
            # Where Seq2SeqTrainer generates, its loss is the model's own.
            with torch.no_grad(), self.compute_loss_context_manager():  # type: ignore[attr-defined]
                loss = self.compute_loss(model, self._prepare_inputs(inputs)).detach()  # type: ignore[attr-defined]
        return loss, *rest

    # The parts of the loss: sums on the device, which are read when the Trainer reads the loss.

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._sums["train"] = {}  # of an earlier call
        return super().train(*args, **kwargs)  # type: ignore[misc]

    def _add(self, result: KDLossOutput, inputs: dict[str, Any], over_a_step: bool) -> None:
        """A part of training is a sum over the micro-batches of a step, one of an evaluation a mean over sequences."""
        mode = "train" if self.model.training else "eval"
        if mode == "eval":
            weight = float(next(len(x) for x in inputs.values() if isinstance(x, Tensor)))
        else:
            weight = 1.0 if over_a_step else 1 / getattr(self, "current_gradient_accumulation_steps", 1)
        parts = {name: part for name in _PARTS if (part := getattr(result, name)) is not None}
        sums = self._sums[mode]
        if mode == "train" and not sums:
            self._first_step = self.state.global_step
        for name, part in (parts | {_WEIGHT: torch.ones_like(result.loss.detach())}).items():
            sums[name] = part * weight + sums.get(name, 0.0)

    def _taken(self, mode: str) -> dict[str, float]:
        """The means over all processes, each of which has the same parts; from here on they are summed anew."""
        sums, self._sums[mode] = self._sums[mode], {}
        if not sums:
            return {}
        means = self.accelerator.gather(torch.stack(list(sums.values()))[None]).mean(0).tolist()
        return dict(zip(sums, means, strict=True))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:  # of training
            steps = max(1, self.state.global_step - self._first_step)
            logs |= {name: total / steps for name, total in self._taken("train").items() if name != _WEIGHT}
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        output = super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]
        sums = self._taken("eval")
        weight = sums.pop(_WEIGHT, 1.0)
        prefix = next((name.removesuffix("loss") for name in output.metrics if name.endswith("_loss")), "eval_")
        output.metrics.update({prefix + name: total / weight for name, total in sums.items()})
        return output


class DistillationTrainer(DistillationMixin, Trainer):
    """The Trainer of transformers with a teacher; `DistillationMixin` has its arguments."""


def _checked(loss_fn: FusedLinearKDLoss | FusedKDLoss) -> FusedLinearKDLoss | FusedKDLoss:
    if not isinstance(loss_fn, (FusedLinearKDLoss, FusedKDLoss)):
        raise TypeError(f"loss_fn must be a FusedLinearKDLoss or a FusedKDLoss, got {type(loss_fn).__name__}")
    if loss_fn.reduction == "none":
        raise ValueError('loss_fn must give one number, but its reduction is "none"')
    if loss_fn.ignore_index != -100:
        raise ValueError(
            f"loss_fn must have ignore_index=-100, as the Trainer counts labels, got {loss_fn.ignore_index}"
        )
    if loss_fn.options.caps:
        raise ValueError(
            "loss_fn must leave the scales and softcaps of logits out: with FusedLinearKDLoss they are found out, and "
            "logits of a model have had them"
        )
    return loss_fn


def _logits_of(outputs: Any) -> Tensor:
    logits: Tensor = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
    return logits
