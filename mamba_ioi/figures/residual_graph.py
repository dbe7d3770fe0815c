"""Figure 3: the residual stream as a graph, in which every layer can read from every earlier one."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

import pandas as pd
from matplotlib.patches import FancyArrowPatch
from matplotlib.path import Path

from mamba_ioi.figures.diagram import Box, Diagram
from mamba_ioi.figures.style import BLUE, GREEN, ORANGE, VERMILION, paper_style, require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mamba_ioi.result import Result

KINDS = {
    "embed → layer": BLUE,
    "layer → layer": GREEN,
    "layer → output": VERMILION,
    "embed → output": ORANGE,
}
SPACING, LIFT, NODE_WIDTH, HALF = 1.75, 0.3, 1.0, 0.42


@paper_style()
def residual_graph(n_layers: int = 4) -> Figure:
    """Nodes embed, 0 … n−1, output in a row, with every edge from a node to a later one.

    Edges into layers arch above the nodes, edges into the output below; each ends at its own point of a box.

    Args:
        n_layers: how many layers to show; more than 8 are not legible.

    Raises:
        ValueError: `n_layers` is below 1 or above 8.
    """
    if not 1 <= n_layers <= 8:
        raise ValueError(f"a residual-stream graph is legible with 1 to 8 layers, not {n_layers}")
    names = ["embed", *(f"layer {layer}" for layer in range(n_layers)), "output"]
    above, below = LIFT * n_layers + 1.0, LIFT * (n_layers + 1) + 0.45
    width = max(SPACING * (n_layers + 1) + 1.5, 8.4)
    page = Diagram(width, above + below + 0.75, f"The residual stream of {n_layers} layers as a graph: every edge")
    kinds = {name: "learned" if name.startswith("layer") else "plain" for name in names}
    nodes = [
        page.box(
            width / 2 + SPACING * (i - (n_layers + 1) / 2), above, name, width=NODE_WIDTH, height=0.46, kind=kinds[name]
        )
        for i, name in enumerate(names)
    ]
    counts = dict.fromkeys(KINDS, 0)
    for target in range(1, len(nodes)):
        for source in range(target):
            kind = _kind(source, target, len(nodes) - 1)
            counts[kind] += 1
            _edge(page, nodes, source, target, KINDS[kind])
    for column, (kind, colour) in enumerate(KINDS.items()):
        x, y = 0.3 + (column % 4) * (width - 0.3) / 4, above + below + 0.45
        page.axes.plot([x, x + 0.3], [y, y], color=colour, linewidth=1.6)
        page.text(x + 0.4, y, f"{kind} ({counts[kind]})", ha="left", fontsize=8.5)
    return page.figure


def of_result(result: Result) -> Figure:
    """The graph of a result with the columns of `residual_edges`."""
    require(result, "src", "dst")
    return residual_graph(result.table["dst"].nunique() - 1)


def residual_edges(n_layers: int = 4) -> pd.DataFrame:
    """Columns src, dst: every edge of the graph, the table of a Result of the experiment `residual_graph`."""
    names = ["embed", *map(str, range(n_layers)), "output"]
    return pd.DataFrame(combinations(names, 2), columns=["src", "dst"])


def _kind(source: int, target: int, output: int) -> str:
    """The kind of an edge between nodes 0 (embed) … `output`."""
    if target == output:
        return "embed → output" if source == 0 else "layer → output"
    return "embed → layer" if source == 0 else "layer → layer"


def _edge(page: Diagram, nodes: list[Box], source: int, target: int, colour: str) -> None:
    """Straight between neighbours, otherwise an arch: below the row if it ends at the output, else above."""
    start, end, span = nodes[source], nodes[target], target - source
    if span == 1:
        points, codes = [(start.right, start.y), (end.left, end.y)], [Path.MOVETO, Path.LINETO]
    else:
        under = target == len(nodes) - 1
        # Outer arches leave further left and arrive further right, so that arches of one node never cross.
        x0 = start.x + HALF * (1 if under else 1 - (span - 2) / max(len(nodes) - 3, 1))
        x1 = end.x + HALF * ((2 if under else 1) * (span - 2) / max(len(nodes) - 3, 1) - 1)
        y0 = start.bottom if under else start.top
        height = (LIFT if under else -LIFT) * span * 4 / 3
        points = [(x0, y0), (x0, y0 + height), (x1, y0 + height), (x1, y0)]
        codes = [Path.MOVETO] + [Path.CURVE4] * 3
    arrow = FancyArrowPatch(
        path=Path(points, codes),
        arrowstyle="-|>,head_length=0.42,head_width=0.18",
        mutation_scale=12,
        color=colour,
        shrinkA=0,
        shrinkB=0,
        linewidth=1.3,
        zorder=2,
    )
    page.axes.add_patch(arrow)
