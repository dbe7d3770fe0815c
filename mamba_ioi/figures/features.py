"""Features of a dictionary: their effects, the edges between those of two sites, and circuits of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mamba_ioi.figures.heatmap import Scale, draw_cells
from mamba_ioi.figures.style import (
    BLUE,
    GREY,
    VERMILION,
    error_lengths,
    new_figure,
    paper_style,
    prompts_note,
    require,
    set_heading,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mamba_ioi.result import Result

ERROR = -1
MOST = 40
"""How many features are shown."""
LINES = {"top": (BLUE, "-o", "those that matter most"), "random": (GREY, ":^", "random ones")}


@paper_style()
def feature_effects(result: Result) -> Figure:
    """A point with whiskers for each feature that was measured, the largest estimates first, and its estimate.

    Where none was measured, the estimates alone; of many features the first are shown.

    Args:
        result: columns feature (-1: what the dictionary leaves unexplained), effect (NaN: not measured), low, high,
            estimate.
    """
    require(result, "feature", "effect", "estimate")
    measured = result.table[result.table["effect"].notna()]
    table = measured if len(measured) else result.table
    table, left = table[:MOST], len(table) - MOST
    figure = new_figure(max(5.0, 1.6 + 0.24 * len(table)), 3.4)
    axes = figure.subplots()
    places = np.arange(len(table))
    axes.axhline(0, color=GREY, linewidth=0.8)
    if len(measured):
        shape: Any = {"fmt": "o", "color": BLUE, "markersize": 4, "capsize": 2, "elinewidth": 1}
        axes.errorbar(places, table["effect"], error_lengths(table, "effect"), label="measured", **shape)
    axes.plot(places, table["estimate"], "x", color=VERMILION, markersize=5, label="estimated")
    axes.set_xticks(places, _names(table["feature"]), rotation=90)
    axes.set(xlabel="feature", ylabel=_unit(result), xlim=(-0.7, len(table) - 0.3))
    axes.legend(fontsize=7, frameon=False)
    note = prompts_note(result) + (f", {left} more are not shown" if left > 0 else "")
    set_heading(figure, result, f"features of {_place(result.meta['arguments'])}", note)
    return figure


@paper_style()
def feature_edges(result: Result) -> Figure:
    """A heat map: a row for each upstream feature, a column for each downstream one, each in the table's order.

    Args:
        result: columns source, target, effect.
    """
    require(result, "source", "target", "effect")
    table = result.table
    sources, targets = (list(dict.fromkeys(table[name])) for name in ("source", "target"))
    cells = table.pivot(index="source", columns="target", values="effect").reindex(index=sources, columns=targets)
    figure = new_figure(max(4.6, 0.3 * len(targets) + 2.6), max(3.0, 0.24 * len(sources) + 1.6))
    axes = figure.subplots()
    scale = Scale.symmetric(table["effect"].to_numpy(), "how far the target goes (1: as in the corrupt prompts)")
    draw_cells(axes, cells, norm=scale.norm, column_labels=_names(targets), row_labels=_names(sources))
    arguments = result.meta["arguments"]
    axes.set(xlabel=_place(arguments["downstream"]), ylabel=_place(arguments["upstream"]))
    scale.bar(figure, [axes], pad=0.02, fraction=0.04)
    set_heading(figure, result, "edges between features", prompts_note(result))
    return figure


@paper_style()
def feature_faithfulness(result: Result) -> Figure:
    """Accuracy and NLD over the number of features that are kept; bands are intervals, of random ones all draws.

    Args:
        result: columns k, kept, accuracy and nld with their intervals.
    """
    require(result, "k", "kept", "accuracy", "nld")
    figure = new_figure(7.0, 3.2)
    panels = figure.subplots(1, 2)
    for axes, value, label in zip(panels, ("accuracy", "nld"), ("accuracy", "NLD"), strict=True):
        for kept, rows in result.table.groupby("kept", sort=False):
            colour, line, name = LINES[str(kept)]
            rows = rows.sort_values("k")
            axes.plot(rows["k"], rows[value], line, color=colour, markersize=3.5, linewidth=1.3, label=name)
            axes.fill_between(rows["k"], rows[f"{value}_low"], rows[f"{value}_high"], color=colour, alpha=0.2, lw=0)
        axes.set_xscale("symlog", linthresh=1)
        axes.set(xlabel="features kept", ylabel=label, xlim=(0, None))
    panels[0].legend(fontsize=7, frameon=False)
    set_heading(figure, result, f"circuits of features of {_place(result.meta['arguments'])}", prompts_note(result))
    return figure


def _names(features) -> list[str]:
    return ["error" if one == ERROR else str(one) for one in features]


def _place(arguments) -> str:
    return f"{arguments['site']}, layer {arguments['layer']}"


def _unit(result: Result) -> str:
    metric = result.meta["arguments"].get("metric", "nld")
    return "effect = mean 1 − NLD" if metric == "nld" else f"effect = mean loss of {metric}"
