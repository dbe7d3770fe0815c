"""Circuits for other tools: the MIB circuit format and Graphviz DOT. (`Circuit.save` writes the format of our own.)"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from ..checks import whole_number
from ..files import replace_files
from ..result import Result
from .circuit import Circuit, edge_table
from .graph import EMBED, OUTPUT, Edge, is_inner, layer_of
from .search import scored_graph


def to_mib(path: str | os.PathLike[str], circuit: Circuit, *, d_model: int, scores: Result | None = None) -> Path:
    """Write a circuit as JSON in the format of MIB's circuit track (arXiv 2504.13151) and the EAP-IG package.

    A layer of ours is an MLP node there (``m39``) in a model without attention heads; embed is ``input``, the output
    ``logits``. Scores change sign: there, a higher score marks an edge that is more needed. Edges of no score have 0.

    Args:
        path: the file to write.
        circuit: a coarse circuit without positions, which is what the format can hold.
        d_model: the width of the residual stream.
        scores: of every edge, from `eap`; the circuit's own if not given.

    Raises:
        ValueError: if the circuit is fine, of parts or positional, or the scores are.
    """
    graph = circuit.graph
    if graph.fine or graph.parts or graph.length is not None:
        raise ValueError("the MIB format holds circuits without positions and without nodes inside layers")
    known: dict[tuple[str, str], float] = {}
    if scores is not None:
        scored, values = scored_graph(scores, circuit.n_layers)
        if scored.fine or scored.parts or scored.length is not None:
            raise ValueError("the MIB format needs scores without positions and without nodes inside layers")
        known = dict(zip(graph.pairs, values.flatten().tolist(), strict=True))
    elif "score" in circuit.table:
        columns = (circuit.table[name] for name in ("src", "dst", "score"))
        known = {(src, dst): score for src, dst, score in zip(*columns, strict=True)}
    kept = set(circuit.edges)
    nodes = {_mib_name(node): False for node in [*graph.sources(graph.n_layers), OUTPUT]}
    edges = {}
    for src, dst in graph.pairs:
        inside = (src, dst) in kept
        edges[f"{_mib_name(src)}->{_mib_name(dst)}"] = {"score": -known.get((src, dst), -0.0), "in_graph": inside}
        if inside:
            nodes[_mib_name(src)] = nodes[_mib_name(dst)] = True
    stored = {
        "cfg": {
            "n_layers": graph.n_layers,
            "n_heads": 0,
            "parallel_attn_mlp": False,
            "d_model": whole_number(d_model, "d_model", least=1),
        },
        "nodes": {name: {"in_graph": inside} for name, inside in nodes.items()},
        "edges": edges,
    }
    path = Path(os.path.expanduser(path))
    replace_files(path.parent, {path.name: json.dumps(stored).encode()})
    return path


def _mib_name(node: str) -> str:
    return {EMBED: "input", OUTPUT: "logits"}.get(node, f"m{node}")


def to_dot(circuit: Circuit, *, labels: Sequence[str] | None = None, hide: Collection[str] = ()) -> str:
    """The circuit as Graphviz DOT text, embed on top.

    Positions of one edge are its label. A layer of which inner edges are known is drawn as a box with its input,
    slices, SSM, skip and output.

    Args:
        circuit: any circuit.
        labels: the positions' names (`PromptPairs.position_labels`); their numbers if not given.
        hide: nodes to leave out, by name, with all their edges.
    """
    for node in hide:
        layer_of(node)
    shown = [edge for edge in circuit.edges if not {edge[0].split(".")[0], edge[1].split(".")[0]} & set(hide)]
    layers = (layer_of(edge[0]) for edge in shown if is_inner(edge[0]) or is_inner(edge[1]))
    split = {layer for layer in layers if layer is not None}
    lines = ["digraph circuit {", "  rankdir=TB;", '  node [shape=box, style=rounded, fontname="Helvetica"];']
    for layer in sorted(split):
        inside = {name for edge in shown for name in _ends(edge, split) if layer_of(name.split()[0]) == layer}
        names = " ".join(f'"{name}";' for name in sorted(inside))
        lines.append(f'  subgraph "cluster_{layer}" {{ label="{layer}"; {names} }}')
    for (src, dst), positions in _by_pair(shown, split).items():
        names = [labels[p] if labels else str(p) for p in positions]
        lines.append(f'  "{src}" -> "{dst}"' + (f' [label="{", ".join(names)}"]' if names else "") + ";")
    for layer in sorted(split):
        slices = sorted({edge[1] for edge in shown if edge[1].startswith(f"{layer}.conv[")})
        lines += [f'  "{name}" -> "{layer}.conv" [style=dashed];' for name in slices]
    return "\n".join([*lines, "}", ""])


def _by_pair(edges: Sequence[Edge], split: set[int]) -> dict[tuple[str, str], list[int]]:
    """The positions of each drawn edge."""
    found: dict[tuple[str, str], list[int]] = {}
    for edge in edges:
        found.setdefault(_ends(edge, split), []).extend(edge[2:])
    return found


def _ends(edge: Edge, split: set[int]) -> tuple[str, str]:
    """The names of an edge's ends as drawn: a layer that is split has an input and an output of its own."""
    src, dst = edge[:2]
    inwards, outwards = is_inner(dst), is_inner(src)
    if "." not in src and layer_of(src) in split:
        src = f"{src} in" if inwards else f"{src} out"
    if "." not in dst and layer_of(dst) in split:
        dst = f"{dst} out" if outwards else f"{dst} in"
    return src, dst


def layer_view(circuit: Circuit, layer: int) -> Circuit:
    """The circuit's edges into, inside and out of one layer (App. D.3's single-layer views)."""
    if not 0 <= layer < circuit.n_layers:
        raise ValueError(f"layers are 0 to {circuit.n_layers - 1}, not {layer}")
    near = tuple(edge for edge in circuit.edges if layer in (layer_of(edge[0]), layer_of(edge[1])))
    return replace(circuit, edges=near, accuracy=None, nld=None, table=edge_table(near), meta={})
