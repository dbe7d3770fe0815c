"""Granite 4 (GraniteMoeHybrid): Mamba-2 or attention, then experts beside an MLP; what each adds is scaled."""

from __future__ import annotations

from torch import nn

from ..trace.hybrid import HybridEnvoy, Layout, Part
from ..trace.ssd_sites import SSDMixerEnvoy
from .family import Family, hybrid_sizes


class GraniteEnvoy(HybridEnvoy):
    """A `GraniteMoeHybridDecoderLayer`."""

    inside = SSDMixerEnvoy

    @staticmethod
    def layout_of(block: nn.Module) -> Layout:
        scale, experts = float(block.residual_multiplier), bool(block.has_experts)  # pyright: ignore[reportArgumentType]
        mlp = Part("post_attention_layernorm", "shared_mlp", scale, "block_sparse_moe" if experts else "")
        kind = "moe" if experts else "mlp"
        if block.mamba is not None:
            return Layout(mixer=Part("input_layernorm", "mamba", scale), mlp=mlp, kinds=f"mamba2+{kind}")
        return Layout(attn=Part("input_layernorm", "self_attn", scale), mlp=mlp, kinds=f"attention+{kind}")


def _classes() -> tuple[type[nn.Module], ...]:
    from transformers.models.granitemoehybrid.modeling_granitemoehybrid import (
        GraniteMoeHybridDecoderLayer,
        GraniteMoeHybridMambaLayer,
    )

    return GraniteMoeHybridMambaLayer, GraniteMoeHybridDecoderLayer


FAMILY = Family.hybrid("granitemoehybrid", _classes, GraniteEnvoy, hybrid_sizes)
