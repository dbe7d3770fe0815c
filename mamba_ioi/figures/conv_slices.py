"""Figure 8: resampling one tap of the convolution at one output position."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mamba_ioi.figures.heatmap import Scale, draw_cells, effect_grid, group_column, place_column
from mamba_ioi.figures.style import new_figure, paper_style, prompts_note, set_heading

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mamba_ioi.result import Result


@paper_style()
def conv_slices(result: Result) -> Figure:
    """Stacked heat maps, one a corruption (or label); rows are slices, oldest (−3) at the top, columns output tokens.

    Colours as in `resample_ablation`: blue moves the answer towards the corrupt prompt's, one scale for all panels.

    Args:
        result: columns corruption (or the group), slice, position (of the output) and label (or mark), effect (mean
            1 − NLD), and n if known; the `layer` of `meta["arguments"]`, and its `channels` if there are
            any, are named in the title.
    """
    place = place_column(result)
    group = group_column(result, "slice", "effect")
    table = result.table
    panels = list(table.groupby(group, sort=False))
    columns, rows = table[place].nunique(), table["slice"].nunique()
    longest = table["label" if place == "position" else place].astype(str).str.len().max()
    width = max(4.0, 0.27 * columns) + 1.9
    figure = new_figure(width, len(panels) * (0.22 * rows + 0.075 * longest + 0.5) + 0.5)
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    scale = Scale.of_effects(result)
    for axis, (label, panel) in zip(axes, panels, strict=True):
        cells, column_labels = effect_grid(panel, "slice", place)
        draw_cells(
            axis,
            cells,
            norm=scale.norm,
            column_labels=column_labels,
            row_labels=[str(tap).replace("-", "−") for tap in cells.index],
        )
        axis.set_title(str(label).replace("->", "→"), parse_math=False)
        axis.set_ylabel("slice")
    scale.bar(figure, list(axes), pad=0.015, fraction=0.03, aspect=45)
    arguments = result.meta.get("arguments", {})
    layer, channels = (arguments.get(name) for name in ("layer", "channels"))
    title = "Resample ablation of conv slices" + ("" if layer is None else f", layer {layer}")
    title += "" if channels is None else f", channels of {channels} alone"
    set_heading(figure, result, title, prompts_note(result))
    return figure
