"""A scan's edges from token to token: its outputs where writes and controls are another run's, and what that changes.

With the writes w_s, and ~ for what is this run's or another's, position by position,

    y_t = sum over s <= t of C~_t . (A_bar~_(s+1) ... A_bar~_t) w~_(s,t)        A_bar~_r = exp(delta~_r A)

where ``w~_(s,t)`` is chosen for each pair of positions, and the controls of a position, its C and the delta by which
the state decays there, together. Targets that take the same writes share one scan.

Letters as in `mixing`. This file is shipped to remote servers: it uses torch alone.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from .mixing import Units
from .recurrence import LOG2_E

_HELD = 2**24
"""How many numbers of the states, over all positions, are held at once, about."""


def written(units: Units, s: int | slice) -> Float[Tensor, "R *S U P N"]:
    """The writes at a position, or at several."""
    entering = units.delta[:, s, ..., None] * units.B[:, s]
    return entering[..., None, :] * units.x[:, s, ..., None]


def decayed(units: Units, t: int | slice) -> Float[Tensor, "R *T U 1 a"]:
    """``A_bar`` at a position, or at several, as it multiplies a state."""
    return (units.delta[:, t, ..., None] * (units.A * LOG2_E)).exp2_()[..., None, :]


def exchanged(
    y: Float[Tensor, "R L U P"],
    units: Units,
    other: Units,
    writes: Float[Tensor, "r L L"],
    controls: Float[Tensor, "r L"],
    initial: Float[Tensor, "R *state"] | None,
) -> Float[Tensor, "R L U P"]:
    """The scan's outputs with a share of the other run's writes and controls; of targets that have none, as they are.

    Args:
        y: the scan's outputs.
        units: the scan.
        other: the other run's.
        writes: the share that is kept of the write at s in the output at t, ``[r, s, t]``; r is R, or 1 for all rows.
        controls: the share that is kept of a position's controls.
        initial: the state before the first position, of both runs; zeros where None.
    """
    kinds, targets = shared_sources(writes, controls)
    if not targets:
        return y
    decay = Units(torch.lerp(other.delta, units.delta, controls[..., None].to(y)), units.A, units.B, units.C, units.x)
    C, out = torch.lerp(other.C, units.C, controls[..., None, None].to(y)), y.clone()
    h = y.new_zeros(len(kinds), len(y), *units.x.shape[2:], units.B.shape[-1])
    if initial is not None:
        h += initial.view(h.shape[1:])
    for t in range(max(targets) + 1):
        there = written(other, t)
        share = kinds[:, :, t, None, None, None].to(y)
        h = decayed(decay, t) * h + torch.addcmul(there, share, written(units, t) - there)
        if t in targets:
            out[:, t] = (h[targets[t]] * C[:, t, :, None]).sum(-1)
    return out


def shared_sources(
    writes: Float[Tensor, "r L L"], controls: Float[Tensor, "r L"]
) -> tuple[Float[Tensor, "kinds r L"], dict[int, int]]:
    """The different shares of writes that targets take, and the number of each target's among them.

    Left out are targets that take all writes and whose controls, and those before them, are all kept.
    """
    live = controls.eq(1).all(0).long().cumprod(0).bool().tolist()
    kinds: list[tuple[int, Tensor]] = []  # up to the last target that it is known for
    targets: dict[int, int] = {}
    for t in reversed(range(len(live))):
        share = writes[:, : t + 1, t]
        if live[t] and bool((share == 1).all()):
            continue
        for number, (_, known) in enumerate(kinds):
            if torch.equal(known[:, : t + 1], share):
                targets[t] = number
                break
        else:
            targets[t] = len(kinds)
            kinds.append((t, writes[:, :, t]))
    return torch.stack([known for _, known in kinds]) if kinds else writes.new_zeros(0, *writes.shape[:2]), targets


def controls_effects(units: Units, other: Units, gain: Float[Tensor, "R L U P"], initial: Tensor | None) -> Tensor:
    """What the other run's controls at one position alone change in the outputs, weighed and summed, ``[L]``.

    Args:
        units: the scan.
        other: the other run's, of which delta and C are taken.
        gain: how much each channel of the output counts.
        initial: the state before the first position; zeros where None.
    """
    rows, length = gain.shape[:2]
    out = gain.new_zeros(length)
    size = max(1, _HELD // (length * units.x[0, 0].numel() * units.B.shape[-1]))
    for start in range(0, rows, size):
        part = slice(start, start + size)
        start_state = None if initial is None else initial[part]
        out += _controls_effects(units.rows(part), other.rows(part), gain[part], start_state)
    return out


def _controls_effects(units: Units, other: Units, gain: Tensor, initial: Tensor | None) -> Float[Tensor, "L"]:
    h = gain.new_zeros(*units.x[:, 0].shape, units.B.shape[-1])
    if initial is not None:
        h = h + initial.view(h.shape)
    length, states = gain.shape[1], []
    for t in range(length):
        states.append(h)
        h = decayed(units, t) * h + written(units, t)
    out, later = gain.new_zeros(length), torch.zeros_like(h)  # what a unit of the state after t counts for later
    for t in reversed(range(length)):
        here, there, write = decayed(units, t), decayed(other, t), written(units, t)
        read, g = units.C[:, t, :, None], gain[:, t, ..., None]
        out[t] = ((there - here) * states[t] * later).sum()
        changed = other.C[:, t, :, None] * (there * states[t] + write) - read * (here * states[t] + write)
        out[t] += (g * changed).sum()
        later = here * (later + g * read)
    return out
