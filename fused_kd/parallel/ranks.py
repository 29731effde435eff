"""Who has which columns of a vocabulary that is cut over the ranks of a process group."""

import zlib
from typing import NamedTuple

import torch
from torch import Tensor, distributed

from fused_kd.backends.rows import NO_LABEL, OUT_OF_RANGE, SKIP


class Ranks(NamedTuple):
    group: distributed.ProcessGroup
    rank: int  # in the group
    ends: Tensor  # [ranks]: the columns up to the end of each slice

    @classmethod
    def of(cls, group: distributed.ProcessGroup, student: Tensor, call: str) -> "Ranks":
        """Asks all ranks for the width of their slice, and whether their `call` is the same. Raises ValueError on each
        if not: they would wait for one another, or find losses of their own. (On a GPU nobody looks: it would wait.)"""
        numbers = student.shape[-1], zlib.crc32(call.encode())
        # (As filled tensors: a copy from the CPU would make a GPU wait.)
        own = torch.stack([torch.full((), x, dtype=torch.int64, device=student.device) for x in numbers])
        widths, calls = gathered(own, group).unbind(1)
        if calls.device.type == "cpu" and not calls.eq(calls[0]).all():
            raise ValueError(
                "process_group: all ranks must be called with the same options, rows and dtypes, but they were not; "
                f"rank {group.rank()} was with {call}"
            )
        return cls(group, group.rank(), widths.cumsum(0))

    @property
    def number(self) -> int:
        return self.ends.shape[0]

    @property
    def widths(self) -> Tensor:
        return self.ends.diff(prepend=self.ends.new_zeros(1))

    def widest(self) -> int:
        """Of the slices. (On a GPU this waits.)"""
        return int(self.widths.max())

    @property
    def columns(self) -> Tensor:
        """The whole vocabulary's."""
        return self.ends[-1]

    def gathered(self, own: Tensor) -> Tensor:
        """[ranks, ...] of what each rank has."""
        return gathered(own, self.group)

    def targets(self, targets: Tensor, columns: int) -> tuple[Tensor, Tensor]:
        """Those of this rank's slice of so many columns; and the rank that has the label, or what else the target is.

        A row whose label another rank has is given one here all the same, the first column: the verbs then have the sum
        over the slice. `Found.hard` sees to the gradient there.
        """
        labelled = (targets != SKIP) & (targets != NO_LABEL)
        owner = torch.bucketize(targets, self.ends, right=True)
        owner = torch.where((targets < 0) | (owner == self.number), OUT_OF_RANGE, owner)
        owner = torch.where(labelled, owner, targets)
        first = self.ends[self.rank] - columns
        local = torch.where(owner == self.rank, targets - first, torch.where(owner >= 0, 0, owner))
        return local, owner

    def ids(self, ids: Tensor, columns: int) -> Tensor:
        """Those that are in this rank's slice of so many columns, counted from its first; -1 in place of the others."""
        end = self.ends[self.rank]
        first = end - columns
        return torch.where((ids >= first) & (ids < end), ids - first, -1)


def gathered(own: Tensor, group: distributed.ProcessGroup) -> Tensor:
    every = own.new_empty((group.size(), *own.shape))
    if own.numel() > 0:
        distributed.all_gather(list(every), own.contiguous(), group=group)
    return every
