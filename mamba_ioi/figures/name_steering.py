"""Figure 9: does writing a name's mean SSM input at another slot change the answer; and where the means lie."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.colors import Normalize

from mamba_ioi.figures.heatmap import draw_cells, grid
from mamba_ioi.figures.style import (
    CYCLE,
    LIGHT_GREY,
    MARKERS,
    literal,
    new_figure,
    paper_style,
    prompts_note,
    require,
    set_heading,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mamba_ioi.result import Result

METHODS = {"replace": "Replace", "subtract_add": "Subtract and add"}
COLOURED_NAMES = len(CYCLE)


@paper_style()
def name_steering(result: Result) -> Figure:
    """One heat map a method: the share of prompts where the injected name wins, written in each cell.

    Rows are target slots, columns source slots, slot 1 at the top left; white is 0 and dark blue 1. A pair of slots
    without a test prompt is grey and marked by a dash.

    Args:
        result: columns method (`replace`, `subtract_add`), source_slot, target_slot, success, and n if known;
            `meta["arguments"]["layer"]` is named in the title.
    """
    require(result, "method", "source_slot", "target_slot", "success")
    panels = {str(method): panel for method, panel in result.table.groupby("method", sort=False)}
    order = [method for method in METHODS if method in panels] + [m for m in panels if m not in METHODS]
    figure = new_figure(3.5 * len(order) + 0.8, 3.9)
    axes = figure.subplots(1, len(order), squeeze=False)[0]
    norm = Normalize(0, 1)
    for axis, method in zip(axes, order, strict=True):
        cells = grid(panels[method], "target_slot", "source_slot", "success")
        draw_cells(
            axis,
            cells,
            norm=norm,
            cmap="Blues",
            column_labels=[str(slot) for slot in cells.columns],
            row_labels=[str(slot) for slot in cells.index],
            size=9,
            square=True,
            linewidths=1,
        )
        for (row, column), value in np.ndenumerate(cells.to_numpy()):
            text, colour = ("–", "black") if np.isnan(value) else (f"{value:.3f}", "white" if value > 0.6 else "black")
            axis.text(column + 0.5, row + 0.5, text, color=colour, ha="center", va="center", fontsize=9)
        axis.set_title(METHODS.get(method, method), parse_math=False)
        axis.tick_params(axis="x", rotation=0)
        axis.set(xlabel="source slot (where the name's mean was taken)", ylabel="target slot (where it is written)")
    bar = figure.colorbar(axes[0].collections[0], ax=list(axes), pad=0.02, fraction=0.04, aspect=25)
    bar.set_label("share of prompts where the injected name wins")
    bar.outline.set_visible(False)
    layer = result.meta.get("arguments", {}).get("layer")
    title = "Steering names" + ("" if layer is None else f" in the SSM input of layer {layer}")
    set_heading(figure, result, title, prompts_note(result))
    return figure


@paper_style()
def name_pca(result: Result) -> Figure:
    """Two views of the mean SSM inputs of names in the plane of their first two principal components.

    Left: coloured by slot. Right: a few names spread over the alphabet, each joined from its first slot to its last,
    the others grey.

    Args:
        result: columns name, slot, pc1, pc2; `meta["explained_variance"]` holds the two components' shares.
    """
    require(result, "name", "slot", "pc1", "pc2")
    table = result.table
    figure = new_figure(9.6, 4.4)
    by_slot, by_name = figure.subplots(1, 2, sharex=True, sharey=True)
    for index, (slot, points) in enumerate(table.groupby("slot")):
        colour, marker = CYCLE[index % len(CYCLE)], MARKERS[index % len(MARKERS)]
        by_slot.scatter(points["pc1"], points["pc2"], s=14, c=colour, marker=marker, linewidths=0, label=f"slot {slot}")
    by_name.scatter(table["pc1"], table["pc2"], s=8, c=LIGHT_GREY, linewidths=0, label="other names")
    names = np.sort(table["name"].unique())
    for index, name in enumerate(names[np.linspace(0, len(names) - 1, min(COLOURED_NAMES, len(names))).astype(int)]):
        points = table[table["name"] == name].sort_values("slot")
        colour, marker = CYCLE[index], MARKERS[index]
        label = literal(name).strip()
        by_name.plot(points["pc1"], points["pc2"], f"-{marker}", color=colour, markersize=5, linewidth=0.8, label=label)
    shares = result.meta.get("explained_variance", [])
    for number, (axis, name) in enumerate([(by_slot, "slot"), (by_name, "name")]):
        axis.set_title(f"coloured by {name}")
        axis.set_xlabel(_component(1, shares))
        axis.legend(frameon=False, markerscale=1.2, loc="upper left", bbox_to_anchor=(1, 1), borderaxespad=0)
        if number == 0:
            axis.set_ylabel(_component(2, shares))
    layer = result.meta.get("arguments", {}).get("layer")
    title = "Mean SSM inputs of names" + ("" if layer is None else f", layer {layer}")
    set_heading(figure, result, title)
    return figure


def _component(number: int, shares: list[float]) -> str:
    """The axis label of one principal component, with its share of the variance where known."""
    return f"PC {number}" + (f" ({100 * shares[number - 1]:.1f} % of variance)" if len(shares) >= number else "")
