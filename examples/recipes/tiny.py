"""What stands in for your models and data in these recipes: small, random, the same in every run."""

import torch
from torch import Tensor, nn

VOCABULARY, LENGTH = 1000, 24


class LanguageModel(nn.Module):
    """Logits [B, T, V] of token ids [B, T], by way of hidden states [B, T, H] and a head."""

    def __init__(self, width: int, spread: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.body = nn.GRU(width, width, batch_first=True)
        self.lm_head = nn.Linear(width, VOCABULARY, bias=False)
        nn.init.normal_(self.lm_head.weight, std=spread)  # else the distributions would be all but uniform

    def hidden(self, ids: Tensor) -> Tensor:
        states: Tensor = self.body(self.embedding(ids))[0]
        return states

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(self.hidden(ids))
        return logits


def language_models() -> tuple[LanguageModel, LanguageModel]:
    """Student and teacher."""
    torch.manual_seed(0)
    return LanguageModel(32, 0.5), LanguageModel(48, 1.0)


def token_batches(count: int, rows: int = 8) -> list[tuple[Tensor, Tensor]]:
    """Ids and labels, [rows, LENGTH] each; the rows are of unequal length, and the label of padding is -100."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(count):
        ids = torch.randint(VOCABULARY, (rows, LENGTH), generator=generator)
        lengths = torch.randint(3, LENGTH + 1, (rows, 1), generator=generator)
        found.append((ids, ids.masked_fill(torch.arange(LENGTH) >= lengths, -100)))
    return found


def image_batches(count: int, rows: int, classes: int) -> list[tuple[Tensor, Tensor]]:
    """Images [rows, 3, 32, 32] and classes [rows]."""
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(rows, 3, 32, 32, generator=generator), torch.randint(classes, (rows,), generator=generator))
        for _ in range(count)
    ]
