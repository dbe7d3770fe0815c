"""Figure 8: resampling one tap of the convolution at one output position."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mamba_ioi.figures.heatmap import Scale, draw_cells, grid, group_column, labels
from mamba_ioi.figures.style import new_figure, paper_style, prompts_note, require, set_heading

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mamba_ioi.result import Result


@paper_style()
def conv_slices(result: Result) -> Figure:
    """Stacked heat maps, one a corruption (or label); rows are slices, oldest (−3) at the top, columns output tokens.

    Colours as in `resample_ablation`: blue moves the answer towards the corrupt prompt's, one scale for all panels.

    Args:
        result: columns corruption (or the group), slice, position (of the output), label, effect (mean 1 − NLD), and n
            if known; `meta["arguments"]["layer"]` is named in the title.
    """
    require(result, "slice", "position", "label", "effect")
    group = group_column(result, "slice", "position", "label", "effect")
    table = result.table
    panels = list(table.groupby(group, sort=False))
    columns, rows = table["position"].nunique(), table["slice"].nunique()
    longest = table["label"].astype(str).str.len().max()
    width = max(4.0, 0.27 * columns) + 1.9
    figure = new_figure(width, len(panels) * (0.22 * rows + 0.075 * longest + 0.5) + 0.5)
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    scale = Scale.symmetric(table["effect"].to_numpy(), "effect = mean 1 − NLD")
    for axis, (label, panel) in zip(axes, panels, strict=True):
        cells = grid(panel, "slice", "position", "effect")
        draw_cells(
            axis,
            cells,
            norm=scale.norm,
            column_labels=labels(panel),
            row_labels=[str(tap).replace("-", "−") for tap in cells.index],
        )
        axis.set_title(str(label).replace("->", "→"), parse_math=False)
        axis.set_ylabel("slice")
    scale.bar(figure, list(axes), pad=0.015, fraction=0.03, aspect=45)
    layer = result.meta.get("arguments", {}).get("layer")
    title = "Resample ablation of conv slices" + ("" if layer is None else f", layer {layer}")
    set_heading(figure, result, title, prompts_note(result))
    return figure
