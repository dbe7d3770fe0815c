"""From scores to circuits: rankings, the k best edges, and the smallest prefix that still does the task (App. D.1)."""

from __future__ import annotations

import logging
import math
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..checks import integer, real_number, whole_number
from ..result import Result, note_precisions
from ..tasks.pairs import PromptPairs
from .circuit import Circuit, edge_table
from .eap import table_of
from .graph import ATTN, MIXER, MLP, TAPS, Graph, Parts, is_inner, layer_of
from .measure import Evaluator

logger = logging.getLogger(__name__)

Ranking = Literal["signed", "absolute", "random"]
RANKINGS = ("signed", "absolute", "random")


def scored_graph(
    scores: Result | pd.DataFrame, n_layers: int | None = None, ssm: str | None = None
) -> tuple[Graph, Float[Tensor, "n_pairs W"]]:
    """The graph that scores are for, and the scores by edge.

    Its ``ssm`` is as given; if None, as the scores' result has it, or ``conv``.

    Raises:
        ValueError: if the table lacks a column, is by marks, or is not the scores of every edge of one graph.
    """
    table = table_of(scores)
    if "mark" in table:
        raise ValueError(
            "these scores are kept apart by marks, and a circuit's edges are not: score edges without marks, or with "
            "positional=True on aligned rows"
        )
    missing = {"src", "dst", "score"} - set(table.columns)
    if missing:
        raise ValueError(f"scores are a table with src, dst, position, score; {', '.join(sorted(missing))} is missing")
    known = scores.meta.get("graph", {}) if isinstance(scores, Result) else {}
    if n_layers is None:
        n_layers = 1 + max((layer_of(str(src)) or 0 for src in table.src), default=0)
    positions = table.position if "position" in table else pd.Series(-1, index=table.index)
    length = int(positions.max()) + 1 if len(table) and positions.max() >= 0 else None
    ssm = str(known.get("ssm", "conv")) if ssm is None else ssm
    fine, parts = any(map(is_inner, table.src.map(str))), known.get("parts") or _parts(table, n_layers)
    direct_step, mixed_input = (bool(known.get(name, False)) for name in ("direct_step", "mixed_input"))
    graph = Graph(n_layers, fine, length, ssm, direct_step, int(known.get("taps", TAPS)), parts, mixed_input)
    values = torch.full((len(graph.pairs), graph.width), math.nan, dtype=torch.float64)
    for src, dst, position, score in zip(table.src, table.dst, positions, table.score, strict=True):
        if (src, dst) not in graph.index:
            raise ValueError(f"the scores hold an edge {src}->{dst} that a model of {n_layers} layers does not have")
        values[graph.index[src, dst], max(int(position), 0)] = score
    if len(table) != len(graph) or values[graph.whole()].isnan().any():
        raise ValueError(f"scores are one number for each of {len(graph)} edges; these are {len(table)}")
    return graph, values


def _parts(table: pd.DataFrame, n_layers: int) -> bool | tuple[Parts, ...]:
    """The parts of each block, by the edges between them; False if there are none."""
    pairs = {(str(src), str(dst)) for src, dst in zip(table.src, table.dst, strict=True)}
    nodes = {node for pair in pairs for node in pair}
    if not any("." in node and not is_inner(node) for node in nodes):
        return False
    found: list[Parts] = []
    for layer in range(n_layers):
        first = tuple(end for end in (MIXER, ATTN) if f"{layer}{end}" in nodes)
        mlp = (MLP,) if f"{layer}{MLP}" in nodes else ()
        follows = any((f"{layer}{end}", f"{layer}{MLP}") in pairs for end in first)
        found.append(tuple(group for group in ((first, mlp) if follows else (first + mlp,)) if group))
    return tuple(found)


def rank(scores: Float[Tensor, "n_pairs W"], by: Ranking = "signed", seed: int = 0) -> Int[Tensor, "n_edges"]:
    """The edges' flat indices, the most needed first.

    Args:
        scores: of each edge; not a number where there is none.
        by: ``signed``: the most negative first, as the paper ranks; ``absolute``: the largest first, whatever its sign;
            ``random``: shuffled.
        seed: of the shuffling.
    """
    if by not in RANKINGS:
        raise ValueError(f"a ranking is one of {', '.join(RANKINGS)}, not {by!r}")
    every = scores.isnan().logical_not().flatten().nonzero().flatten()
    flat = scores.flatten()[every]
    if by == "random":
        seed = whole_number(seed, "seed", least=0, most=2**63 - 1)
        return every[torch.randperm(len(flat), generator=torch.Generator().manual_seed(seed))]
    return every[torch.argsort(flat if by == "signed" else -flat.abs(), stable=True)]


def prefix_mask(graph: Graph, order: Int[Tensor, "n_edges"], k: int) -> Tensor:
    """The mask of the first k edges of a ranking, ``[n_pairs, W]``."""
    mask = torch.zeros(len(graph.pairs) * graph.width, dtype=torch.bool)
    mask[order[:k]] = True
    return mask.view(len(graph.pairs), graph.width)


def top_k(scores: Result, k: int, *, by: Ranking = "signed", seed: int = 0, prune: bool = True) -> Circuit:
    """The circuit of the k edges that score highest in a ranking.

    Args:
        scores: the result of `eap`.
        k: how many edges.
        by: ``signed`` (the paper's), ``absolute``, or ``random``.
        seed: of the random ranking.
        prune: remove those on no path from embed to output, which change no run.
    """
    graph, values = scored_graph(scores)
    size = integer(k)
    if size is None or not 0 <= size <= len(graph):
        raise ValueError(f"k is from 0 to {len(graph)}, a whole number, not {k!r}")
    mask = prefix_mask(graph, rank(values, by, seed), size)
    return _circuit(graph, values, mask, prune, meta={"found_by": f"top {k} by {by} score"})


def minimal_circuit(
    model,
    data: PromptPairs,
    scores: Result,
    target: float = 0.85,
    *,
    by: Ranking = "signed",
    seed: int = 0,
    prune: bool = True,
    ssm: str | None = None,
    absolute: bool = True,
    batch_rows: int | None = None,
) -> Circuit:
    """The fewest edges of the ranking whose accuracy is above the target, by the paper's binary search (App. D.1).

    Of n edges, with L = 0 and R = n - 1: m = ceil((L + R) / 2); accuracy(m) > target sets R = m - 1, else L = m; the
    answer is min(n - 1, L + 1). The search supposes that accuracy rises with the number of edges. Then dead ends are
    removed: edges on no path from embed to output, which change nothing; ``meta["pruned"]`` says how many.

    Args:
        model: the model that was scored.
        data: pairs of prompts to measure accuracy on, as a rule those that were scored.
        scores: the result of `eap`.
        target: accuracy has to be above it.
        by: the ranking: ``signed`` (the paper's), ``absolute`` or ``random``.
        seed: of the random ranking.
        prune: whether to remove dead ends.
        ssm: what the edges conv -> ssm carry in fine graphs, as in `acdc`; None: as in the scores.
        absolute: of the normalized logit difference that is reported, as in `eap`.
        batch_rows: how many rows run at once; as many, up to 128, as ``model.memory`` allows if None.

    Returns:
        The circuit, with its accuracy and NLD on ``data``; ``meta["tried"]`` holds (edges, accuracy, nld) of every step
        and ``meta["reached"]`` whether the target was.

    Raises:
        ValueError: if the scores are not of this model's graph, or the data do not fit.
    """
    accuracy = real_number(target)
    if accuracy is None or not 0 <= accuracy <= 1:
        raise ValueError(f"target is an accuracy from 0 to 1, not {target!r}")
    target = accuracy
    note_precisions(model, *([scores] if isinstance(scores, Result) else []))
    graph, values = scored_graph(scores, model.n_layers, ssm)
    graph = graph.on(model)
    evaluator = Evaluator(model, data, graph, absolute=absolute, batch_rows=batch_rows)
    order = rank(values, by, seed)
    tried: dict[int, dict[str, float]] = {}

    def measure(k: int) -> dict[str, float]:
        if k not in tried:
            tried[k] = evaluator.measure(prefix_mask(graph, order, k)[None]).means()
        return tried[k]

    low, high = 0, len(graph) - 1
    while low < high:
        middle = math.ceil((low + high) / 2)
        if measure(middle)["accuracy"] > target:
            high = middle - 1
        else:
            low = middle
    k = min(len(graph) - 1, low + 1)
    found = measure(k)
    meta = {
        "found_by": f"minimal circuit, accuracy above {target}, by {by} score",
        "target": target,
        "reached": found["accuracy"] > target,
        "prefix": k,
        "ssm": graph.ssm,
        "tried": [[k, one["accuracy"], one["nld"]] for k, one in sorted(tried.items())],
    }
    if not meta["reached"]:
        logger.warning("accuracy %.3f with %d edges is not above the target %.3f", found["accuracy"], k, target)
    circuit = _circuit(graph, values, prefix_mask(graph, order, k), prune, meta, found["accuracy"], found["nld"])
    logger.info("%d of %d edges, %d dead ends removed", len(circuit), len(graph), circuit.meta["pruned"])
    return circuit


def _circuit(graph: Graph, values: Tensor, mask: Tensor, prune: bool, meta: dict, accuracy=None, nld=None) -> Circuit:
    kept = graph.prune(mask) if prune else mask
    edges = graph.edges(kept)
    table = edge_table(edges).assign(score=values[kept].tolist())
    meta = {**meta, "pruned": int(mask.sum() - kept.sum())}
    kind = graph.n_layers, graph.fine, graph.length
    return Circuit(edges, *kind, accuracy, nld, table, meta, **graph.inner_kind)
