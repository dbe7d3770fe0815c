"""Blocks of any causal language model: their attention and their MLP, by the names that models give them.

That what the parts give adds up to the residual stream is checked before their sites are served. This file is shipped
to remote servers: it uses torch and nnsight alone.
"""

from __future__ import annotations

import torch
from torch import nn

from .anatomy import relative_difference
from .hybrid import PART_SITES, HybridEnvoy, Layout, Part
from .sites import SITES, SiteInfo

SEQUENTIAL = (
    ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp"),
    ("input_layernorm", "self_attn", "post_attention_layernorm", "block_sparse_moe"),
    ("input_layernorm", "attention", "post_attention_layernorm", "mlp"),
    ("input_layernorm", "self_attention", "post_attention_layernorm", "mlp"),
    ("ln_1", "attn", "ln_2", "mlp"),
    ("self_attn_layer_norm", "self_attn", "final_layer_norm", "fc2"),
)
"""Of blocks whose MLP follows their attention: the attention's norm, the module that gives what it adds to the stream
(itself, or a norm after it), the MLP's norm, and the module that gives what the MLP adds."""
BESIDE = (
    ("input_layernorm", "self_attn", "mlp"),
    ("input_layernorm", "self_attention", "mlp"),
    ("ln_1", "attn", "mlp"),
)
"""Of blocks whose attention and MLP read the stream by one norm: that norm, the attention, the MLP."""


def block_layout(block: nn.Module) -> Layout:
    """What a block's parts are, by their names; an empty layout where they are not known."""
    names, scale = {name for name, _ in block.named_children()}, float(getattr(block, "residual_multiplier", 1.0))
    for attn_norm, attn, mlp_norm, mlp in SEQUENTIAL:
        if {attn_norm, attn, mlp_norm, mlp} <= names:
            follows = not getattr(block, "use_parallel_residual", False)
            return Layout(attn=Part(attn_norm, attn, scale), mlp=Part(mlp_norm, mlp, scale), follows=follows)
    for norm, attn, mlp in BESIDE:
        if {norm, attn, mlp} <= names:
            return Layout(attn=Part(norm, attn), mlp=Part(norm, mlp), follows=False, shared=True)
    return Layout()


class BlockEnvoy(HybridEnvoy):
    """A block: the residual stream before and after it, and what its attention and MLP read from it and add to it."""

    @staticmethod
    def layout_of(block: nn.Module) -> Layout:
        return block_layout(block)


EVERY_SITE: dict[str, SiteInfo] = SITES | PART_SITES
"""The sites of all families by name; shapes inside a mixer are Mamba's."""


def part_differences(model) -> dict[str, torch.Tensor]:
    """The body of a trace: how far the parts of each block are from adding up to the residual stream."""
    found = {}
    for i in range(model.n_layers):
        block = model.layers[i]
        layout = block.layout
        if layout.attn is None:
            continue
        resid = block.resid_pre.clone()
        wrong = [relative_difference(block.attn_in, resid)]
        attn = block.attn_out.clone()
        wrong.append(relative_difference(block.mlp_in, resid + attn if layout.follows else resid))
        added = block.mlp_out
        resid = resid + attn + added if added.shape == resid.shape else added
        wrong.append(relative_difference(block.resid_post, resid))
        found[f"parts.{i}"] = torch.stack([one.cpu() for one in wrong])
    return found
