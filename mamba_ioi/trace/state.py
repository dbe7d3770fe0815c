"""What a position leaves behind in a layer: all that later positions know of the ones before.

This file is shipped to remote servers: it uses torch alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class LayerState:
    """A layer's state after some position, for each prompt.

    Attributes:
        ssm: the scan's state h, ``[B, E, N]`` (of heads ``[B, H, P, N]``); None before the first position.
        conv: the conv's input at the last K - 1 positions, ``[B, C, K - 1]`` for C channels; None before the first.
    """

    ssm: Float[Tensor, "B *state"] | None = None
    conv: Float[Tensor, "B C _"] | None = None

    def rows(self, index: Tensor | slice) -> LayerState:
        """That of some of the prompts, or of the same one several times."""
        return LayerState(*(None if part is None else part[index] for part in (self.ssm, self.conv)))

    def for_rows(self, count: int) -> LayerState:
        """That of ``count`` rows, which are the same prompts again and again."""
        if self.ssm is None:
            return self
        return self.rows(torch.arange(len(self.ssm), device=self.ssm.device).repeat(count // len(self.ssm)))


def next_conv_state(
    before: Float[Tensor, "B C _"] | None, x: Float[Tensor, "B C L"], taps: int
) -> Float[Tensor, "B C _"]:
    """The conv's inputs that a later position reads: the last ``taps - 1`` of those before and of ``x``."""
    tail = x if before is None else torch.cat([before.to(x), x], dim=-1)
    tail = torch.nn.functional.pad(tail, (max(0, taps - 1 - tail.shape[-1]), 0))
    return tail[..., tail.shape[-1] - (taps - 1) :].clone()
