"""How much of the model's behaviour circuits of growing size keep (MIB, arXiv 2504.13151)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mamba_ioi.figures.style import BLUE, GREY, VERMILION, new_figure, paper_style, require, set_heading

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mamba_ioi.result import Result

LINES = {"signed": (VERMILION, "-o"), "absolute": (BLUE, "--s"), "random": (GREY, ":^")}


@paper_style()
def faithfulness(result: Result) -> Figure:
    """Faithfulness over the share of edges, a line for each ranking, with the areas CPR and CMD in the legend.

    Args:
        result: columns ranking, fraction, faithfulness, as `circuits.faithfulness` has them; `meta["cpr"]` and
            `meta["cmd"]` are the areas by ranking.
    """
    require(result, "ranking", "fraction", "faithfulness")
    figure = new_figure(6.0, 3.6)
    axes = figure.subplots()
    for level in (0, 1):
        axes.axhline(level, color="black", linewidth=0.8, linestyle="-" if level == 0 else "--")
    for ranking, rows in result.table.groupby("ranking", sort=False):
        colour, line = LINES.get(str(ranking), ("black", "-"))
        areas = [f"{name.upper()} {result.meta[name][ranking]:.3f}" for name in ("cpr", "cmd") if name in result.meta]
        label = f"{ranking} ({', '.join(areas)})" if areas else str(ranking)
        axes.plot(
            rows["fraction"], rows["faithfulness"], line, color=colour, markersize=3.5, linewidth=1.3, label=label
        )
    if result.table["fraction"].min() < 0.1:
        axes.set_xscale("log")
    axes.set(xlabel="share of all edges kept, the highest ranked first", ylabel="faithfulness")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, title="ranking")
    rows = result.meta.get("n_rows")
    set_heading(figure, result, "Circuits of growing size", "" if rows is None else f"n = {rows}")
    return figure
