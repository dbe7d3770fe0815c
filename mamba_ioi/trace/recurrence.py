"""What the scans of S6 and SSD have in common: a state that decays and is written to, position after position.

This file is shipped to remote servers: it uses torch alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor

PatchFn = Callable[[int, Tensor], Tensor]
"""``(position, h [B, ...]) -> h [B, ...]``: what replaces the state at that position."""

LOG2_E = 1.4426950408889634
"""exp(a) is 2^(a log2 e): on CPUs torch's exp2 takes less than half the time of its exp."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision the recurrence runs in: the input's, but never below float32."""
    return torch.promote_types(dtype, torch.float32)


def every_state(
    length: int,
    decay: Callable[[int], Tensor],
    write: Callable[[int], Tensor],
    *,
    initial: Float[Tensor, "B *state"],
    patch: PatchFn | None = None,
) -> Float[Tensor, "B L *state"]:
    """Every state of the recurrence, one position after another; any of them can be replaced on the way.

    Args:
        length: how many positions.
        decay: position -> ``A_bar`` there, broadcastable to a state.
        write: position -> what enters the state there.
        initial: the state before the first position.
        patch: called at every position with the state just computed; what it returns takes its place, and the
            later states follow from it.
    """
    h, states = initial, []
    for t in range(length):
        h = decay(t) * h + write(t)
        if patch is not None:
            h = patch(t, h)
        states.append(h)
    return torch.stack(states, dim=1)


def held_states(
    scan: Callable[..., tuple[Tensor, Tensor]],
    read_out: Callable[[Tensor, Tensor], Tensor],
    x: Float[Tensor, "B L ..."],
    delta: Float[Tensor, "B L _"],
    A: Tensor,
    B: Float[Tensor, "B L ..."],
    C: Float[Tensor, "B L ..."],
    *,
    initial: Float[Tensor, "B *state"],
    patch: PatchFn,
    positions: Iterable[int],
) -> tuple[Float[Tensor, "B L ..."], Float[Tensor, "B *state"]]:
    """A scan with ``patch`` applied to the states after ``positions``, from one of them to the next: no other is kept.

    Args:
        scan: the scan, of some positions: outputs and last state.
        read_out: the outputs, of states ``[B, L, ...]`` and C.
        x, delta, A, B, C: what the scan is given.
        initial: the state before the first position.
        patch: what replaces states.
        positions: where it does.
    """
    C, h, outputs, start = C.to(compute_dtype(x.dtype)), initial, [], 0
    for position in (*sorted(positions), x.shape[1]):
        cut = slice(start, min(position + 1, x.shape[1]))
        if cut.start < cut.stop:
            y, h = scan(x[:, cut], delta[:, cut], A, B[:, cut], C[:, cut], initial=h)
            if position < x.shape[1]:
                h = patch(position, h)
                y = torch.cat([y[:, :-1], read_out(h[:, None], C[:, position : position + 1])], dim=1)
            outputs.append(y)
        start = position + 1
    return torch.cat(outputs, dim=1), h
