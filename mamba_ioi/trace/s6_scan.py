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

from .recurrence import LOG2_E, PatchFn, compute_dtype, every_state, held_states

_KERNEL_DEVICE = "cuda"

_BLOCK = 2**19
"""How many elements of the states are worked on at once, about: few enough for the cores' caches."""

_HELD = 2**22
"""How many elements of the states, over all positions, the backward pass holds at once, about."""


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
    """`every_state` from the scan's input x, and position -> ``A_bar`` and ``B_bar`` there, ``[B, E, N]``."""
    return every_state(x.shape[1], A_bar, lambda t: B_bar(t) * x[:, t, :, None], initial=initial, patch=patch)


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

    Equal to `scan_states` followed by `read_out`. ``initial`` is the state before the first position (zeros). Under
    gradients only the arguments are kept: the backward pass computes the states anew, a few rows at a time. On CUDA
    mamba_ssm's kernel does the same, where it is installed and the scan starts from zeros in float32.
    """
    dtype = compute_dtype(x.dtype)
    x, delta, A, B, C = (tensor.to(dtype) for tensor in (x, delta, A, B, C))
    kernel = _kernel() if initial is None and x.device.type == _KERNEL_DEVICE and dtype == torch.float32 else None
    if kernel is not None:
        u, step, b, c = (tensor.transpose(1, 2).contiguous() for tensor in (x, delta, B, C))
        y, last = kernel(u, step, A, b, c, return_last_state=True)
        return y.transpose(1, 2), last
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, delta, A, B, C, initial)):
        initial = x.new_zeros(x.shape[0], x.shape[2], A.shape[-1]) if initial is None else initial
        return Recomputed.apply(x, delta, A, B, C, initial)
    return _in_place(x, delta, A, B, C, initial)


def _kernel() -> Callable | None:
    """`selective_scan_fn` of mamba_ssm, None where it is not installed or not allowed (in a server's sandbox)."""
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn  # pyright: ignore[reportMissingImports]
    except Exception:  # a broken build fails in ways of its own
        return None
    return selective_scan_fn


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
    inputs = x, delta, A, B, C
    return held_states(selective_scan, read_out, *inputs, initial=initial, patch=patch, positions=positions)


def _stepwise(x, delta, A, B, C, initial):
    h, outputs = initial, []
    for t in range(x.shape[1]):
        h = discretize_A(delta[:, t], A) * h + discretize_B(delta[:, t], B[:, t]) * x[:, t, :, None]
        outputs.append(torch.matmul(h, C[:, t, :, None]).squeeze(-1))
    return torch.stack(outputs, dim=1), h


def _in_place(x, delta, A, B, C, initial):
    size = max(1, _BLOCK // A.numel()) if x.device.type == "cpu" else len(x)
    delta, rate = delta.contiguous(), A.T.contiguous() * LOG2_E  # channels innermost in all that follows: h [B, N, E]
    y = delta * x  # what flows in at each position, until its output takes the place
    if initial is None:
        h = x.new_zeros(x.shape[0], *rate.shape)
    else:
        h = initial.transpose(1, 2).clone(memory_format=torch.contiguous_format)
    for start in range(0, len(x), size):
        part = slice(start, start + size)
        step, b, c, state, out = delta[part], B[part], C[part], h[part], y[part]
        decay = torch.empty_like(state)
        for t in range(x.shape[1]):
            torch.mul(step[:, t, None, :], rate, out=decay).exp2_()
            state.mul_(decay).addcmul_(out[:, t, None, :], b[:, t, :, None])
            out[:, t] = torch.matmul(c[:, t, None, :], state).squeeze(1)
    return y, h.transpose(1, 2)


class Recomputed(torch.autograd.Function):
    """`_in_place` under gradients: keeps its arguments and no state, and computes the states again going back."""

    @staticmethod
    def forward(ctx, x, delta, A, B, C, initial):
        ctx.save_for_backward(x, delta, A, B, C, initial)
        return _in_place(x, delta, A, B, C, initial)

    @staticmethod
    def backward(ctx, d_y, d_last):
        arguments = ctx.saved_tensors
        if torch.is_grad_enabled():  # a gradient of the gradient is asked for
            views = [tensor.view_as(tensor) for tensor in arguments]  # delta may come from x: not counted again
            wanted = [view for view, needed in zip(views, ctx.needs_input_grad, strict=True) if needed]
            found = iter(torch.autograd.grad(_stepwise(*views), wanted, (d_y, d_last), create_graph=True))
            return tuple(next(found) if needed else None for needed in ctx.needs_input_grad)
        return _gradients(*arguments, d_y=d_y, d_last=d_last, for_A=ctx.needs_input_grad[2])


def _gradients(x, delta, A, B, C, initial, d_y, d_last, *, for_A: bool):
    """The gradients of `_in_place`'s arguments, from those of its results; that of A only if it is asked for."""
    rows, length, _ = x.shape
    size = max(1, min(rows, _BLOCK // A.numel(), _HELD // (length * A.numel())))
    x, delta, d_y, rate = x.contiguous(), delta.contiguous(), d_y.contiguous(), A.T.contiguous()  # as in `_in_place`
    weighted, rate_2 = delta * x, rate * LOG2_E
    held, decays = (x.new_empty(length + k, size, *rate.shape) for k in (1, 0))
    d_weighted, d_delta, d_B, d_C = (torch.empty_like(tensor) for tensor in (x, delta, B, C))
    d_A, d_h = torch.zeros_like(rate), d_last.transpose(1, 2).clone(memory_format=torch.contiguous_format)
    for start in range(0, rows, size):
        part = slice(start, start + size)
        step, inflow, b, c, g, d = delta[part], weighted[part], B[part], C[part], d_y[part], d_h[part]
        h, decay, work = held[:, : len(d)], decays[:, : len(d)], torch.empty_like(d)
        h[0].copy_(initial[part].transpose(1, 2))
        for t in range(length):
            torch.mul(step[:, t, None, :], rate_2, out=decay[t]).exp2_()
            torch.mul(h[t], decay[t], out=h[t + 1]).addcmul_(inflow[:, t, None, :], b[:, t, :, None])
        for t in reversed(range(length)):
            d_C[part, t] = torch.matmul(h[t + 1], g[:, t, :, None]).squeeze(-1)
            d.addcmul_(g[:, t, None, :], c[:, t, :, None])
            d_B[part, t] = torch.matmul(d, inflow[:, t, :, None]).squeeze(-1)
            d_weighted[part, t] = torch.matmul(b[:, t, None, :], d).squeeze(1)
            d.mul_(decay[t])
            torch.mul(d, h[t], out=work)
            if for_A:
                d_A += (work * step[:, t, None, :]).sum(0)
            d_delta[part, t] = work.mul_(rate).sum(1)
    d_delta.addcmul_(d_weighted, x)
    return d_weighted * delta, d_delta, d_A.T if for_A else None, d_B, d_C, d_h.transpose(1, 2)
