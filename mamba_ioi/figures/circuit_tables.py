"""Appendix D.3.1 to D.3.5: what each layer of a circuit receives and sends, by position, as tables."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import pandas as pd

from mamba_ioi.figures.circuit_graph import head, kept_edges
from mamba_ioi.figures.circuit_layout import drawn_edges, name_layers, nodes_of
from mamba_ioi.figures.style import LIGHT_GREY, new_figure, paper_style

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure

    from mamba_ioi.result import Result

COLUMN_CHARACTERS, LINE, TEXT_SIZE = 58, 0.155, 8


def traffic_table(table: pd.DataFrame, labels: Sequence[str] | None = None) -> pd.DataFrame:
    """One row a node: node, receives, sends, each a text such as ``n1–n5 from embed, 0, 3–38; out from 28``.

    Edges of the same positions are named together, those of the most positions first.

    Args:
        table: columns src, dst, and position where there is one.
        labels: the positions' names; their numbers if not given.
    """
    edges = drawn_edges(table)
    rows = []
    for node in nodes_of(edges):
        into: dict[str, list[str]] = {}
        out: dict[str, list[str]] = {}
        for edge in sorted(edges, key=lambda edge: (-len(edge.positions), edge.positions)):
            if edge.dst == node:
                into.setdefault(edge.label(labels), []).append(edge.src)
            if edge.src == node:
                out.setdefault(edge.label(labels), []).append(edge.dst)
        rows.append((node, _words(into, "from"), _words(out, "to")))
    return pd.DataFrame(rows, columns=["node", "receives", "sends"])


def _words(by_positions: dict[str, list[str]], preposition: str) -> str:
    return "; ".join(f"{at} {preposition} {name_layers(nodes)}".strip() for at, nodes in by_positions.items())


@paper_style()
def circuit_tables(result: Result) -> Figure:
    """The table of what each node receives (left) and sends (right).

    Args:
        result: as for `circuit_graph`.
    """
    rows = traffic_table(kept_edges(result), result.meta.get("position_labels"))
    texts = [
        [row.node, *(textwrap.wrap(str(text), COLUMN_CHARACTERS) or ["–"] for text in (row.receives, row.sends))]
        for row in rows.itertuples()
    ]
    heights = [max(len(receives), len(sends)) * LINE + 0.08 for _, receives, sends in texts]
    width, top = 9.6, 0.55
    height = top + 0.35 + sum(heights) + 0.15
    figure = new_figure(width, height, layout=None)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    columns = (0.3, 1.15, 5.45)
    y = top
    for x, name in zip(columns, ("node", "receives", "sends"), strict=True):
        axes.text(x, y + 0.1, name, fontsize=TEXT_SIZE, fontweight="bold", va="center")
    y += 0.27
    for (node, receives, sends), row_height in zip(texts, heights, strict=True):
        axes.axhline(y, 0.02, 0.98, color=LIGHT_GREY, linewidth=0.6)
        for x, lines in zip(columns, ([node], receives, sends), strict=True):
            for i, text in enumerate(lines):
                axes.text(x, y + 0.16 + i * LINE, text, fontsize=TEXT_SIZE, va="baseline", parse_math=False)
        y += row_height
    head(figure, result, "What each layer receives and sends")
    return figure
