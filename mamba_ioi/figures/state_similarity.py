"""Figure 7: how much of each token's contribution is still in the state at later tokens."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from matplotlib.colors import Normalize

from mamba_ioi.figures.heatmap import Scale, draw_cells, grid, labels
from mamba_ioi.figures.style import literal, new_figure, paper_style, require, set_heading

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mamba_ioi.result import Result

A_ROW = 3
CELL = 0.15


@paper_style()
def state_similarity(result: Result) -> Figure:
    """A heat map a prompt: the cosine of position i's contribution B̄ᵢxᵢ (row) with the state hⱼ (column).

    All panels share the scale −1 … 1; position 0 is at the top left.

    Args:
        result: columns prompt, i, j, similarity, and label_i, label_j (tokens) if known;
            `meta["arguments"]["layer"]` is named in the title.
    """
    require(result, "prompt", "i", "j", "similarity")
    panels = list(result.table.groupby("prompt", sort=False))
    across = min(A_ROW, len(panels))
    down = -(-len(panels) // across)
    side = max(max(panel["j"].nunique() for _, panel in panels) * CELL, 2.4)
    figure = new_figure(across * (side + 0.95) + 0.9, down * (side + 1.45) + 0.4)
    axes = figure.subplots(down, across, squeeze=False).ravel()
    scale = Scale(Normalize(-1, 1), "cosine similarity", "neither")
    for axis, (prompt, panel) in zip(axes, panels, strict=False):
        draw_cells(
            axis,
            grid(panel, "i", "j", "similarity"),
            norm=scale.norm,
            column_labels=_tokens(panel, "j"),
            row_labels=_tokens(panel, "i"),
            square=True,
        )
        axis.set_title(textwrap.fill(literal(prompt), int(side * 16)), fontsize=8, parse_math=False)
        axis.set_xlabel("state after token j")
        axis.set_ylabel("contribution of token i")
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    scale.bar(figure, list(axes), pad=0.01, fraction=0.03, aspect=30)
    layer = result.meta.get("arguments", {}).get("layer")
    title = "Similarity of contributions and states" + ("" if layer is None else f", layer {layer}")
    set_heading(figure, result, title)
    return figure


def _tokens(panel, axis: str) -> list[str]:
    """The labels along axis `i` or `j`: the tokens, or the positions where the table has none."""
    return labels(panel, axis, f"label_{axis}" if f"label_{axis}" in panel.columns else axis)
