"""How well a circuit does the task alone: everything outside it resampled, and a random circuit beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from ..result import Result, note_precisions
from ..tasks.pairs import Metric, PromptPairs, metric_name
from .circuit import Circuit
from .measure import MANY, Evaluator, graph_for
from .pairs import held_out
from .search import prefix_mask, rank, scored_graph

MIB_FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True)
class Evaluation:
    """A circuit's means over rows, with everything outside it resampled.

    Attributes:
        accuracy: share of rows where the answer beats the other names of the pair.
        nld: normalized logit difference: 1 for the whole model, 0 for the corrupt run.
        kl: KL(whole model ‖ circuit) over the vocabulary, in nats.
        logit_diff: the answer's logit less the corrupt answer's.
        accuracy_low: where the accuracy's bootstrap 95 % interval begins.
        accuracy_high: where it ends.
        nld_low: where the NLD's begins.
        nld_high: where it ends.
        n_edges: how many edges the circuit has.
        n_rows: how many rows it was measured on.
        ssm: what of a fine circuit's edges conv -> ssm was resampled, ``conv`` or ``states``.
        random: the same for a random circuit with as many edges.
        metric: the metric that was asked for.
        score: its mean; the NLD's as a rule.
    """

    accuracy: float
    nld: float
    kl: float
    logit_diff: float
    accuracy_low: float
    accuracy_high: float
    nld_low: float
    nld_high: float
    n_edges: int
    n_rows: int
    ssm: str = "conv"
    random: Evaluation | None = None
    metric: str = "nld"
    score: float | None = None


def evaluate(
    model,
    data: PromptPairs | None,
    circuit: Circuit,
    *,
    ssm: str | None = None,
    absolute: bool = True,
    metric: Metric | None = None,
    random_seed: int = 0,
    batch_rows: int | None = None,
) -> Evaluation:
    """Run a circuit alone: every edge outside it is resampled from the corrupt run (paper, App. D.1 and D.2).

    A circuit found on seed 27 is to be judged on other data: pass None for held-out pairs (seed 28, 100 pairs in both
    directions), or data of your own.

    Args:
        model: the model the circuit is of.
        data: pairs of prompts, or None for held-out ones.
        circuit: which edges are kept; of a coarse circuit, everything inside its layers is.
        ssm: what a fine circuit's edges conv -> ssm carry, as in `acdc`; None: as the circuit has it.
        absolute: NLD over |max - min| (App. B), or over max - min, with which the whole model scores 1 in every row.
        metric: what ``score`` is the mean of; the pairs' own metric if None.
        random_seed: of the random circuit beside it.
        batch_rows: how many rows run at once; as many, up to 128, as ``model.memory`` allows if None.

    Returns:
        Accuracy, NLD, KL and logit difference, and those of a random circuit of as many edges of the same graph.

    Raises:
        ValueError: if the circuit is not of this model, or the data do not fit it.
    """
    data = held_out(model, data)
    graph = graph_for(circuit, data, model, ssm)
    evaluator = Evaluator(model, data, graph, absolute=absolute, metric=metric, batch_rows=batch_rows, together=2)
    mask = graph.mask(circuit.edges)
    order = rank(torch.zeros(mask.shape).where(graph.whole(), torch.nan), "random", random_seed)
    found = evaluator.measure(torch.stack([mask, prefix_mask(graph, order, len(circuit))]))

    def evaluation(i: int, random: Evaluation | None = None) -> Evaluation:
        of = {"n_edges": len(circuit), "n_rows": evaluator.n_rows, "ssm": graph.ssm}
        of |= {"metric": metric_name(evaluator.pairs.metric), "score": float(found.score[i].mean())}
        return Evaluation(**found.means(i), **found.intervals(i), **of, random=random)

    return evaluation(0, random=evaluation(1))


def last_position_only(
    model,
    data: PromptPairs | None,
    circuit: Circuit,
    layer: int,
    *,
    absolute: bool = True,
    batch_rows: int | None = None,
) -> Result:
    """What a positional circuit loses with every edge that leaves ``layer`` but at the last position (paper, § 4.4).

    Args:
        model: the model the circuit is of.
        data: pairs of prompts, or None for held-out ones.
        circuit: a circuit found with positions.
        layer: the layer whose edges are cut, 39 in the paper.
        absolute: as in `evaluate`.
        batch_rows: how many rows run at once; as many, up to 128, as ``model.memory`` allows if None.

    Returns:
        A Result with two rows, circuit ``whole`` and ``cut``: circuit, n_edges, accuracy, nld, kl, and the bootstrap
        95 % intervals (accuracy_low, accuracy_high, nld_low, nld_high).

    Raises:
        ValueError: if the circuit has no positions, or there is no such layer.
    """
    data = held_out(model, data)
    both = {"whole": circuit, "cut": circuit.only_last_position(layer)}
    graph = graph_for(circuit, data, model)
    evaluator = Evaluator(model, data, graph, absolute=absolute, batch_rows=batch_rows, together=2)
    found = evaluator.measure(torch.stack([graph.mask(one.edges) for one in both.values()]))
    rows = [
        {"circuit": name, "n_edges": len(one), **found.means(i), **found.intervals(i)}
        for i, (name, one) in enumerate(both.items())
    ]
    table = pd.DataFrame(rows).drop(columns="logit_diff")
    arguments = {"layer": layer, "absolute": absolute, "circuit": circuit.meta.get("found_by")}
    return Result.create(
        "last_position_only", table, model=model, arguments=arguments, graph=graph.stored(), n_rows=evaluator.n_rows
    )


def faithfulness(
    model,
    data: PromptPairs | None,
    scores: Result,
    fractions: Sequence[float] = MIB_FRACTIONS,
    *,
    ssm: str | None = None,
    absolute: bool = True,
    metric: Metric | None = None,
    seed: int = 0,
    batch_rows: int | None = None,
) -> Result:
    """How much of the model's behaviour circuits of growing size keep, as in MIB (arXiv 2504.13151).

    Faithfulness of a circuit is (m(circuit) - m(empty)) / (m(whole) - m(empty)), m being the mean logit difference with
    everything outside the circuit resampled. CPR is the area under faithfulness over the fraction of edges, CMD that
    under |1 - faithfulness|, by trapezoids over ``fractions``. With the signed ranking CPR asks for the circuit that
    does the task best; with the absolute one CMD asks for the circuit that behaves most like the model.

    Args:
        model: the model that was scored.
        data: pairs of prompts, or None for held-out ones (seed 28).
        scores: the result of `eap`.
        fractions: shares of all edges, increasing, each above 0 and at most 1.
        ssm: what the edges conv -> ssm carry in fine graphs, as in `acdc`; None: as in the scores.
        absolute: of the NLD in the table, as in `evaluate`.
        metric: another metric than ``nld`` takes the place of the logit difference as m; the pairs' own if None.
        seed: of the random ranking.
        batch_rows: how many rows run at once; as many, up to 128, as ``model.memory`` allows if None.

    Returns:
        A Result with a row for each ranking (``signed``, ``absolute``, ``random``) and fraction: ranking, fraction,
        n_edges, faithfulness, accuracy, nld, kl. ``meta["cpr"]`` and ``meta["cmd"]`` hold the areas by ranking.

    Raises:
        ValueError: for fractions that are not increasing in (0, 1], or where whole and corrupt run differ in nothing.
    """
    fractions = [float(fraction) for fraction in fractions]
    if not fractions or sorted(set(fractions)) != fractions or not 0 < fractions[0] <= fractions[-1] <= 1:
        raise ValueError(f"fractions increase, from above 0 to at most 1; they are {fractions}")
    note_precisions(model, scores)
    graph, values = scored_graph(scores, model.n_layers, ssm)
    graph = graph.on(model)
    data = held_out(model, data)
    evaluator = Evaluator(model, data, graph, absolute=absolute, metric=metric, batch_rows=batch_rows, together=MANY)
    rows: list[dict] = []
    masks: list[Tensor] = [prefix_mask(graph, rank(values), size) for size in (0, len(graph))]
    for ranking in ("signed", "absolute", "random"):
        order = rank(values, ranking, seed)
        for fraction in fractions:
            size = int(len(graph) * fraction)
            rows.append({"ranking": ranking, "fraction": fraction, "n_edges": size})
            masks.append(prefix_mask(graph, order, size))
    measured = evaluator.measure(torch.stack(masks))
    named = "logit difference" if evaluator.pairs.metric == "nld" else metric_name(evaluator.pairs.metric)
    values = measured.logit_diff if evaluator.pairs.metric == "nld" else measured.score
    empty, whole, *kept = values.mean(1).tolist()
    if abs(whole - empty) < 1e-12:
        raise ValueError(f"the mean {named} is the same clean and corrupt: faithfulness has no scale")
    for i, row in enumerate(rows, start=2):
        found = measured.means(i)
        found.pop("logit_diff")
        row["faithfulness"] = (kept[i - 2] - empty) / (whole - empty)
        row.update(found)
    table = pd.DataFrame(rows)
    curves = {name: group.faithfulness.tolist() for name, group in table.groupby("ranking", sort=False)}
    return Result.create(
        "faithfulness",
        table,
        model=model,
        arguments={"fractions": fractions, "absolute": absolute, "scores": scores.meta.get("arguments")},
        seed=seed,
        graph=graph.stored(),
        cpr={name: area(fractions, curve) for name, curve in curves.items()},
        cmd={name: area(fractions, [abs(1 - value) for value in curve]) for name, curve in curves.items()},
        n_rows=evaluator.n_rows,
    )


def area(x: Sequence[float], y: Sequence[float]) -> float:
    """The area under a curve by trapezoids."""
    return float(torch.trapezoid(torch.tensor(y, dtype=torch.float64), torch.tensor(x, dtype=torch.float64)))
