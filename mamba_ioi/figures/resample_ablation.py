"""Figures 4, 10 and 11: resample ablation of one site at every layer and position."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mamba_ioi.figures.heatmap import Scale, draw_cells, effect_grid, group_column, place_column, rows_note
from mamba_ioi.figures.style import new_figure, paper_style, set_heading

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mamba_ioi.result import Result

CELL_WIDTH, BAR_WIDTH = 0.138, 1.4


@paper_style()
def resample_ablation(result: Result) -> Figure:
    """One heat map a corruption (or label), side by side; rows are layers with layer 0 at the top, columns tokens.

    Blue: resampling here moves the answer towards the corrupt prompt's (1: all the way); red: away from it. All
    panels share one colour scale centred at 0. It reaches to the largest effect but not beyond ±1.5; the colour bar
    says so if cells lie beyond.

    Args:
        result: columns corruption (or the group), layer, position and label (or mark), effect (mean 1 − NLD), and n
            if known; `meta["arguments"]["site"]` is named in the title, and so is an estimate with its rank
            correlation.
    """
    place = place_column(result)
    group = group_column(result, "layer", "effect")
    table = result.table
    panels = list(table.groupby(group, sort=False))
    layers = np.sort(table["layer"].unique())
    cell_height = 0.28 if len(layers) <= 16 else 0.15
    longest = table["label" if place == "position" else place].astype(str).str.len().max()
    columns = [panel[place].nunique() for _, panel in panels]
    widths = [max(count * CELL_WIDTH, 2.1) for count in columns]
    height = max(len(layers) * cell_height, 1.4) + 0.08 * longest + 1.1
    figure = new_figure(sum(widths) + 0.15 * len(panels) + BAR_WIDTH, height)
    axes = figure.subplots(1, len(panels), squeeze=False, gridspec_kw={"width_ratios": widths})[0]
    scale = Scale.of_effects(result)
    for index, (axis, (label, panel)) in enumerate(zip(axes, panels, strict=True)):
        cells, column_labels = effect_grid(panel, "layer", place)
        draw_cells(
            axis,
            cells.reindex(layers),
            norm=scale.norm,
            column_labels=column_labels,
            row_labels=[str(layer) for layer in layers] if index == 0 else None,
        )
        axis.set_title(_panel_title(label, panel), parse_math=False)
    axes[0].set_ylabel("layer")
    scale.bar(figure, list(axes), pad=0.01, fraction=0.02, aspect=30)
    arguments = result.meta.get("arguments", {})
    by = "token" if place == "position" else "mark"
    title = f"Resample ablation of {arguments.get('site', 'layer_input')}, by layer and {by}"
    if arguments.get("estimate") is not None:
        title += f", estimated by {arguments['estimate']}"
    if result.meta.get("rank_correlation") is not None:
        title += f" (rank correlation with measured effects {result.meta['rank_correlation']:.2f})"
    set_heading(figure, result, title)
    return figure


def _panel_title(label: object, panel) -> str:
    """The label with a real arrow, and how many prompts the mean is over."""
    title = str(label).replace("->", "→")
    note = rows_note(panel)
    return f"{title}\n{note}" if note else title
