"""Models of the size of published ones, with random weights: what speed and memory are measured on."""

from __future__ import annotations

import torch
from torch import nn
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

SHAPES = {
    "mamba": (MambaForCausalLM, MambaConfig, {"vocab_size": 50280, "state_size": 16, "time_step_rank": 64}),
    "mamba2": (
        Mamba2ForCausalLM,
        Mamba2Config,
        {"vocab_size": 50288, "state_size": 128, "num_heads": 32, "head_dim": 64, "n_groups": 1, "chunk_size": 256},
    ),
}
"""The model class, its config and its own sizes, by family: of mamba-370m and mamba2-370m."""

FIRST = next(iter(SHAPES))
"""The family that is measured where none is named."""


def of_370m(family: str, layers: int) -> nn.Module:
    """The shape of a family's model of 370 million parameters, or of its first layers, from a fixed seed.

    Raises:
        ValueError: for another family.
    """
    if family not in SHAPES:
        raise ValueError(f"there are the shapes of {' and '.join(SHAPES)} to measure, not of {family!r}")
    kind, settings, own = SHAPES[family]
    torch.manual_seed(0)
    common = {"hidden_size": 1024, "num_hidden_layers": layers, "conv_kernel": 4, "expand": 2, "residual_in_fp32": True}
    return kind(settings(**common, **own)).eval()
