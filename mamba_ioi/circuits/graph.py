"""The computational graph of a residual network: its nodes, its edges, and which of them lie on a path.

Nodes: ``embed``, the layers ``0`` … ``n-1``, ``output`` (the residual stream after the last layer, at the last
position). An edge (i, j) carries what i adds to the residual stream into j's input (paper, Figure 3 and Equation 11).

Fine nodes split each layer (App. D.2). ``39`` then stands for the layer's input where an edge leaves it inwards, and
for its output where an edge enters it from inside; eight edges connect them, of a conv with K taps K + 4:

    39 -> 39.conv[-3], 39.conv[-2], 39.conv[-1], 39.conv[0]     the K terms whose sum, with the bias, is 39.conv
    39.conv -> 39.ssm                                           the conv's output, which the SSM (and B, C, delta) reads
    39 -> 39.skip                                               the gate's input
    39.ssm -> 39, 39.skip -> 39                                 the SSM's output before gating, and the gate

A slice reaches ``39.conv`` always: that sum is no edge, since to cut it is to cut the edge into the slice. So a graph
of n layers has (n + 1)(n + 2) / 2 coarse edges (1225 for 48 layers) and 8n fine ones more (1609).

With ``length``, every edge is kept apart by position: (i, j, p) carries what i adds at p; inside a layer, p is the
position of the *destination's* value (of a conv slice: the output position, its term coming from p + slice).

What the edge ``39.conv -> 39.ssm`` carries, and ``39.ssm -> 39`` after it, is said by ``ssm``:

``conv``
    (The default.) The conv's output, from which the scan gets x, B, C and delta; all four are resampled with it. What
    ``39.ssm -> 39`` carries is the scan's output, D x included.
``states``
    The states h, as in the authors' ACDC. To cut the edge at a position is to put the corrupt run's state there, from
    which the later states follow; without positions, the states of all positions are the corrupt run's. C and D x stay
    live: through them the conv's output reaches the layer's output whatever is cut, along no edge. ``39.ssm -> 39``
    carries what is read of the states, C h: to cut it at a position is to read the corrupt run's state there, and the
    later states stay as they are. Without positions the two edges are one.

``tokens``
    What one position gives to another. It needs positions, and in the edge's place there are

        39.write[s] -> 39.ssm      at t >= s: what the write at s (B_bar x there) gives to the scan's output at t
        39.controls -> 39.ssm      at t: delta, as the state decays there, and C, by which it is read

    To cut a write is to put the corrupt run's write at s in its place in the output at t alone, under the decays and C
    that are there; to cut the controls at t, to let the state decay by the corrupt run's delta there, for all outputs
    from t on, and read it by the corrupt run's C. D x stays live: through it the conv's output reaches the scan's at
    its own position, along no edge. ``39.ssm -> 39`` carries the scan's output, D x included.

Parts split a block of a hybrid or a transformer: ``3`` is then its mixer alone, ``3.attn`` its attention, ``3.mlp`` its
MLP or experts; a block has those of the three that it consists of. Mixer and attention read the stream as it comes into
the block, the MLP reads it with what they add (``3 -> 3.mlp``, ``3.attn -> 3.mlp``), or where it stands beside the
attention, without. A block's parts add up to what the block adds, so by ``eap``'s standard variant the scores of the
edges from the parts of one block to those of another sum to the score of the edge between the two.

Of such blocks the fine nodes are the parts, and those inside the mixers: attention and MLP stay whole. So a fine graph
of a hybrid is one of parts, whether that is asked for or not.

In a Mamba-2 the conv gives x, B and C, and the time step delta comes from the layer's input beside it, along no edge
(``direct_step``): it stays live whatever is cut, but for states, writes, controls and outputs that are the corrupt
run's themselves. In a Zamba2 a shared block reads the layer's input, and what it gives enters the mixer alone: so the
mixer reads what comes into the layer at earlier positions too (``mixed_input``).

Order: edges by destination (nodes, then output), then source (embed, nodes); a layer's inner edges follow those into
it, as listed above, and after them its writes; positions of an edge are adjacent.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from ..checks import integer, scalar
from ..trace.anatomy import given_embeddings

Edge = tuple[str, str] | tuple[str, str, int]
"""``(src, dst)``, or ``(src, dst, position)``."""

EMBED, OUTPUT = "embed", "output"
TAPS = 4
"""How many taps a conv has unless a graph says otherwise."""
SLICE, SSM, SKIP, SSM_OUT, SKIP_OUT = slice(0, -4), -4, -3, -2, -1
"""Where the edges inside a layer stand among them, counted from their end."""
SSM_CUTS = ("conv", "states", "tokens")
MIXER, ATTN, MLP = "", ".attn", ".mlp"
"""What the names of a block's parts end in."""
WHOLE, EVERY = ((MIXER,),), ((MIXER, ATTN), (MLP,))
"""A block that is one node, and one that has all parts: those side by side together, one after another."""
_NODE = re.compile(r"embed|output|\d+(\.(conv(\[(-[1-9]\d*|0)\])?|ssm|skip|controls|write\[\d+\]|attn|mlp))?")

Parts = tuple[tuple[str, ...], ...]
"""A block's nodes as in `EVERY`."""


def inner_edges(layer: int, taps: int = TAPS, writes: int = 0) -> list[tuple[str, str]]:
    """The edges inside a layer whose conv has so many taps, in order.

    Those of so many positions' writes, if any, follow, and the controls are in the place of conv.
    """
    node = str(layer)
    slices = [(node, f"{node}.conv[{s}]") for s in range(1 - taps, 1)]
    return [
        *slices,
        (f"{node}.controls" if writes else f"{node}.conv", f"{node}.ssm"),
        (node, f"{node}.skip"),
        (f"{node}.ssm", node),
        (f"{node}.skip", node),
        *((f"{node}.write[{s}]", f"{node}.ssm") for s in range(writes)),
    ]


def layer_of(node: str) -> int | None:
    """The layer that a node is, or lies in; None for embed and output.

    Raises:
        ValueError: if there is no such node in any graph.
    """
    if not isinstance(node, str) or not _NODE.fullmatch(node):
        known = "'embed', '0', …, 'output', '0.conv[-1]', '0.ssm', '0.skip', '0.attn', '0.mlp'"
        raise ValueError(f"{node!r} is no node: nodes are {known}")
    return None if node in (EMBED, OUTPUT) else int(node.split(".")[0])


def is_inner(node: str) -> bool:
    """Whether a node lies inside a layer's mixer."""
    return "." in node and not node.endswith((ATTN, MLP))


def _block(node: str) -> str:
    """The block that a node is, or is a part of; embed and output themselves."""
    return node.split(".")[0]


def parts_of(model) -> tuple[Parts, ...] | bool:
    """The parts of each block of a model; False if mixers are all that there is.

    Raises:
        ValueError: for a block whose parts are not known.
    """
    found: list[Parts] = []
    for layer in range(model.n_layers):
        sites = model.sites_of(layer)
        first = tuple(end for end, site in ((MIXER, "layer_input"), (ATTN, "attn_in")) if site in sites)
        if not first and "mlp_in" not in sites:
            raise ValueError(f"the parts of layer {layer} of {model.model_id} are not known: leave parts and fine out")
        mlp = (MLP,) if "mlp_in" in sites else ()
        groups = (first, mlp) if "resid_mid" in sites else (first + mlp,)
        found.append(tuple(group for group in groups if group))
    return any(block != WHOLE for block in found) and tuple(found)


@dataclass(frozen=True)
class Graph:
    """All edges of a model.

    Attributes:
        n_layers: how many layers (blocks) the model has.
        fine: whether mixers are split into conv slices, SSM and skip; of a hybrid, also blocks into parts, by `on`.
        length: the number of positions, if edges are kept apart by position.
        ssm: what the edge into a layer's SSM carries, ``conv`` or ``states``, or ``tokens``; without fine nodes it has
            no meaning.
        direct_step: whether a layer's time step comes from its input and not out of its conv, as in a Mamba-2.
        taps: how many taps the layers' convs have; without fine nodes it has no meaning.
        mixed_input: whether a mixer's input holds what comes into its layer at earlier positions, as in a Zamba2.
        parts: whether blocks are split into mixer, attention and MLP, or the parts of each block, those that stand side
            by side together; True: of every block all three. `on` takes those that a model has.
        nodes: the nodes between embed and output, in order.
        before: how many of them each node, and after them the output, reads.
        mixers: the number of the node that is each layer's mixer, by layer, where it has one.
        starts: where the edges into each node, and after them into the output, begin in `pairs`.
        pairs: every (src, dst), in order; n_pairs of them.
        index: where each (src, dst) stands in `pairs`.
    """

    n_layers: int
    fine: bool = False
    length: int | None = None
    ssm: str = "conv"
    direct_step: bool = False
    taps: int = TAPS
    parts: bool | tuple[Parts, ...] = False
    mixed_input: bool = False
    nodes: tuple[str, ...] = field(init=False, repr=False, compare=False)
    before: tuple[int, ...] = field(init=False, repr=False, compare=False)
    mixers: dict[int, int] = field(init=False, repr=False, compare=False)
    starts: tuple[int, ...] = field(init=False, repr=False, compare=False)
    # computed here and not by cached_property, which holds a lock: a graph travels to servers
    pairs: tuple[tuple[str, str], ...] = field(init=False, repr=False, compare=False)
    index: dict[tuple[str, str], int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        n_layers, length = integer(self.n_layers), integer(self.length)
        if n_layers is None or n_layers < 1 or (self.length is not None and (length is None or length < 1)):
            raise ValueError(f"a graph has at least one layer and one position, not {self.n_layers} and {self.length}")
        if self.ssm not in SSM_CUTS:
            raise ValueError(f"ssm is what the edge conv -> ssm carries, conv, states or tokens, not {self.ssm!r}")
        if self.fine and self.ssm == "tokens" and length is None:
            raise ValueError("edges from token to token (ssm='tokens') are kept apart by position: give a length")
        if (taps := integer(self.taps)) is None or taps < 1:
            raise ValueError(f"a conv has at least one tap, not {self.taps!r}")
        object.__setattr__(self, "n_layers", n_layers)
        object.__setattr__(self, "length", length)
        self._place_nodes()
        found: list[tuple[str, str]] = []
        starts: list[int] = []
        layers = {node: layer for layer, node in self.mixers.items()}
        for i, node in enumerate((*self.nodes, OUTPUT)):
            starts.append(len(found))
            found += [(source, node) for source in self.sources(i)]
            if self.fine and i in layers:
                found += inner_edges(layers[i], self.taps, self.writes)
        object.__setattr__(self, "starts", tuple(starts))
        object.__setattr__(self, "pairs", tuple(found))
        object.__setattr__(self, "index", {pair: i for i, pair in enumerate(found)})

    def _place_nodes(self) -> None:
        """Order the nodes, by the parts of each block."""
        if isinstance(self.parts, Iterable):
            parts = tuple(tuple(map(tuple, block)) for block in self.parts)
            ends = {end for block in parts for group in block for end in group}
            if len(parts) != self.n_layers or not ends <= {MIXER, ATTN, MLP}:
                raise ValueError(f"parts are True, or {MIXER!r}, {ATTN!r} and {MLP!r} of {self.n_layers} blocks")
            object.__setattr__(self, "parts", parts)
        nodes: list[str] = []
        before: list[int] = []
        mixers: dict[int, int] = {}
        for layer, block in enumerate(self.blocks):
            for group in block:
                before += [len(nodes)] * len(group)
                if MIXER in group:
                    mixers[layer] = len(nodes) + group.index(MIXER)
                nodes += [f"{layer}{end}" for end in group]
        object.__setattr__(self, "nodes", tuple(nodes))
        object.__setattr__(self, "before", (*before, len(nodes)))
        object.__setattr__(self, "mixers", mixers)

    @property
    def blocks(self) -> tuple[Parts, ...]:
        """The parts of each block, in order of execution."""
        if isinstance(self.parts, tuple):
            return self.parts
        return (EVERY if self.parts else WHOLE,) * self.n_layers

    @classmethod
    def of(cls, n_layers: int, edges: Iterable[Edge]) -> Graph:
        """The smallest kind of graph that holds these edges: fine, of parts or positional if one of them is.

        Its ssm is ``tokens`` if a write or controls are among them, else ``conv``.
        """
        edges = list(edges)
        positional = {len(edge) == 3 for edge in edges}
        if len(positional) > 1:
            raise ValueError("edges are either all (src, dst) or all (src, dst, position)")
        nodes = [str(node) for edge in edges for node in edge[:2]]
        fine = any(is_inner(node) for node in nodes)
        positions = [edge[2] for edge in edges if len(edge) == 3]
        length = 1 + max(positions) if positions else None
        tokens = any("." in edge[0] and edge[0].split(".")[1].startswith(("write[", "controls")) for edge in edges)
        parts = any("." in node and not is_inner(node) for node in nodes)
        return cls(n_layers, fine, length, "tokens" if tokens else "conv", parts=parts)

    def on(self, model) -> Graph:
        """The same graph of this model: its taps, its parts, and where it says that time steps come from.

        Raises:
            ValueError: for a fine graph of a model that is no Mamba, or blocks whose parts are not known.
        """
        if self.fine:
            model.require_mamba("edges inside a layer")
        sizes = model.sizes()
        mixed = any(given_embeddings(model.layers[layer]) for layer in range(model.n_layers))
        inner = {"direct_step": "H" in sizes, "taps": sizes.get("K", self.taps), "mixed_input": mixed}
        return replace(self, **inner, parts=(self.fine or self.parts) and parts_of(model))

    @property
    def inner_kind(self) -> dict[str, Any]:
        """What tells how layers look inside: ``ssm``, ``direct_step``, ``taps``, ``parts``, ``mixed_input``."""
        return {name: getattr(self, name) for name in ("ssm", "direct_step", "taps", "parts", "mixed_input")}

    @property
    def width(self) -> int:
        """The size of a mask's second dimension: `length`, or 1 if edges are not kept apart by position."""
        return self.length or 1

    @property
    def writes(self) -> int:
        """How many positions' writes are sources of edges in each layer: all, or none."""
        return self.length or 0 if self.fine and self.ssm == "tokens" else 0

    def __len__(self) -> int:
        return len(self.pairs) * self.width - len(self.mixers) * self.writes * (self.writes - 1) // 2

    def whole(self) -> Bool[Tensor, "n_pairs width"]:
        """The mask of all edges: every pair at every position, but for writes at positions before them."""
        mask = torch.ones(len(self.pairs), self.width, dtype=torch.bool)
        for node in self.mixers.values() if self.writes else ():
            mask[self.written(node)].triu_()
        return mask

    def stored(self) -> dict[str, Any]:
        """What tells the graph, as a result's ``meta["graph"]`` holds it."""
        return {"n_layers": self.n_layers, "fine": self.fine, "length": self.length} | self.inner_kind

    def sources(self, node: int) -> list[str]:
        """The nodes with an edge into a node of `nodes` (the number of them all stands for the output)."""
        return [EMBED, *self.nodes[: self.before[node]]]

    def into(self, node: int) -> slice:
        """Where the edges into a node's input stand in `pairs` (the number of all nodes: into the output)."""
        start = self.starts[node]
        return slice(start, start + self.before[node] + 1)

    def splits(self, node: int) -> bool:
        """Whether a node has edges inside: it is a mixer, in a fine graph."""
        return self.fine and node in self.mixers.values()

    def inside(self, node: int) -> slice:
        """Where a node's inner edges stand in `pairs`, but for its writes; an empty slice where it has none."""
        start = self.into(node).stop
        return slice(start, start + self.taps + 4 if self.splits(node) else start)

    @property
    def slices(self) -> range:
        """The taps, as conv slices."""
        return range(1 - self.taps, 1)

    def written(self, node: int) -> slice:
        """Where the edges of a node's writes stand in `pairs`; an empty slice where it has none."""
        start = self.inside(node).stop
        return slice(start, start + self.writes if self.splits(node) else start)

    def edges(self, mask: Bool[Tensor, "n_pairs width"] | None = None) -> tuple[Edge, ...]:
        """The edges that a mask holds, in order; all of them without a mask."""
        if mask is None:
            mask = self.whole()
        held = (mask & self.whole()).nonzero().tolist()
        return tuple((*self.pairs[i], p) if self.length else self.pairs[i] for i, p in held)

    def mask(self, edges: Iterable[Edge]) -> Bool[Tensor, "n_pairs width"]:
        """Which edges are among those given. In a positional graph, (src, dst) stands for all its positions.

        Raises:
            ValueError: for an edge that is not in the graph.
        """
        mask, whole = torch.zeros(len(self.pairs), self.width, dtype=torch.bool), self.whole()
        for edge in edges:
            pair, position = (str(scalar(edge[0])), str(scalar(edge[1]))), integer(edge[2]) if len(edge) == 3 else None
            outside = len(edge) == 3 and (position is None or not 0 <= position < (self.length or 0))
            there = None if pair not in self.index or outside else whole[self.index[pair]]
            if there is None or (position is not None and not there[position]):
                raise ValueError(f"the edge {edge!r} is not in {self}")
            at = slice(None) if position is None else position
            mask[self.index[pair], at] = there[at]
        return mask

    def refine(
        self, mask: Bool[Tensor, "n_pairs width"], parts: bool | tuple[Parts, ...] = False
    ) -> tuple[Graph, Bool[Tensor, "n_fine width"]]:
        """The fine graph, and the same circuit in it, with everything inside every layer kept.

        Args:
            mask: the circuit.
            parts: the parts of each block, if they are several: what a graph of whole blocks is split into first.
        """
        if self.fine:
            return self, mask
        graph = replace(self, fine=True, parts=self.parts or parts)
        fine = graph.whole()
        for i, (src, dst) in enumerate(graph.pairs):
            pair = (src, dst) if self.parts else (_block(src), _block(dst))
            if not (is_inner(src) or is_inner(dst)) and pair in self.index:
                fine[i] = mask[self.index[pair]]
        return graph, fine

    def prune(self, mask: Bool[Tensor, "n_pairs width"]) -> Bool[Tensor, "n_pairs width"]:
        """Keep only edges on a path from embed to output; the others change nothing in any run.

        A source whose input is all resampled gives what it gives in the corrupt run, and what reaches no output is
        never read. Positions: a layer passes what it receives at p to any position from p on (which holds for a
        causal model), the gate and an MLP to p alone; the output is read at the last position. Where ``ssm`` is
        ``states``, the conv's output reaches the layer's output at its own position without an edge, and where it is
        ``tokens`` the scan's.
        """
        return mask & self.whole() & self._reach(mask) & self._needed(mask)

    def live_nodes(self, kept: Bool[Tensor, "n_pairs"]) -> list[bool]:
        """Whether each node may lie on a path, of edges of which any position is kept."""
        plain = replace(self, length=None, ssm="conv" if self.writes else self.ssm)
        mask = torch.zeros(len(plain.pairs), 1, dtype=torch.bool)
        for node in range(len(self.nodes) + 1):
            mask[plain.into(node), 0] = kept[self.into(node)]
            if self.splits(node):
                mask[plain.inside(node), 0] = kept[self.inside(node)]
                if self.writes:  # by D x at least
                    mask[plain.inside(node)][SSM] = True
        used = plain.prune(mask)
        return [bool(used[plain.into(node)].any()) for node in range(len(self.nodes))]

    def _reach(self, mask: Tensor) -> Tensor:
        """Which edges have a source that a path from embed reaches, ``[n_pairs, width]``."""
        reached = torch.zeros_like(mask)
        outputs = [torch.ones(self.width, dtype=torch.bool)]
        for node in range(len(self.nodes) + 1):
            into = self.into(node)
            reached[into] = torch.stack(outputs[: self.before[node] + 1])
            arrives = (mask[into] & reached[into]).any(0)
            if node == len(self.nodes):
                break
            if not self.splits(node):
                outputs.append(arrives if self.nodes[node].endswith(MLP) else self._onwards(arrives))
                continue
            arrives = self._onwards(arrives) if self.mixed_input else arrives
            inner, kept = reached[self.inside(node)], mask[self.inside(node)]
            inner[SLICE] = torch.stack([self._shift(arrives, -s) for s in self.slices])
            conv = (inner[SLICE] & kept[SLICE]).any(0)
            step = arrives & self.direct_step
            inner[SKIP] = arrives
            if self.ssm == "conv":
                inner[SSM] = conv
                inner[SSM_OUT] = self._onwards((inner[SSM] & kept[SSM]) | step)
            elif self.ssm == "tokens":
                writes = self.written(node)
                inner[SSM], reached[writes] = conv | step, (conv | step)[:, None]
                written = (mask[writes] & reached[writes]).any(0)
                inner[SSM_OUT] = written | self._onwards(inner[SSM] & kept[SSM]) | conv
            else:
                inner[SSM_OUT] = self._carried(conv | step, kept[SSM])
                inner[SSM] = conv | step | self._shift(inner[SSM_OUT], 1)
            inner[SKIP_OUT] = inner[SKIP] & kept[SKIP]
            through = (inner[SSM_OUT] & kept[SSM_OUT]) | (inner[SKIP_OUT] & kept[SKIP_OUT])
            outputs.append(through | conv if self.ssm == "states" else through)
        return reached

    def _needed(self, mask: Tensor) -> Tensor:
        """Which edges have a destination from which a path leads to the output, ``[n_pairs, width]``."""
        needed = torch.zeros_like(mask)
        last = torch.zeros(self.width, dtype=torch.bool)
        last[-1] = True
        final = self.into(len(self.nodes))
        needed[final] = last
        leaves = (mask & needed)[final][1:]
        for node in reversed(range(len(self.nodes))):
            if self.splits(node):
                inner, kept = needed[self.inside(node)], mask[self.inside(node)]
                inner[SSM_OUT] = inner[SKIP_OUT] = leaves[node]
                read = leaves[node] & kept[SSM_OUT]
                inner[SKIP] = leaves[node] & kept[SKIP_OUT]
                if self.ssm == "conv":
                    step = inner[SSM] = self._backwards(read)
                    inner[SLICE] = inner[SSM] & kept[SSM]
                elif self.ssm == "tokens":
                    writes = self.written(node)
                    inner[SSM], needed[writes] = self._backwards(read), read
                    step = (inner[SSM] & kept[SSM]) | (mask[writes] & needed[writes]).any(1)
                    inner[SLICE] = step | read
                else:
                    carried = step = self._carried(read.flip(0), kept[SSM].flip(0)).flip(0)
                    inner[SSM] = read | self._shift(carried, -1)
                    inner[SLICE] = carried | leaves[node]
                through = [self._shift(inner[k] & kept[k], s) for k, s in enumerate(self.slices)]
                arrives = torch.stack([*through, inner[SKIP] & kept[SKIP], step & self.direct_step]).any(0)
                arrives = self._backwards(arrives) if self.mixed_input else arrives
            else:
                at_once = self.nodes[node].endswith(MLP)
                arrives = leaves[node] if at_once else self._backwards(leaves[node])
            into = self.into(node)
            needed[into] = arrives
            leaves[: self.before[node]] |= (mask[into] & arrives)[1:]
        return needed

    def _carried(self, begins: Bool[Tensor, "width"], kept: Bool[Tensor, "width"]) -> Bool[Tensor, "width"]:
        """Where a state holds what came in at that position or before it, with no cut from there on."""
        places = torch.arange(len(kept))
        came, cut = (torch.where(at, places, -1).cummax(0).values for at in (begins, ~kept))
        return came > cut

    def _onwards(self, at: Bool[Tensor, "width"]) -> Bool[Tensor, "width"]:
        """The positions from any of these on."""
        return at.int().cummax(0).values.bool()

    def _backwards(self, at: Bool[Tensor, "width"]) -> Bool[Tensor, "width"]:
        """The positions up to any of these."""
        return self._onwards(at.flip(0)).flip(0)

    def _shift(self, at: Bool[Tensor, "width"], by: int) -> Bool[Tensor, "width"]:
        """Moved ``by`` positions later (not at all if edges are not kept apart by position)."""
        if self.length is None or by == 0:
            return at
        moved = torch.zeros_like(at)
        if by > 0:
            moved[by:] = at[:-by]
        else:
            moved[:by] = at[-by:]
        return moved


def describe(edges: Sequence[Edge]) -> str:
    """Edges as text for a message: ``embed->3, 3->output``."""
    return ", ".join(f"{edge[0]}->{edge[1]}" + (f"@{edge[2]}" if len(edge) == 3 else "") for edge in edges)
