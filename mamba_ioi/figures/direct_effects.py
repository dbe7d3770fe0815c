"""Direct effects: what each layer's parts, tokens or channels add to the logit difference."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mamba_ioi.figures.style import (
    CYCLE,
    GREY,
    MARKERS,
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


@paper_style()
def direct_effects(result: Result) -> Figure:
    """A point for each write over the layers, by part, with whiskers; tokens and channels are summed to their part.

    Args:
        result: columns layer, part, effect, and low and high where there is one write a part.
    """
    require(result, "layer", "part", "effect")
    table = result.table
    if len(extra := [name for name in ("source", "channel") if name in table]):
        keep = [name for name in table.columns if name not in (*extra, "low", "high")]
        table = table[keep].groupby(["layer", "part"], sort=False, as_index=False).agg({"effect": "sum", "n": "first"})
    last = int(table["layer"].max())
    places: dict[str, int] = {"embed": 0, "bias": last + 2}
    figure = new_figure(max(4.4, 1.6 + 0.24 * (last + 3)), 3.4)
    axes = figure.subplots()
    axes.axhline(0, color=GREY, linewidth=0.8)
    for index, (part, rows) in enumerate(table.groupby("part", sort=False)):
        at = np.array([places.get(str(part), layer + 1) for layer in rows["layer"]], dtype=float)
        axes.errorbar(
            at,
            rows["effect"],
            yerr=error_lengths(rows, "effect") if "low" in rows else None,
            fmt=MARKERS[index % len(MARKERS)],
            color=CYCLE[index % len(CYCLE)],
            markersize=4,
            capsize=2,
            elinewidth=1,
            label=str(part),
        )
    step = 1 if last < 24 else 4
    ticks = [0, *range(1, last + 2, step), last + 2]
    axes.set_xticks(ticks, ["embed", *map(str, np.arange(0, last + 1, step)), "bias"])
    axes.set(xlabel="layer", ylabel="added to the logit difference", xlim=(-0.7, last + 2.7))
    axes.legend(fontsize=7, frameon=False)
    set_heading(figure, result, "direct effects", prompts_note(result))
    return figure
