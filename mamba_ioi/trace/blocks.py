"""The residual stream in a transformer: the sites before and after each block, and around its attention and its MLP.

A block's parts are known by their names (`TREES`); that what they give adds up to the stream is checked before their
sites are served. This file is shipped to remote servers: it uses torch and nnsight alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .anatomy import relative_difference, stream_of
from .location import Site
from .served import ServedEnvoy
from .sites import SITES, SiteInfo
from .stages import cast


@dataclass(frozen=True)
class Tree:
    """What the parts of a block are called, of which one follows the other.

    Attributes:
        attn_norm: the norm before the attention.
        attn: the module that gives what the attention adds to the stream: itself, or a norm after it.
        mlp_norm: the norm before the MLP.
        mlp: the module that gives what the MLP adds.
    """

    attn_norm: str
    attn: str
    mlp_norm: str
    mlp: str


TREES = (
    Tree("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    Tree("input_layernorm", "self_attn", "post_attention_layernorm", "mlp"),
    Tree("input_layernorm", "self_attn", "post_attention_layernorm", "block_sparse_moe"),
    Tree("input_layernorm", "attention", "post_attention_layernorm", "mlp"),
    Tree("ln_1", "attn", "ln_2", "mlp"),
    Tree("self_attn_layer_norm", "self_attn", "final_layer_norm", "fc2"),
)


def tree_of(block: nn.Module) -> Tree | None:
    """The first of `TREES` whose parts the block has; None if there is none."""
    names = {name for name, _ in block.named_children()}
    return next((tree for tree in TREES if {tree.attn_norm, tree.attn, tree.mlp_norm, tree.mlp} <= names), None)


def multiplier(block: nn.Module) -> float:
    """What the block multiplies its parts' outputs by before it adds them."""
    return float(getattr(block, "residual_multiplier", 1.0))


def first_of(inputs: tuple[tuple, dict]) -> Tensor:
    """The first argument of a call."""
    args, kwargs = inputs
    return args[0] if args else next(iter(kwargs.values()))


def with_first(inputs: tuple[tuple, dict], value: Tensor) -> tuple[tuple, dict]:
    """The same call with another first argument."""
    args, kwargs = inputs
    return ((value, *args[1:]), kwargs) if args else ((), {**kwargs, next(iter(kwargs)): value})


def with_stream(output: Any, value: Tensor) -> Any:
    """What a module returns, with another tensor in the first place."""
    return (value, *output[1:]) if isinstance(output, tuple) else value


class TreeSite(Site):
    """A `Site` at one of a block's parts, by its name in `Tree`."""

    def _location(self, obj: Any) -> str:
        part, end = self.key.split(".")
        return f"{obj.path}.{getattr(obj.tree, part)}.{end}"


class BlockEnvoy(ServedEnvoy):
    """A block: the residual stream before and after it, and what its parts read from it and add to it."""

    chains: ClassVar[dict] = {}

    @property
    def tree(self) -> Tree | None:
        """What its parts are called, None where they are not known."""
        return tree_of(self._module)

    @Site(key="input", description="the residual stream before the layer")
    def resid_pre(self, value) -> Float[Tensor, "B L D"]:
        """The residual stream before the layer; a change stays in the stream."""
        return first_of(value).clone()

    @resid_pre.transform
    def resid_pre(self, view, raw):
        return with_first(raw, cast(view, first_of(raw)))

    @TreeSite(key="attn_norm.input", description="the attention's own copy of the residual stream, before its norm")
    def attn_in(self, value) -> Float[Tensor, "B L D"]:
        """What the attention reads: a change reaches it only."""
        return first_of(value).clone()

    @attn_in.transform
    def attn_in(self, view, raw):
        return with_first(raw, cast(view, first_of(raw)))

    @TreeSite(key="attn.output", description="what the attention adds to the residual stream")
    def attn_out(self, value) -> Float[Tensor, "B L D"]:
        """What the attention adds to the residual stream, multipliers included."""
        return stream_of(value) * multiplier(self._module)

    @attn_out.transform
    def attn_out(self, view, raw):
        return with_stream(raw, cast(view, stream_of(raw)) / multiplier(self._module))

    @TreeSite(key="mlp_norm.input", description="the MLP's own copy of the residual stream, before its norm")
    def mlp_in(self, value) -> Float[Tensor, "B L D"]:
        """What the MLP reads: a change reaches it only."""
        return first_of(value).clone()

    @mlp_in.transform
    def mlp_in(self, view, raw):
        return with_first(raw, cast(view, first_of(raw)))

    @TreeSite(key="mlp.output", description="what the MLP adds to the residual stream")
    def mlp_out(self, value) -> Float[Tensor, "B L D"]:
        """What the MLP adds to the residual stream, multipliers included."""
        return stream_of(value) * multiplier(self._module)

    @mlp_out.transform
    def mlp_out(self, view, raw):
        return with_stream(raw, cast(view, stream_of(raw)) / multiplier(self._module))

    @Site(key="output", description="the residual stream after the layer")
    def resid_post(self, value) -> Float[Tensor, "B L D"]:
        """The residual stream after the layer."""
        return stream_of(value).clone()

    @resid_post.transform
    def resid_post(self, view, raw):
        return with_stream(raw, cast(view, stream_of(raw)))


PARTS: dict[str, SiteInfo] = {
    name: SiteInfo(name, "layer", name, ("B", "L", "D"), BlockEnvoy.__dict__[name].description)
    for name in ("attn_in", "attn_out", "mlp_in", "mlp_out")
}
"""The sites of a block's parts, in execution order."""
MID = SiteInfo("resid_mid", "layer", "mlp_in", ("B", "L", "D"), "the residual stream between the attention and the MLP")
"""Read where the MLP reads it; a change of it is in what the MLP reads and in the stream after the block."""
EVERY_SITE = SITES | PARTS | {"resid_mid": MID}
"""The sites of all families by name."""
BLOCK_SITES = ("resid_pre", "attn_in", "attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post")
"""The sites of a block, in execution order."""


def part_differences(model) -> dict[str, Tensor]:
    """The body of a trace: how far the parts of each block are from adding up to the residual stream."""
    found = {}
    for i in range(model.n_layers):
        block = model.layers[i]
        if block.tree is None:
            continue
        resid = block.resid_pre.clone()
        wrong = [relative_difference(block.attn_in, resid)]
        resid = resid + block.attn_out
        wrong.append(relative_difference(block.mlp_in, resid))
        added = block.mlp_out
        resid = resid + added if added.shape == resid.shape else added
        wrong.append(relative_difference(block.resid_post, resid))
        found[f"parts.{i}"] = torch.stack([one.cpu() for one in wrong])
    return found
