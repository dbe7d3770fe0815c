"""Mamba (arXiv 2312.00752), the family that the sites are named after: nothing is peculiar to it."""

from __future__ import annotations

from torch import nn

from .family import Family, s6_sizes


def _classes() -> tuple[type[nn.Module], type[nn.Module]]:
    from transformers.models.mamba.modeling_mamba import MambaBlock, MambaMixer

    return MambaMixer, MambaBlock


FAMILY = Family("mamba", classes=_classes, sizes=s6_sizes)
