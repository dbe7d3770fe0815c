"""Mamba-2 (arXiv 2405.21060): heads that share a decay, B and C out of the conv, a gated norm after the scan."""

from __future__ import annotations

from torch import nn

from ..trace.sites import layer_table
from ..trace.ssd_sites import SSDLayerEnvoy, SSDMixerEnvoy
from .family import Family, ssd_sizes


def _classes() -> tuple[type[nn.Module], type[nn.Module]]:
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Block, Mamba2Mixer

    return Mamba2Mixer, Mamba2Block


def _sizes(config) -> dict[str, int]:
    return ssd_sizes(config.num_heads, config.head_dim, config.n_groups, config.state_size, config.conv_kernel)


FAMILY = Family(
    "mamba2",
    classes=_classes,
    mixer=SSDMixerEnvoy,
    block=SSDLayerEnvoy,
    sizes=_sizes,
    infos=layer_table(SSDLayerEnvoy, SSDMixerEnvoy),
    kind=lambda block: "mamba2",
)
