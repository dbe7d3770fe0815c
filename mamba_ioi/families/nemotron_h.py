"""Nemotron-H (arXiv 2504.03624): a block is a Mamba-2, an attention, an MLP or experts, each with a norm."""

from __future__ import annotations

from typing import Any

from nnsight import Envoy
from torch import nn

from ..trace.hybrid import HybridEnvoy, Layout, Part
from ..trace.served import NoSuchName
from ..trace.ssd_sites import SSDMixerEnvoy
from .family import Family, ssd_sizes


class NemotronEnvoy(HybridEnvoy):
    """A `NemotronHBlock`, whose one part is called mixer, whatever it is."""

    inside = SSDMixerEnvoy
    _part: Envoy

    @property
    def mixer(self) -> Any:
        """The scan's mixer.

        Raises:
            ValueError: if the block's part is another.
        """
        if self.layout.mixer is None:
            raise ValueError(f"{self.path} has no mixer with a scan: it is {self.layout.kinds}")
        return self._part

    @mixer.setter
    def mixer(self, part: Envoy) -> None:
        if self._built:
            raise NoSuchName(f"{self.path}.mixer is a module; assign to one of its sites, or to its output")
        self._part = part  # nnsight builds the tree of envoys

    @staticmethod
    def layout_of(block: nn.Module) -> Layout:
        part = Part("norm", "mixer")
        if block.block_type == "linear_attention":
            return Layout(mixer=part, kinds="mamba2")
        if block.block_type == "full_attention":
            return Layout(attn=part, kinds="attention")
        return Layout(mlp=part, kinds="moe" if block.block_type == "moe" else "mlp")


def _classes() -> tuple[type[nn.Module], ...]:
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHBlock, NemotronHMamba2Mixer

    return NemotronHMamba2Mixer, NemotronHBlock


def _sizes(config) -> dict[str, int]:
    return ssd_sizes(
        config.mamba_num_heads, config.mamba_head_dim, config.n_groups, config.ssm_state_size, config.conv_kernel
    )


FAMILY = Family.hybrid("nemotron_h", _classes, NemotronEnvoy, _sizes)
