"""The rows of a loss from hidden states: their logits exist for a chunk of rows at a time, and so does their gradient.

For a chunk of n rows with hidden states X [n, H], a head W [V, H] and its bias b [V]:

    S = X W^T + b                            the student's logits; T, the teacher's, likewise
    soft, hard, G                            by the fused verb: G = d loss / dS, over S where their dtypes are one
    dX = G W      dW += G^T X      db += G^T 1

Four products of 2 n H V operations, of which two are left where no gradient is wanted. Where the products take 16 bits
S and T come out in float32 on a GPU, as nobody rounds them; a CPU's products round. What is added up over the chunks is
float32 at least, and so is dX: the upstream gradient, which may be a loss scale, comes before they are rounded.
"""

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fused_kd import capped, teachers
from fused_kd.backends.pytorch import row_index
from fused_kd.backends.rows import SKIP, RowOptions
from fused_kd.entropies import row_entropies
from fused_kd.gradient_memory import empty
from fused_kd.taught import LOGITS, TaughtRows, Teacher

if TYPE_CHECKING:
    from fused_kd.parallel.slices import Slices

# What the logits of a chunk may take, with their gradient where that has a place of its own. A longer chunk reads the
# heads less often and adds less often to dW.
CHUNK_BYTES = 768 << 20

_BLOCK = 1 << 24  # elements that are converted from one dtype to another at a time


class Head(NamedTuple):
    """Logits are hidden [..., H] times weight [V, H] transposed, plus bias [V], computed in `dtype`."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype

    @property
    def logits_dtype(self) -> torch.dtype:
        return torch.float32 if self.dtype.itemsize == 2 and _widens(self.hidden.device) else self.dtype

    def logits_like(self) -> Tensor:
        """The logits' shape, dtype and device, with the memory of one row."""
        row = self.hidden.new_empty(self.weight.shape[0], dtype=self.logits_dtype)
        return row.expand(*self.hidden.shape[:-1], -1)

    def cut(self, columns: int) -> "Head":
        """The first columns of the vocabulary, with what all chunks share in `dtype`."""
        weight = self.weight[:columns].to(self.dtype)
        return self._replace(weight=weight, bias=None if self.bias is None else self.bias[:columns].to(self.dtype))

    def project(self, hidden: Tensor, out: Tensor) -> Tensor:
        """The logits [n, V] of hidden states [n, H]."""
        if out.dtype == self.dtype and self.bias is not None:
            return torch.addmm(self.bias, hidden, self.weight.T, out=out)
        _product(out, hidden, self.weight.T)
        return out if self.bias is None else out.add_(self.bias)


def product_dtype(hidden: Tensor, autocast: torch.dtype | None) -> torch.dtype:
    """That in which torch.nn.Linear would work under autocast to this dtype; None: without."""
    return hidden.dtype if autocast is None or hidden.dtype == torch.float64 else autocast


class Heads(NamedTuple):
    """A `fused_kd.teachers.Teacher`; where it has `heads`, their logits come after its tensors."""

    kind: str
    tensors: tuple[Tensor, ...]
    heads: tuple[Head, ...]

    def as_teacher(self) -> Teacher:
        """With logits that have the memory of one row."""
        return Teacher(self.kind, (*self.tensors, *(head.logits_like() for head in self.heads)))


class Gradients(NamedTuple):
    """Of the student's hidden states [N, H], weight [V, H] and bias [V], float32 at least; None for what is not wanted.
    The weight's comes in two pieces, the first `rows_of_first` rows and the others."""

    hidden: Tensor | None
    first: Tensor | None
    others: Tensor | None
    bias: Tensor | None


def rows_of_first(weight: Tensor) -> int:
    """All of them; of a weight of 16 bits half: the memory of that piece can take the whole gradient once it is
    rounded."""
    return -(-weight.shape[0] // 2) if weight.dtype.itemsize == 2 else weight.shape[0]


class LinearRows(NamedTuple):
    """The terms of each row, [N]; the entropies of student and teacher, if wanted; the gradients."""

    soft: Tensor
    hard: Tensor
    entropies: tuple[Tensor, ...]
    gradients: Gradients


def linear_rows(
    student: Head,
    teacher: Heads,
    targets: Tensor,
    coef_soft: Tensor,
    coef_hard: Tensor,
    options: RowOptions,
    wanted: tuple[bool, bool, bool],
    entropies: bool,
    chunk_rows: int | None,
    slices: "Slices | None" = None,
) -> LinearRows:
    """The gradients are those of sum(coef_soft * soft + coef_hard * hard), where `wanted`: by the student's hidden
    states, weight and bias. chunk_rows None takes what CHUNK_BYTES allow. Where the heads are `slices` of the
    vocabulary, the hidden states' gradient is the slice's share. Raises IndexError or ValueError for rows, as the verbs
    do."""
    like, logits = student.logits_like(), teacher.as_teacher()
    if not options.caps:  # capped logits have another dtype
        options = options._replace(backend=teachers.backend_name(options.backend, like, logits, options.divergence))
    (slices or teachers).check_rows(TaughtRows(like, logits, targets, options))
    columns = teachers.common_columns(like, logits)
    dtype, *_ = teachers.row_dtypes(like, logits)
    soft, hard, *of_both = (targets.new_zeros(targets.shape, dtype=dtype) for _ in range(4 if entropies else 2))
    scale = None
    if student.dtype == torch.float16 and any(wanted) and len(targets) > 0:
        # A mean's gradients would be lost in float16, and those of a low temperature too large for it.
        largest = torch.maximum(coef_soft.abs().amax() / options.temperature, coef_hard.abs().amax())
        scale = torch.ldexp(torch.ones_like(largest), -torch.frexp(largest).exponent)
        coef_soft, coef_hard = coef_soft * scale, coef_hard * scale

    read = options.soft or entropies  # the teacher
    head, heads = student.cut(columns), [each.cut(columns) for each in teacher.heads if read]
    over = head.dtype == head.logits_dtype  # the gradient is written over the logits
    dtypes = [x.logits_dtype for x in (head, *heads)] + ([] if over or not any(wanted) else [head.dtype])
    widest = columns if slices is None else slices.ranks.widest()  # ranks meet at every chunk
    size = min(len(targets), chunk_rows or CHUNK_BYTES // (widest * sum(x.itemsize for x in dtypes)) or 1)
    spans = _spans(targets, size)
    space = _side_by_side(size if spans else 0, columns, dtypes, targets.device)
    gradients, verbs = _Sums(student, head, wanted, spans, len(targets)), slices or capped
    for span in spans:
        x, target = _taken(student.hidden, span).to(head.dtype), targets[span]
        if wanted[1] and isinstance(span, slice):  # 0 times what an ignored row holds would be NaN in dW, if that is
            x = x.masked_fill((target == SKIP).unsqueeze(1), 0)
        places = [place[: len(target)] for place in space]
        s = head.project(x, places[0])
        projected = (
            each.project(_taken(each.hidden, span).to(each.dtype), place)
            for each, place in zip(heads, places[1:], strict=False)
        )
        of_span = Teacher(LOGITS, (s,))
        if read:
            of_span = Teacher(teacher.kind, (*(_taken(each, span) for each in teacher.tensors), *projected))
        rows = TaughtRows(s, of_span, target, options)
        if entropies:
            of_rows = row_entropies(rows) if slices is None else slices.row_entropies(rows)
            of_both[0][span], of_both[1][span] = of_rows
        if any(wanted):
            g = s if over else places[-1]
            soft[span], hard[span] = verbs.rows_fused(rows, coef_soft[span], coef_hard[span], g)
            gradients.add(span, g, x)
        else:
            soft[span], hard[span], _ = verbs.rows_forward(rows)
    return LinearRows(soft, hard, tuple(of_both), gradients.finish(scale))


class _Sums:
    """Of the gradients, over the chunks of `rows`."""

    def __init__(
        self, student: Head, head: Head, wanted: tuple[bool, bool, bool], rows: list["Span"], number: int
    ) -> None:
        dtype = torch.promote_types(head.dtype, torch.float32)
        (columns, width), device = student.weight.shape, student.hidden.device
        all_rows = sum(x.stop - x.start for x in rows if isinstance(x, slice)) == number
        self.head, self.empty = head, True
        self.hidden = self.bias = None
        self.weight: list[Tensor] = []
        if wanted[0]:
            new = torch.empty if all_rows else torch.zeros
            self.hidden = new((number, width), dtype=dtype, device=device)
        if wanted[1]:
            first = rows_of_first(student.weight)
            self.weight = [torch.empty((rows, width), dtype=dtype, device=device) for rows in (first, columns - first)]
            written = len(head.weight) if rows else 0
            for piece, begin in zip(self.weight, (0, first), strict=True):
                piece[max(0, written - begin) :] = 0
        if wanted[2]:
            self.bias = torch.zeros(columns, dtype=dtype, device=device)

    def add(self, rows: "Span", g: Tensor, x: Tensor) -> None:
        """The gradient over logits [n, V] of hidden states [n, H]."""
        columns = g.shape[1]
        if self.hidden is not None and isinstance(rows, slice):
            _product(self.hidden[rows], g, self.head.weight)
        elif self.hidden is not None:
            self.hidden[rows] = _product(self.hidden.new_empty(x.shape), g, self.head.weight)
        begin = 0
        for piece in self.weight:
            of_piece = g[:, begin : begin + len(piece)]
            if of_piece.shape[1] > 0:
                _product(piece[: of_piece.shape[1]], of_piece.T, x, add=not self.empty)
            begin += len(piece)
        if self.bias is not None:
            self.bias[:columns] += g.sum(0, dtype=self.bias.dtype)
        self.empty = False

    def finish(self, scale: Tensor | None) -> Gradients:
        first, others = self.weight or (None, None)
        result = Gradients(self.hidden, first, others, self.bias)
        for gradient in result:
            if gradient is not None and scale is not None:
                gradient.div_(scale)
        return result


Span = slice | Tensor


def _spans(targets: Tensor, size: int) -> list[Span]:
    """Of so many rows each. Where it costs no synchronisation, of those alone that have a term."""
    if targets.device.type == "cpu":
        rows = (targets != SKIP).nonzero().squeeze(1)
        if len(rows) < len(targets):
            return list(torch.split(rows, size)) if len(rows) else []
    return [slice(begin, min(begin + size, len(targets))) for begin in range(0, len(targets), max(1, size))]


def _taken(x: Tensor, rows: Span) -> Tensor:
    """These rows [n, m] of x [..., m]; a view where that can be, and never more than they are."""
    if isinstance(rows, slice):
        try:
            return x.view(-1, x.shape[-1])[rows]
        except RuntimeError:  # its strides do not allow it
            rows = torch.arange(rows.start, rows.stop, device=x.device)
    return x[row_index(rows, x.shape[:-1])]


def _side_by_side(size: int, columns: int, dtypes: list[torch.dtype], device: torch.device) -> list[Tensor]:
    """A [size, columns] of each dtype, in one piece of memory: the next call finds that as it is."""
    used = [size * columns * dtype.itemsize for dtype in dtypes]
    memory = empty([sum(-(-x // 64) * 64 for x in used)], torch.uint8, device)
    parts = torch.split(memory, [-(-x // 64) * 64 for x in used])
    return [part[:x].view(dtype).view(size, columns) for part, x, dtype in zip(parts, used, dtypes, strict=True)]


def _product(out: Tensor, a: Tensor, b: Tensor, add: bool = False) -> Tensor:
    """out = a b, or out += a b, with the dtype of out, rounded once where the device can."""
    if out.dtype == a.dtype:
        return out.addmm_(a, b, beta=int(add))
    if _widens(a.device):
        if add:
            return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    for some, of_a in zip(torch.split(out, block_rows(out)), torch.split(a, block_rows(out)), strict=True):
        product = of_a @ b
        some.add_(product) if add else some.copy_(product)
    return out


def _widens(device: torch.device) -> bool:
    """Whether products of 16 bits can have a float32 result there."""
    return device.type == "cuda" and torch.version.hip is None


def block_rows(x: Tensor) -> int:
    """How many rows are converted at a time."""
    return max(1, _BLOCK // max(1, math.prod(x.shape[1:])))
