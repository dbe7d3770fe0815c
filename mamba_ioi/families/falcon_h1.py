"""Falcon-H1 (arXiv 2507.22448): Mamba-2 beside attention, by one norm, then an MLP; multipliers everywhere."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..trace.hybrid import HybridEnvoy, Layout, Part, keep_stream
from ..trace.ssd_sites import SSDMixerEnvoy
from .family import Family, hybrid_sizes


class FalconH1MixerEnvoy(SSDMixerEnvoy):
    """A `FalconH1Mixer`: ``skip`` and ``in_proj`` are after the multipliers of in_proj's output."""

    parent: Any

    def multipliers(self) -> Tensor:
        return self._module.mup_vector

    def before_entry(self) -> None:
        """Keep the stream that the shared norm is given: attention may be asked for it after the mixer."""
        keep_stream(self.parent)


class FalconH1Envoy(HybridEnvoy):
    """A `FalconH1DecoderLayer`."""

    inside = FalconH1MixerEnvoy

    @staticmethod
    def layout_of(block: nn.Module) -> Layout:
        mixer = Part("input_layernorm", "mamba", float(block.ssm_out_multiplier))  # pyright: ignore[reportArgumentType]
        attn = Part("input_layernorm", "self_attn", float(block.attn_out_multiplier))  # pyright: ignore[reportArgumentType]
        attn = replace(attn, inside=float(block.attention_in_multiplier))  # pyright: ignore[reportArgumentType]
        mlp = Part("pre_ff_layernorm", "feed_forward")
        return Layout(mixer=mixer, attn=attn, mlp=mlp, shared=True, kinds="mamba2+attention+mlp")


def _classes() -> tuple[type[nn.Module], ...]:
    from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1DecoderLayer, FalconH1Mixer

    return FalconH1Mixer, FalconH1DecoderLayer


FAMILY = Family.hybrid("falcon_h1", _classes, FalconH1Envoy, hybrid_sizes)
