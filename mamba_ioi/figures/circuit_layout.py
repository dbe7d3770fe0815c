"""Where the nodes and edges of a circuit's picture lie: by Graphviz where `dot` is installed, else in plain layers."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import networkx as nx
import numpy as np

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

DOT_SECONDS = 60
LABEL_WIDTH = 22
READABLE_LAYERS = 8
"""Circuits of models with more layers are shown without the nodes that are tied to nearly all others."""
WHOLE_PARTS = ("attn", "mlp")
"""The parts of a block that are nodes of their own beside its mixer."""
ROW, COLUMN, BOX_HEIGHT, CHARACTER = 78.0, 92.0, 24.0, 7.2

Point = tuple[float, float]


@dataclass(frozen=True)
class DrawnEdge:
    """An edge as it is drawn, all its positions together.

    Attributes:
        src: the name of the node it leaves.
        dst: the name of the node it enters.
        positions: where it is kept, ascending; empty if edges are not kept apart by position.
        scores: one for each position (one in all without positions); NaN where there is none.
    """

    src: str
    dst: str
    positions: tuple[int, ...]
    scores: tuple[float, ...]

    def label(self, labels: Sequence[str] | None = None) -> str:
        """Its positions in short: ``n1–n3, out``; empty without positions."""
        return name_positions(self.positions, labels)


@dataclass(frozen=True)
class Curve:
    """An edge's course: a cubic Bézier path [1 + 3k] of points, the arrow's tip, and where its label stands."""

    points: tuple[Point, ...]
    tip: Point
    label: Point


@dataclass(frozen=True)
class Layout:
    """A picture's geometry, in points from the top left; a node is (x, y, width, height), with x, y its centre."""

    width: float
    height: float
    nodes: dict[str, tuple[float, float, float, float]]
    curves: dict[tuple[str, str], Curve]


def drawn_edges(table: pd.DataFrame, hide: Collection[str] = (), layer: int | None = None) -> list[DrawnEdge]:
    """The edges of a circuit as they are drawn, in the table's order.

    A mixer of which inner edges are kept is drawn by what is inside, between nodes ``39 in`` and ``39 out``; a dashed
    line of no score joins its conv slices to the conv.

    Args:
        table: columns src, dst, and position (−1 for none) and score where there are such.
        hide: nodes to leave out, with all their edges and parts.
        layer: show only the edges into, inside and out of this layer.

    Raises:
        ValueError: a hidden node or the layer is in no edge of the circuit.
    """
    rows = table.assign(position=table.get("position", -1), score=table.get("score", np.nan))
    ends = [(str(row.src).split(".")[0], str(row.dst).split(".")[0]) for row in rows.itertuples()]
    known = {name for pair in ends for name in pair}
    for name in (*hide, *(() if layer is None else (str(layer),))):
        if name not in known:
            raise ValueError(f"{name!r} is no node of this circuit; its nodes are {', '.join(in_order(known))}")
    inside = [is_inner(str(row.src)) or is_inner(str(row.dst)) for row in rows.itertuples()]
    split = {src for (src, _), inner in zip(ends, inside, strict=True) if inner}
    found: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row, pair, inner in zip(rows.itertuples(), ends, inside, strict=True):
        if set(pair) & set(hide) or (layer is not None and str(layer) not in pair):
            continue
        src, dst = str(row.src), str(row.dst)
        if src in split:
            src += " in" if inner else " out"
        if dst in split:
            dst += " out" if inner else " in"
        found.setdefault((src, dst), []).append((int(row.position), float(row.score)))
    edges = [
        DrawnEdge(*pair, tuple(p for p, _ in sorted(at) if p >= 0), tuple(score for _, score in sorted(at)))
        for pair, at in found.items()
    ]
    slices = {edge.dst for edge in edges if "[" in edge.dst}
    return edges + [DrawnEdge(name, name.split("[")[0], (), (np.nan,)) for name in sorted(slices)]


def is_inner(node: str) -> bool:
    """Whether a node lies inside a mixer: ``39.ssm``, and not ``39`` or ``39.attn``."""
    return "." in node and node.split(".")[1] not in WHOLE_PARTS


def default_hidden(table: pd.DataFrame) -> list[str]:
    """Nodes to hide so that a large circuit can be read; none in a small one.

    Embed, layer 0 and the two layers with the most edges: in mamba-370m 39 and 35, as in App. D.3.6 of the paper.
    """
    edges = {(edge.src, edge.dst) for edge in drawn_edges(table)}
    ties = Counter(node for edge in edges for node in edge if node != "output")
    layers = [node for node in ties if node.isdigit()]
    if len(layers) <= READABLE_LAYERS:
        return []
    busiest = sorted((node for node in layers if node != "0"), key=lambda node: (-ties[node], int(node)))[:2]
    return [node for node in ("embed", "0", *busiest) if node in ties]


def nodes_of(edges: Sequence[DrawnEdge]) -> list[str]:
    """The edges' nodes, from embed to output."""
    return in_order({name for edge in edges for name in (edge.src, edge.dst)})


def in_order(names: Collection[str]) -> list[str]:
    """Names of nodes as the model computes them: embed, layers and their parts, output."""
    parts = ("in", "conv[", "conv", "ssm", "skip", "out", *WHOLE_PARTS)

    def key(name: str) -> tuple[int, int, int]:
        if name in ("embed", "output"):
            return (-1 if name == "embed" else 10**9, 0, 0)
        layer, *part = re.split(r"[ .]", name, maxsplit=1)
        tap = re.fullmatch(r"conv\[(.*)\]", part[0]) if part else None
        return int(layer), parts.index("conv[" if tap else part[0]) if part else -1, int(tap[1]) if tap else 0

    return sorted(names, key=key)


def name_positions(positions: Sequence[int], labels: Sequence[str] | None = None) -> str:
    """Positions in words, three or more names in a row in short: ``n1–n5, pos16, out``.

    Args:
        positions: ascending.
        labels: the name of every position (`PromptPairs.position_labels`); their numbers if not given.
    """
    names = [labels[p] if labels else str(p) for p in positions]
    slots = [int(name[1:]) if re.fullmatch(r"n\d", name) else np.nan for name in names]
    words, i = [], 0
    while i < len(names):
        j = i
        while j + 1 < len(names) and slots[j + 1] == slots[j] + 1:
            j += 1
        words += [f"{names[i]}–{names[j]}"] if j - i >= 2 else names[i : j + 1]
        i = j + 1
    return ", ".join(words)


def name_layers(names: Collection[str]) -> str:
    """Nodes in words, three or more layers in a row in short: ``embed, 0, 3–17, output``."""
    ordered, words, i = in_order(names), [], 0
    while i < len(ordered):
        j = i
        while (
            j + 1 < len(ordered)
            and ordered[j + 1].isdigit()
            and ordered[j].isdigit()
            and (int(ordered[j + 1]) == int(ordered[j]) + 1)
        ):
            j += 1
        words += [f"{ordered[i]}–{ordered[j]}"] if j - i >= 2 else ordered[i : j + 1]
        i = j + 1
    return ", ".join(words)


def wrap_label(text: str) -> str:
    """A label in lines of at most about `LABEL_WIDTH` characters, broken after commas."""
    lines: list[str] = []
    for word in text.split(", "):
        if lines and len(lines[-1]) + len(word) + 2 <= LABEL_WIDTH:
            lines[-1] += f", {word}"
        else:
            lines.append(word)
    return ",\n".join(lines)


def lay_out(edges: Sequence[DrawnEdge], labels: Sequence[str] | None = None, *, use_dot: bool = True) -> Layout:
    """Place the nodes in layers from embed (top) to output, and the edges between them.

    Args:
        edges: from `drawn_edges`.
        labels: the positions' names.
        use_dot: whether Graphviz may be used where it is installed.
    """
    if use_dot and edges and shutil.which("dot"):
        try:
            return _by_dot(edges, labels)
        except (subprocess.SubprocessError, OSError, ValueError, KeyError) as error:
            logger.warning("dot did not lay the graph out (%s); it is drawn in plain layers", error)
    return plain_layout(edges)


def _by_dot(edges: Sequence[DrawnEdge], labels: Sequence[str] | None) -> Layout:
    lines = [
        "digraph circuit {",
        "rankdir=TB; nodesep=0.3; ranksep=0.45;",
        'node [shape=box, fontname="Helvetica", fontsize=11, height=0.33, margin="0.12,0.04"];',
        'edge [fontname="Helvetica", fontsize=9];',
        *(f"{json.dumps(node)};" for node in nodes_of(edges)),
    ]
    for edge in edges:
        label = json.dumps(wrap_label(edge.label(labels)), ensure_ascii=False)
        lines.append(f"{json.dumps(edge.src)} -> {json.dumps(edge.dst)} [label={label}];")
    text = "\n".join([*lines, "}"])
    ran = subprocess.run(["dot", "-Tjson0"], input=text.encode(), capture_output=True, timeout=DOT_SECONDS, check=True)
    drawn = json.loads(ran.stdout)
    _, _, width, height = map(float, drawn["bb"].split(","))

    def point(text: str) -> Point:
        x, y = map(float, text.split(","))
        return x, height - y

    nodes = {
        node["name"]: (*point(node["pos"]), 72 * float(node["width"]), 72 * float(node["height"]))
        for node in drawn["objects"]
    }
    names = {node["_gvid"]: node["name"] for node in drawn["objects"]}
    curves = {}
    for edge in drawn["edges"]:
        tip, *points = edge["pos"].removeprefix("e,").split(" ")
        points = tuple(map(point, points))
        middle = point(edge["lp"]) if "lp" in edge else points[len(points) // 2]
        curves[names[edge["tail"]], names[edge["head"]]] = Curve(points, point(tip), middle)
    return Layout(width, height, nodes, curves)


def plain_layout(edges: Sequence[DrawnEdge]) -> Layout:
    """Nodes in rows by the longest path that leads to them; edges that pass rows by go round in an arc."""
    graph = nx.DiGraph()
    graph.add_nodes_from(nodes_of(edges))
    graph.add_edges_from((edge.src, edge.dst) for edge in edges)
    rows = [in_order(row) for row in nx.topological_generations(graph)]
    widest = max(map(len, rows), default=1)
    height = (len(rows) + 0.2) * ROW
    nodes, row_of = {}, {}
    for r, row in enumerate(rows):
        for c, name in enumerate(row):
            x = (c - (len(row) - 1) / 2) * COLUMN
            nodes[name] = (x, (r + 0.6) * ROW, box_width(name), BOX_HEIGHT)
            row_of[name] = r
    arcs, reach, curves = {-1: 0, 1: 0}, widest * COLUMN / 2, {}
    for edge in sorted(edges, key=lambda edge: row_of[edge.dst] - row_of[edge.src]):
        start, end, bend = nodes[edge.src], nodes[edge.dst], 0.0
        passed = rows[row_of[edge.src] + 1 : row_of[edge.dst]]
        if passed:
            lean = start[0] + end[0]
            side = int(math.copysign(1, lean)) if lean else min(arcs, key=lambda side: arcs[side])
            arcs[side] += 1
            bend = side * (_clearance(start[0] * side, end[0] * side, list(map(len, passed))) + 12 * arcs[side])
            reach = max(reach, max(start[0] * side, end[0] * side) + 0.75 * abs(bend) + 20)
        curves[edge.src, edge.dst] = straight(start, end, bend)
    half = reach + 0.3 * COLUMN
    return moved(Layout(2 * half, height, nodes, curves), half)


def _clearance(x0: float, x1: float, sizes: list[int]) -> float:
    """How far an edge from x0 to x1 must bend to the right to pass rows of so many nodes each.

    A curve that is bent by b lies 3 t (1 - t) b beside the line between its ends at share t of its height.
    """
    span = len(sizes) + 1
    needed = [0.0]
    for row, size in enumerate(sizes, start=1):
        t = row / span
        near = min(t, 1 - t) - 0.25 / span  # the edge of the row's boxes that is nearer to an end
        needed.append((size * COLUMN / 2 - ((1 - t) * x0 + t * x1)) / (3 * near * (1 - near)))
    return max(needed)


def moved(layout: Layout, by: float) -> Layout:
    """The layout with everything in it this much further right."""
    nodes = {name: (x + by, y, w, h) for name, (x, y, w, h) in layout.nodes.items()}

    def right(point: Point) -> Point:
        return point[0] + by, point[1]

    curves = {
        pair: Curve(tuple(map(right, curve.points)), right(curve.tip), right(curve.label))
        for pair, curve in layout.curves.items()
    }
    return Layout(layout.width, layout.height, nodes, curves)


def box_width(name: str) -> float:
    """Of a node's box, in points."""
    return max(44.0, CHARACTER * len(name) + 14)


def straight(start: Sequence[float], end: Sequence[float], bend: float = 0.0) -> Curve:
    """A curve from the bottom of one box to the top of another, bent aside by some points."""
    x0, y0, x1, y1 = start[0], start[1] + start[3] / 2, end[0], end[1] - end[3] / 2
    first, second = (x0 + bend, y0 + (y1 - y0) / 3), (x1 + bend, y0 + 2 * (y1 - y0) / 3)
    tip = (x1, y1)
    towards = np.subtract(tip, second)
    back = tuple(np.subtract(tip, 8 * towards / max(np.hypot(*towards), 1e-9)).tolist())
    middle = ((x0 + 3 * first[0] + 3 * second[0] + x1) / 8, (y0 + 3 * first[1] + 3 * second[1] + y1) / 8)
    return Curve(((x0, y0), first, second, back), tip, middle)
