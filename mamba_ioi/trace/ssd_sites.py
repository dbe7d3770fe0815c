"""The sites of mixers like Mamba-2's (SSD): where their activations live in transformers and nnsight.

H heads of size P, E = H P, G groups, X = E + 2 G N channels of the conv, out of which B and C come. There is no x_proj
and no dt_proj. This file is shipped to remote servers: it uses torch and nnsight alone.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from .conv import ConvStages
from .location import OperationSite, Site, StageSite
from .sites import LayerEnvoy, ScanMixerEnvoy
from .ssd import SSDStages
from .stages import Stages, cast


class SSDMixerEnvoy(ScanMixerEnvoy):
    """A `Mamba2Mixer` or its like, with everything between its input projection and its output projection named."""

    _module: Any
    chains: ClassVar[dict[str, type[Stages]]] = {stages.ORDER[0]: stages for stages in (ConvStages, SSDStages)}
    inside: ClassVar[tuple[str, ...]] = (
        *("gate", "conv_slice", "conv", "ssm_input", "B", "C"),
        *SSDStages.ORDER,
        "after_skip",
    )

    @Site(key="in_proj.output", description="the gate before silu (site `skip`)")
    def gate(self, value) -> Float[Tensor, "B L E"]:
        """The gate, before silu: the first E outputs of in_proj."""
        return (value * self.multipliers())[..., : self.widths()[0]].clone()

    @gate.transform
    def gate(self, view, raw):
        return self._with(raw, slice(0, self.widths()[0]), view)

    @StageSite(ConvStages, description="the conv's terms, the oldest first")
    def conv_slice(self, value) -> Float[Tensor, "B L X K"]:
        """The conv's terms at each output position, bias excluded: their sum plus the bias is ``conv``."""
        ...

    @StageSite(ConvStages, description="the conv's output before silu, bias included")
    def conv(self, value) -> Float[Tensor, "B L X"]:
        """The conv's output before silu, bias included: the channels of x, of B and of C."""
        ...

    @OperationSite(ConvStages, description="the scan's input x: the conv's output after silu")
    def ssm_input(self, value) -> Float[Tensor, "B L E"]:
        """The scan's input x: the conv's output after silu, its first E channels."""
        return self.part(value, 0).clone()

    @ssm_input.transform
    def ssm_input(self, view, raw):
        return self.with_part(raw, 0, view)

    @OperationSite(ConvStages, description="B: how the input enters the state, of each group")
    def B(self, value) -> Float[Tensor, "B L G N"]:
        """B of each position and group, after conv and silu."""
        return self.part(value, 1).unflatten(-1, (self._module.n_groups, -1)).clone()

    @B.transform
    def B(self, view, raw):
        return self.with_part(raw, 1, view.flatten(2))

    @OperationSite(ConvStages, description="C: how the state is read out, of each group")
    def C(self, value) -> Float[Tensor, "B L G N"]:
        """C of each position and group, after conv and silu."""
        return self.part(value, 2).unflatten(-1, (self._module.n_groups, -1)).clone()

    @C.transform
    def C(self, view, raw):
        return self.with_part(raw, 2, view.flatten(2))

    @StageSite(SSDStages, description="A = -exp(A_log), of each head")
    def A(self, value) -> Float[Tensor, "H"]:
        """A of each head, the same at every position and for every row."""
        ...

    @StageSite(SSDStages, description="the time step before softplus, bias included")
    def delta_2(self, value) -> Float[Tensor, "B L H"]:
        """The time step of each head before softplus, bias included."""
        ...

    @StageSite(SSDStages, description="the time step after softplus and clamp")
    def delta(self, value) -> Float[Tensor, "B L H"]:
        """The time step of each head, after softplus and the model's limits."""
        ...

    @StageSite(SSDStages, description="exp(delta A)")
    def A_bar(self, value) -> Float[Tensor, "B L H"]:
        """The discretized A of each head."""
        ...

    @StageSite(SSDStages, description="delta B")
    def B_bar(self, value) -> Float[Tensor, "B L H N"]:
        """The discretized B of each head."""
        ...

    @StageSite(SSDStages, description="x B_bar: what enters the state")
    def write(self, value) -> Float[Tensor, "B L H P N"]:
        """What enters the state at each position; what is written takes the place of ``x B_bar``."""
        ...

    @StageSite(SSDStages, description="the state before the first position")
    def h_start(self, value) -> Float[Tensor, "B H P N"]:
        """The state before the first position: zeros, unless it is written."""
        ...

    @StageSite(SSDStages, description="the state; where it is edited, later states follow")
    def h(self, value) -> Float[Tensor, "B L H P N"]:
        """The state after each position. Positions whose value is changed are held; the states after them follow.

        Under gradients read it before y and ssm_output: what was read of these before it gets no gradient.
        """
        ...

    @StageSite(SSDStages, description="h C, heads side by side")
    def y(self, value) -> Float[Tensor, "B L E"]:
        """The state read out by C, before D."""
        ...

    @StageSite(SSDStages, description="y + x D")
    def ssm_output(self, value) -> Float[Tensor, "B L E"]:
        """The scan's output with the skip connection D."""
        ...

    @Site(key="out_proj.input", description="what out_proj receives: after the gate and its norm")
    def after_skip(self, value) -> Float[Tensor, "B L E"]:
        """The gated output, after the norm that goes with the gate: what out_proj receives."""
        return value[0][0].clone()

    @after_skip.transform
    def after_skip(self, view, raw):
        return ((cast(view, raw[0][0]), *raw[0][1:]), raw[1])

    def multipliers(self) -> Tensor | float:
        """What in_proj's output is multiplied by before it is split."""
        return 1.0

    def branch(self, projected: Tensor) -> Float[Tensor, "B L X"]:
        """The conv branch of in_proj's output."""
        inner = self.widths()[0]
        return (projected * self.multipliers())[..., inner : inner + sum(self.widths())]

    def with_branch(self, projected: Tensor, view: Tensor) -> Tensor:
        """in_proj's output with another conv branch."""
        inner = self.widths()[0]
        return self._with(projected, slice(inner, inner + sum(self.widths())), view)

    def _with(self, projected: Tensor, part: slice, view: Tensor) -> Tensor:
        """in_proj's output with other values in one part, which are given as they are after the multipliers."""
        raw, scale = projected.clone(), self.multipliers()
        raw[..., part] = cast(view, raw[..., part]) / (scale[..., part] if isinstance(scale, Tensor) else scale)
        return raw

    def widths(self) -> tuple[int, int, int]:
        """How many of the conv's channels are those of x, of B and of C."""
        shared = self._module.n_groups * self._module.ssm_state_size
        return self._module.intermediate_size, shared, shared

    def part(self, value: Float[Tensor, "B X L"], index: int) -> Float[Tensor, "B L _"]:
        """The channels of x, B or C (0, 1, 2) of the conv's result."""
        return value.split(self.widths(), dim=1)[index].transpose(1, 2)

    def with_part(self, raw: Float[Tensor, "B X L"], index: int, view: Float[Tensor, "B l _"]) -> Tensor:
        """The conv's result with other channels at its last positions, as many as the view has."""
        parts = list(raw.split(self.widths(), dim=1))
        earlier = raw.shape[-1] - view.shape[1]
        parts[index] = torch.cat([parts[index][..., :earlier], view.transpose(1, 2).to(raw.dtype)], dim=-1)
        return torch.cat(parts, dim=1)


class SSDLayerEnvoy(LayerEnvoy):
    """A `Mamba2Block`: as a Mamba's, but for what in_proj gives."""

    @Site(key="mixer.in_proj.output", description="the conv's input: x, B and C before the conv")
    def in_proj(self, value) -> Float[Tensor, "B L X"]:
        """The conv branch of in_proj: X outputs after the gate's E; the last H are the time step."""
        return self.mixer.branch(value).clone()

    @in_proj.transform
    def in_proj(self, view, raw):
        return self.mixer.with_branch(raw, view)
