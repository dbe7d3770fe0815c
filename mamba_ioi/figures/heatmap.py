"""Heat maps with token labels: from a tidy table to labelled cells with a shared colour scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import seaborn as sns
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize

from mamba_ioi.figures.style import LIGHT_GREY, literal, require

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mamba_ioi.result import Result

DIVERGING = "RdBu"  # ColorBrewer; safe for colour-blind readers; red negative, blue positive
EFFECT_LIMIT = 1.5
"""Effects are in units of the whole change (1 = acts as corrupted): colours stop here, so that one cell with a
tiny denominator does not wash out the others."""
MISSING = "#BDBDBD"
_KNOWN = ("position", "label", "mark", "effect", "low", "high", "n")


@dataclass(frozen=True)
class Scale:
    """A colour scale for several heat maps: zero is white, and what was clipped is said on the colour bar."""

    norm: Normalize
    label: str
    extend: str
    colours: str = DIVERGING

    @classmethod
    def symmetric(cls, values: np.ndarray, label: str, limit: float = EFFECT_LIMIT) -> Scale:
        """From −m to m, m the largest magnitude among `values` or `limit`, whichever is smaller."""
        values = np.asarray(values, dtype=float)
        values = values[np.isfinite(values)]
        largest = float(np.abs(values).max(initial=0))
        bound = min(largest, limit) or 1.0
        below, above = int((values < -bound).sum()), int((values > bound).sum())
        if clipped := below + above:
            cells = "cell" if clipped == 1 else "cells"
            label += f"\ncolours clipped at ±{bound:g}:\n{clipped} {cells} beyond, up to {largest:.3g}"
        extend = {(False, False): "neither", (True, False): "min", (False, True): "max"}.get(
            (below > 0, above > 0), "both"
        )
        return cls(Normalize(-bound, bound), label, extend)

    @classmethod
    def of_effects(cls, result: Result) -> Scale:
        """For the effects of a result, in units of its metric."""
        metric = result.meta.get("arguments", {}).get("metric", "nld")
        values = result.table["effect"].to_numpy()
        if metric == "nld":
            return cls.symmetric(values, "effect = mean 1 − NLD")
        return cls.symmetric(values, f"effect = mean loss of {literal(metric)}", np.inf)

    def bar(self, figure: Figure, axes: Sequence[Axes], **options) -> None:
        """Draw the one colour bar that the heat maps in `axes` share."""
        mappable = ScalarMappable(self.norm, self.colours)
        bar = figure.colorbar(mappable, ax=axes, extend=self.extend, **options)
        bar.set_label(self.label)
        bar.outline.set_visible(False)


def grid(table: pd.DataFrame, rows: str, columns: str, values: str) -> pd.DataFrame:
    """The table as a matrix, rows and columns ascending; combinations that are absent are NaN.

    Raises:
        ValueError: a combination occurs twice.
    """
    if (twice := table.duplicated([rows, columns])).any():
        row = table[twice].iloc[0]
        raise ValueError(f"the table has two rows for {rows} {row[rows]} and {columns} {row[columns]}")
    return table.pivot(index=rows, columns=columns, values=values).astype(float).sort_index().sort_index(axis=1)


def group_column(result: Result, *known: str) -> str:
    """The column that says which panel a row is in: ``corruption``, or else the first that is none of ``known``.

    Raises:
        ValueError: there is none.
    """
    others = [name for name in result.table.columns if name not in (*known, *_KNOWN)]
    column = "corruption" if "corruption" in others or not others else others[0]
    require(result, column, *known)
    return column


def place_column(result: Result) -> str:
    """The column of the heat map's columns: ``mark``, or else ``position``, which needs a ``label``.

    Raises:
        ValueError: there is none.
    """
    if "mark" in result.table.columns:
        return "mark"
    require(result, "position", "label")
    return "position"


def effect_grid(panel: pd.DataFrame, rows: str, place: str) -> tuple[pd.DataFrame, list[str]]:
    """A panel's effects as a matrix, positions ascending or marks as they first occur, and the columns' labels."""
    cells = grid(panel, rows, place, "effect")
    if place == "position":
        return cells, labels(panel)
    marks = panel[place].drop_duplicates().tolist()
    return cells[marks], [literal(mark) for mark in marks]


def rows_note(panel: pd.DataFrame) -> str:
    """`n = 32`, or `n = 30–32` where cells differ; empty if the table does not say."""
    if "n" not in panel.columns:
        return ""
    low, high = panel["n"].min(), panel["n"].max()
    return f"n = {low}" if low == high else f"n = {low}–{high}"


def labels(table: pd.DataFrame, position: str = "position", label: str = "label") -> list[str]:
    """The label of each position, in the order of positions."""
    return [literal(text) for text in table.drop_duplicates(position).sort_values(position)[label]]


def draw_cells(
    axes: Axes,
    cells: pd.DataFrame,
    *,
    norm: Normalize,
    column_labels: Sequence[str],
    row_labels: Sequence[str] | None,
    cmap: str = DIVERGING,
    size: float = 7.5,
    **options,
) -> None:
    """Draw `cells` with its first row at the top; `row_labels` None leaves that axis bare. Missing cells are grey."""
    options = {"linewidths": 0.3, "linecolor": "white"} | options
    sns.heatmap(cells, ax=axes, norm=norm, cmap=cmap, cbar=False, xticklabels=False, yticklabels=False, **options)
    axes.set(xlabel="", ylabel="")
    axes.set_facecolor(MISSING)
    axes.spines[:].set(visible=True, color=LIGHT_GREY, linewidth=0.6)
    axes.set_xticks(np.arange(len(column_labels)) + 0.5, column_labels, rotation=90, fontsize=size, parse_math=False)
    if row_labels is not None:
        axes.set_yticks(np.arange(len(row_labels)) + 0.5, row_labels, rotation=0, fontsize=size, parse_math=False)
    axes.tick_params(length=2, width=0.6, pad=2)
