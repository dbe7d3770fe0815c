"""Edge attribution patching: how much the metric would change if an edge were resampled, by gradients (App. D.1).

    score(i -> j) = mean over rows of sum over positions and D of (corrupt_i - output_i) * grad_j

with grad_j the gradient of the normalized logit difference at j's input, averaged over steps between the clean (alpha =
0) and the corrupt run (alpha = 1), alpha_k = k / (steps - 1). Negative: resampling the edge lowers the metric, so the
edge is needed. One step is plain EAP, at the clean run (arXiv 2310.10348).

The two variants of integrated gradients:

``standard``
    EAP-IG on inputs (arXiv 2403.17806): the embeddings are interpolated and the rest of the model follows; output_i is
    the clean run's. So the sources are constants, every edge into one layer meets the same gradient, and scores of
    different steps differ by their gradient alone. In a linear model each score is the exact effect of resampling that
    edge alone, and the scores of the edges of any cut between embed and output sum to the metric's whole change. In any
    model the edges out of embed do so, as the number of steps grows (the completeness of integrated gradients).
``paper``
    As the paper's own code: in each step every edge is patched with weight alpha, output_i is that run's, and gradients
    pass through the patch. The gradient at a layer's input then comes through residual streams scaled by 1 - alpha: it
    shrinks with every step, and is exactly 0 at alpha = 1, where only the edges into the output still score.

Fine edges are scored in the same way, by the gradients at the conv's output, the gate and the SSM's output; inside
layers nothing is interpolated on its own, so coarse scores are the same with and without them. By the algebra, the
four slices' scores of a layer sum to that of ``conv -> ssm``; ``in -> skip`` and ``skip -> out`` are one value, and
score the same. Where positions are kept apart, ``ssm="tokens"`` has the writes and controls of each position in place
of ``conv -> ssm`` (see `graph`): their scores are the gradient at the scan's output times what resampling one of them
changes there, all from the same backward pass.

With positions, the sum over positions is not taken: (i -> j, p) has the share of position p. With marks it is taken by
places: (i -> j, mark) has, of each row, the share of the position where the mark stands in that row, and (i -> j,
``other``) the shares of all positions at none of the marks; a row without a mark adds nothing to it. So the scores of
an edge over its marks and ``other`` sum to its score without positions, and rows need not be aligned. Of an edge inside
a layer, the position is that of the destination's value (see `Graph`).

A batch costs a forward each for the clean and the corrupt run, and a forward and a backward a step; a Mamba's begin
at the position where the prompts part, before which every difference is zero. As each gradient arrives it is
contracted with the sources' differences: no [src, dst, D] tensor is ever held.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from ..checks import whole_number
from ..interventions.plan import Frozen
from ..memory import backward_bytes, fitting_rows, state_bytes
from ..remote.requests import ask, require_gradients
from ..result import Result
from ..tasks.pairs import Metric, PromptPairs, metric_name
from ..trace.conv import ConvStages, conv_terms
from ..trace.mixing import contracted
from ..trace.scan import ScanStages
from ..trace.tokens import controls_effects, written
from .circuit import edge_table
from .forward import Pass, Run, beginning, record, run_nodes
from .graph import SKIP, SKIP_OUT, SLICE, SSM, SSM_OUT, Graph
from .pairs import Pairs

VARIANTS = ("standard", "paper")
MOST_ROWS = 32


@torch.inference_mode(False)  # gradients are asked for here, whatever mode the caller is in
def eap(
    model,
    data: PromptPairs,
    *,
    steps: int = 5,
    positional: bool = False,
    marks: Sequence[str] | str | None = None,
    variant: Literal["standard", "paper"] = "standard",
    fine: bool = False,
    parts: bool = False,
    ssm: str = "conv",
    absolute: bool = True,
    metric: Metric | None = None,
    batch_rows: int | None = None,
    progress: bool = False,
) -> Result:
    """Score every edge by edge attribution patching with integrated gradients (paper, § 3.2, § 5 and App. D.1).

    Args:
        model: a model from `load_model`; with ``fine`` one with scans.
        data: pairs of prompts; aligned ones if ``positional``, unless ``marks`` are given.
        steps: how many points between clean and corrupt run the gradients are taken at; 1 is plain EAP.
        positional: keep positions apart: a score for (src, dst, position).
        marks: keep places apart instead of positions, each row's own: marks of the data, ``last``, or so many tokens
            after or before one, ``n1+1``. No two of them may stand at one position. Such scores are to be looked at:
            circuits are made of positions, or of edges without.
        variant: ``standard`` or ``paper``: what is interpolated, and whether gradients pass through the patch. See this
            module's text.
        fine: score also the edges inside mixers: conv slices, SSM and skip; with those of ``parts``.
        parts: split each block of several parts into mixer, attention and MLP (see `Graph`); one that is a mixer alone
            stays one node.
        ssm: what the edges conv -> ssm carry: ``conv``, or with ``positional`` and ``fine`` ``tokens``: the writes of
            each position to each later one, and the controls, in their place; `exact_effects` measures ``states`` too.
        absolute: the metric is the normalized logit difference over |max - min| (App. B), or else over max - min.
        metric: another metric, as `PromptPairs` has them, whose own change is scored; the pairs' own if None.
        batch_rows: how many rows run at once; as many, up to 32, as ``model.memory`` allows if None.
        progress: show a progress bar.

    Returns:
        A Result with one row an edge: src, dst, position (-1 if not positional), score: an estimate of the metric's
        change when the edge is resampled, averaged over rows. ``meta["graph"]`` says which graph was scored. By marks,
        the column ``mark`` takes the place of ``position``, and each edge has a row for each mark and for ``other``.

    Raises:
        ValueError: for data whose clean and corrupt prompts differ in length, or which are not aligned where positions
            are kept; for marks that are unknown or stand at one position; for an unknown variant, less than one step or
            ``ssm="states"``, or ``tokens`` without positions; on a server whose sandbox has no gradients; for a model
            that carries edits or hooks, or whose layers read more than the residual stream; for ``parts`` or ``fine``
            of blocks whose parts are not known.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant is one of {', '.join(VARIANTS)}, not {variant!r}")
    steps = whole_number(steps, "steps", least=1)
    if ssm not in ("conv", "tokens"):
        raise ValueError(f"eap estimates ssm='conv' or 'tokens'; of what carries the edges conv -> ssm, not {ssm!r}")
    if ssm == "tokens" and not (fine and positional and marks is None):
        raise ValueError("edges from token to token are scored with fine=True and positional=True, and without marks")
    if fine:
        model.require_mamba("edges inside a layer")
    require_gradients(model, "edge attribution patching")
    model.require_stream("circuits", edges=True)
    by_position = positional and marks is None
    pairs = Pairs.of(model, data, positional=by_position, marks=marks, metric=metric)
    graph = Graph(model.n_layers, fine, pairs.length if by_position else None, ssm, parts=parts).on(model)
    total = torch.zeros(len(graph.pairs), len(pairs.marks) or graph.width, dtype=torch.float64)
    row = backward_bytes(model, pairs.length - int(pairs.start[0])) + 2 * state_bytes(model)  # where runs begin
    rows = fitting_rows(model, row, MOST_ROWS) if batch_rows is None else batch_rows
    alphas = [k / max(steps - 1, 1) for k in range(steps)]
    batches = list(pairs.chunks(rows))
    with Frozen(model), tqdm(total=len(batches) * steps, desc="eap", disable=not progress) as bar:
        note = bar.update if model.remote is None else None
        for batch in batches:
            given = graph, batch, alphas, len(pairs), variant, absolute
            total += ask(model, attributed_batch, *given, aside=(note,))["scores"].cpu()
            if note is None:
                bar.update(steps)
    if not total.isfinite().all():
        raise ValueError("some scores are not finite: the model's activations or gradients overflow on these data")
    arguments = {
        "steps": steps,
        "positional": bool(positional or pairs.marks),
        "variant": variant,
        "fine": fine,
        "parts": parts,
    }
    arguments |= {"absolute": absolute, "metric": metric_name(pairs.metric)}
    arguments |= {"marks": pairs.marks[:-1]} if pairs.marks else {}
    return Result.create(
        "eap",
        score_table(graph, total, pairs.marks),
        model=model,
        arguments=arguments,
        graph=graph.stored(),
        n_rows=len(pairs),
    )


def score_table(graph: Graph, scores: Float[Tensor, "n_pairs width"], marks: Sequence[str] = ()) -> pd.DataFrame:
    """The scores as a tidy table: src, dst, position (-1 if edges are not kept apart by position), score.

    With ``marks``, these are what the columns of ``scores`` are of, and ``mark`` takes the place of ``position``.
    """
    if not marks:
        return edge_table(graph.edges()).assign(score=scores[graph.whole()].tolist())
    rows = [(src, dst, mark) for src, dst in graph.pairs for mark in marks]
    return pd.DataFrame(rows, columns=["src", "dst", "mark"]).assign(score=scores.flatten().tolist())


def table_of(scores: Result | pd.DataFrame) -> pd.DataFrame:
    """The table of scores that come as a result or as its table.

    Raises:
        ValueError: if they are neither.
    """
    table = scores.table if isinstance(scores, Result) else scores
    if not isinstance(table, pd.DataFrame):
        raise ValueError(f"scores are a Result or its table, not {type(scores).__name__}")
    return table


def attributed_batch(
    model,
    graph: Graph,
    batch: Pairs,
    alphas: list[float],
    n_rows: int,
    variant: str,
    absolute: bool,
    note: Callable[[], object] | None,
) -> dict[str, Float[Tensor, "n_pairs width"]]:
    """A batch's share of the ``scores``, which are over ``n_rows`` rows; here or on a server that has gradients."""
    total = torch.zeros(len(graph.pairs), len(batch.marks) or graph.width, dtype=torch.float64)
    parts = []
    for part in batch.to(model.device).batches(len(batch)):
        begins = beginning(model, part.clean, int(part.start[0]))
        runs = [record(model, ids, part.last, begins, graph=graph) for ids in (part.clean, part.corrupt)]
        _, spread = part.scale(*(one.logits for one in runs), absolute=absolute)
        spread = spread if part.metric == "nld" else torch.ones_like(spread)
        parts.append((part, *runs, 1 / (spread * n_rows * len(alphas))))
    for alpha in alphas:
        for part, clean, corrupt, weights in parts:
            scores = attribute(model, graph, part, clean, corrupt, weights, alpha, variant)
            total[:, -scores.shape[1] :] += scores
        if note is not None:
            note()
    return {"scores": total}


def attribute(
    model,
    graph: Graph,
    batch: Pairs,
    clean: Run,
    corrupt: Run,
    weights: Float[Tensor, "B"],
    alpha: float,
    variant: str,
) -> Float[Tensor, "n_pairs width"]:
    """One step's scores, at the positions from where the runs begin, or at the marks: one forward, one backward.

    ``weights`` turn each row's metric (of NLD, its logit difference) into its share.
    """
    begin, live = corrupt.begins.position, variant == "paper"
    places = None if batch.places is None else batch.places[:, begin:]
    visitor = Attributed(graph, alpha, corrupt, None if live else clean, places, len(batch.marks))
    with torch.enable_grad(), model.trace(batch.clean[:, begin:]):
        scores = attributed(model, visitor, batch, weights).save()  # pyright: ignore[reportAttributeAccessIssue]
    return scores.double().cpu()


def attributed(model, visitor: Attributed, batch: Pairs, weights) -> Tensor:
    """The body of `attribute`'s trace."""
    logits = run_nodes(model, visitor, batch.last)
    metric = (batch.value(logits) * weights).sum()
    torch.autograd.grad(metric, visitor.start)
    return visitor.scores


class Attributed(Pass):
    """Take the gradient at every layer's input, and contract it with the sources' differences.

    Args:
        graph: the edges to score.
        alpha: how far between clean (0) and corrupt (1) the run is.
        corrupt: the corrupt run.
        clean: the clean run, for sources that are constant (`standard`); None takes them from this run, in which every
            edge is patched with weight alpha (`paper`).
        places: the number of each position's place, ``[B, L]``, of the positions that run; None to keep apart positions
            if the graph does.
        n_places: how many places there are.
    """

    def __init__(
        self,
        graph: Graph,
        alpha: float,
        corrupt: Run,
        clean: Run | None,
        places: Tensor | None = None,
        n_places: int = 0,
    ) -> None:
        Pass.__init__(self, corrupt.begins, graph)
        self.graph, self.alpha, self.corrupt, self.clean = graph, alpha, corrupt, clean
        self.places = places
        self.width = n_places or (1 if graph.length is None else corrupt.sources[0].shape[1])
        self.scores = corrupt.sources[0].new_zeros(len(graph.pairs), self.width)
        self.differences: list[Tensor] = []
        self.base = corrupt.sources[0]

    def embed(self, value):
        there = self.corrupt.sources[0]
        if self.clean is not None:
            value = torch.lerp(self.clean.sources[0], there, self.alpha)
        self.start = value.detach().requires_grad_()
        self._difference(0, self.start)
        return self.start

    def into(self, node, resid):
        value = resid.clone() if self.clean is not None else torch.lerp(resid, self.base, self.alpha)
        return self.contracted(value, node, self.graph.before[node] + 1)

    def beside(self, node):
        there = self.corrupt.sources[0]
        value = self.start.clone() if self.clean is not None else torch.lerp(self.start, there, self.alpha)
        return self.contracted(value, node, 1)

    def contracted(self, value: Tensor, node: int, sources: int) -> Tensor:
        """A value that a node reads, whose gradient gives scores of the edges from the first sources into the node."""
        start, width, places = self.graph.into(node).start, self.width, self.places
        scores, differences = self.scores, self.differences

        def contract(gradient: Tensor) -> None:
            for source in range(sources):
                scores[start + source] += by_place(gradient * differences[source], width, places)

        value.register_hook(contract)
        return value

    def after(self, node, resid, added):
        self.base = self.base + self.corrupt.sources[node + 1]
        self._difference(node + 1, added)
        return resid + added

    def at(self, model, layer, site):
        Pass.at(self, model, layer, site)
        if not self.graph.fine or site.name != "skip":
            return
        gate: Tensor = model.layers[layer].mixer.gate
        end, width, scores, places = self.inside(layer).stop, self.width, self.scores, self.places
        d_gate = self.corrupt.inner[layer]["gate"] - self.here(layer, "gate", gate)

        def contract(gradient: Tensor) -> None:
            score = by_place(gradient * d_gate, width, places)
            scores[end + SKIP] += score
            scores[end + SKIP_OUT] += score

        gate.register_hook(contract)

    def opened(self, layer, stages):
        Pass.opened(self, layer, stages)
        if self.graph.fine:
            (self.conv if stages.KIND == "conv" else self.scan)(layer, stages)

    def conv(self, layer: int, conv: ConvStages) -> None:
        """Score the edges into the conv's taps, and from them into the scan."""
        inside, width, scores, places = self.inside(layer), self.width, self.scores, self.places
        convolved, weight, tokens = conv.peek("conv"), conv.weight.detach(), self.graph.writes
        d_input = self.corrupt.inner[layer]["conv_input"] - self.here(layer, "conv_input", conv.x.transpose(1, 2))

        def contract(gradient: Tensor) -> None:
            terms = conv_terms(d_input.transpose(1, 2), weight)
            by_slice = by_place(gradient[..., None] * terms, width, places, keep=-1)
            scores[inside][SLICE] += by_slice
            if not tokens:
                scores[inside.stop + SSM] += by_slice.sum(0)

        convolved.register_hook(contract)

    def scan(self, layer: int, scan: ScanStages) -> None:
        """Score the edge out of the scan, and those of writes and controls into it."""
        end, width, scores, places = self.inside(layer).stop, self.width, self.scores, self.places
        output, kind, A, initial = scan.peek("ssm_output"), type(scan), scan.peek("A").detach(), scan.initial
        writes, flows = self.graph.written(self.graph.mixers[layer]), None
        if self.graph.writes:
            names, live = ("ssm_input", "delta", "B", "C"), scan.flow()
            there = {name: self.corrupt.inner[layer][name] for name in names}
            flows = {name: self.here(layer, name, live[name]) for name in names}, there
        d_output = self.corrupt.inner[layer]["ssm_output"] - self.here(layer, "ssm_output", output)

        def contract(gradient: Tensor) -> None:
            scores[end + SSM_OUT] += by_place(gradient * d_output, width, places)
            if flows is not None:
                here, there = (kind.units(flow, A) for flow in flows)
                gain = gradient.to(here.delta).unflatten(-1, here.x.shape[2:])
                scores[end + SSM] += controls_effects(here, there, gain, initial)
                moved = contracted(here, range(width), gain, lambda s: written(there, s) - written(here, s))
                scores[writes][-width:] += moved.T

        output.register_hook(contract)

    def inside(self, layer: int) -> slice:
        """Where the edges inside a layer's mixer stand among all."""
        return self.graph.inside(self.graph.mixers[layer])

    def here(self, layer: int, name: str, live: Tensor) -> Tensor:
        """The value that the corrupt run's is compared with: the clean run's, or this run's."""
        return live.detach() if self.clean is None else self.clean.inner[layer][name]

    def _difference(self, source: int, value: Tensor) -> None:
        here = value if self.clean is None else self.clean.sources[source]
        self.differences.append((self.corrupt.sources[source] - here).detach())


def by_place(products: Tensor, width: int, places: Tensor | None, keep: int | None = None) -> Tensor:
    """Products [B, L, X] summed to [width]: over all, over all but L, or by the number of each position's place [B, L].

    With ``keep=-1``, [B, L, X, K] to [K, width].
    """
    products = products.to(torch.promote_types(products.dtype, torch.float32))
    if keep is not None:
        return torch.stack([by_place(products[..., k], width, places) for k in range(products.shape[keep])])
    if places is not None:
        return products.new_zeros(width).index_add(0, places.flatten(), products.sum(2).flatten())
    return products.sum((0, 2)) if width > 1 else products.sum()[None]
