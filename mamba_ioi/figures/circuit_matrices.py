"""Appendix D.1 and D.2: circuits as matrices, source × destination and layer × part, by presence and by effect."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.colors import Normalize

from mamba_ioi.figures.circuit_graph import circuit_note
from mamba_ioi.figures.circuit_layout import in_order, is_inner
from mamba_ioi.figures.heatmap import DIVERGING, Scale, draw_cells
from mamba_ioi.figures.style import GREY, PlainFigure, literal, new_figure, paper_style, require, set_heading

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mamba_ioi.result import Result

CLAMPED_SHARE = 0.05
"""Where clamped colours stop, as a share of the largest magnitude: the paper's are chosen by hand for its one model."""
NONE = "#EDEDED"
MARKS_A_ROW = 5
PRESENCE = Normalize(0, 1.25)


@paper_style()
def circuit_matrices(result: Result) -> Figure:
    """Source × destination: which edges the circuit has, every edge's attribution, its effect, and both clamped.

    Attribution and effect are changes of the mean NLD (or of another metric) when an edge is resampled, estimated by
    gradients and measured: red is needed. Edges without a number are light grey.

    Args:
        result: columns src, dst, kept, score (of EAP), and effect (the measured drop of the mean NLD; NaN where an
            edge was not tested) if known; `meta["effects"]` says how effects were measured.
    """
    require(result, "src", "dst", "kept", "score")
    table = result.table
    nodes = in_order(set(table["src"]) | set(table["dst"]))
    panels = [("attribution", table["score"])]
    if "effect" in table and table["effect"].notna().any():
        panels.append((f"effect: {result.meta.get('effects', 'measured')}", -table["effect"]))
    side = max(2.5, 0.115 * len(nodes) + 0.55)
    figure = new_figure((side + 0.75) * 3, (side + 0.45) * len(panels) + 0.6)
    axes = figure.subplots(len(panels), 3, squeeze=False)
    kept = table["kept"].astype(float).where(table["kept"].astype(bool), 0.0)
    _matrix(axes[0, 0], table, kept, nodes, PRESENCE, "Blues", f"the circuit: {int(kept.sum())} edges")
    for blank in axes[1:, 0]:
        _agreement(blank, table)
    for row, (name, values) in zip(axes, panels, strict=True):
        _whole_and_clamped(figure, row[1:], table, values, nodes, name, _change(result))
    set_heading(figure, result, "The minimal circuit, attributions and effects", circuit_note(result))
    return figure


@paper_style()
def edge_scores(result: Result) -> Figure:
    """Source × destination: every edge's score, and the same clamped. Red is needed; with positions, scores are summed.

    Scores by marks have a panel for each mark, and one for the positions at none, with one colour scale.

    Args:
        result: columns src, dst, score, and mark if they are by marks, as `circuits.eap` and `circuits.exact_effects`
            have them; edges inside mixers are left out.
    """
    require(result, "src", "dst", "score")
    inside = result.table["src"].map(is_inner) | result.table["dst"].map(is_inner)
    table = result.table[~inside]
    nodes = in_order(set(table["src"]) | set(table["dst"]))
    side = max(2.5, 0.115 * len(nodes) + 0.55)
    exact = result.meta["experiment"] == "exact_effects"
    heading = "Effects of resampling each edge" if exact else "Edge attribution patching"
    if "mark" in table:
        figure, heading = _by_marks(table, nodes, side, _change(result)), f"{heading}, by mark"
    else:
        table = table.groupby(["src", "dst"], as_index=False)["score"].sum()
        figure = new_figure((side + 0.75) * 2, side + 1.05)
        name = "effect" if exact else "attribution"
        _whole_and_clamped(figure, figure.subplots(1, 2), table, table["score"], nodes, name, _change(result))
    rows = result.meta.get("n_rows")
    set_heading(figure, result, heading, "" if rows is None else f"n = {rows}")
    return figure


def _change(result: Result) -> str:
    """What scores are changes of, for a colour bar."""
    metric = result.meta.get("arguments", {}).get("metric", "nld")
    return "change of NLD" if metric == "nld" else f"change of {literal(metric)}"


def _by_marks(table: pd.DataFrame, nodes: list[str], side: float, change: str) -> PlainFigure:
    """A panel a mark, in the table's order."""
    panels = list(table.groupby("mark", sort=False))
    across = min(len(panels), MARKS_A_ROW)
    down = -(-len(panels) // across)
    figure = new_figure((side + 0.1) * across + 0.9, (side + 0.35) * down + 0.5)
    axes = figure.subplots(down, across, squeeze=False).ravel()
    scale = Scale.symmetric(table["score"].to_numpy(), change, float("inf"))
    for number, (axis, (mark, panel)) in enumerate(zip(axes, panels, strict=False)):
        _matrix(axis, panel, panel["score"], nodes, scale.norm, DIVERGING, literal(mark))
        if number % across:
            axis.set_ylabel("")
        if number + across < len(panels):
            axis.set_xlabel("")
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    scale.bar(figure, list(axes), fraction=0.02, pad=0.01, aspect=30)
    return figure


def _whole_and_clamped(
    figure: Figure,
    axes: Sequence[Axes],
    table: pd.DataFrame,
    values: pd.Series,
    nodes: list[str],
    name: str,
    change: str,
) -> None:
    """Two panels: values with colours up to the largest, and up to a small share of it."""
    largest = float(values.abs().max()) or 1.0
    clamped = f"{name.split(':')[0]}, clamped to ±{CLAMPED_SHARE:.0%} of the largest"
    for axis, bound, title in zip(axes, (largest, CLAMPED_SHARE * largest), (name, clamped), strict=True):
        scale = Scale.symmetric(values.to_numpy(), change, bound)
        plain = Scale(scale.norm, change, scale.extend)
        _matrix(axis, table, values, nodes, plain.norm, DIVERGING, title)
        plain.bar(figure, [axis], fraction=0.046, pad=0.02)


def _matrix(
    axis: Axes, table: pd.DataFrame, values: pd.Series, nodes: list[str], norm: Normalize, cmap: str, title: str
) -> None:
    """One panel: sources as rows, destinations as columns."""
    long = pd.DataFrame({"src": table["src"], "dst": table["dst"], "value": values})
    cells = long.pivot(index="src", columns="dst", values="value").reindex(index=nodes[:-1], columns=nodes[1:])
    size = 7.5 if len(nodes) <= 20 else 5.5
    draw_cells(
        axis, cells, norm=norm, cmap=cmap, column_labels=nodes[1:], row_labels=nodes[:-1], size=size, square=True
    )
    axis.set_facecolor(NONE)
    axis.set(xlabel="destination", ylabel="source")
    axis.set_title(title)


def _agreement(axis: Axes, table: pd.DataFrame) -> None:
    """Attribution against effect, an edge a dot, with the rank correlation of the two."""
    both = table[["score", "effect"]].dropna()
    axis.axline((0, 0), slope=1, color=GREY, linewidth=0.8, linestyle=":")
    inside = table.loc[both.index, "kept"].astype(bool)
    axis.scatter(both["score"][~inside], -both["effect"][~inside], s=14, color="#B0B0B0", label="not in the circuit")
    axis.scatter(both["score"][inside], -both["effect"][inside], s=14, color="#0072B2", label="in the circuit")
    correlation = both["score"].rank().corr(-both["effect"].rank()) if len(both) > 2 else np.nan
    words = "" if np.isnan(correlation) else f": rank correlation {correlation:.2f}"
    axis.set_title(f"{len(both)} edges tested{words}")
    axis.set(xlabel="attribution", ylabel="effect", box_aspect=1)
    axis.legend(frameon=False, fontsize=7, loc="upper left")


@paper_style()
def layer_parts(result: Result) -> Figure:
    """Layer × part (conv slices, skip, ssm): what ACDC keeps inside layers, and what each part's loss costs.

    Left, the parts that are kept; middle, the drop of the mean NLD when a part was tested; right, the same clamped.
    Parts that were not tested, since no path led on from them any more, are light grey.

    Args:
        result: columns src, dst, kept, effect, one row an edge of the fine graph, as `circuits.acdc` has them;
            `meta["circuit"]["threshold"]` is named in the heading.
    """
    require(result, "src", "dst", "kept", "effect")
    cells = parts_table(result.table)
    kept, effects = (cells.pivot(index="layer", columns="part", values=name) for name in ("kept", "effect"))
    taps = sorted((part for part in kept if part.startswith("conv")), key=lambda part: (len(part), part))
    parts = {part: part.strip("conv[]").replace("-", "−") for part in taps} | {"skip": "skip", "ssm": "ssm"}
    kept, effects = (frame.reindex(columns=list(parts)) for frame in (kept.astype(float), effects))
    largest = float(np.nanmax(np.abs(effects.to_numpy(dtype=float)), initial=0)) or 1.0
    figure = new_figure(9.6, max(2.2, 0.17 * len(kept) + 1.0) + 0.5)
    axes = figure.subplots(1, 3)
    clamped = CLAMPED_SHARE * largest
    panels = (
        (kept, PRESENCE, f"kept: {int(kept.to_numpy().sum())} of {kept.size}", None),
        (effects, Normalize(-largest, largest), "effect", "neither"),
        (effects, Normalize(-clamped, clamped), f"effect, clamped to ±{CLAMPED_SHARE:.0%} of the largest", "both"),
    )
    for axis, (frame, norm, title, extend) in zip(axes, panels, strict=True):
        cmap = "Blues" if extend is None else f"{DIVERGING}_r"
        names = [str(layer) for layer in frame.index] if axis is axes[0] else None
        draw_cells(axis, frame, norm=norm, cmap=cmap, column_labels=list(parts.values()), row_labels=names)
        axis.set_facecolor(NONE)
        axis.set_title(title)
        if axis is axes[0]:
            axis.set_ylabel("layer")
        else:
            axis.set_yticks([])
        if extend:
            bar = figure.colorbar(axis.collections[0], ax=axis, extend=extend, fraction=0.06, pad=0.03)
            bar.set_label(_change(result).replace("change", "drop"))
            bar.outline.set_visible(False)
    threshold = result.meta.get("circuit", {}).get("threshold")
    note = circuit_note(result) + (f", threshold {threshold:g}" if threshold is not None else "")
    set_heading(figure, result, "Parts of layers by ACDC", note)
    return figure


def parts_table(table: pd.DataFrame) -> pd.DataFrame:
    """Columns layer, part (`conv[-1]`, `skip`, `ssm`), kept, effect, of the edges inside mixers that are tested.

    With positions, a part is kept if it is kept anywhere, and its effect is the largest in magnitude.
    """
    table = table[table["dst"].map(is_inner)]
    ends = table["dst"].str.extract(r"^(?P<layer>\d+)\.(?P<part>.+)$")
    rows = table[["kept", "effect"]].join(ends).dropna(subset="part")
    rows["layer"] = rows["layer"].astype(int)
    by_part = rows.groupby(["layer", "part"], sort=False)
    strongest = by_part["effect"].agg(
        lambda effects: effects.loc[effects.abs().idxmax()] if effects.notna().any() else np.nan
    )
    return by_part["kept"].any().to_frame().join(strongest).reset_index()
