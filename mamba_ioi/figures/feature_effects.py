"""Feature effects: what each feature of a dictionary does for the answer, as measured and as estimated."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mamba_ioi.figures.style import (
    BLUE,
    GREY,
    ORANGE,
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

MOST = 40
"""How many features are shown."""


@paper_style()
def feature_effects(result: Result) -> Figure:
    """A pair of points for each feature that was measured: its effect, with whiskers, and the estimate of it.

    Args:
        result: columns feature (-1: what the dictionary leaves unexplained), effect (NaN: not measured), estimate, and
            low and high if known. Of many features the first are shown, those of the largest estimates.
    """
    require(result, "feature", "effect", "estimate")
    measured = result.table[result.table["effect"].notna()]
    table = measured if len(measured) else result.table
    table, left = table[:MOST], len(table) - MOST
    figure = new_figure(max(4.4, 1.6 + 0.24 * len(table)), 3.4)
    axes = figure.subplots()
    axes.axhline(0, color=GREY, linewidth=0.8)
    places = range(len(table))
    if len(measured):
        axes.errorbar(
            places,
            table["effect"],
            yerr=error_lengths(table, "effect"),
            fmt="o",
            color=BLUE,
            markersize=4,
            capsize=2,
            elinewidth=1,
            label="measured",
        )
    axes.plot(places, table["estimate"], "D", color=ORANGE, markersize=3.5, fillstyle="none", label="estimated")
    names = ["error" if feature < 0 else str(feature) for feature in table["feature"]]
    axes.set_xticks(places, names, rotation=90)
    axes.set(xlabel="feature", ylabel="effect", xlim=(-0.7, len(table) - 0.3))
    axes.legend(fontsize=7, frameon=False)
    arguments = result.meta.get("arguments", {})
    where = f" of {arguments['site']} in layer {arguments['layer']}" if {"site", "layer"} <= set(arguments) else ""
    note = prompts_note(result) + (f", {left} more are not shown" if left > 0 else "")
    set_heading(figure, result, f"effects of features{where}", note)
    return figure
