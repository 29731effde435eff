"""The loss as one writes it without this package: what the demo compares with."""

from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax, softmax


def eager_kd_loss(student: Tensor, teacher: Tensor, labels: Tensor, *, temperature: float, alpha: float) -> Tensor:
    soft = kl_div(log_softmax(student / temperature, -1), softmax(teacher / temperature, -1), reduction="batchmean")
    return alpha * temperature**2 * soft + (1 - alpha) * cross_entropy(student, labels)
