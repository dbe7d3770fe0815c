"""The scan of Mamba-2 (SSD) as a chain of values, the states among them.

H heads of size P, so that E = H P, and G groups of heads that share B and C. The gate and the norm after the scan are
outside of the operation. This file is shipped to remote servers: it uses torch and nnsight alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .mixing import Units
from .recurrence import compute_dtype
from .scan import ScanStages
from .ssd_scan import held_ssd, ssd_outputs, ssd_read_out, ssd_scan
from .stages import refuse_narrowed


class SSDStages(ScanStages):
    """The scan of Mamba-2: states ``[B, L, H, P, N]``.

    Attributes:
        limit: the least and the greatest time step.
        heads: the shape of the heads, (H, P).
    """

    OPERATION = "source.mamba2_chunk_scan_0"
    STEP = "source.mamba2_selective_state_update_0"
    ORDER = ("A", "delta_2", "delta", "A_bar", "B_bar", "write", "h_start", "h", "y", "ssm_output")

    def __init__(
        self, args: tuple, kwargs: dict, length: int | None = None, single: bool = False, runs: bool = False
    ) -> None:
        ScanStages.__init__(self, runs, args[0] if single else None)
        x, self.dt, self.A, B, C = args[single : 5 + single]
        self.D, self.bias = kwargs.get("D"), kwargs.get("dt_bias")
        self.limit = kwargs.get("dt_limit", (0.0, math.inf))
        if single:  # one token, without the dimension of positions; what a head shares is repeated over its channels
            self.D = args[6] if len(args) > 6 else self.D
            x, self.dt, B, C = (tensor[:, None] for tensor in (x, self.dt[..., 0], B, C))
            self.A = self.A[:, 0, 0]
            self.D, self.bias = (None if one is None else one[:, 0] for one in (self.D, self.bias))
            self.limit = (0.0, math.inf)  # transformers' own step has none
        refuse_narrowed(self.A, x.shape[2])
        self.heads = tuple(x.shape[2:])
        self.output_dtype, self.dtype = x.dtype, compute_dtype(x.dtype)
        self.x, self.B, self.C = (tensor.to(self.dtype) for tensor in (x.flatten(2), B, C))
        self.return_last_state = kwargs.get("return_final_states", False)
        before = self.state if single else kwargs.get("initial_states")
        self.initial = None if before is None else before.to(self.dtype, copy=True)

    def h_shape(self) -> tuple[int, int, int, int]:
        return self.x.shape[0], *self.heads, self.B.shape[-1]

    def inflow(self) -> dict[str, Tensor]:
        """What the states follow from, but for A: ``ssm_input`` [B,L,E], ``delta`` [B,L,H], ``B`` [B,L,G,N]."""
        return {"ssm_input": self.x, "delta": self.peek("delta"), "B": self.B.clone()}

    @staticmethod
    def decay(delta: Float[Tensor, "B H"], A: Float[Tensor, "H"]) -> Float[Tensor, "B H 1 1"]:
        """``A_bar`` at one position, as a state is multiplied by it."""
        return SSDStages.spread(torch.exp(delta * A))

    @staticmethod
    def spread(A_bar: Float[Tensor, "B H"]) -> Float[Tensor, "B H 1 1"]:
        """``A_bar`` at one position, for the numbers of a head's state."""
        return A_bar[..., None, None]

    @staticmethod
    def written(
        x: Float[Tensor, "*B E"], delta: Float[Tensor, "*B H"], B: Float[Tensor, "*B G N"]
    ) -> Float[Tensor, "*B H P N"]:
        """``write`` at one position, or at several."""
        heads = delta.shape[-1]
        return SSDStages.entered(delta[..., None] * by_head(B, heads), x)

    @staticmethod
    def entered(B_bar: Float[Tensor, "*B H N"], x: Float[Tensor, "*B E"]) -> Float[Tensor, "*B H P N"]:
        """``B_bar x`` at one position, or at several."""
        return B_bar[..., None, :] * x.unflatten(-1, (B_bar.shape[-2], -1))[..., None]

    @staticmethod
    def units(flow: Mapping[str, Tensor], A: Float[Tensor, "H"]) -> Units:
        """A run's scan by heads."""
        B, C = (by_head(flow[name], len(A)) for name in ("B", "C"))
        return Units(flow["delta"], A[:, None], B, C, flow["ssm_input"].unflatten(-1, (len(A), -1)))

    def read(self, h: Float[Tensor, "*runs B H P N"], t: int, rows: slice = slice(None)) -> Float[Tensor, "*out E"]:
        """``y`` at a position of this run, were its states those."""
        C = by_head(self.C[rows, t], self.heads[0]).unflatten(0, (-1, h.shape[-4]))
        return torch.matmul(h, C[..., None]).squeeze(-1).flatten(-2)

    def result(self) -> Tensor | tuple[Tensor, Tensor]:
        self.ends = self.ends or self.return_last_state or self.state is not None
        output = self.take("ssm_output")[0].unflatten(-1, self.heads)
        if self.state is not None:
            self.state.copy_(self.end())
            return output[:, 0].to(self.output_dtype)
        return (output, self.end()) if self.return_last_state else output

    def _A(self) -> Tensor:
        return self.A.to(self.dtype, copy=True)

    def _delta_2(self) -> Tensor:
        dt = self.dt if self.bias is None else self.dt + self.bias.to(self.dt.dtype)
        return dt.to(self.dtype, copy=self.bias is None)

    def _delta(self) -> Tensor:
        delta = F.softplus(self.take("delta_2")[0])
        low, high = self.limit
        return delta if low <= 0 and high == math.inf else delta.clamp(low, high)

    def _A_bar(self) -> Tensor:
        return torch.exp(self._value("delta") * self._value("A"))

    def _B_bar(self) -> Tensor:
        return self._value("delta")[..., None] * by_head(self.B, self.heads[0])

    def _y(self) -> Tensor:
        if self._keeps_states():
            return ssd_read_out(self._read_states(), self.C).flatten(2)
        inputs = self._by_head(self.x), self.take("delta")[0], self.take("A")[0], self.B, self.C
        if self.patch is None or self.held is None:  # which `_keeps_states` has told
            start = self._known("h_start")
            start = self.initial if start is None else start
            if self.ends:
                y, self.last = ssd_scan(*inputs, initial=start)
            else:
                y = ssd_outputs(*inputs, initial=start)
        else:
            y, self.last = held_ssd(*inputs, initial=self._value("h_start"), patch=self.patch, positions=self.held)
        return y.flatten(2)

    def _ssm_output(self) -> Tensor:
        y, spare = self.take("y")
        if self.D is None:
            return y.clone() if spare is None else y
        D = self.D.to(self.dtype)
        D = (D[:, None] if D.dim() == 1 else D).expand(self.heads).reshape(-1)
        return torch.addcmul(y, self.x, D, out=spare)

    def _by_head(self, x: Float[Tensor, "B L E"]) -> Float[Tensor, "B L H P"]:
        return x.unflatten(-1, self.heads)


def by_head(tensor: Float[Tensor, "*batch G N"], heads: int) -> Float[Tensor, "*batch H N"]:
    """B or C of every head."""
    return tensor.repeat_interleave(heads // tensor.shape[-2], dim=-2)
