"""The recall study's figures: accuracy by subject, and what is restored, carried or looked at, a panel a subject."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib import colormaps

from mamba_ioi.figures.heatmap import Scale, draw_cells
from mamba_ioi.figures.style import error_lengths, new_figure, paper_style, prompts_note, require, set_heading

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from mamba_ioi.result import Result


@paper_style()
def accuracy(result: Result) -> Figure:
    """A line for each subject: accuracy over the table's second column, with whiskers.

    Args:
        result: columns subject, another (``pairs`` or ``distance``), accuracy, and low and high if known.
    """
    require(result, "subject", "accuracy")
    table, along = result.table, result.table.columns[1]
    figure = new_figure(5.6, 3.4)
    axes = figure.subplots()
    subjects = list(dict.fromkeys(table["subject"]))
    colours = colormaps["viridis"].resampled(max(2, len(subjects)))
    for index, subject in enumerate(subjects):
        line = table[table["subject"] == subject].sort_values(along)
        axes.errorbar(
            line[along],
            line["accuracy"],
            yerr=error_lengths(line, "accuracy"),
            color=colours(index),
            marker="os^D"[index % 4],
            markersize=4,
            linewidth=1.2,
            capsize=2,
            elinewidth=0.8,
            label=subject,
        )
    axes.set(xlabel=along, ylabel="accuracy", ylim=(-0.03, 1.05), xticks=sorted(table[along].unique()))
    axes.legend(fontsize=7, frameon=False)
    set_heading(figure, result, f"recall: accuracy by {along}", prompts_note(result))
    return figure


@paper_style()
def interchange(result: Result) -> Figure:
    """A panel for each subject and change: rows are layers and components, columns places; what is restored.

    Args:
        result: columns subject, change, layer, component, place, and restored or estimate.
    """
    require(result, "subject", "change", "layer", "component", "place")
    value = "restored" if "restored" in result.table.columns else "estimate"
    table = result.table.assign(row=result.table["layer"].astype(str) + " " + result.table["component"])
    return _panels(result, table, ["subject", "change"], "row", "place", value)


@paper_style()
def edges(result: Result) -> Figure:
    """A panel for each subject and change: rows are edges between tokens, columns a layer's conv and scan.

    Args:
        result: columns subject, change, layer, via, source, target, restored.
    """
    require(result, "subject", "change", "layer", "via", "source", "target", "restored")
    table = result.table.assign(
        row=result.table["source"] + " → " + result.table["target"],
        column=result.table["layer"].astype(str) + " " + result.table["via"].str.replace(r"\[.*", "", regex=True),
    )
    return _panels(result, table, ["subject", "change"], "row", "column", "restored")


@paper_style()
def looked_at(result: Result) -> Figure:
    """A panel for each subject: rows are layers, columns what the query looks at; its share.

    Args:
        result: columns subject, layer, source, share.
    """
    require(result, "subject", "layer", "source", "share")
    return _panels(result, result.table.assign(change=""), ["subject", "change"], "layer", "source", "share")


def _panels(result: Result, table: pd.DataFrame, panels: list[str], rows: str, columns: str, value: str) -> Figure:
    """A heat map for each subject (across) and change (down), with one scale of colours."""
    across, down = (list(dict.fromkeys(table[name])) for name in panels)
    scale = Scale.symmetric(table[value].to_numpy(dtype=float), f"{value} (1: all the way)")
    height = max(table[table[panels[0]] == one][rows].nunique() for one in across)
    width = table[columns].nunique()
    figure = new_figure(1.6 + len(across) * (1.1 + 0.26 * width), 1.2 + len(down) * (0.8 + 0.2 * height))
    grid = figure.subplots(len(down), len(across), squeeze=False)
    for (i, change), (j, subject) in ((a, b) for a in enumerate(down) for b in enumerate(across)):
        part = table[(table[panels[0]] == subject) & (table[panels[1]] == change)]
        axes = grid[i][j]
        axes.set_title(f"{subject}, changed {change}" if change else subject, fontsize=8)
        if part.empty:
            axes.set_axis_off()
            continue
        cells = part.pivot(index=rows, columns=columns, values=value).astype(float)
        order = [list(dict.fromkeys(part[name])) for name in (rows, columns)]
        cells = cells.loc[order[0], order[1]]
        names = [[str(one) for one in axis] for axis in order]
        if cells.isna().all(axis=None):
            axes.set_axis_off()
            axes.text(0.5, 0.5, "the change takes nothing", ha="center", va="center", fontsize=7)
            continue
        draw_cells(axes, cells, norm=scale.norm, column_labels=names[1], row_labels=names[0], size=6.5)
    scale.bar(figure, list(np.ravel(grid)), shrink=0.6)
    set_heading(figure, result, result.meta["experiment"].replace("_", " "), prompts_note(result))
    return figure
