"""The exact effect of every edge, by resampling each one alone, and how well scores and circuits agree."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pandas as pd
import torch
from tqdm.auto import tqdm

from ..result import Result, note_precisions
from ..tasks.pairs import Metric, PromptPairs, metric_name
from .circuit import Circuit
from .eap import score_table, table_of
from .graph import Graph
from .measure import MANY, Evaluator
from .pairs import Pairs

KEY = ["src", "dst", "position"]


def exact_effects(
    model,
    data: PromptPairs,
    *,
    positional: bool = False,
    fine: bool = False,
    parts: bool = False,
    ssm: str = "conv",
    absolute: bool = True,
    metric: Metric | None = None,
    batch_rows: int | None = None,
    progress: bool = False,
) -> Result:
    """How much the metric changes when one edge is resampled and nothing else is: what `eap` estimates.

    Args:
        model: a model from `load_model`; with ``fine`` one with scans.
        data: pairs of prompts; aligned ones if ``positional``.
        positional: resample every edge at every position alone.
        fine: the edges inside mixers too, with those of ``parts``.
        parts: split blocks into mixer, attention and MLP, as in `eap`.
        ssm: what the edges conv -> ssm carry: ``conv``, the conv's output, which is what `eap` estimates; or
            ``states``, the states h, as the authors' ACDC has it; or with positions ``tokens``, what each position
            gives to each later one (see `Graph`).
        absolute: NLD over |max - min| (App. B), or over max - min.
        metric: another metric, as `PromptPairs` has them, whose own change is measured; the pairs' own if None.
        batch_rows: how many rows, edges times prompts, run at once; None: up to 128, as ``model.memory`` allows.
        progress: show a progress bar.

    Returns:
        A Result as that of `eap`: src, dst, position, score: the mean metric's change. Negative: the edge is needed.
        ``meta["graph"]`` and ``meta["arguments"]`` hold ``ssm``.
    """
    length = Pairs.of(model, data, positional=True).length if positional else None
    graph = Graph(model.n_layers, fine, length, ssm, parts=parts).on(model)
    evaluator = Evaluator(model, data, graph, absolute=absolute, metric=metric, batch_rows=batch_rows, together=MANY)
    whole = graph.whole()
    before = evaluator.measure(whole[None]).score.double().mean()
    effects, every = torch.zeros(whole.numel(), dtype=torch.float64), whole.flatten().nonzero().flatten()
    for some in tqdm(every.split(evaluator.batch_rows), desc="exact effects", disable=not progress):
        masks = whole.flatten().expand(len(some), -1).clone()
        masks[torch.arange(len(some)), some] = False
        effects[some] = evaluator.measure(masks.view(len(some), *whole.shape)).score.double().mean(1) - before
    return Result.create(
        "exact_effects",
        score_table(graph, effects.view(whole.shape)),
        model=model,
        arguments={
            "positional": positional,
            "fine": fine,
            "parts": parts,
            "ssm": ssm,
            "absolute": absolute,
            "metric": metric_name(evaluator.pairs.metric),
        },
        graph=graph.stored(),
        n_rows=evaluator.n_rows,
    )


def rank_correlation(one: Result | pd.DataFrame, other: Result | pd.DataFrame) -> float:
    """Spearman's correlation of two tables of scores, over the edges that both have; by marks, at the same marks.

    Raises:
        ValueError: if they share less than two edges.
    """
    note_precisions(*(table for table in (one, other) if isinstance(table, Result)))
    both = pd.concat([_scores(one).score, _scores(other).score], axis=1, join="inner", keys=["one", "other"]).dropna()
    if len(both) < 2:
        raise ValueError(f"the two tables share {len(both)} edges with scores: a correlation needs two")
    return float(both.one.rank().corr(both.other.rank()))


def overlap(one: Circuit | Sequence, other: Circuit | Sequence) -> dict[str, float | int]:
    """What two sets of edges have in common.

    Returns:
        ``shared`` (how many), ``precision`` (of the first), ``recall`` (of the second), ``jaccard`` (of either).

    Raises:
        ValueError: if one is neither a circuit nor edges.
    """
    first, second = set(_edges(one)), set(_edges(other))
    shared = len(first & second)
    either = len(first | second)
    return {
        "shared": shared,
        "precision": shared / len(first) if first else float("nan"),
        "recall": shared / len(second) if second else float("nan"),
        "jaccard": shared / either if either else float("nan"),
    }


def _edges(edges: Circuit | Sequence) -> list[tuple]:
    listed = edges.edges if isinstance(edges, Circuit) else edges
    if not isinstance(listed, Iterable) or not all(isinstance(edge, tuple | list) for edge in listed):
        raise ValueError(f"edges are a Circuit or tuples (src, dst[, position]), not {type(edges).__name__}")
    return [tuple(edge) for edge in listed]


def _scores(scores: Result | pd.DataFrame) -> pd.DataFrame:
    table = table_of(scores)
    table = table.assign(**{name: rest for name, rest in (("position", -1), ("mark", "")) if name not in table})
    return table.set_index([*KEY, "mark"])[["score"]]
