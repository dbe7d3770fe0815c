"""The logit lens: the logit difference that the stream holds after each layer, at each token or mark."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mamba_ioi.figures.heatmap import Scale, draw_cells
from mamba_ioi.figures.style import new_figure, paper_style, prompts_note, require, set_heading

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mamba_ioi.result import Result


@paper_style()
def logit_lens(result: Result) -> Figure:
    """A heat map: a row for each layer, the first for what layer 0 begins with; blue: the right answer is ahead.

    Args:
        result: columns layer, position and label (or mark), logit_diff, and n if known.
    """
    place = "mark" if "mark" in result.table else "position"
    require(result, "layer", place, "logit_diff")
    table = result.table
    layers, places = table["layer"].unique(), list(dict.fromkeys(table[place]))
    cells = table.pivot(index="layer", columns=place, values="logit_diff").reindex(index=layers, columns=places)
    labels = places if place == "mark" else list(table.drop_duplicates(place)["label"])
    tall = max(1.6, len(layers) * (0.28 if len(layers) <= 16 else 0.15))
    figure = new_figure(max(4.2, 0.26 * len(places) + 2.2), tall + 1.5)
    axes = figure.subplots()
    scale = Scale.symmetric(table["logit_diff"].to_numpy(), "logit difference", np.inf)
    names = ["embed" if layer < 0 else str(layer) for layer in layers]
    draw_cells(axes, cells, norm=scale.norm, column_labels=[str(one) for one in labels], row_labels=names)
    axes.set_ylabel("after layer")
    scale.bar(figure, [axes], pad=0.02, fraction=0.04)
    set_heading(figure, result, "logit lens", prompts_note(result))
    return figure
