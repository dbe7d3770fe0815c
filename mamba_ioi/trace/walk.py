"""The walk through a model's layers, site by site, and the visitors that change and read what they find there.

A run may begin at any layer, and at any position once the states before it are known; what runs on the way is our own
conv and scan. This file is shipped to remote servers: it uses torch alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .anatomy import cut_head, output_logits, skip_block
from .location import replace_op
from .sites import SITES, SiteInfo
from .state import LayerState


class Visitor:
    """What is done on the way through the layers. This one changes nothing.

    Args:
        states: what the positions before the run left behind in each layer; None where it begins with the first.
    """

    replaces = True
    """Whether our own conv and scan take the place of the model's."""

    def __init__(self, states: Sequence[LayerState] | None = None) -> None:
        self.states = states

    def enter(self, model, layer: int) -> bool:
        """Before a layer. False: it does not run, and the visitor has said by what it is replaced."""
        return True

    def state(self, layer: int, rows: int) -> LayerState:
        """What earlier positions left in a layer, for so many rows."""
        return LayerState() if self.states is None else self.states[layer].for_rows(rows)

    def opened(self, layer: int, stages: Any) -> None:
        """Our own conv or scan (a `Stages`) takes the place of the model's: it goes on from where the run begins."""
        stages.go_on_from(self.state(layer, stages.x.shape[0]))

    def at(self, model, layer: Any, site: SiteInfo) -> None:
        """At a site, in execution order; layer None: outside the layers."""

    def leave(self, model, layer: int) -> None:
        """After a layer that has run."""


def walk(model, visitor: Visitor, first: int = 0, stop: int | None = None) -> None:
    """In a trace: visit the layers from ``first`` to before ``stop`` (None: to the last), site by site.

    Args:
        model: a `CausalLM` from `load_model`, in a trace.
        visitor: what to do on the way.
        first: the first layer; the embeddings are visited if it is 0.
        stop: the first layer that is not visited.
    """
    if first == 0:
        visitor.at(model, None, SITES["embed"])
    for layer in range(first, model.n_layers if stop is None else stop):
        if not visitor.enter(model, layer):
            continue
        operations = model.operations(layer) if visitor.replaces else {}
        for name, site in model.layer_sites(layer).items():
            if name in operations:
                visitor.opened(layer, replace_op(model.layers[layer].mixer, operations[name]))
            visitor.at(model, layer, site)
        visitor.leave(model, layer)


def logits_at(model, read: Int[Tensor, "B"]) -> Tensor:
    """The logits of the model's output at one position a row, which alone are unembedded."""
    cut_head(model, read)
    return output_logits(model)[:, 0]


def each_alone(model, layer: int, project) -> Float[Tensor, "_ D"]:
    """In a trace of one token: what a layer's projection makes of each channel alone, and of none; no weight is read.

    Nothing else of the model runs.
    """
    for below in range(layer):
        skip_block(model, below, model.layers[below].input)
    given = project.input
    project.input = torch.eye(given.shape[-1] + 1, given.shape[-1], dtype=given.dtype, device=given.device)[None]
    found = project.output[0]
    project.output = found[None, :1]
    leave_out(model, layer + 1)
    return found


def weight_and_bias(alone: Float[Tensor, "_ D"], dtype: torch.dtype) -> tuple[Float[Tensor, "C D"], Float[Tensor, "D"]]:
    """A projection's weight and bias, of what it makes of each channel alone, and of none."""
    bias = alone[-1].to(dtype)
    return alone[:-1].to(dtype) - bias, bias


def leave_out(model, first: int) -> None:
    """Run no layer from ``first`` on, and no unembedding.

    Unlike `tracer.stop`, after which NDIF's sandbox (0.1.2) gives the next trace of the request nothing.
    """
    for layer in range(first, model.n_layers):
        skip_block(model, layer, model.layers[layer].input)
    model.unembedding.skip(model.unembedding.input)
