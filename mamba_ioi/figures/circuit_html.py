"""A circuit as an interactive page: one self-contained HTML file, nodes to hide, scores on hover, and tables."""

from __future__ import annotations

import html
import json
import math
from importlib import resources
from string import Template
from typing import TYPE_CHECKING

from mamba_ioi.figures.circuit_graph import circuit_note, edge_colour, kept_edges, widths
from mamba_ioi.figures.circuit_layout import (
    BOX_HEIGHT,
    DrawnEdge,
    Layout,
    box_width,
    default_hidden,
    drawn_edges,
    is_inner,
    lay_out,
    moved,
    nodes_of,
    straight,
    wrap_label,
)
from mamba_ioi.figures.circuit_tables import traffic_table
from mamba_ioi.figures.diagram import FILLS

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from mamba_ioi.result import Result

ASIDE_COLUMNS, ASIDE_STEP, MARGIN = 4, 70.0, 24.0
LINE_HEIGHT = 10.5


def circuit_html(result: Result, *, hide: Collection[str] | None = None, use_dot: bool = True) -> str:
    """The page's text: the graph as inline SVG, a checkbox a node, each edge's scores on hover, tables below.

    It loads nothing from anywhere. Opened with ``#selftest``, it hides its first node and writes onto its body what it
    then counts (`data-nodes`, `data-shown-edges`, …), for tests in a browser.

    Args:
        result: as for `figures.circuit_graph`.
        hide: nodes that are hidden until their box is ticked; by default as in `circuit_graph`.
        use_dot: whether Graphviz may lay the graph out where it is installed.

    Raises:
        ValueError: the table lacks a column, or a node that is named is not in the circuit.
    """
    table, labels = kept_edges(result), result.meta.get("position_labels")
    hide = default_hidden(table) if hide is None else hide
    edges = drawn_edges(table)
    shown = drawn_edges(table, hide)
    layout = _with_aside(lay_out(shown, labels, use_dot=use_dot), edges)
    kept = set(nodes_of(shown))
    hidden = [node for node in nodes_of(edges) if node not in kept and _base(node) in hide]
    size = [layout.width + 2 * MARGIN, layout.height + 2 * MARGIN]
    model = result.meta.get("model")
    template = Template(resources.files("mamba_ioi.figures").joinpath("circuit.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=html.escape(" · ".join(part for part in ("Circuit", model) if part)),
        note=html.escape(circuit_note(result)),
        boxes="\n".join(_checkbox(node, node not in hidden) for node in nodes_of(edges)),
        width=f"{size[0]:.0f}",
        height=f"{size[1]:.0f}",
        viewbox=f"{-MARGIN:.0f} {-MARGIN:.0f} {size[0]:.0f} {size[1]:.0f}",
        edges="\n".join(
            _edge(edge, layout, line, labels) for edge, line in zip(edges, widths(edges).values(), strict=True)
        ),
        nodes="\n".join(_node(node, layout) for node in nodes_of(edges)),
        scores=json.dumps([_scores(edge, labels) for edge in edges], ensure_ascii=False).replace("<", "\\u003c"),
        rows="\n".join(
            "<tr>" + "".join(f"<td>{html.escape(text) or '–'}</td>" for text in row) + "</tr>"
            for row in traffic_table(table, labels).itertuples(index=False)
        ),
    )


def _base(node: str) -> str:
    """The node that a layer's part belongs to."""
    return node.replace(" ", ".").split(".")[0]


def _with_aside(layout: Layout, edges: Sequence[DrawnEdge]) -> Layout:
    """The layout with the nodes that it leaves out in columns at its left, and plain curves for their edges."""
    missing = [node for node in nodes_of(edges) if node not in layout.nodes]
    columns = min(ASIDE_COLUMNS, max(1, math.ceil(len(missing) / 8)))
    shift = columns * ASIDE_STEP + 30 if missing else 0.0
    beside = moved(layout, shift)
    nodes, curves = beside.nodes, beside.curves
    for i, name in enumerate(missing):
        row, column = divmod(i, columns)
        nodes[name] = ((column + 0.5) * ASIDE_STEP, 20 + row * 48.0, box_width(name), BOX_HEIGHT)
    for edge in edges:
        if (edge.src, edge.dst) not in curves:
            curves[edge.src, edge.dst] = straight(nodes[edge.src], nodes[edge.dst], 30)
    bottom = max((y + h for _, y, _, h in nodes.values()), default=0)
    return Layout(layout.width + shift, max(layout.height, bottom), nodes, curves)


def _checkbox(node: str, checked: bool) -> str:
    name = html.escape(node)
    state = " checked" if checked else ""
    return f'<label><input type="checkbox" data-node="{name}"{state}>{name}</label>'


def _edge(edge: DrawnEdge, layout: Layout, line: float, labels: Sequence[str] | None) -> str:
    curve, colour = layout.curves[edge.src, edge.dst], edge_colour(edge)
    (x, y), *rest = curve.points
    course = f"M{x:.1f},{y:.1f} C" + " ".join(f"{x:.1f},{y:.1f}" for x, y in rest)
    course += f" L{curve.tip[0]:.1f},{curve.tip[1]:.1f}"
    lines = wrap_label(edge.label(labels)).split("\n") if edge.positions else []
    top = curve.label[1] - (len(lines) - 1) * LINE_HEIGHT / 2 + 3
    label = "".join(
        f'<text x="{curve.label[0]:.1f}" y="{top + i * LINE_HEIGHT:.1f}">{html.escape(text)}</text>'
        for i, text in enumerate(lines)
    )
    dashes = ' stroke-dasharray="4 3"' if "[" in edge.src else ""
    return (
        f'<g class="edge" data-src="{html.escape(edge.src)}" data-dst="{html.escape(edge.dst)}">'
        f'<path class="reach" d="{course}"/>'
        f'<path class="line" d="{course}" stroke="{colour}" stroke-width="{line:.2f}"{dashes} '
        f'marker-end="url(#tip{colour[1:]})"/>{label}</g>'
    )


def _node(node: str, layout: Layout) -> str:
    x, y, w, h = layout.nodes[node]
    fill = FILLS["plain"] if node in ("embed", "output") else FILLS["ssm" if is_inner(node) else "learned"]
    name = html.escape(node)
    return (
        f'<g class="node" data-node="{name}"><rect x="{x - w / 2:.1f}" y="{y - h / 2:.1f}" width="{w:.1f}" '
        f'height="{h:.1f}" rx="5" fill="{fill}"/><text x="{x:.1f}" y="{y + 4:.1f}">{name}</text></g>'
    )


def _scores(edge: DrawnEdge, labels: Sequence[str] | None) -> list[list[str]]:
    """Each position's name and score, as the page shows them on hover."""
    names = [labels[p] if labels else str(p) for p in edge.positions] or ["all positions"]
    return [
        [name, "no score" if math.isnan(score) else f"{score:+.5f}"]
        for name, score in zip(names, edge.scores, strict=True)
    ]
