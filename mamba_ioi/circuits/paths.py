"""Which edges of a graph lie on a path from embed to output: what reaches them, and what they reach (see `graph`).

Positions: a layer passes what it receives at p to any position from p on (which holds for a causal model), the gate to
p alone; the output is read at the last position.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

SLICES = (-3, -2, -1, 0)
INNER = 8
"""How many edges a layer has inside; `SLICE`, `SSM`, `SKIP`, `SSM_OUT`, `SKIP_OUT` say where they stand among them.
Where writes are edges they follow (`WRITES`), and `SSM` is the edge of the controls."""
SLICE, SSM, SKIP, SSM_OUT, SKIP_OUT, WRITES = slice(0, 4), 4, 5, 6, 7, slice(8, None)


def reached(graph: Any, mask: Bool[Tensor, "n_pairs width"]) -> Bool[Tensor, "n_pairs width"]:
    """Which edges have a source that a path of the mask's edges from embed reaches."""
    found = torch.zeros_like(mask)
    outputs = [torch.ones(graph.width, dtype=torch.bool)]
    for layer in range(graph.n_layers + 1):
        into = graph.into(layer)
        found[into] = torch.stack(outputs)
        arrives = (mask[into] & found[into]).any(0)
        if layer == graph.n_layers:
            break
        if not graph.fine:
            outputs.append(onwards(arrives))
            continue
        inner, kept = found[graph.inside(layer)], mask[graph.inside(layer)]
        inner[SLICE] = torch.stack([shifted(graph, arrives, -s) for s in SLICES])
        conv = (inner[SLICE] & kept[SLICE]).any(0)
        step = arrives & graph.direct_step
        inner[SKIP] = arrives
        if graph.ssm == "conv":
            inner[SSM] = conv
            inner[SSM_OUT] = onwards((inner[SSM] & kept[SSM]) | step)
        elif graph.ssm == "tokens":
            inner[SSM] = conv | step
            inner[WRITES] = (conv | step)[:, None]
            written = (inner[WRITES] & kept[WRITES]).any(0)
            inner[SSM_OUT] = written | onwards(inner[SSM] & kept[SSM]) | conv
        else:
            inner[SSM_OUT] = carried(conv | step, kept[SSM])
            inner[SSM] = conv | step | shifted(graph, inner[SSM_OUT], 1)
        inner[SKIP_OUT] = inner[SKIP] & kept[SKIP]
        through = (inner[SSM_OUT] & kept[SSM_OUT]) | (inner[SKIP_OUT] & kept[SKIP_OUT])
        outputs.append(through | conv if graph.ssm == "states" else through)
    return found


def needed(graph: Any, mask: Bool[Tensor, "n_pairs width"]) -> Bool[Tensor, "n_pairs width"]:
    """Which edges have a destination from which a path of the mask's edges leads to the output."""
    found = torch.zeros_like(mask)
    last = torch.zeros(graph.width, dtype=torch.bool)
    last[-1] = True
    found[graph.into(graph.n_layers)] = last
    leaves = torch.zeros(graph.n_layers, graph.width, dtype=torch.bool)
    leaves |= (mask & found)[graph.into(graph.n_layers)][1:]
    for layer in reversed(range(graph.n_layers)):
        if graph.fine:
            inner, kept = found[graph.inside(layer)], mask[graph.inside(layer)]
            inner[SSM_OUT] = inner[SKIP_OUT] = leaves[layer]
            read = leaves[layer] & kept[SSM_OUT]
            inner[SKIP] = leaves[layer] & kept[SKIP_OUT]
            if graph.ssm == "conv":
                step = inner[SSM] = backwards(read)
                inner[SLICE] = inner[SSM] & kept[SSM]
            elif graph.ssm == "tokens":
                inner[SSM], inner[WRITES] = backwards(read), read
                step = (inner[SSM] & kept[SSM]) | (inner[WRITES] & kept[WRITES]).any(1)
                inner[SLICE] = step | read
            else:
                held = step = carried(read.flip(0), kept[SSM].flip(0)).flip(0)
                inner[SSM] = read | shifted(graph, held, -1)
                inner[SLICE] = held | leaves[layer]
            through = [shifted(graph, inner[k] & kept[k], s) for k, s in enumerate(SLICES)]
            arrives = torch.stack([*through, inner[SKIP] & kept[SKIP], step & graph.direct_step]).any(0)
        else:
            arrives = backwards(leaves[layer])
        into = graph.into(layer)
        found[into] = arrives
        leaves[:layer] |= (mask[into] & arrives)[1:]
    return found


def carried(begins: Bool[Tensor, "width"], kept: Bool[Tensor, "width"]) -> Bool[Tensor, "width"]:
    """Where a state holds what came in at that position or before it, with no cut from there on."""
    places = torch.arange(len(kept))
    came, cut = (torch.where(at, places, -1).cummax(0).values for at in (begins, ~kept))
    return came > cut


def onwards(at: Bool[Tensor, "width"]) -> Bool[Tensor, "width"]:
    """The positions from any of these on."""
    return at.int().cummax(0).values.bool()


def backwards(at: Bool[Tensor, "width"]) -> Bool[Tensor, "width"]:
    """The positions up to any of these."""
    return onwards(at.flip(0)).flip(0)


def shifted(graph: Any, at: Bool[Tensor, "width"], by: int) -> Bool[Tensor, "width"]:
    """Moved ``by`` positions later (not at all if the graph's edges are not kept apart by position)."""
    if graph.length is None or by == 0:
        return at
    moved = torch.zeros_like(at)
    if by > 0:
        moved[by:] = at[:-by]
    else:
        moved[:by] = at[-by:]
    return moved
