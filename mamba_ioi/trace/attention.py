"""What attention moves from token to token: its pattern and its values, read off the model's own function.

An attention's output is ``z_t = sum over s of pattern[t, s] v_s``, in each head. Its function is linear in the values,
so it is given the values with unit vectors beside them: what it makes of those is the pattern, whatever masks, windows,
caps or sinks it has, and however it computes. This file is shipped to remote servers: it uses torch alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .walk import each_alone, leave_out

ATTENTIONS = ("self_attn", "attn", "attention", "self_attention")
"""What an attention is called, where the module that gives what is added to the stream is another: a norm after it."""
PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj")
"""What its output projection is called."""
FUNCTIONS = ("attention_interface_1", "attention_interface_0")
"""The call of its function, as nnsight names it: what is called so before it is no call."""


@dataclass(frozen=True)
class AttentionPath:
    """Where a block's attention is.

    Attributes:
        attn: the name of its module.
        function: the call of its function.
        project: the name of its output projection.
        scale: what is added to the stream, of what the projection gives; None where a norm follows.
    """

    attn: str
    function: str
    project: str
    scale: float | None


def attention_path(block) -> AttentionPath | None:
    """Where the attention of a block is, None where its parts have other names or it calls another function."""
    part, names = block.layout.attn, dict(block._module.named_children())
    for name in (part.path, *ATTENTIONS):
        project = next((one for one in PROJECTIONS if name in names and hasattr(names[name], one)), None)
        if project is not None:
            source = child(block, name).source
            function = next((one for one in FUNCTIONS if hasattr(source, one)), None)
            scale = part.scale if name == part.path else None
            return None if function is None else AttentionPath(name, function, project, scale)
    return None


def child(block, name: str):
    """The envoy of a block's module, whatever its name means for the block."""
    module = getattr(block._module, name)
    return next(envoy for envoy in block._children if envoy._module is module)


@dataclass(frozen=True)
class Attended:
    """An attention in a run.

    Attributes:
        pattern: how much of each value each output takes, by head.
        values: those, of each head.
        projected: what the projection gives.
        added: what is added to the stream.
    """

    pattern: Float[Tensor, "B H L L"]
    values: Float[Tensor, "B H L P"]
    projected: Float[Tensor, "B L D"]
    added: Float[Tensor, "B L D"]


def attended(model, layer: int, path: AttentionPath) -> Attended:
    """The body of a trace, which ends after the layer."""
    block = model.layers[layer]
    attn = child(block, path.attn)
    function = getattr(attn.source, path.function)
    args, kwargs = function.inputs
    module, query, key, values, *rest = args
    size, length = values.shape[-1], values.shape[2]
    ones = torch.eye(length, dtype=values.dtype, device=values.device).expand(*values.shape[:2], -1, -1)
    function.inputs = ((module, query, key, torch.cat([values, ones], dim=-1), *rest), kwargs)
    output, *others = function.output
    function.output = (output[..., :size].contiguous(), *others)
    projected, added = getattr(attn, path.project).output.clone(), block.attn_out.clone()
    leave_out(model, layer + 1)
    pattern = output[..., size:].transpose(1, 2)
    values = values.repeat_interleave(pattern.shape[1] // values.shape[1], dim=1)
    return Attended(pattern, values, projected, added)


def head_projection(model, layer: int, path: AttentionPath) -> Float[Tensor, "_ D"]:
    """The body of a trace of one token: what the projection makes of each channel alone, and of none."""
    return each_alone(model, layer, getattr(child(model.layers[layer], path.attn), path.project))
