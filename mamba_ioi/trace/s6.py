"""The selective scan of a mixer (Mamba's S6) as a chain of values, the states among them.

This file is shipped to remote servers: it uses torch and nnsight alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .mixing import Units
from .recurrence import compute_dtype
from .s6_scan import (
    discretize_A,
    discretize_B,
    held_scan,
    read_out,
    selective_scan,
)
from .scan import ScanStages
from .stages import refuse_narrowed


class S6Stages(ScanStages):
    """The selective scan: states ``[B, L, E, N]``."""

    OPERATION = "source.mamba_selective_scan_0"
    STEP = "source.mamba_selective_state_update_0"
    ORDER = ("A", "delta_2", "delta", "A_bar", "B_bar", "write", "h_start", "h", "y", "ssm_output", "after_skip")

    def __init__(
        self, args: tuple, kwargs: dict, length: int | None = None, single: bool = False, runs: bool = False
    ) -> None:
        ScanStages.__init__(self, runs, args[0] if single else None)
        self.z = kwargs.get("z")
        x, self.dt, self.A, B, C = args[single : 5 + single]
        self.D = args[5 + single] if len(args) > 5 + single else kwargs.get("D")
        if single:  # one token, without the dimension of positions
            x, self.dt, B, C = (tensor[..., None] for tensor in (x, self.dt, B, C))
            self.z = None if self.z is None else self.z[..., None]
        refuse_narrowed(self.A, x.shape[1])
        self.output_dtype, self.dtype = x.dtype, compute_dtype(x.dtype)
        self.x, self.B, self.C = (tensor.transpose(1, 2).to(self.dtype) for tensor in (x, B, C))
        self.bias = kwargs.get("dt_bias" if single else "delta_bias")
        self.return_last_state = kwargs.get("return_last_state", False)
        self.initial = None if self.state is None else self.state.to(self.dtype, copy=True)

    def h_shape(self) -> tuple[int, int, int]:
        return self.x.shape[0], self.x.shape[2], self.A.shape[-1]

    def inflow(self) -> dict[str, Tensor]:
        """What the states follow from, but for A: ``ssm_input`` and ``delta`` ``[B, L, E]``, ``B`` ``[B, L, N]``."""
        return {"ssm_input": self.x, "delta": self.peek("delta"), "B": self.B.clone()}

    @staticmethod
    def decay(delta: Float[Tensor, "B E"], A: Float[Tensor, "E N"]) -> Float[Tensor, "B E N"]:
        """``A_bar`` at one position, as a state is multiplied by it."""
        return discretize_A(delta, A)

    @staticmethod
    def spread(A_bar: Float[Tensor, "B E N"]) -> Float[Tensor, "B E N"]:
        """``A_bar`` at one position, for the numbers of a channel's state."""
        return A_bar

    @staticmethod
    def written(
        x: Float[Tensor, "*B E"], delta: Float[Tensor, "*B E"], B: Float[Tensor, "*B N"]
    ) -> Float[Tensor, "*B E N"]:
        """``write`` at one position, or at several."""
        return S6Stages.entered(discretize_B(delta, B), x)

    @staticmethod
    def entered(B_bar: Float[Tensor, "*B E N"], x: Float[Tensor, "*B E"]) -> Float[Tensor, "*B E N"]:
        """``B_bar x`` at one position, or at several."""
        return B_bar * x[..., None]

    @staticmethod
    def units(flow: Mapping[str, Tensor], A: Float[Tensor, "E N"]) -> Units:
        """A run's scan by channels."""
        B, C = (flow[name][:, :, None] for name in ("B", "C"))
        return Units(flow["delta"], A, B, C, flow["ssm_input"][..., None])

    def read(self, h: Float[Tensor, "*runs B E N"], t: int, rows: slice = slice(None)) -> Float[Tensor, "*out E"]:
        """``y`` at a position of this run, were its states those."""
        C = self.C[rows, t].unflatten(0, (-1, h.shape[-3]))
        return torch.matmul(h, C[..., None]).squeeze(-1)

    def result(self) -> Tensor | tuple[Tensor, Tensor]:
        output = self.take("after_skip")[0].transpose(1, 2)
        if self.state is not None:
            self.state.copy_(self.end())
            return output[..., 0].to(self.output_dtype)
        return (output, self.end()) if self.return_last_state else output

    def _A(self) -> Tensor:
        return self.A.to(self.dtype, copy=True)

    def _delta_2(self) -> Tensor:
        dt = self.dt.transpose(1, 2).to(self.dtype).clone(memory_format=torch.contiguous_format)  # as the scan needs it
        return dt if self.bias is None else dt.add_(self.bias.to(self.dtype))

    def _delta(self) -> Tensor:
        return F.softplus(self.take("delta_2")[0])

    def _A_bar(self) -> Tensor:
        return discretize_A(self._value("delta"), self._value("A"))

    def _B_bar(self) -> Tensor:
        return discretize_B(self._value("delta"), self.B)

    def _y(self) -> Tensor:
        if self._keeps_states():
            return read_out(self._read_states(), self.C)
        inputs = self.x, self.take("delta")[0], self.take("A")[0], self.B, self.C
        if self.patch is None or self.held is None:  # which `_keeps_states` has told
            start = self._known("h_start")
            y, self.last = selective_scan(*inputs, initial=self.initial if start is None else start)
        else:
            y, self.last = held_scan(*inputs, initial=self._value("h_start"), patch=self.patch, positions=self.held)
        return y

    def _ssm_output(self) -> Tensor:
        y, spare = self.take("y")
        if self.D is None:
            return y.clone() if spare is None else y
        return torch.addcmul(y, self.x, self.D.to(self.dtype), out=spare)

    def _after_skip(self) -> Tensor:
        output, spare = self.take("ssm_output")
        if self.z is None:
            return output.clone() if spare is None else output
        return torch.mul(output, F.silu(self.z.transpose(1, 2).to(self.dtype)), out=spare)
