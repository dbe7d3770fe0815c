"""The scan of Mamba-2 (state space duality, SSD): one definition of its recurrence, and the forms it is computed in.

For every position t and every head, with one A and one delta a head (arXiv 2405.21060, equations 1 and 2, section 7.2):

    A_bar_t = exp(delta_t * A)            write_t = delta_t * x_t B_t^T
    h_t     = A_bar_t * h_(t-1) + write_t
    y_t     = h_t C_t

Letters: B batch, L positions, H heads, P head size, N state size, G groups of heads that share B and C: head i belongs
to group i // (H / G). delta is what the scan uses: after softplus and clamp, not negative. A is negative. Everything is
computed in the inputs' precision, and in float32 at least. This file is shipped to remote servers: it uses torch alone.

The fast form is the paper's section 6. Within a chunk of positions, y is a masked attention,
``y_l = sum over s <= l of (C_l . B_s) exp(delta_(s+1) A + ... + delta_l A) delta_s x_s``; from chunk to chunk goes the
state. Every exponent is a sum of terms that are not positive, and no sum is a difference of two others: nothing can
overflow, and what decays to zero is zero. An input that is not finite spoils its row from the start of its chunk.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .recurrence import LOG2_E, PatchFn, compute_dtype, held_states

_CHUNK = 96
"""The most positions that are computed at once: what they cost by pairs grows with this, by states it shrinks."""

_BLOCK = 2**19
"""How many elements of a chunk's inputs are worked on at once, about: few enough for the cores' caches."""

_HELD = 2**24
"""How many elements of the states between chunks the backward pass holds at once, about."""

_FORGOTTEN = -1e30
"""An exponent that leaves nothing; lower ones, down to minus infinity, are raised to it, so that 0 times one is 0."""


def ssd_read_out(h: Float[Tensor, "B L H P N"], C: Float[Tensor, "B L G N"]) -> Float[Tensor, "B L H P"]:
    """``y = h C``, at every position."""
    return torch.matmul(h, _by_head(C, h.shape[2])[..., None]).squeeze(-1)


def ssd_scan(
    x: Float[Tensor, "B L H P"],
    delta: Float[Tensor, "B L H"],
    A: Float[Tensor, "H"],
    B: Float[Tensor, "B L G N"],
    C: Float[Tensor, "B L G N"],
    *,
    initial: Float[Tensor, "B H P N"] | None = None,
) -> tuple[Float[Tensor, "B L H P"], Float[Tensor, "B H P N"]]:
    """The scan where no state is asked for: the outputs y and the last state, with no ``[B, L, H, P, N]`` tensor.

    Equal to `every_state` followed by `ssd_read_out`. ``initial`` is the state before the first position (zeros). Under
    gradients only the arguments are kept: the backward pass computes all else anew, a few rows at a time.
    """
    return _scan(x, delta, A, B, C, initial, True)


def ssd_outputs(
    x: Float[Tensor, "B L H P"],
    delta: Float[Tensor, "B L H"],
    A: Float[Tensor, "H"],
    B: Float[Tensor, "B L G N"],
    C: Float[Tensor, "B L G N"],
    *,
    initial: Float[Tensor, "B H P N"] | None = None,
) -> Float[Tensor, "B L H P"]:
    """The outputs of `ssd_scan` alone: a prompt of one chunk then takes no state at all, and a fraction of the time."""
    return _scan(x, delta, A, B, C, initial, False)[0]


def held_ssd(
    x: Float[Tensor, "B L H P"],
    delta: Float[Tensor, "B L H"],
    A: Float[Tensor, "H"],
    B: Float[Tensor, "B L G N"],
    C: Float[Tensor, "B L G N"],
    *,
    initial: Float[Tensor, "B H P N"],
    patch: PatchFn,
    positions: Iterable[int],
) -> tuple[Float[Tensor, "B L H P"], Float[Tensor, "B H P N"]]:
    """`ssd_scan` with ``patch`` applied to the states after ``positions``: no other state is kept.

    Equal to `every_state` with that patch, followed by `ssd_read_out`.
    """
    inputs = x, delta, A, B, C
    return held_states(ssd_scan, ssd_read_out, *inputs, initial=initial, patch=patch, positions=positions)


def _by_head(tensor: Tensor, heads: int) -> Tensor:
    """B or C, ``[B, L, G, N]``, for every head: ``[B, L, H, N]``."""
    return tensor.repeat_interleave(heads // tensor.shape[2], dim=2)


def _scan(x, delta, A, B, C, initial, last) -> tuple[Tensor, Any]:
    """The outputs, and the last state if it is asked for, else None."""
    dtype = compute_dtype(x.dtype)
    x, delta, A, B, C = (tensor.to(dtype) for tensor in (x, delta, A, B, C))
    initial = None if initial is None else initial.to(dtype)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, delta, A, B, C, initial)):
        return Recomputed.apply(x, delta, A, B, C, initial, last)
    return _in_chunks(x, delta, A, B, C, initial, last)


def _stepwise(x, delta, A, B, C, initial):
    h = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[-1]) if initial is None else initial
    B, C, outputs = _by_head(B, x.shape[2]), _by_head(C, x.shape[2]), []
    for t in range(x.shape[1]):
        A_bar, inflow = torch.exp(delta[:, t] * A), delta[:, t, :, None] * x[:, t]
        h = A_bar[..., None, None] * h + inflow[..., None] * B[:, t, :, None, :]
        outputs.append(torch.matmul(h, C[:, t, :, :, None]).squeeze(-1))
    return torch.stack(outputs, dim=1), h


def _cut(length: int, size: int) -> list[slice]:
    """So many things in as few parts as that size allows, about equal."""
    size = -(-length // max(1, -(-length // size)))
    return [slice(start, min(start + size, length)) for start in range(0, length, max(1, size))]


def _rows(x, chunks, *, states=0):
    """The rows, in parts that are worked on at once; each row holds that many elements of states."""
    size = _BLOCK // (chunks[0].stop * x.shape[2] * x.shape[3]) if x.device.type == "cpu" else len(x)
    return _cut(len(x), max(1, min(size, _HELD // states) if states else size))


def _swap(tensor):
    return tensor.transpose(1, 2)


def _ones_above(like, size):
    return torch.ones(size, size, dtype=like.dtype, device=like.device).triu_(1)


def _by_position(tensor, weight):
    """``tensor [K, R, T, P]`` times ``weight [K, R, T]``, as ``[K, T, R P]``."""
    out = tensor.new_empty(_swap(tensor).shape)
    return torch.mul(_swap(tensor), _swap(weight)[..., None], out=out).flatten(2)


def _by_group(h, groups):
    """States, ``[rows, H, P, N]``, by groups: ``[K, R P, N]``; a view where it can be."""
    return h.reshape(len(h) * groups, -1, h.shape[-1]).contiguous()


class _Chunk:
    """A chunk of positions of a few rows: K rows times groups, R heads in a group, S and T its positions.

    Attributes:
        b, c: B and C, ``[K, T, N]``.
        inflow: delta x, ``[K, R, T, P]``.
        decay: what is left at T of what entered at S, ``[K, R, S, T]``; 1 where T is not after S.
        since: what is left at T of the state before the chunk, ``[K, R, T]``.
        scores: ``B_S . C_T``, ``[K, 1, S, T]``; 0 where T is before S.
    """

    def __init__(self, x, delta, A, B, C):
        rows, length, heads, size = x.shape
        self.b, self.c = (_swap(tensor).reshape(-1, length, tensor.shape[-1]) for tensor in (B, C))
        step, by_group = _swap(delta).contiguous(), (rows * B.shape[2], -1, length)
        inflow = torch.mul(_swap(x), step[..., None], out=x.new_empty(rows, heads, length, size))
        self.inflow = inflow.view(*by_group, size)
        exponents = (step * (A * LOG2_E)[:, None]).clamp_(min=_FORGOTTEN).view(by_group)
        between = exponents[..., None, :] * _ones_above(x, length)
        self.decay = torch.cumsum(between, -1, out=between).exp2_()
        self.since = torch.cumsum(exponents, -1).exp2_()
        self.scores = torch.bmm(self.b, _swap(self.c)).triu_()[:, None]

    def read(self, h, out):
        """Write the outputs into ``out [rows, T, H, P]``, given the state before the chunk: ``[K, R P, N]`` or None."""
        mixed = (self.decay * self.scores).flatten(0, 1)
        y = torch.bmm(_swap(mixed), self.inflow.flatten(0, 1)).view(self.inflow.shape)
        if h is not None:
            before = torch.bmm(self.c, _swap(h)).view(_swap(y).shape)
            y.addcmul_(_swap(before), self.since[..., None])
        out.copy_(_swap(y.view(_swap(out).shape)))

    def pass_on(self, h, out=None):
        """The state after the chunk, ``[K, R P, N]``, in ``out`` if that is given; ``h`` before it may be ``out``."""
        if out is None:
            out = self.b.new_empty(len(self.b), self.inflow[0, :, 0].numel(), self.b.shape[-1])
        if h is not None:
            torch.mul(self._heads(h), self.since[..., -1:], out=self._heads(out))
        return out.baddbmm_(_swap(self._leaving()), self.b, beta=int(h is not None))

    def gradients(self, d_y, h, d_h, *, for_h):
        """The gradients, from that of the outputs ``[K, R, T, P]`` and that of the state after the chunk (or None).

        Returns:
            Those of ``inflow``, of ``delta A``, of b and c, and of ``h``, the state before the chunk (None if there is
            none, or its gradient is not asked for).
        """
        flow, gain = self.inflow.flatten(0, 1), d_y.flatten(0, 1)
        d_inflow = torch.bmm((self.decay * self.scores).flatten(0, 1), gain).view(self.inflow.shape)
        pairs = torch.bmm(flow, _swap(gain)).view(self.decay.shape).mul_(self.decay)
        d_scores = pairs.sum(1).triu_()
        d_b, d_c, d_before = torch.bmm(d_scores, self.c), torch.bmm(_swap(d_scores), self.b), None
        # delta A at a position acts on all that passes it: from S before it to T not before it, the old state to T,
        # S to the new state. Its gradient is the sum of theirs.
        after = _ones_above(d_y, d_y.shape[2])
        up_to = 1 - after
        d_rate = torch.matmul(pairs.mul_(self.scores), up_to).mul_(after).sum(-2)
        if h is not None:
            entering, before = _by_position(d_y, self.since), torch.bmm(self.c, _swap(h))
            d_rate += torch.matmul(self._sums(entering * before), up_to)
            d_c.baddbmm_(entering, h)
            d_before = torch.bmm(_swap(entering), self.c) if for_h else None
        if d_h is not None:
            leaving, d_leaving = self._leaving(), torch.bmm(self.b, _swap(d_h))
            d_rate += torch.matmul(self._sums(leaving * d_leaving), after)
            d_b.baddbmm_(leaving, d_h)
            d_inflow.addcmul_(_swap(d_leaving.view(_swap(d_inflow).shape)), self.decay[..., -1, None])
        if h is not None and d_h is not None:
            left, d_after = self.since[..., -1:], self._heads(d_h)
            d_rate += left * (self._heads(h) * d_after).sum(-1, keepdim=True)
            if d_before is not None:
                self._heads(d_before).addcmul_(d_after, left)
        return d_inflow, d_rate, d_b, d_c, d_before

    def _leaving(self):
        """What of the inflow is in the state after the chunk, ``[K, T, R P]``."""
        return _by_position(self.inflow, self.decay[..., -1])

    def _heads(self, h):
        """States, ``[K, R P, N]``, as ``[K, R, P N]``."""
        return h.view(*self.since.shape[:2], -1)

    def _sums(self, tensor):
        """``[K, T, R P]`` summed over each head, ``[K, R, T]``."""
        return _swap(tensor.view(*_swap(self.since).shape, -1).sum(-1))


def _in_chunks(x, delta, A, B, C, initial, last):
    groups, chunks = B.shape[2], _cut(x.shape[1], _CHUNK)
    y, end = x.new_empty(x.shape), x.new_empty(len(x), *x.shape[2:], B.shape[3]) if last else None
    for part in _rows(x, chunks):
        h = None if initial is None else _by_group(initial[part], groups)
        room = None if end is None else _by_group(end[part], groups)
        for cut in chunks:
            chunk = _Chunk(x[part, cut], delta[part, cut], A, B[part, cut], C[part, cut])
            chunk.read(h, y[part, cut])
            if last or cut.stop < x.shape[1]:
                h = room = chunk.pass_on(h, room)
    return y, end


class Recomputed(torch.autograd.Function):
    """`_in_chunks` under gradients: keeps its arguments and no state, and computes the rest again going back."""

    @staticmethod
    def forward(ctx, x, delta, A, B, C, initial, last):
        ctx.save_for_backward(x, delta, A, B, C, initial)
        ctx.set_materialize_grads(False)
        return _in_chunks(x, delta, A, B, C, initial, last)

    @staticmethod
    def backward(ctx, d_y, d_last):
        arguments, needed = ctx.saved_tensors, ctx.needs_input_grad
        if not torch.is_grad_enabled():
            return *_gradients(*arguments, d_y=d_y, d_last=d_last, for_initial=needed[5]), None
        # A gradient of the gradient is asked for. delta, B and C may come from x: views keep those paths out of x's.
        views = [None if tensor is None else tensor.view_as(tensor) for tensor in arguments]
        wanted = [view for view, need in zip(views, needed, strict=False) if need and view is not None]
        given = [pair for pair in zip(_stepwise(*views), (d_y, d_last), strict=True) if pair[1] is not None]
        outputs, gradients = zip(*given, strict=True)
        found = iter(torch.autograd.grad(outputs, wanted, gradients, create_graph=True, allow_unused=True))
        return tuple(next(found) if need else None for need in needed)


def _gradients(x, delta, A, B, C, initial, d_y, d_last, *, for_initial):
    """The gradients of `_in_chunks`'s arguments, from those of its results."""
    groups, chunks = B.shape[2], _cut(x.shape[1], _CHUNK)
    d_y = torch.zeros_like(x) if d_y is None else d_y
    d_x, d_delta, d_B, d_C = (torch.empty_like(tensor) for tensor in (x, delta, B, C))
    d_A, d_initial = torch.zeros_like(A), torch.empty_like(initial) if for_initial else None
    for part in _rows(x, chunks, states=len(chunks) * x.shape[2] * x.shape[3] * B.shape[3]):
        h, passed = None if initial is None else _by_group(initial[part], groups), []
        for cut in chunks:
            chunk = _Chunk(x[part, cut], delta[part, cut], A, B[part, cut], C[part, cut])
            passed.append((cut, chunk, h))
            h = chunk.pass_on(h) if cut.stop < x.shape[1] else None
        d_h = None if d_last is None else _by_group(d_last[part], groups)
        for cut, chunk, h in reversed(passed):
            gain = _swap(d_y[part, cut]).reshape(chunk.inflow.shape)
            d_inflow, d_rate, d_b, d_c, d_h = chunk.gradients(gain, h, d_h, for_h=for_initial or cut.start > 0)
            here, step = _swap(x[part, cut]), _swap(delta[part, cut])
            d_inflow, d_rate = d_inflow.view(here.shape), d_rate.view(step.shape)
            _swap(d_x[part, cut]).copy_(d_inflow * step[..., None])
            _swap(d_delta[part, cut]).copy_((d_inflow * here).sum(-1).addcmul_(d_rate, A[:, None]))
            d_A += (d_rate * step).sum((0, 2))
            for whole, found in ((d_B, d_b), (d_C, d_c)):
                _swap(whole[part, cut]).copy_(found.view(_swap(whole[part, cut]).shape))
        if d_initial is not None and d_h is not None:
            d_initial[part] = d_h.view(d_initial[part].shape)
    return d_x, d_delta, d_A, d_B, d_C, d_initial
