"""Resampling edges: many candidate circuits in one forward, each with everything outside it taken from the corrupt run.

With the sources' values of the same run (paper, Equation 11),

    input_j = resid_j - sum_i (1 - keep_ij) d_i = corrupt_resid_j + sum_i keep_ij d_i,    d_i = output_i - corrupt_i

so any set of edges is resampled at once. Inner nodes of a Mamba layer blend their own value with the corrupt run's,
w live + (1 - w) corrupt; a state that is blended at a position is what the next one follows from, and of edges from
token to token each target's output is made of the writes that it takes.
Layers on no path from embed to output of any candidate are skipped, and so are those below the first node at which any
candidate differs from a circuit whose run is known. Positions before the prompts part are those of the corrupt run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..trace.conv import ConvStages, conv_terms
from ..trace.scan import ScanStages
from ..trace.tokens import exchanged
from .forward import Pass, Run, run_nodes
from .graph import SKIP, SKIP_OUT, SLICE, SSM, SSM_OUT, Graph


class Resampled(Pass):
    """Resample edges: a layer's input keeps of each source the share that its weight says, the rest is corrupt.

    The weights hold for C candidate circuits, each run on the same B prompts. A value is ``[c, B, L, D]``, c being 1 up
    to the first node where the candidates differ, and C from there on: what they share is computed once.

    Args:
        graph: which edges the weights are for.
        keep: ``[C, R, n_pairs, W]``: the share of each edge that is kept, 1 or 0 in a circuit; R is B for weights of
            each row's own, or 1; W is L in a positional graph, or 1.
        corrupt: the run that resampled values come from, on B prompts.
        share: whether candidates share what they have in common (only a Mamba's number of rows may change on the way).
        known: what each node gave in a circuit that every candidate is like in the edges into the first nodes.
        first: the first node that has to be run; after the last if they differ in the edges into the output alone.
    """

    def __init__(
        self,
        graph: Graph,
        keep: Float[Tensor, "C R n_pairs W"],
        corrupt: Run,
        share: bool = True,
        known: list[Float[Tensor, "B L D"]] | None = None,
        first: int = 0,
    ) -> None:
        Pass.__init__(self, corrupt.begins, graph)
        self.graph, self.corrupt, self.share, self.known, self.first = graph, corrupt, share, known, first
        self.candidates = keep.shape[0]
        device, dtype = corrupt.sources[0].device, corrupt.sources[0].dtype
        nodes = len(graph.nodes)
        self.mixes = [Mix.of(keep[:, :, graph.into(j)], device, dtype) for j in range(nodes + 1)]
        self.embeds: list = [narrow(keep[:, :, graph.into(j).start, :, None]).to(device, dtype) for j in range(nodes)]
        self.inner: dict = {}  # of each mixer's node, the weights inside it, and of its writes; none where all is kept
        self.writes: dict = {}
        for node in filter(graph.splits, range(nodes)):
            inner = keep[:, :, graph.inside(node).start : graph.written(node).stop]
            parts = narrow(inner).to(device, dtype).split([inner.shape[2] - graph.writes, graph.writes], dim=2)
            if (inner != 1).any():
                self.inner[node], self.writes[node] = parts
        self.live = graph.live_nodes((keep != 0).amax((0, 1, 3)))
        self.wanted = {source for mix in self.mixes[first:] for source, _ in mix.terms}
        self.base = torch.zeros_like(corrupt.sources[0])
        self.differences: list = []  # a tensor each, or None where a layer was skipped

    def embed(self, value):
        corrupt = self.corrupt.sources[0]
        value = value[None] if self.share else value.unflatten(0, (self.candidates, -1))
        self.base = corrupt
        self.differences = [value - corrupt]
        return value

    def beside(self, node):
        there = self.corrupt.sources[0]
        value = torch.lerp(there.expand_as(self.start), self.start, self.embeds[node])
        return value.expand(self.candidates, *value.shape[1:])

    def into(self, node, resid):
        mix = self.mixes[node]
        value = self.base[None] if mix.from_corrupt else resid
        for source, weight in mix.terms:
            if self.differences[source] is not None:
                value = torch.addcmul(value, self.differences[source], weight)
        if node in self.inner:
            value = value.expand(max(value.shape[0], self.inner[node].shape[0]), *value.shape[1:])
        return value if self.share else value.expand(self.candidates, *value.shape[1:])

    def skipped(self, node):
        return node < self.first or not self.live[node]

    def after(self, node, resid, added):
        corrupt = self.corrupt.sources[node + 1]
        self.base = self.base + corrupt
        if self.known is not None and node < self.first:
            added = self.known[node + 1][None]
        self.differences.append(None if added is None or node + 1 not in self.wanted else added - corrupt)
        return resid + (corrupt if added is None else added)

    def at(self, model, layer, site):
        Pass.at(self, model, layer, site)
        weights = self.inner.get(self.graph.mixers.get(layer)) if site.name == "skip" else None
        if weights is None:
            return
        kept, mixer = weights[:, :, SKIP] * weights[:, :, SKIP_OUT], model.layers[layer].mixer
        if (kept != 1).any():
            mixer.gate = blend(self.corrupt.inner[layer]["gate"], mixer.gate, kept[..., None])

    def opened(self, layer, stages):
        Pass.opened(self, layer, stages)
        node = self.graph.mixers[layer]
        if node not in self.inner:
            return
        weights = self.inner[node]
        if stages.KIND == "conv":
            self.conv(layer, stages, weights)
            return
        if self.graph.ssm == "states":
            self.resample_states(layer, stages, weights[:, :, SSM], weights[:, :, SSM_OUT])
            return
        if self.graph.ssm == "tokens":
            self.exchange(layer, stages, self.writes[node][:, :, self.begins.position :], weights[:, :, SSM])
        if (weights[:, :, SSM_OUT] != 1).any():
            kept = weights[:, :, SSM_OUT, :, None]
            stages.set("ssm_output", blend(self.corrupt.inner[layer]["ssm_output"], stages.peek("ssm_output"), kept))

    def conv(self, layer: int, conv: ConvStages, weights: Float[Tensor, "C R inner w"]) -> None:
        """Blend the conv's terms, and in a graph whose ssm is fed by the conv, their sum."""
        corrupt, apart = self.corrupt.inner[layer], self.graph.ssm != "conv"
        slices = weights[:, :, SLICE]
        if (slices != 1).any() or (not apart and (weights[:, :, SSM] != 1).any()):
            live = conv.peek("conv")
            if (slices != 1).any():
                change = corrupt["conv_input"].transpose(1, 2) - conv.x.unflatten(0, (-1, corrupt["gate"].shape[0]))
                terms = conv_terms(change.flatten(0, 1), conv.weight).unflatten(0, change.shape[:2])
                share = (1 - slices).movedim(2, -1)[..., None, :].to(terms)
                live = live + (terms * share).sum(-1).flatten(0, 1)
            conv.set("conv", live if apart else blend(corrupt["conv"], live, weights[:, :, SSM, :, None]))

    def resample_states(
        self, layer: int, scan: ScanStages, kept: Float[Tensor, "C R w"], read: Float[Tensor, "C R w"]
    ) -> None:
        """Put the corrupt run's states in place of the live ones, and read them in their place.

        Args:
            layer: which layer.
            scan: its scan.
            kept: the share of the live state, at each position or at all.
            read: the share of the live state in what is read there.
        """
        read = torch.where(kept == 0, 1, read)  # the state there is the corrupt run's already
        if kept.shape[-1] == 1 and ((kept == 0) | (kept == 1)).all():
            kept, read = torch.ones_like(kept), kept * read  # all states or none: what is read of them is all they do
        if (kept == 1).all() and (read == 1).all():
            return
        begins = self.begins.states
        there = CorruptStates(self.corrupt.inner[layer], scan, None if begins is None else begins[layer].ssm)
        length = scan.x.shape[1]
        cut = [t for t in range(length) if (at(kept, t) != 1).any()]
        if cut:
            scan.hold(lambda t, h: blend(there.at(t), h, at(kept, t)[(..., *[None] * (h.dim() - 1))]), cut)
        if (read != 1).any():
            corrupt = [scan.read(there.at(t), t) for t in range(length)]
            scan.set("y", blend(torch.stack(corrupt, dim=2), scan.peek("y"), read[..., None]))

    def exchange(
        self, layer: int, scan: ScanStages, writes: Float[Tensor, "C R s w"], controls: Float[Tensor, "C R w"]
    ) -> None:
        """Put the corrupt run's writes into outputs in place of the live ones, and its controls.

        Args:
            layer: which layer.
            scan: its scan.
            writes: the share of the live write at s that the output at each position takes.
            controls: the share of the live controls.
        """
        if (writes == 1).all() and (controls == 1).all():
            return
        corrupt, here = self.corrupt.inner[layer], scan.by_unit()
        there, y = scan.units(corrupt, scan.peek("A")), scan.peek("y").unflatten(-1, here.x.shape[2:])
        size = len(y) // len(writes)  # rows of a candidate; of all where they are the same
        there, parts = there.times(size // len(there.x)), []
        for one, kept, start in zip(writes, controls, range(0, len(y), size), strict=True):
            part, times = slice(start, start + size), 1 if len(one) == 1 else size // len(one)
            own = y[part], here.rows(part), there, one.repeat(times, 1, 1), kept.repeat(times, 1)
            parts.append(exchanged(*own, None if scan.initial is None else scan.initial[part]))
        scan.set("y", torch.cat(parts).flatten(2))


class CorruptStates:
    """The states of the corrupt run in one layer, position after position; one at a time is held."""

    def __init__(self, inner: dict[str, Tensor], scan: ScanStages, initial: Tensor | None) -> None:
        self.inner, self.scan, self.rows = inner, scan, len(inner["ssm_input"])
        zeros = inner["ssm_input"].new_zeros(self.rows, *scan.h_shape()[1:])
        self.initial = zeros if initial is None else initial.to(zeros)
        self.position, self.h = -1, self.initial

    def at(self, position: int) -> Float[Tensor, "B *state"]:
        """The state after a position, counted from where the run begins."""
        if position < self.position:
            self.position, self.h = -1, self.initial
        while self.position < position:
            self.position += 1
            self.h = self.scan.next_state(self.h, self.inner, self.position)
        return self.h


def at(weights: Float[Tensor, "C R w"], position: int) -> Float[Tensor, "C R"]:
    """The weights at a position; they may be those of all."""
    return weights[..., position if weights.shape[-1] > 1 else 0]


def blend(there: Tensor, live: Float[Tensor, "rows *value"], weight: Tensor) -> Float[Tensor, "rows *value"]:
    """``weight`` of the live value and the rest of the corrupt one, row by row, for C candidates on B prompts each.

    Args:
        there: the corrupt run's, ``[B, ...]``, or each candidate's.
        live: ``[C * B, ...]``.
        weight: ``[C, B or 1, ...]``.
    """
    live = live.unflatten(0, (-1, there.shape[-live.dim()]))
    return torch.lerp(there.expand_as(live), live, weight.to(live)).flatten(0, 1)


@dataclass(frozen=True)
class Mix:
    """How one layer's input is put together: from the live or from the corrupt stream, and terms weight * difference.

    Attributes:
        from_corrupt: whether the corrupt stream is the base (terms are what is kept), or the live one (terms are what
            is taken away); whichever needs fewer terms.
        terms: source and weight, ``[C or 1, R, W or 1, 1]``.
    """

    from_corrupt: bool
    terms: list[tuple[int, Tensor]]

    @classmethod
    def of(cls, keep: Float[Tensor, "C R n_src W"], device, dtype) -> Mix:
        keep = narrow(keep)
        kept, dropped = ((keep != value).amax((0, 1, 3)).nonzero().flatten().tolist() for value in (0, 1))
        from_corrupt = len(kept) <= len(dropped)
        weights = keep if from_corrupt else keep - 1
        weights = weights.to(device, dtype)
        sources = kept if from_corrupt else dropped
        return cls(from_corrupt, [(source, weights[:, :, source, :, None]) for source in sources])


def narrow(keep: Float[Tensor, "C ..."]) -> Float[Tensor, "c ..."]:
    """The candidates' weights, or one candidate's if they are all the same."""
    return keep[:1] if (keep == keep[:1]).all() else keep


def resampled_logits(
    model,
    graph: Graph,
    tokens: Int[Tensor, "B L"],
    read: Int[Tensor, "B"],
    corrupt: Run,
    keep: Float[Tensor, "C R n_pairs W"] | Bool[Tensor, "C R n_pairs W"],
    base: BaseCircuit | None = None,
) -> Float[Tensor, "C B V"]:
    """The logits of C candidate circuits in one forward, everything outside each of them resampled.

    Args:
        model: a `CausalLM` from `load_model`; fine graphs need one with scans.
        graph: which edges there are.
        tokens: the prompts that run.
        read: the position to read logits at, per prompt.
        corrupt: `record` of the prompts that resampled values come from (with ``fine`` if the graph is), which begins
            no later than the prompts part.
        keep: which edges are kept: a bool, or a share. R is B (each row its own circuit) or 1, W is L or 1.
        base: `run_circuit` of a circuit on the same prompts: the nodes below those where the candidates differ from
            it are not run.

    Raises:
        ValueError: if the weights fit neither graph nor prompts, or the corrupt run was recorded for another ``ssm``.
    """
    weights, graph = _weights(graph, tokens, corrupt, keep), graph.on(model)
    sources, first = (None, 0) if base is None else (base.sources, first_difference(graph, keep, base.mask))
    candidates, share = keep.shape[0], bool(model.all_scans)
    visitor = Resampled(graph, weights, corrupt, share, sources, first)
    ids = tokens[:, corrupt.begins.position :]
    with torch.no_grad(), model.trace(ids if share else ids.repeat(candidates, 1)):
        logits = run_nodes(model, visitor, read).save()  # pyright: ignore[reportAttributeAccessIssue]
    logits = logits.unflatten(0, (-1, len(tokens)))
    return logits.expand(candidates, -1, -1)


@dataclass(frozen=True)
class BaseCircuit:
    """A circuit, and what embed and each node added to the residual stream in its run."""

    mask: Bool[Tensor, "n_pairs W"]
    sources: list[Float[Tensor, "B L D"]]


class Kept(Resampled):
    """Resample one circuit's edges and keep what every node gives: all layers run, on a path from embed or not."""

    def embed(self, value):
        value = Resampled.embed(self, value)
        self.given = [value[0]]
        return value

    def skipped(self, node):
        return False

    def after(self, node, resid, added):
        self.given.append(added[0])
        return Resampled.after(self, node, resid, added)


def run_circuit(
    model, graph: Graph, tokens: Int[Tensor, "B L"], corrupt: Run, mask: Bool[Tensor, "n_pairs W"]
) -> BaseCircuit:
    """Run one circuit, for candidates that are like it in the edges into the first nodes to go on from."""
    keep, read = _weights(graph, tokens, corrupt, mask[None, None]), torch.full_like(tokens[:, 0], tokens.shape[1] - 1)
    visitor = Kept(graph.on(model), keep, corrupt)
    with torch.no_grad(), model.trace(tokens[:, corrupt.begins.position :]):
        found = given(model, visitor, read).save()  # pyright: ignore[reportAttributeAccessIssue]
    return BaseCircuit(mask, found)


def given(model, visitor: Kept, read: Tensor) -> list[Tensor]:
    """The body of `run_circuit`'s trace."""
    run_nodes(model, visitor, read)
    return visitor.given


def first_difference(
    graph: Graph, keep: Float[Tensor, "C R n_pairs W"] | Bool[Tensor, "C R n_pairs W"], mask: Bool[Tensor, "n_pairs W"]
) -> int:
    """The first node with an edge into it or inside it that any candidate keeps and the circuit does not, or reversed.

    How many nodes there are if only edges into the output differ, or none.
    """
    unlike = (keep != mask.to(keep)).flatten(0, 1).any(0).any(1)
    for node in range(len(graph.nodes)):
        if unlike[graph.into(node).start : graph.written(node).stop].any():
            return node
    return len(graph.nodes)


def _weights(graph: Graph, tokens: Tensor, corrupt: Run, keep: Tensor) -> Float[Tensor, "C R n_pairs w"]:
    """The weights at the positions that run, if they fit graph and prompts."""
    batch, length = tokens.shape
    rows, pairs, width = keep.shape[1:]
    if rows not in (1, batch) or pairs != len(graph.pairs) or width != graph.width or width not in (1, length):
        raise ValueError(
            f"weights of shape {tuple(keep.shape)} do not fit {len(graph.pairs)} edges, {graph.width} positions, "
            f"{batch} rows and prompts of length {length}"
        )
    start, (others, left) = corrupt.begins.position, corrupt.sources[0].shape[:2]
    if (others, start + left) != tokens.shape:
        there = others, start + left
        raise ValueError(f"clean and corrupt prompts must have one shape, not {tuple(tokens.shape)} and {there}")
    if graph.fine and corrupt.ssm != graph.ssm:
        raise ValueError(f"the corrupt run must be recorded as the graph is, with ssm={graph.ssm!r}")
    kept = keep.float().where(graph.whole(), 1.0) if graph.writes else keep.float()
    return kept[..., start if width > 1 else 0 :]
