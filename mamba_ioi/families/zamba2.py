"""Zamba2 (arXiv 2411.15242): Mamba-2 layers, into some of which a shared transformer block writes as well."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from ..trace.hybrid import HybridEnvoy, Layout, Part
from ..trace.ssd_sites import SSDMixerEnvoy
from .family import Family, ssd_sizes


class ZambaEnvoy(HybridEnvoy):
    """A `Zamba2MambaDecoderLayer`, or a `Zamba2HybridLayer`: the shared block's output enters the mixer's input alone.

    So ``layer_input`` is the mixer's input with that in it, and the shared block, which writes to no stream, has no
    sites.
    """

    inside = SSDMixerEnvoy
    given_embeddings = True

    @staticmethod
    def layout_of(block: nn.Module) -> Layout:
        if hasattr(block, "mamba_decoder"):
            mixer = Part("mamba_decoder.input_layernorm", "mamba_decoder.mamba")
            return Layout(mixer=mixer, kinds="attention+mlp+mamba2")
        return Layout(mixer=Part("input_layernorm", "mamba"), kinds="mamba2")


def _classes() -> tuple[type[nn.Module], ...]:
    from transformers.models.zamba2.modeling_zamba2 import Zamba2HybridLayer, Zamba2MambaDecoderLayer, Zamba2MambaMixer

    return Zamba2MambaMixer, Zamba2MambaDecoderLayer, Zamba2HybridLayer


def _sizes(config) -> dict[str, int]:
    size = config.mamba_expand * config.hidden_size // config.n_mamba_heads
    return ssd_sizes(config.n_mamba_heads, size, config.mamba_ngroups, config.mamba_d_state, config.mamba_d_conv)


def _family() -> Family:
    family = Family.hybrid("zamba2", _classes, ZambaEnvoy, _sizes)
    what = "the mixer's own input, before its norm: the residual stream, and what a shared block before it gives"
    return replace(
        family, infos={**family.infos, "layer_input": replace(family.infos["layer_input"], description=what)}
    )


FAMILY = _family()
