"""What one position of a scan gives to another: the mixing matrix ("hidden attention"), and sums over it.

With the write ``w_s = B_bar_s x_s`` the output of a scan (S6 or SSD) that begins with a state of zeros is

    y_t = sum over s <= t of alpha[t, s] x_s        alpha[t, s] = C_t . (A_bar_(s+1) ... A_bar_t) B_bar_s

for each unit: a channel of S6, a head of SSD (arXiv 2403.01590, equation 9, and 2405.21060, section 2). All pairs
``s <= t`` are rectangles of targets after a position m and sources before it. There the product of decays is one since
m times one until m, so that a rectangle is a product of matrices. Exponents are sums of ``delta A <= 0`` and no sum is
a difference of two others: nothing overflows, and what decays to zero is zero.

Letters: R rows, L positions, T targets, U units, M numbers of the state in a unit, P channels of a unit (1 in S6).
This file is shipped to remote servers: it uses torch alone.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .recurrence import LOG2_E

_BLOCK = 2**22
"""How many numbers are worked on at once, about."""


@dataclass(frozen=True)
class Units:
    """A scan by units, in the precision that it runs in.

    Attributes:
        delta: the time steps, ``[R, L, U]``.
        A: ``[U, N]``, or ``[U, 1]`` where a unit has one.
        B: ``[R, L, U, N]``, or ``[R, L, 1, N]`` where all units share it.
        C: the same.
        x: the scan's input, ``[R, L, U, P]``.
    """

    delta: Float[Tensor, "R L U"]
    A: Float[Tensor, "U a"]
    B: Float[Tensor, "R L b N"]
    C: Float[Tensor, "R L b N"]
    x: Float[Tensor, "R L U P"]

    def rows(self, part: slice) -> Units:
        """The scan of some rows."""
        return Units(self.delta[part], self.A, self.B[part], self.C[part], self.x[part])

    def times(self, count: int) -> Units:
        """The scan of the same rows, so many times."""
        delta, B, C, x = (one.repeat(count, *[1] * (one.dim() - 1)) for one in (self.delta, self.B, self.C, self.x))
        return Units(delta, self.A, B, C, x)

    def of(self, units: Sequence[int]) -> Units:
        """The scan of some units."""
        shared = self.B.shape[2] == 1
        B, C = (self.B, self.C) if shared else (self.B[:, :, units], self.C[:, :, units])
        return Units(self.delta[..., units], self.A[units], B, C, self.x[:, :, units])

    def entering(self, s: slice) -> Float[Tensor, "R S U N"]:
        """``B_bar`` at some positions."""
        return self.delta[:, s, :, None] * self.B[:, s]


def rectangles(
    delta: Float[Tensor, "R L U"], A: Float[Tensor, "U a"], targets: Sequence[int], width: int
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Every pair of a target and a source not after it, once.

    Args:
        delta: the time steps.
        A: of each unit.
        targets: positions in ascending order, each once.
        width: how many targets, and sources, a rectangle has at most.

    Yields:
        Which of the targets (a slice of their list), which sources (a slice of positions), and with m between the two
        the decay since m at the targets ``[R, T, U, a]`` and from each source until m ``[R, S, U, a]``.
    """
    rate, waiting = A * LOG2_E, [(0, targets[-1] + 1)]

    def decay(sums: Tensor) -> Tensor:
        return (sums[..., None] * rate).exp2_()

    while waiting:
        start, stop = waiting.pop()
        first, end = bisect_left(targets, start), bisect_left(targets, stop)
        if first == end:
            continue
        if stop - start == 1:
            one = torch.ones_like(delta[:, :1, :, None])
            yield slice(first, end), slice(start, stop), one, one
            continue
        middle = (start + stop) // 2
        waiting += [(start, middle), (middle, stop)]
        first = bisect_left(targets, middle)
        if first == end:
            continue
        since = delta[:, middle:stop].cumsum(1)[:, [t - middle for t in targets[first:end]]]
        until = torch.zeros_like(delta[:, start:middle])
        until[:, :-1] = delta[:, start + 1 : middle].flip(1).cumsum(1).flip(1)
        for s in range(0, middle - start, width):
            sources, left = slice(start + s, min(start + s + width, middle)), decay(until[:, s : s + width])
            for t in range(0, end - first, width):
                yield slice(first + t, min(first + t + width, end)), sources, decay(since[:, t : t + width]), left


def _width(units: Units) -> int:
    rows, _, count = units.delta.shape
    return max(8, min(256, _BLOCK // (rows * count * units.B.shape[-1])))


def row_slices(units: Units) -> list[slice]:
    """The rows, a few at a time where their states are small."""
    rows, _, count = units.delta.shape
    size = max(1, _BLOCK // (64 * count * units.B.shape[-1]))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def mean_mixing(units: Units, targets: Sequence[int]) -> Float[Tensor, "R T L"]:
    """``alpha``, the mean over units."""
    rows, length, count = units.delta.shape
    out = units.delta.new_zeros(rows, len(targets), length)
    for part in row_slices(units):
        some = units.rows(part)
        for where, s, since, until in rectangles(some.delta, some.A, targets, _width(some)):
            read = since * some.C[:, list(targets[where])]
            out[part, where, s] = torch.bmm(read.flatten(2), (until * some.entering(s)).flatten(2).transpose(1, 2))
    return out.div_(count)


def unit_mixing(units: Units, targets: Sequence[int]) -> Float[Tensor, "R U T L"]:
    """``alpha`` of each unit."""
    rows, length, count = units.delta.shape
    out = units.delta.new_zeros(rows, count, len(targets), length)
    for part in row_slices(units):
        some = units.rows(part)
        for where, s, since, until in rectangles(some.delta, some.A, targets, _width(some)):
            read = since * some.C[:, list(targets[where])]
            out[part, :, where, s] = _by_unit(read, until * some.entering(s))
    return out


def contributions(
    units: Units, targets: Sequence[int], gain: Float[Tensor, "R T E"], weight: Float[Tensor, "E D"]
) -> Float[Tensor, "R T L D"]:
    """What each source adds to the stream at each target: ``(alpha[t, s] x_s gain_t) weight``, summed over channels.

    Args:
        units: the scan; U P = E channels.
        targets: positions in ascending order, each once.
        gain: what becomes of the scan's output before out_proj, a factor at each target and channel.
        weight: of out_proj.
    """
    rows, length, _ = units.delta.shape
    out = units.delta.new_zeros(rows, len(targets), length, weight.shape[-1])
    width = max(8, min(_width(units), int((2 * _BLOCK / weight.shape[0]) ** 0.5)))
    for row in range(rows):
        some, factor = units.rows(slice(row, row + 1)), gain[row].unflatten(-1, units.x.shape[2:])
        for where, s, since, until in rectangles(some.delta, some.A, targets, width):
            read, write = since * some.C[:, list(targets[where])], until * some.entering(s)
            if some.x.shape[-1] == 1:
                mixed = _by_unit(read * factor[None, where], write * some.x[:, s])[0]  # [E, T, S]
            else:
                mixed = _by_unit(read, write)[0, :, None]
                mixed = mixed * factor[where].permute(1, 2, 0)[..., None] * some.x[0, s].permute(1, 2, 0)[:, :, None]
                mixed = mixed.flatten(0, 1)
            out[row, where, s] = (mixed.flatten(1).T @ weight).view(*mixed.shape[1:], -1)
    return out


def contracted(
    units: Units,
    targets: Sequence[int],
    gain: Float[Tensor, "R T U P"],
    written: Callable[[slice], Tensor],
) -> Float[Tensor, "T L"]:
    """``gain_t . C_t (A_bar_(s+1) ... A_bar_t) written_s``, summed over rows, channels and the state.

    Args:
        units: the scan, for its decays and C.
        targets: positions in ascending order, each once.
        gain: how much each channel of the output counts.
        written: gives what is written at some positions, ``[R, S, U, (P,) N]``.
    """
    rows, length, count = units.delta.shape
    out = units.delta.new_zeros(len(targets), length)
    row = count * units.x.shape[-1] * units.B.shape[-1]
    width = max(8, min(256, _BLOCK // (rows * row)))
    for where, s, since, until in rectangles(units.delta, units.A, targets, width):
        read = (since * units.C[:, list(targets[where])])[..., None, :] * gain[:, where, ..., None]
        write = until[..., None, :] * written(s).view(rows, s.stop - s.start, *units.x.shape[2:], -1)
        out[where, s] = torch.bmm(read.flatten(2), write.flatten(2).transpose(1, 2)).sum(0)
    return out


def _by_unit(read: Float[Tensor, "R T U N"], write: Float[Tensor, "R S U N"]) -> Float[Tensor, "R U T S"]:
    return torch.matmul(read.transpose(1, 2), write.permute(0, 2, 3, 1))
