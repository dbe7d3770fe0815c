"""Knockout: how far the answer falls with one token cut from another in a window of layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib import colormaps

from mamba_ioi.figures.style import (
    GREY,
    error_lengths,
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


@paper_style()
def knockout(result: Result) -> Figure:
    """A panel for each target, a line for each source: the effect over the window's first layer, with intervals.

    Args:
        result: columns source, target, layer, effect, and low and high if known.
    """
    require(result, "source", "target", "layer", "effect")
    table = result.table
    targets, sources = (list(dict.fromkeys(table[name])) for name in ("target", "source"))
    width = max(4.0, 1.6 + 0.21 * table["layer"].nunique())
    figure = new_figure(min(24.0, width * len(targets)), 3.6)
    colours = colormaps["viridis"].resampled(max(2, len(sources)))
    for number, (axes, target) in enumerate(
        zip(figure.subplots(1, len(targets), sharey=True, squeeze=False)[0], targets, strict=True)
    ):
        axes.axhline(0, color=GREY, linewidth=0.8)
        for index, source in enumerate(sources):
            line = table[(table["source"] == source) & (table["target"] == target)].sort_values("layer")
            axes.errorbar(
                line["layer"],
                line["effect"],
                yerr=error_lengths(line, "effect"),
                color=colours(index),
                marker="o",
                markersize=3,
                linewidth=1.2,
                capsize=1.5,
                elinewidth=0.8,
                label=f"from {literal(source)}",
            )
        axes.set(xlabel="first layer of the window", title=f"to {literal(target)}")
        axes.xaxis.get_major_locator().set_params(integer=True)
        if not number:
            axes.set_ylabel("effect")
            axes.legend(fontsize=7, frameon=False)
    window = result.meta.get("arguments", {}).get("window", 1)
    title = "knockout" if window == 1 else f"knockout, windows of {window} layers"
    set_heading(figure, result, title, prompts_note(result))
    return figure
