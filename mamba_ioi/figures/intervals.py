"""Any table of means with intervals, a point a row: what draws a result that has no figure of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mamba_ioi.figures.style import (
    BLUE,
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
def intervals(result: Result) -> Figure:
    """The value of each row over the table's first column, with whiskers from ``low`` to ``high``.

    Args:
        result: its table's columns ``low`` and ``high`` stand behind the value's column; rows are in their order.

    Raises:
        ValueError: the table is empty, or has no column between its first one and ``low``.
    """
    require(result, "low", "high")
    table = result.table
    before = list(table.columns[: table.columns.get_loc("low")])
    if len(before) < 2:
        raise ValueError(
            f"the figure of {result.meta['experiment']!r} needs a column for the axis and one for the value before "
            f"'low'; the table has {list(table.columns)}"
        )
    along, value = before[0], before[-1]
    figure = new_figure(max(5.0, 1.6 + 0.21 * len(table)), 3.4)
    axes = figure.subplots()
    places = range(len(table))
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.errorbar(
        places,
        table[value],
        yerr=error_lengths(table, value),
        fmt="o",
        color=BLUE,
        markersize=4,
        capsize=2,
        elinewidth=1,
    )
    names = [literal(one) for one in table[along]]
    axes.set_xticks(places, names, rotation=90 if len(table) > 24 or max(map(len, names)) > 3 else 0)
    axes.set(xlabel=along, ylabel=value, xlim=(-0.7, len(table) - 0.3))
    set_heading(figure, result, result.meta["experiment"].replace("_", " "), prompts_note(result))
    return figure
