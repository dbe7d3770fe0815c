"""Cuts inside a scan: what some positions' writes give to the outputs of others, by one more scan of them alone.

This file is shipped to remote servers: it uses torch alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

NAMES = ("ssm_input", "delta", "B")
"""The sites that a write is made of."""

New = Callable[[int], Tensor | float]
"""Position -> what takes the place of the writes there: those of each row, or 0."""


def cut_outputs(
    scan: Any,
    rows: slice,
    sources: Bool[Tensor, "R l"],
    targets: Bool[Tensor, "R l"],
    new: New,
    carried: Float[Tensor, "R *state"] | None,
    whole: bool = False,
) -> Float[Tensor, "R *state"] | None:
    """Put ``new`` in the place of the sources' writes, in the targets' outputs alone.

    Args:
        scan: a `ScanStages`, open; its ``y`` is edited.
        rows: the rows in question.
        sources: where their writes are replaced.
        targets: whose outputs change.
        new: what takes the writes' place.
        carried: what earlier sources give to the state before the run's first position.
        whole: go on to the run's last position, whatever the last target is.

    Returns:
        What ``new`` changes in the state after the last position gone to; None: nothing.
    """
    reached, replaced = targets.any(0).tolist(), sources.any(0).tolist()
    stop = max((t for t, here in enumerate(reached) if here), default=-1) + 1
    y = scan.get("y")[rows] if stop else None
    stop = len(reached) if whole else stop
    apart = carried if scan.patch is None else None
    held = None if scan.patch is None else Both(scan, rows, carried)
    for t in range(stop):
        step = None
        if replaced[t]:
            step = _masked(new(t) - scan.write_at(t)[rows], sources[:, t])
        if held is not None:
            apart = held.step(t, step)
        elif apart is not None:
            apart = scan.decay_at(t)[rows] * apart
            apart = apart if step is None else apart + step
        else:
            apart = step
        if y is not None and reached[t] and apart is not None:
            y[:, t] += _masked(scan.read(apart[None], t, rows)[0], targets[:, t])
    return apart


class Both:
    """The run and the one with other writes, where states are replaced on the way, and by what they differ."""

    def __init__(self, scan: Any, rows: slice, carried: Tensor | None) -> None:
        self.scan, self.rows = scan, rows
        self.plain = scan.peek("h_start")
        self.other = self.plain.clone()
        if carried is not None:
            self.other[rows] += carried

    def step(self, t: int, step: Tensor | None) -> Tensor:
        """The difference after position ``t``, where the writes differ by ``step``."""
        decay, write = self.scan.decay_at(t), self.scan.write_at(t)
        self.plain, self.other = decay * self.plain + write, decay * self.other + write
        if step is not None:
            self.other[self.rows] += step
        self.plain, self.other = self.scan.patch(t, self.plain), self.scan.patch(t, self.other)
        return (self.other - self.plain)[self.rows]


def carry(
    kind: Any, inflow: Mapping[str, Tensor], A: Tensor, sources: Bool[Tensor, "R l"], new: New
) -> Float[Tensor, "R *state"] | None:
    """What replacing the sources' writes by ``new`` changes in the state after the last position; None: nothing.

    Args:
        kind: the class of the scan, a `ScanStages`.
        inflow: what the writes and decays follow from, ``[R, l, ...]`` each.
        A: of the scan.
        sources: where the writes are replaced.
        new: what takes the writes' place.
    """
    state, replaced = None, sources.any(0).tolist()
    for t, here in enumerate(replaced):
        x, delta, B = (inflow[name][:, t] for name in NAMES)
        if state is not None:
            state = kind.decay(delta, A) * state
        if here:
            step = _masked(new(t) - kind.written(x, delta, B), sources[:, t])
            state = step if state is None else state + step
    return state


def mask(positions, prompts, rows: int, start: int, length: int, device: torch.device) -> Bool[Tensor, "R l"]:
    """Where the positions are: common ones, or each prompt's own; of ``length`` positions from ``start`` on."""
    every = torch.arange(start, start + length, device=device)
    if isinstance(positions, Tensor):
        return (positions.to(device)[prompts][:, :, None] == every).any(1)
    return torch.isin(every, torch.tensor(positions, device=device)).expand(rows, -1)


def _masked(values: Tensor, rows: Bool[Tensor, "R"]) -> Tensor:
    """The values of the rows that are asked for, 0 of others."""
    return torch.where(rows.view(-1, *[1] * (values.dim() - 1)), values, 0)
