"""What an attention moves from token to token, on some rows, here or on a server.

What runs inside a trace here uses torch alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..trace.attention import Attended, AttentionPath, attended, attention_path, head_projection
from ..trace.recurrence import compute_dtype
from ..trace.walk import weight_and_bias


def find_attention(model, layer: int) -> AttentionPath:
    """Where a layer's attention is.

    Raises:
        ValueError: if it has none that writes to the residual stream, or one whose function is not known.
    """
    if "attn_out" not in model.layer_sites(layer):
        raise ValueError(
            f"layer {layer} of {model.model_id} has no attention that writes to the residual stream: it is "
            f"{model.layer_kinds[layer]}"
        )
    path = attention_path(model.layers[layer])
    if path is None:
        raise ValueError(
            f"the attention of layer {layer} of {model.model_id} does not call transformers' attention function with "
            f"an output projection after it, which its pattern is read off from"
        )
    return path


def attention_pattern(
    model,
    ids: Int[Tensor, "B L"],
    layer: int,
    path: AttentionPath,
    reduce: str | None,
    units: Sequence[int] | None,
    targets: Int[Tensor, "B T"],
) -> dict[str, Tensor]:
    """The pattern ``alpha``, of some heads, or their mean."""
    pattern = seen_attention(model, ids, layer, path).pattern
    pattern = pattern if units is None else pattern[:, units]
    pattern = at_targets(pattern.to(compute_dtype(pattern.dtype)), targets)
    return {"alpha": pattern.mean(1) if reduce else pattern}


def attention_contributed(
    model, ids: Int[Tensor, "B L"], layer: int, path: AttentionPath, targets: Int[Tensor, "B T"]
) -> dict[str, Tensor]:
    """The ``contributions`` ``[B, T, L, D]``, and how far ``off`` their sums are from what is added to the stream."""
    seen = seen_attention(model, ids, layer, path)
    with torch.no_grad(), model.trace(ids[:1, :1]):
        projection = head_projection(model, layer, path).save()  # pyright: ignore[reportAttributeAccessIssue]
    dtype, rows = compute_dtype(seen.values.dtype), torch.arange(len(ids), device=seen.values.device)[:, None]
    at = targets.to(rows.device)
    weight, bias = weight_and_bias(projection, dtype)
    weight = weight.unflatten(0, (seen.values.shape[1], -1))  # [H, P, D]
    moved = torch.einsum("bhsp,hpd->bhsd", seen.values.to(dtype), weight)
    found = torch.einsum("bhts,bhsd->btsd", at_targets(seen.pattern.to(dtype), at), moved)
    found[rows, torch.arange(at.shape[1], device=at.device), at] += bias
    added, projected = (value.to(dtype)[rows, at] for value in (seen.added, seen.projected))
    if path.scale is None:  # a norm follows, whose scale is the run's own
        found *= torch.where(projected == 0, 0.0, added / projected)[:, :, None]
    else:
        found *= path.scale
    off = (found.sum(2) - added).abs().max() / added.abs().max().clamp(min=torch.finfo(dtype).tiny)
    return {"contributions": found, "off": off}


def at_targets(pattern: Float[Tensor, "B H L L"], targets: Int[Tensor, "B T"]) -> Float[Tensor, "B H T L"]:
    """Each row's pattern at its own targets."""
    rows = torch.arange(len(pattern), device=pattern.device)[:, None]
    return pattern.transpose(1, 2)[rows, targets.to(pattern.device)].transpose(1, 2)


def seen_attention(model, ids: Int[Tensor, "B L"], layer: int, path: AttentionPath) -> Attended:
    """A layer's attention in a run of the tokens, which ends there."""
    with torch.no_grad(), model.trace(ids):
        seen = attended(model, layer, path).save()  # pyright: ignore[reportAttributeAccessIssue]
    return seen
