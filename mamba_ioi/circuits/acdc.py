"""ACDC: walk backwards from the output, drop every edge that the metric does not miss (arXiv 2304.14997; App. D.2)."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import torch
from jaxtyping import Bool
from torch import Tensor
from tqdm.auto import tqdm

from ..checks import real_number
from ..tasks.pairs import Metric, PromptPairs, metric_name
from .circuit import Circuit, edge_table
from .graph import SKIP, SKIP_OUT, SLICE, SSM, SSM_OUT, Graph
from .measure import MANY, Evaluator, graph_for
from .pairs import Pairs

logger = logging.getLogger(__name__)


def acdc(
    model,
    data: PromptPairs,
    circuit: Circuit | None = None,
    threshold: float = 1e-4,
    fine: bool = True,
    *,
    exact: bool = False,
    ssm: str | None = None,
    absolute: bool = True,
    metric: Metric | None = None,
    batch_rows: int | None = None,
    progress: bool = False,
) -> Circuit:
    """Drop edges whose removal lowers the mean normalized logit difference by no more than the threshold (App. D.2).

    Nodes are taken backwards from the output; of a layer, first its SSM (where ``ssm`` is ``tokens``, the writes and
    controls that it is made of) and skip, then its conv slices, then the edges into it, from the latest source to the
    earliest. Edges are removed by resampling them, on top of everything that is
    outside the circuit. ``ssm -> out`` and ``skip -> out`` are not tested: they stay where ``conv -> ssm`` and
    ``in -> skip`` do, for to cut the one is to cut the other (with positions, ``ssm -> out`` is tested).
    An edge from which no path leads to the output any more is dropped without a test.

    Two rules for which circuit an edge is tested against:

    * joint (the default): the edges into one node are each tested, alone, against the circuit as it stands when the
      node is reached, all in one forward; those within the threshold are then dropped together.
    * ``exact=True``: ACDC's sequential rule, each edge against the circuit that the decisions before it left. Many runs
      still share a forward: candidate k is the circuit without the next k edges, and the first one whose last edge
      has to stay ends the run; the answer is that of testing them one by one.

    Args:
        model: a model from `load_model`; with ``fine`` one with scans.
        data: pairs of prompts; the metric is their mean.
        circuit: where to start from; None for the whole graph, with positions where ``ssm`` is ``tokens``.
        threshold: the largest drop of the mean NLD at which an edge goes.
        fine: test the edges inside mixers too; of a hybrid also those between the parts of blocks (see `Graph`), of
            which a circuit of whole blocks keeps all that lie within a block or between two that it joins.
        exact: test sequentially.
        ssm: what the edges conv -> ssm carry: ``conv``, the conv's output, or ``states``, the states h, as the authors
            have it, or ``tokens``, what each position gives to each later one, which needs positions (see `Graph`);
            None: as the circuit has it, ``conv`` if it is not said there.
        absolute: NLD over |max - min| (App. B), or over max - min.
        metric: another metric, as `PromptPairs` has them, whose drop counts; the pairs' own if None.
        batch_rows: how many rows, candidates times prompts, run at once; None: up to 128, as ``model.memory`` allows.
        progress: show a progress bar.

    Returns:
        The circuit that is left, without dead ends, with its accuracy and NLD on ``data``. Its ``table`` has every edge
        of the graph: src, dst, position (-1 if not positional), kept, effect (the drop of the mean NLD when the edge
        was tested; NaN if it was not). ``meta["pruned"]`` counts the dead ends removed at the end. Its ``ssm``, also in
        ``meta``, says what was cut.

    Raises:
        ValueError: if the threshold is negative, or circuit and data do not fit the model.
    """
    drop = real_number(threshold)
    if drop is None or not drop >= 0:
        raise ValueError(f"the threshold is a drop of the metric, 0 or more, not {threshold!r}")
    threshold = drop
    if circuit is None:
        length = Pairs.of(model, data, positional=True).length if ssm == "tokens" else None
        circuit = Circuit.of(model, Graph(model.n_layers, length=length).edges())
    graph = graph_for(circuit, data, model, ssm)
    mask = graph.mask(circuit.edges)
    if fine:
        graph, mask = graph.refine(mask, replace(graph, fine=True).on(model).parts)
    evaluator = Evaluator(model, data, graph, absolute=absolute, metric=metric, batch_rows=batch_rows, together=MANY)
    search = Search(evaluator, mask, threshold)
    groups = steps(graph)
    for group in tqdm(groups, desc="acdc", disable=not progress):
        search.test(group, exact)
    kept = graph.prune(search.mask)
    final = evaluator.measure(kept[None]).means()
    logger.info("%d edges kept, %d tested in %d runs", int(kept.sum()), search.tested, search.runs)
    table = edge_table(graph.edges())
    table["kept"] = kept[graph.whole()].tolist()
    table["effect"] = search.effects[graph.whole()].tolist()
    meta = {
        "found_by": f"acdc, threshold {threshold:g}, {'sequential' if exact else 'joint'} tests",
        "threshold": threshold,
        "ssm": graph.ssm,
        "tested": search.tested,
        "runs": search.runs,
        "pruned": int((search.mask & ~kept).sum()),
        "metric": metric_name(evaluator.pairs.metric),
    }
    kind = graph.n_layers, graph.fine, graph.length
    return Circuit(graph.edges(kept), *kind, final["accuracy"], final["nld"], table, meta, **graph.inner_kind)


def steps(graph: Graph) -> list[list[int]]:
    """The edges by the node they are tested at, backwards from the output; indices in ``graph.pairs``.

    What need not be tested is in no step: ``skip -> out``, and ``ssm -> out`` where it is one with ``conv -> ssm``, as
    it is unless positions are kept apart, or the time step stays live where the conv's output is cut.
    """
    groups = [list(range(len(graph.pairs)))[graph.into(len(graph.nodes))][::-1]]
    for node in reversed(range(len(graph.nodes))):
        if graph.splits(node):
            inside = graph.inside(node)
            if graph.length is not None or (graph.direct_step and graph.ssm == "conv"):
                groups.append([inside.stop + SSM_OUT])
            groups.append([inside.stop + SSM, inside.stop + SKIP, *range(len(graph.pairs))[graph.written(node)]])
            groups.append(list(range(len(graph.pairs)))[inside][SLICE][::-1])
        groups.append(list(range(len(graph.pairs)))[graph.into(node)][::-1])
    return groups


class Search:
    """The circuit as the search goes on.

    Attributes:
        mask: the edges still kept, ``[n_pairs, W]``.
        effects: the drop of the mean NLD of each edge that was tested, else NaN.
        tested: how many edges were tested.
        runs: how many candidate circuits were run.
    """

    def __init__(self, evaluator: Evaluator, mask: Bool[Tensor, "n_pairs W"], threshold: float) -> None:
        self.evaluator, self.graph, self.threshold = evaluator, evaluator.graph, threshold
        self.mask = mask.clone()
        self.effects = torch.full(mask.shape, math.nan, dtype=torch.float64)
        self.tested = self.runs = 0
        evaluator.start_from(mask)  # edges are tested backwards: below the node at hand the circuit is still this one
        self.nld = self._run([self.mask])[0]

    def test(self, group: list[int], exact: bool) -> None:
        """Test one node's edges and drop those that are not needed."""
        alive = self.graph.prune(self.mask)
        for i in group:
            self.mask[i] &= alive[i]
        edges = [(i, p) for i in group for p in self.mask[i].nonzero().flatten().tolist()]
        if exact:
            self._one_by_one(edges)
        else:
            self._together(edges)
        self._follow(group)

    def _together(self, edges: list[tuple[int, int]]) -> None:
        if not edges:
            return
        values = self._run([self._without([edge]) for edge in edges])
        dropped = []
        for edge, value in zip(edges, values, strict=True):
            self.effects[edge] = self.nld - value
            if self.nld - value <= self.threshold:
                dropped.append(edge)
        self.tested += len(edges)
        if dropped:
            self.mask = self._without(dropped)
            self.nld = self._run([self.mask])[0]

    def _one_by_one(self, edges: list[tuple[int, int]]) -> None:
        ahead = max(1, self.evaluator.batch_rows // min(self.evaluator.rows, self.evaluator.n_rows))
        while edges:
            chain = edges[:ahead]
            values = self._run([self._without(chain[: k + 1]) for k in range(len(chain))])
            dropped: list[tuple[int, int]] = []
            for edge, value in zip(chain, values, strict=True):
                self.effects[edge] = self.nld - value
                self.tested += 1
                if self.nld - value > self.threshold:
                    break
                self.nld = value
                dropped.append(edge)
            self.mask = self._without(dropped)
            edges = edges[min(len(dropped) + 1, len(chain)) :]

    def _follow(self, group: list[int]) -> None:
        """Keep ``skip -> out`` and ``ssm -> out`` only with the edges they continue."""
        continuations = {SKIP: SKIP_OUT} if self.graph.length is not None else {SKIP: SKIP_OUT, SSM: SSM_OUT}
        for node in filter(self.graph.splits, range(len(self.graph.nodes))):
            end = self.graph.inside(node).stop
            for edge, continuation in continuations.items():
                if end + edge in group:
                    self.mask[end + continuation] &= self.mask[end + edge]

    def _without(self, edges: list[tuple[int, int]]) -> Tensor:
        mask = self.mask.clone()
        for edge in edges:
            mask[edge] = False
        return mask

    def _run(self, masks: list[Tensor]) -> list[float]:
        """The mean metric of each candidate."""
        self.runs += len(masks)
        return self.evaluator.measure(torch.stack(masks)).score.double().mean(1).tolist()
