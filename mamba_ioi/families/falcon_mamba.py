"""Falcon-Mamba (arXiv 2410.05355): Mamba with RMSNorms without weights on x_proj's time step, B and C.

The scan uses what these norms give, so the sites ``delta_1``, ``B`` and ``C`` are their outputs, in this order.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from ..trace.location import Site
from ..trace.sites import MixerEnvoy
from ..trace.stages import cast
from .family import Family, s6_sizes


class FalconMixerEnvoy(MixerEnvoy):
    """A `FalconMambaMixer`: of `MixerEnvoy`'s sites three are served after their norms."""

    @Site(key="dt_layernorm.output", description="the time step before dt_proj, after its norm")
    def delta_1(self, value) -> Float[Tensor, "B L R"]:
        """The time step's low-rank form after its norm, before dt_proj."""
        return value.clone()

    @delta_1.transform
    def delta_1(self, view, raw):
        return cast(view, raw)

    @Site(key="b_layernorm.output", description="B: how the input enters the state, after its norm")
    def B(self, value) -> Float[Tensor, "B L N"]:
        """B of each position, after its norm."""
        return value.clone()

    @B.transform
    def B(self, view, raw):
        return cast(view, raw)

    @Site(key="c_layernorm.output", description="C: how the state is read out, after its norm")
    def C(self, value) -> Float[Tensor, "B L N"]:
        """C of each position, after its norm."""
        return value.clone()

    @C.transform
    def C(self, view, raw):
        return cast(view, raw)


def _classes() -> tuple[type[nn.Module], type[nn.Module]]:
    from transformers.models.falcon_mamba.modeling_falcon_mamba import FalconMambaBlock, FalconMambaMixer

    return FalconMambaMixer, FalconMambaBlock


FAMILY = Family("falcon_mamba", classes=_classes, mixer=FalconMixerEnvoy, sizes=s6_sizes)
