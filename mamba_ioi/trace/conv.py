"""The causal convolution of a mixer as a chain of values: its terms, tap by tap, and their sum.

This file is shipped to remote servers: it uses torch and nnsight alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .recurrence import compute_dtype
from .stages import Stages, refuse_narrowed
from .state import LayerState, next_conv_state


class ConvStages(Stages):
    """The causal convolution: ``conv_slice`` [B, L, E, K] (terms), ``conv`` [B, L, E] (their sum and the bias).

    Attributes:
        before: the conv's input at the K - 1 positions before the first, ``[B, E, K - 1]``; zeros where None.
        state: the cache's inputs of this layer's conv, ``[B, E, S]``, where one token continues it.
    """

    KIND = "conv"
    OPERATION = "source.causal_conv1d_fn_0"
    STEP = "source.causal_conv1d_update_0"
    RECORDS = True
    ORDER = ("conv_slice", "conv")
    weight: Tensor

    def __init__(
        self, args: tuple, kwargs: dict, length: int | None = None, single: bool = False, runs: bool = False
    ) -> None:
        Stages.__init__(self, runs)
        self.state = args[1] if single else None
        self.x, self.weight = args[0], args[1 + single]
        self.bias = args[2 + single] if len(args) > 2 + single else kwargs.get("bias")
        self.before: Tensor | None = None
        refuse_narrowed(self.weight, self.x.shape[1])
        taps = self.weight.shape[-1] - 1
        if self.state is not None:
            self.before = self.state[..., self.state.shape[-1] - taps :].clone()
        elif length is not None and length < self.x.shape[-1]:  # the cache puts earlier inputs, or zeros, in front
            earlier, self.x = self.x[..., :-length], self.x[..., -length:]
            self.before = F.pad(earlier, (max(0, taps - earlier.shape[-1]), 0))[..., -taps:] if taps else None
        self.in_front = args[0].shape[-1] - self.x.shape[-1]

    def go_on_from(self, state: LayerState) -> None:
        self.before = state.conv

    def end(self) -> Tensor:
        """The conv's inputs that a later position reads, ``[B, E, K - 1]``."""
        return next_conv_state(self.before, self.x, self.weight.shape[-1])

    def result(self) -> Tensor:
        if self.state is not None and not self.runs:
            self.state.copy_(torch.cat([self.state, self.x], dim=-1)[..., -self.state.shape[-1] :])
        conv, spare = self.take("conv")
        output = F.silu(conv, inplace=spare is not None).to(self.x.dtype).transpose(1, 2)
        return F.pad(output, (self.in_front, 0)) if self.in_front else output

    def _conv_slice(self) -> Tensor:
        dtype = compute_dtype(self.weight.dtype)  # in which the terms of a half-precision model are exact
        return conv_terms(self.x.to(self.weight.dtype), self.weight.to(dtype), self.before)

    def _conv(self) -> Tensor:
        terms = self._known("conv_slice")
        if terms is not None and ("conv_slice" in self.kept or terms.requires_grad):
            last, *earlier = terms.unbind(-1)[::-1]
            total = last if self.bias is None else self.bias.to(terms.dtype) + last
            for term in earlier:  # in the order of `convolve`, so that terms which are as they were change nothing
                total = total + term
            return total.to(self.weight.dtype)
        return convolve(self.x, self.weight, self.bias, self.before)


def conv_terms(
    x: Float[Tensor, "B E L"], weight: Float[Tensor, "E K"], before: Float[Tensor, "B E K-1"] | None = None
) -> Float[Tensor, "B L E K"]:
    """The conv's terms: ``weight[:, k] * x`` at the position ``k - (K - 1)`` relative to each output position."""
    windows = _with_context(x, weight, before).unfold(-1, weight.shape[-1], 1)  # [B, E, L, K]
    return (windows * weight[:, None, :]).transpose(1, 2).contiguous()


def convolve(
    x: Float[Tensor, "B E L"],
    weight: Float[Tensor, "E K"],
    bias: Float[Tensor, "E"] | None,
    before: Float[Tensor, "B E K-1"] | None = None,
) -> Float[Tensor, "B L E"]:
    """The causal convolution, tap by tap: the sum of `conv_terms` and the bias, with no ``[B, L, E, K]`` tensor."""
    dtype = compute_dtype(weight.dtype)
    taps, length = weight.to(dtype), x.shape[-1]
    inputs = x.to(weight.dtype).transpose(1, 2).to(dtype)
    conv = inputs * taps[:, -1] if bias is None else torch.addcmul(bias.to(dtype), inputs, taps[:, -1])
    if before is not None:
        inputs = torch.cat([before.to(inputs).transpose(1, 2), inputs], dim=1)
    for back in range(1, weight.shape[-1]):
        reach = inputs[:, : max(0, inputs.shape[1] - back)][:, -length:]  # the last ones, `back` earlier
        conv[:, length - reach.shape[1] :].addcmul_(reach, taps[:, -1 - back])
    return conv.to(weight.dtype)


def _with_context(x: Tensor, weight: Tensor, before: Tensor | None) -> Tensor:
    """The conv's input with the K - 1 positions before it, zeros where None."""
    x = x.to(weight.dtype)
    return F.pad(x, (weight.shape[-1] - 1, 0)) if before is None else torch.cat([before.to(x), x], dim=-1)
