"""The distillation losses of other projects, by name: value and gradient are those of their own formulas.

| preset | soft term | weights | reduction |
|---|---|---|---|
| hinton | cross entropy, temperature**2 | alpha, 1 - alpha | mean over labelled rows |
| torchtune | cross entropy or reverse KL | kd_ratio, 1 - kd_ratio | mean over labelled rows |
| trl_gkd | KL, reverse KL, JSD; no temperature**2 | 1, 0 | mean over labelled rows, or num_items |
| torchdistill | KL, temperature**2 | beta, alpha | soft: mean over all rows |
| deit | KL, temperature**2 | alpha, 0 | mean over all rows and classes |
| distilbert | KL, temperature**2 | alpha_ce, alpha_mlm | soft: mean over attended rows |
| modelopt | KL, temperature**2 | 1, 0 | any; "mean" is over rows and classes |
| megatron | KL or reverse KL, no temperature**2 | 1, 0 | none |
| nemo_automodel | KL, temperature**2 | kd_ratio, 1 - kd_ratio | mean over labelled rows, or num_items |
| huggingface_docs | KL, temperature**2 | lambda_param, 1 - lambda_param | soft: mean over all rows |
| haitongli | KL, temperature**2 | alpha, 1 - alpha | soft: mean over all rows and classes |
| distillm | cross entropy, reverse KL, JSD, total variation, skew reverse KL | kd_ratio, 1 - kd_ratio | as torchtune |
| minillm | cross entropy | kd_ratio, 1 - kd_ratio | as torchtune |
| mdistiller | KL, temperature**2 | kd_weight, ce_weight | soft: mean over all rows |

Parameters have the projects' names, and their defaults where they have any. Each function returns a `FusedKDLoss`,
called with (student_logits, teacher_logits, labels); what else it can do is set on it: `loss_fn.shift = True`,
`loss_fn.vocab_mismatch = "truncate"`. Rows whose label is -100 have no hard term. Where the table says "all rows" they
keep the soft term, as KLDivLoss knows no labels.

Where no row has a label, some of these projects divide 0 by 0; here the term is 0.
"""

from typing import Literal

from fused_kd.divergences import (
    JSD,
    CrossEntropy,
    Divergence,
    ForwardKL,
    ReverseKL,
    SkewReverseKL,
    TotalVariation,
)
from fused_kd.loss import FusedKDLoss
from fused_kd.options import Reduction


def hinton(alpha: float, temperature: float) -> FusedKDLoss:
    """Hinton, Vinyals and Dean (2015), section 2: alpha * temperature**2 * soft + (1 - alpha) * hard.

    The paper's first objective is the cross entropy with the soft targets, so the value has the teacher's entropy in it
    and does not reach 0. The gradient is that of the KL.
    """
    return FusedKDLoss(temperature, alpha=alpha, divergence=CrossEntropy())


def torchtune(kd_ratio: float = 0.5, kd_loss: Literal["forward", "reverse"] = "forward") -> FusedKDLoss:
    """torchtune's distillation recipes: (1 - kd_ratio) * CE + kd_ratio * ForwardKLLoss or ReverseKLLoss.

    ForwardKLLoss is the cross entropy: the value has the teacher's entropy in it. No temperature. Labels come shifted.
    `kd_ratio=1` is the KD loss alone. With logits of -inf the original leaves those columns out of its sum.
    There is no "symmetric": SymmetricKLLoss(ratio) has the cross entropy in the forward KL's place, so its value, not
    its gradient, differs from `SymmetricKL(ratio)` by ratio times the teacher's entropy, and no divergence is that.
    """
    kinds: dict[str, Divergence] = {"forward": CrossEntropy(), "reverse": ReverseKL()}
    divergence = _one_of("kd_loss", kd_loss, kinds)
    return FusedKDLoss(1.0, alpha=kd_ratio, divergence=divergence)


def trl_gkd(beta: float = 0.5, temperature: float = 0.9) -> FusedKDLoss:
    """TRL's GKDTrainer.generalized_jsd_loss: the KL for beta=0, the reverse KL for beta=1, between them the JSD.

    No hard term and no temperature**2: a higher temperature means a smaller gradient. Logits [:, :-1] come with
    labels [:, 1:]; instead, `shift = True` takes both whole. Its num_items_in_batch is `num_items`. Its "batchmean" is
    the mean over labelled rows; where labels is None it divides by the batch dimension: set `reduction = "batchmean"`.
    """
    divergence: Divergence = ForwardKL() if beta == 0 else ReverseKL() if beta == 1 else JSD(beta)
    return FusedKDLoss(temperature, alpha=1.0, t2_scaling=False, divergence=divergence)


def torchdistill(alpha: float, temperature: float, beta: float | None = None) -> FusedKDLoss:
    """torchdistill's KDLoss with its reduction "batchmean": alpha * CE + beta * temperature**2 * KL, for logits [N, C].

    alpha weighs the cross entropy, beta (None: 1 - alpha) the KL. For alpha=0 the original returns the KL as it is,
    without beta and without temperature**2: so does this.
    """
    if alpha == 0:
        return FusedKDLoss(temperature, alpha=1.0, t2_scaling=False, soft_on_ignored=True)
    beta = 1 - alpha if beta is None else beta
    return FusedKDLoss(temperature, alpha=beta, hard_weight=alpha, soft_on_ignored=True)


def deit(alpha: float, temperature: float, num_classes: int) -> FusedKDLoss:
    """DeiT's DistillationLoss, soft, for logits [N, C]: the part alpha * temperature**2 * KL / C of it.

    It divides by the number of logits, not of rows, so the soft term is num_classes times smaller than elsewhere. Call
    this with the distillation head's logits and no labels, and add (1 - alpha) * base_criterion(outputs, labels) of the
    other head; for one head and a plain cross entropy set `hard_weight = 1 - alpha`. Its hard kind is
    `FusedKDLoss(alpha=0, hard_weight=alpha)` with the teacher's argmax as labels.
    """
    soft = alpha / _positive("num_classes", num_classes)
    return FusedKDLoss(temperature, alpha=soft, hard_weight=0.0, soft_on_ignored=True)


def distilbert(
    alpha_ce: float = 0.5, alpha_mlm: float = 0.0, temperature: float = 2.0, restrict_ce_to_mask: bool = False
) -> FusedKDLoss:
    """DistilBERT's distiller.py: alpha_ce * temperature**2 * KL + alpha_mlm * CE.

    alpha_ce weighs the KL, for all its name. Pass `weights=attention_mask.float()`: the KL is the mean over attended
    rows, the cross entropy over those with a label; with restrict_ce_to_mask both are over those with a label, and
    weights are not needed. For alpha_clm in alpha_mlm's place pass labels that are shifted already, -100 last: the KL
    is not shifted there. Its other terms (alpha_mse, alpha_cos) are no part of this.
    """
    return FusedKDLoss(temperature, alpha=alpha_ce, hard_weight=alpha_mlm, soft_on_ignored=not restrict_ce_to_mask)


def modelopt(temperature: float = 1.0, reduction: Reduction = "mean", *, num_classes: int | None = None) -> FusedKDLoss:
    """ModelOpt's LogitsDistillationLoss(temperature, reduction): temperature**2 * KL over all rows, no labels.

    Its "mean", the default, divides by rows and classes, so it needs num_classes. The other reductions are those of the
    same name: "batchmean" divides [B, T, V] by B, and "none" is one number a row.
    """
    alpha = 1.0
    if reduction == "mean":
        if num_classes is None:
            raise ValueError(
                'num_classes is needed with reduction="mean", which divides by it; pass the vocabulary size'
            )
        alpha /= _positive("num_classes", num_classes)
    return FusedKDLoss(temperature, alpha=alpha, hard_weight=0.0, reduction=reduction, soft_on_ignored=True)


def megatron(temperature: float = 1.0, reverse: bool = False) -> FusedKDLoss:
    """ModelOpt's LogitsKLLoss for Megatron: the KL, or with `reverse` the reverse KL, of each token, no labels.

    No temperature**2. Logits [s, b, V] give [s, b], which the original transposes: `.transpose(0, 1).contiguous()`. Of
    logits that are a slice of the vocabulary a rank, set `process_group`.
    """
    divergence: Divergence = ReverseKL() if reverse else ForwardKL()
    return FusedKDLoss(temperature, alpha=1.0, t2_scaling=False, divergence=divergence, reduction="none")


def nemo_automodel(kd_ratio: float = 0.5, temperature: float = 1.0) -> FusedKDLoss:
    """NeMo Automodel's recipe: (1 - kd_ratio) * CE + kd_ratio * temperature**2 * KL. Labels come shifted.

    Its num_batch_labels, by which both terms are divided, is `num_items`; without, the mean over labelled rows.
    """
    return FusedKDLoss(temperature, alpha=kd_ratio)


def huggingface_docs(lambda_param: float = 0.5, temperature: float = 5.0) -> FusedKDLoss:
    """ImageDistilTrainer of Transformers' documentation: (1 - lambda_param) * CE + lambda_param * temperature**2 * KL.

    For logits [N, C]. On [B, T, V] its "batchmean" would divide by B, while the model's own loss is a mean over tokens.
    """
    return FusedKDLoss(temperature, alpha=lambda_param, soft_on_ignored=True)


def haitongli(alpha: float, temperature: float, num_classes: int) -> FusedKDLoss:
    """loss_fn_kd of haitongli/knowledge-distillation-pytorch, which many have copied, for logits [N, C].

    nn.KLDivLoss() divides by rows and classes, so the soft term weighs alpha * temperature**2 / num_classes. The same
    snippet with reduction="batchmean" is `huggingface_docs`.
    """
    soft = alpha / _positive("num_classes", num_classes)
    return FusedKDLoss(temperature, alpha=soft, hard_weight=1 - alpha, soft_on_ignored=True)


def distillm(
    kind: Literal["fkl", "rkl", "jsd", "tvd", "srkl"] = "srkl", kd_ratio: float = 0.5, *, lam: float | None = None
) -> FusedKDLoss:
    """DistiLLM's finetune.py: (1 - kd_ratio) * CE + kd_ratio * distil_loss. No temperature. Labels come shifted.

    `lam` is the student's share in the mixture: 0.9 for "jsd", 0.1 for "srkl". "fkl" is the cross entropy: the value
    has the teacher's entropy in it. With logits of -inf the original leaves those columns out of its sum.
    There is no "sfkl": that is -sum p log m without the teacher's entropy, so its value differs from `SkewKL(lam)` by
    the entropy (the gradient does not), and no divergence is that. The same holds for its symmetric_kl.
    """
    kinds: dict[str, Divergence] = {
        "fkl": CrossEntropy(),
        "rkl": ReverseKL(),
        "jsd": JSD(1 - (0.9 if lam is None else lam)),
        "tvd": TotalVariation(),
        "srkl": SkewReverseKL(0.1 if lam is None else lam),
    }
    divergence = _one_of("kind", kind, kinds)
    if lam is not None and kind not in ("jsd", "srkl"):
        raise ValueError(f'lam is for kind="jsd" and "srkl", not for {kind!r}; leave it out')
    return FusedKDLoss(1.0, alpha=kd_ratio, divergence=divergence)


def minillm(kd_ratio: float = 0.5) -> FusedKDLoss:
    """MiniLLM's supervised baseline and its pretraining loss: (1 - kd_ratio) * CE + kd_ratio * soft cross entropy.

    The value has the teacher's entropy in it. No temperature. Labels come shifted. Its policy gradient is no function
    of logits and labels, so it is not here.
    """
    return distillm("fkl", kd_ratio)


def mdistiller(ce_weight: float = 0.1, kd_weight: float = 0.9, temperature: float = 4.0) -> FusedKDLoss:
    """KD of mdistiller, and of RepDistiller: ce_weight * CE + kd_weight * temperature**2 * KL, for logits [N, C]."""
    return FusedKDLoss(temperature, alpha=kd_weight, hard_weight=ce_weight, soft_on_ignored=True)


def _positive(name: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"{name} must be the size of the logits' last dimension, got {value}")
    return value


def _one_of(name: str, value: str, kinds: dict[str, Divergence]) -> Divergence:
    if value not in kinds:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, kinds))}, got {value!r}")
    return kinds[value]
