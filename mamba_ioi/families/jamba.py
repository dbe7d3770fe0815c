"""Jamba (arXiv 2403.19887): Mamba or attention, then an MLP or experts; norms on the time step, B and C."""

from __future__ import annotations

from torch import nn

from ..trace.hybrid import HybridEnvoy, Layout, Part
from .falcon_mamba import FalconMixerEnvoy
from .family import Family


class JambaEnvoy(HybridEnvoy):
    """A `JambaMambaDecoderLayer` or a `JambaAttentionDecoderLayer`; norms as in Falcon-Mamba, with weights."""

    inside = FalconMixerEnvoy

    @staticmethod
    def layout_of(block: nn.Module) -> Layout:
        mlp, kind = Part("pre_ff_layernorm", "feed_forward"), "moe" if hasattr(block.feed_forward, "experts") else "mlp"
        if hasattr(block, "mamba"):
            return Layout(mixer=Part("input_layernorm", "mamba"), mlp=mlp, kinds=f"mamba+{kind}")
        return Layout(attn=Part("input_layernorm", "self_attn"), mlp=mlp, kinds=f"attention+{kind}")


def _classes() -> tuple[type[nn.Module], ...]:
    from transformers.models.jamba.modeling_jamba import (
        JambaAttentionDecoderLayer,
        JambaMambaDecoderLayer,
        JambaMambaMixer,
    )

    return JambaMambaMixer, JambaMambaDecoderLayer, JambaAttentionDecoderLayer


def _sizes(config) -> dict[str, int]:
    inner = config.mamba_expand * config.hidden_size
    return {"E": inner, "N": config.mamba_d_state, "R": config.mamba_dt_rank, "K": config.mamba_d_conv}


FAMILY = Family.hybrid("jamba", _classes, JambaEnvoy, _sizes)
