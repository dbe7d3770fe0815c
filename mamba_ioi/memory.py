"""How many rows run at once: batches are sized from a budget of bytes, and no result depends on it.

A model's `memory` is that budget; where it is None, half of what is free on the model's device.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from .checks import integer

if TYPE_CHECKING:
    from .trace.sites import SiteInfo

FLOAT = 4
"""Bytes of a value: the scan computes in float32 at least, and estimates are made for it."""
_SERVER = 2 * 2**30
"""The bytes that a server is supposed to have for one request."""


def budget(model) -> int:
    """The bytes that an experiment on the model may use, about.

    Raises:
        ValueError: if the model's ``memory`` is not a positive whole number.
    """
    if model.memory is not None:
        size = integer(model.memory)
        if size is None or size < 1:
            raise ValueError(f"memory is a positive whole number of bytes, or None, not {model.memory!r}")
        return size
    if model.remote is not None:
        return _SERVER
    device = model.device
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    try:
        import psutil
    except Exception:  # on a server, which may lack it, and whose sandbox may refuse it
        return _SERVER
    return psutil.virtual_memory().available // 2


def fitting_rows(model, row: int, most: int, *, share: float = 1.0) -> int:
    """How many rows of ``row`` bytes fit into that share of the budget: from 1 to ``most``."""
    return max(1, min(most, int(budget(model) * share) // max(1, row)))


def forward_bytes(model, length: int) -> int:
    """What one row of a forward pass needs while it runs, its logits at one position included."""
    d_model, width = model.d_model, inner_width(model)
    states = 4 * model.d_inner * model.d_state if model.has_scans else 0
    return FLOAT * (length * (8 * d_model + 16 * width) + states + model.vocab_size)


def site_bytes(model, site: SiteInfo, length: int) -> int:
    """One row's value of a site."""
    sizes = {"B": 1, "L": length, **model.sizes()}
    return FLOAT * math.prod(sizes[letter] for letter in site.shape)


def backward_bytes(model, length: int) -> int:
    """What one row of a forward pass keeps for the backward pass, which computes the states anew.

    The scan of a Mamba-2 keeps nothing but what it is given.
    """
    inner = (6 if "H" in model.sizes() else 16) * inner_width(model)
    kept = model.n_layers * length * (4 * model.d_model + inner)
    return forward_bytes(model, length) + FLOAT * kept


def stream_bytes(model, length: int) -> int:
    """One value of the residual stream's width at every layer and position of a row."""
    return FLOAT * (model.n_layers + 1) * length * model.d_model


def state_bytes(model) -> int:
    """Every layer's state and last conv inputs at one position of a row; 0 where the model is no Mamba."""
    if not model.has_scans:
        return 0
    return FLOAT * model.n_layers * (model.d_inner * model.d_state + model.d_channels * model.d_conv)


def inner_width(model) -> int:
    """The width inside a block: the conv's channels, or four times d_model where the model is no Mamba."""
    return model.d_channels if model.has_scans else 4 * model.d_model
