"""Bamba (a Mamba-2 hybrid): Mamba-2 or attention, then an MLP, each after a norm of its own."""

from __future__ import annotations

from torch import nn

from ..trace.hybrid import HybridEnvoy, Layout, Part
from ..trace.ssd_sites import SSDMixerEnvoy
from .family import Family, hybrid_sizes


class BambaEnvoy(HybridEnvoy):
    """A `BambaDecoderLayer`."""

    inside = SSDMixerEnvoy

    @staticmethod
    def layout_of(block: nn.Module) -> Layout:
        mlp = Part("pre_ff_layernorm", "feed_forward")
        if hasattr(block, "mamba"):
            return Layout(mixer=Part("input_layernorm", "mamba"), mlp=mlp, kinds="mamba2+mlp")
        return Layout(attn=Part("input_layernorm", "self_attn"), mlp=mlp, kinds="attention+mlp")


def _classes() -> tuple[type[nn.Module], ...]:
    from transformers.models.bamba.modeling_bamba import BambaDecoderLayer, BambaMixer

    return BambaMixer, BambaDecoderLayer


FAMILY = Family.hybrid("bamba", _classes, BambaEnvoy, hybrid_sizes)
