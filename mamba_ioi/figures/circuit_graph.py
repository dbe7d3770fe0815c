"""Appendix D.3.6: a circuit drawn as a graph, positions on its edges, with nodes hidden by name, or one layer alone."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from matplotlib.patches import FancyBboxPatch, PathPatch, Polygon
from matplotlib.path import Path

from mamba_ioi.figures.circuit_layout import (
    DrawnEdge,
    Layout,
    default_hidden,
    drawn_edges,
    is_inner,
    lay_out,
    name_layers,
    nodes_of,
    wrap_label,
)
from mamba_ioi.figures.diagram import FILLS, INK
from mamba_ioi.figures.style import BLUE, GREY, VERMILION, new_figure, paper_style, require, set_heading

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mamba_ioi.result import Result

MARGIN, LARGEST, NARROWEST = 0.35, 40.0, 7.0
THIN, THICK = 0.7, 3.2


@paper_style()
def circuit_graph(
    result: Result, *, hide: Collection[str] | None = None, layer: int | None = None, use_dot: bool = True
) -> Figure:
    """The circuit from embed (top) to output; wide edges have large scores, and labels say at which positions.

    Args:
        result: columns src, dst, position (−1 for none), score; rows with `kept` False are left out.
            `meta["position_labels"]` names the positions, `meta["circuit"]` holds the numbers for the heading.
        hide: nodes to leave out, by name; by default none in a small circuit, and in a large one embed, 0 and the two
            layers with the most edges, as the paper hides embed, 0, 39 and 35. For one layer's view, none.
        layer: show only the edges into, inside and out of this layer.
        use_dot: whether Graphviz may lay it out where it is installed.

    Raises:
        ValueError: the table lacks a column, or a node that is named is not in the circuit.
    """
    table = kept_edges(result)
    if hide is None:
        hide = [] if layer is not None else default_hidden(table)
    edges = drawn_edges(table, hide, layer)
    labels = result.meta.get("position_labels")
    layout = lay_out(edges, labels, use_dot=use_dot)
    scale = min(1.0, LARGEST * 72 / max(layout.width, layout.height, 1))
    width = max(layout.width * scale / 72 + 2 * MARGIN, NARROWEST)
    height = max(layout.height * scale / 72, 0.6) + 2 * MARGIN + 0.5
    figure = new_figure(width, height, layout=None)
    axes = figure.add_axes((0, 0, 1, 1))
    left = (width * 72 / scale - layout.width) / 2
    top = (MARGIN + 0.3) * 72 / scale
    axes.set(xlim=(-left, width * 72 / scale - left), ylim=(height * 72 / scale - top, -top))
    axes.set_axis_off()
    _draw(axes, edges, layout, labels, scale)
    title = "The circuit" if layer is None else f"Layer {layer}: what it receives and sends"
    head(figure, result, title)
    note = "line width: |score|; blue: needed (score < 0), orange: against the answer"
    if hide:
        note = f"hidden: {name_layers(hide)}   ·   {note}"
    figure.text(
        0.5, 0.12 / height, note if edges else f"nothing is left; {note}", ha="center", fontsize=7.5, color=GREY
    )
    return figure


def kept_edges(result: Result) -> pd.DataFrame:
    """The rows of the circuit's edges: all of the table, or those with `kept` where it says so.

    Raises:
        ValueError: the table is empty or lacks a column.
    """
    require(result, "src", "dst")
    table = result.table
    return table[table["kept"].astype(bool)] if "kept" in table else table


def circuit_note(result: Result) -> str:
    """The circuit's size and how well it does the task, on held-out data where that was measured."""
    known = result.meta.get("circuit", {})
    parts = [f"{known['n_edges']} of {known['of']} edges"] if "n_edges" in known else []
    measured, where = known.get("held_out"), "held-out "
    if measured is None:
        measured, where = known, ""
    if measured.get("nld") is not None:
        parts.append(f"{where}NLD {measured['nld']:.3f}, accuracy {measured['accuracy']:.3f}")
    if known.get("reached") is False:
        parts.append(f"target {known['target']:g} not reached")
    return ", ".join(parts)


def head(figure: Figure, result: Result, title: str) -> None:
    """The heading of a page that is laid out in inches, at its upper edge whatever its height."""
    set_heading(figure, result, title, circuit_note(result))
    figure.suptitle(figure.get_suptitle(), y=1 - 0.12 / figure.get_figheight(), va="top", parse_math=False)


def widths(edges: list[DrawnEdge]) -> dict[tuple[str, str], float]:
    """Each edge's line width by the sum of its scores' magnitudes, on a square-root scale."""
    sizes = {(edge.src, edge.dst): sum(abs(s) for s in edge.scores if not math.isnan(s)) for edge in edges}
    largest = max(sizes.values(), default=0) or 1
    return {pair: THIN + (THICK - THIN) * math.sqrt(size / largest) for pair, size in sizes.items()}


def edge_colour(edge: DrawnEdge) -> str:
    """Blue where the scores sum to less than nothing (the edge is needed), orange to more; grey without scores."""
    known = [score for score in edge.scores if not math.isnan(score)]
    return GREY if not known else BLUE if sum(known) <= 0 else VERMILION


def _draw(axes: Axes, edges: list[DrawnEdge], layout: Layout, labels: Sequence[str] | None, scale: float) -> None:
    width = widths(edges)
    for edge in edges:
        curve, colour = layout.curves[edge.src, edge.dst], edge_colour(edge)
        codes = [Path.MOVETO] + [Path.CURVE4] * (len(curve.points) - 1)
        line = width[edge.src, edge.dst] * scale
        style = "--" if "[" in edge.src else "-"
        axes.add_patch(
            PathPatch(Path(curve.points, codes), fc="none", ec=colour, lw=line, ls=style, alpha=0.8, zorder=1)
        )
        axes.add_patch(Polygon(arrow_head(curve.points[-1], curve.tip), fc=colour, ec="none", zorder=2))
        if edge.positions:
            axes.text(
                *curve.label,
                wrap_label(edge.label(labels)),
                ha="center",
                va="center",
                fontsize=7.5 * scale,
                color=INK,
                linespacing=1.05,
                bbox={"boxstyle": "square,pad=0.08", "fc": "white", "ec": "none", "alpha": 0.75},
                zorder=3,
            )
    for name in nodes_of(edges):
        x, y, w, h = layout.nodes[name]
        fill = FILLS["plain"] if name in ("embed", "output") else FILLS["ssm" if is_inner(name) else "learned"]
        axes.add_patch(
            FancyBboxPatch(
                (x - w / 2 + 3, y - h / 2 + 3), w - 6, h - 6, boxstyle="round,pad=3", fc=fill, ec=INK, lw=0.9, zorder=4
            )
        )
        axes.text(x, y, name, ha="center", va="center", fontsize=9 * scale, zorder=5)


def arrow_head(base: tuple[float, float], tip: tuple[float, float]) -> list[tuple[float, float]]:
    """A triangle's corners."""
    x, y = tip[0] - base[0], tip[1] - base[1]
    length = math.hypot(x, y) or 1.0
    x, y = x / length, y / length
    return [tip, (base[0] - 3.4 * y, base[1] + 3.4 * x), (base[0] + 3.4 * y, base[1] - 3.4 * x)]
