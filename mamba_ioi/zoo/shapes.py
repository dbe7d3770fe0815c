"""Models of the size of published ones, with random weights: what speed and memory are measured on."""

from __future__ import annotations

import torch
from torch import nn
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

_SIZES = {"hidden_size": 1024, "num_hidden_layers": 48, "conv_kernel": 4, "expand": 2, "residual_in_fp32": True}
_S6 = _SIZES | {"vocab_size": 50280, "state_size": 16, "time_step_rank": 64}
_SSD = {"vocab_size": 50288, "state_size": 128, "num_heads": 32, "head_dim": 64, "n_groups": 1, "chunk_size": 256}
_7B = {"vocab_size": 65024, "hidden_size": 4096, "num_hidden_layers": 64, "time_step_rank": 256}

SHAPES = {
    "mamba": ("mamba-370m", MambaForCausalLM, MambaConfig, _S6),
    "mamba2": ("mamba2-370m", Mamba2ForCausalLM, Mamba2Config, _SIZES | _SSD),
    "falcon_mamba": (
        "falcon-mamba-7b",
        FalconMambaForCausalLM,
        FalconMambaConfig,
        _S6 | _7B | {"tie_word_embeddings": False},
    ),
}
"""The model whose shape it is, its class, its config and its sizes, by family."""

FIRST = next(iter(SHAPES))
"""The family that is measured where none is named."""


def of_shape(family: str, layers: int | None = None) -> nn.Module:
    """The shape of the family's model, or of its first layers, with random weights from a fixed seed.

    Raises:
        ValueError: for another family.
    """
    if family not in SHAPES:
        raise ValueError(f"there are the shapes of {' and '.join(SHAPES)} to measure, not of {family!r}")
    _, kind, settings, sizes = SHAPES[family]
    torch.manual_seed(0)
    return kind(settings(**sizes | ({} if layers is None else {"num_hidden_layers": layers}))).eval()
