"""Section 4.4: a positional circuit before and after all of one layer's edges but the last position's are dropped."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mamba_ioi.figures.style import BLUE, SKY, error_lengths, new_figure, paper_style, require, set_heading

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mamba_ioi.result import Result


@paper_style()
def last_position_only(result: Result) -> Figure:
    """Two panels, accuracy and NLD, with a bar for the whole circuit and one for the circuit that is cut.

    Args:
        result: columns circuit (`whole`, `cut`), n_edges, accuracy, nld, and accuracy_low and so on where intervals are
            known; `meta["arguments"]["layer"]` is the layer.
    """
    require(result, "circuit", "n_edges", "accuracy", "nld")
    table = result.table
    layer = result.meta.get("arguments", {}).get("layer")
    of = "the layer" if layer is None else f"layer {layer}"
    words = {"whole": "whole circuit", "cut": f"{of}: only its edges\nat the last position"}
    if table["n_edges"].nunique() == 1:
        words["cut"] += ": it has no others"
    rows = zip(table["circuit"], table["n_edges"], strict=True)
    names = [f"{words.get(circuit, circuit)}\n({n_edges} edges)" for circuit, n_edges in rows]
    figure = new_figure(7.6, 3.1)
    for axis, column, title in zip(figure.subplots(1, 2), ("accuracy", "nld"), ("accuracy", "mean NLD"), strict=True):
        values = table[column]
        whiskers = error_lengths(table, column, f"{column}_low", f"{column}_high")
        options = {"yerr": whiskers, "capsize": 3, "error_kw": {"linewidth": 0.9}}
        bars = axis.bar(range(len(names)), values, color=[BLUE, SKY][: len(names)], width=0.6, **options)
        axis.bar_label(bars, [f"{value:.3f}" for value in values], padding=2)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xticks(range(len(names)), names)
        axis.set(ylabel=title, xlim=(-0.6, len(names) - 0.4))
        axis.set_ylim(min(0, 1.15 * values.min()), max(1.1, 1.15 * values.max()))
    rows = result.meta.get("n_rows")
    set_heading(
        figure,
        result,
        f"Without what {of} sends before the last position",
        "" if rows is None else f"n = {rows} held-out",
    )
    return figure
