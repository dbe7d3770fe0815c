"""Any other causal language model: what its layers are made of is told by their parts' names and shapes."""

from __future__ import annotations

from torch import nn

from ..trace.blocks import EVERY_SITE, block_layout
from ..trace.hybrid import layout_sites
from .family import Family

ATTENTION = ("attn", "attention", "self_attn", "self_attention", "temporal_block")
EXPERTS = ("moe", "block_sparse_moe", "experts")
MLP = ("mlp", "shared_mlp", "ffn", "feed_forward", "mlp_block", "fc1", "shared_expert")


def layer_kind(block: nn.Module) -> str:
    """``mamba``, ``mamba2``, ``attention``, ``moe``, ``mlp``, joined by ``+``: what mixes positions, then the rest."""
    found: list[str] = []
    for name, part in block.named_children():
        kind = part_kind(name, part)
        if kind is not None and kind not in found:
            found.append(kind)
    if "moe" in found and "mlp" in found:
        found.remove("mlp")  # shared experts beside the others: one part under two names
    return "+".join(sorted(found, key=lambda kind: kind in ("moe", "mlp"))) or "other"


def part_kind(name: str, part: nn.Module) -> str | None:
    """What one part of a block is, None for norms and the like."""
    rate = getattr(part, "A_log", None)
    if rate is not None:
        return "mamba" if rate.dim() == 2 else "mamba2"
    if name in EXPERTS or any(child in EXPERTS for child, _ in part.named_children()):
        return "moe"
    kind = type(part).__name__.lower()
    if name in MLP or kind.endswith("mlp"):
        return "mlp"
    return "attention" if name in ATTENTION or kind.endswith("attention") else None


def block_sites(block: nn.Module) -> tuple[str, ...]:
    """The residual stream before and after the block, and around its parts where their names are known."""
    return layout_sites(block_layout(block))


TRANSFORMER = Family("", infos=EVERY_SITE, kind=layer_kind, sites=block_sites)
