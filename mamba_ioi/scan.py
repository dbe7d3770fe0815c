"""The selective scan: one definition of Mamba's recurrence, and the forms it is computed in.

For every position t (arXiv 2312.00752, equation 2; the paper's equations 5 to 10):

    A_bar_t = exp(delta_t * A)            B_bar_t = delta_t * B_t
    h_t     = A_bar_t * h_(t-1) + B_bar_t * x_t
    y_t     = C_t . h_t

Letters: B batch, L positions, E d_inner, N d_state. Everything is computed in the inputs' precision,
and in float32 at least. This file is shipped to remote servers: it uses torch alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor

PatchFn = Callable[[int, Tensor], Tensor]
"""``(position, h [B, E, N]) -> h [B, E, N]``: what replaces the state at that position."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision the recurrence runs in: the input's, but never below float32."""
    return torch.promote_types(dtype, torch.float32)


def discretize_A(delta: Float[Tensor, "*batch E"], A: Float[Tensor, "E N"]) -> Float[Tensor, "*batch E N"]:
    """``A_bar = exp(delta A)`` (equation 7)."""
    return torch.exp(delta[..., None] * A)


def discretize_B(delta: Float[Tensor, "*batch E"], B: Float[Tensor, "*batch N"]) -> Float[Tensor, "*batch E N"]:
    """``B_bar = delta B`` (equation 8; Mamba's own first-order form)."""
    return delta[..., None] * B[..., None, :]


def scan_states(
    x: Float[Tensor, "B L E"],
    A_bar: Callable[[int], Tensor],
    B_bar: Callable[[int], Tensor],
    *,
    initial: Float[Tensor, "B E N"],
    patch: PatchFn | None = None,
) -> Float[Tensor, "B L E N"]:
    """Every state of the recurrence, one position after another; any of them can be replaced on the way.

    Args:
        x: the scan's input (``ssm_input``).
        A_bar: position -> ``A_bar`` there, ``[B, E, N]``.
        B_bar: position -> ``B_bar`` there, ``[B, E, N]``.
        initial: the state before the first position.
        patch: called at every position with the state just computed; what it returns takes its place, and the
            later states follow from it.
    """
    h, states = initial, []
    for t in range(x.shape[1]):
        h = A_bar(t) * h + B_bar(t) * x[:, t, :, None]
        if patch is not None:
            h = patch(t, h)
        states.append(h)
    return torch.stack(states, dim=1)


def read_out(h: Float[Tensor, "B L E N"], C: Float[Tensor, "B L N"]) -> Float[Tensor, "B L E"]:
    """``y = C h``, at every position (equation 6)."""
    return torch.matmul(h, C[..., None]).squeeze(-1)


def selective_scan(
    x: Float[Tensor, "B L E"],
    delta: Float[Tensor, "B L E"],
    A: Float[Tensor, "E N"],
    B: Float[Tensor, "B L N"],
    C: Float[Tensor, "B L N"],
    *,
    initial: Float[Tensor, "B E N"] | None = None,
) -> tuple[Float[Tensor, "B L E"], Float[Tensor, "B E N"]]:
    """The scan where no state is asked for: the outputs y and the last state, with no ``[B, L, E, N]`` tensor.

    Equal to `scan_states` followed by `read_out`. ``initial`` is the state before the first position (zeros).
    """
    dtype = compute_dtype(x.dtype)
    x, delta, A, B, C = (tensor.to(dtype) for tensor in (x, delta, A, B, C))
    if initial is None:
        initial = x.new_zeros(x.shape[0], x.shape[2], A.shape[-1])
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, delta, A, B, C, initial)):
        return _stepwise(x, delta, A, B, C, initial)
    return _in_place(x, delta, A, B, C, initial)


def held_scan(
    x: Float[Tensor, "B L E"],
    delta: Float[Tensor, "B L E"],
    A: Float[Tensor, "E N"],
    B: Float[Tensor, "B L N"],
    C: Float[Tensor, "B L N"],
    *,
    initial: Float[Tensor, "B E N"],
    patch: PatchFn,
    positions: Iterable[int],
) -> tuple[Float[Tensor, "B L E"], Float[Tensor, "B E N"]]:
    """`selective_scan` with ``patch`` applied to the states after ``positions``: no other state is kept.

    Equal to `scan_states` with that patch, followed by `read_out`.
    """
    h, outputs, start = initial, [], 0
    for position in (*sorted(positions), x.shape[1]):
        cut = slice(start, min(position + 1, x.shape[1]))
        if cut.start < cut.stop:
            y, h = selective_scan(x[:, cut], delta[:, cut], A, B[:, cut], C[:, cut], initial=h)
            if position < x.shape[1]:
                h = patch(position, h)
                y = torch.cat([y[:, :-1], read_out(h[:, None], C[:, position : position + 1])], dim=1)
            outputs.append(y)
        start = position + 1
    return torch.cat(outputs, dim=1), h


def _stepwise(x, delta, A, B, C, initial):
    h, outputs = initial, []
    for t in range(x.shape[1]):
        h = discretize_A(delta[:, t], A) * h + discretize_B(delta[:, t], B[:, t]) * x[:, t, :, None]
        outputs.append(torch.matmul(h, C[:, t, :, None]).squeeze(-1))
    return torch.stack(outputs, dim=1), h


def _in_place(x, delta, A, B, C, initial):
    h, decay = initial.clone(), torch.empty_like(initial)
    weighted, y = delta * x, torch.empty_like(x)
    for t in range(x.shape[1]):
        torch.mul(delta[:, t, :, None], A, out=decay).exp_()
        h.mul_(decay).addcmul_(weighted[:, t, :, None], B[:, t, None, :])
        y[:, t] = torch.matmul(h, C[:, t, :, None]).squeeze(-1)
    return y, h
