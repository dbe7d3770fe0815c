"""Probes: how often a linear probe is right at each place, beside the same probe for shuffled labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.colors import Normalize

from mamba_ioi.figures.heatmap import Scale, draw_cells
from mamba_ioi.figures.style import literal, new_figure, paper_style, prompts_note, require, set_heading

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mamba_ioi.result import Result

COLOURS = "Blues"
PANELS = {"accuracy": "accuracy", "control": "shuffled labels"}


@paper_style()
def probe(result: Result) -> Figure:
    """Two heat maps, of accuracy and of the control: rows are layers, or what is read off which site, columns places.

    Args:
        result: columns layer, position and label (or mark), accuracy and control; and site and target, where there are
            several.
    """
    place = "mark" if "mark" in result.table else "position"
    require(result, "layer", place, *PANELS)
    several = "target" in result.table or "site" in result.table
    table = result.table.assign(row=result.table["layer"].astype(str))
    if several:
        require(result, "site", "target")
        table["row"] = table["target"] + " in " + table["site"] + " of layer " + table["row"]
    rows, places = list(dict.fromkeys(table["row"])), list(dict.fromkeys(table[place]))
    labels = places if place == "mark" else list(table.drop_duplicates(place)["label"])
    tall = max(1.6, len(rows) * (0.28 if len(rows) <= 16 else 0.15))
    wide = max(1.8, 0.26 * len(places)) * len(PANELS) + (3.4 if several else 2.2)
    figure = new_figure(max(4.2, wide), tall + 1.5)
    grid = figure.subplots(1, len(PANELS))
    scale = Scale(Normalize(0, 1), "share of prompts read right", "neither", COLOURS)
    for axes, (value, title) in zip(grid, PANELS.items(), strict=True):
        cells = table.pivot(index="row", columns=place, values=value).reindex(index=rows, columns=places)
        names = rows if axes is grid[0] else None
        draw_cells(
            axes,
            cells.astype(float),
            norm=scale.norm,
            cmap=scale.colours,
            column_labels=[literal(one) for one in labels],
            row_labels=names,
        )
        axes.set_title(title)
    if not several:
        grid[0].set_ylabel("layer")
    scale.bar(figure, list(grid), pad=0.02, fraction=0.04)
    arguments = result.meta.get("arguments", {})
    what = "" if several else f" of the {arguments.get('what', 'token')} of {arguments.get('target')}"
    site = "" if several or "site" not in arguments else f" in {arguments['site']}"
    set_heading(figure, result, f"probes{what}{site}", prompts_note(result))
    return figure
