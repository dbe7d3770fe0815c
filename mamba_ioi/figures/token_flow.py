"""Token flow: for each kind of pairs the tokens, and arcs from token to token in the layers that move something."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.patheffects import withStroke

from mamba_ioi.figures.heatmap import group_column
from mamba_ioi.figures.style import (
    BLUE,
    GREY,
    LIGHT_GREY,
    ORANGE,
    VERMILION,
    literal,
    new_figure,
    paper_style,
    prompts_note,
    require,
    set_heading,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mamba_ioi.result import Result

COLOURS = {"scan": BLUE, "conv": ORANGE}
SHOWN, NUMBERED, LANES = 0.02, 0.1, 5
"""The effect from which on an edge has an arc, and a number; how many layers have a lane, at most."""
WINDOWS = ("before", "after")


@paper_style()
def token_flow(result: Result) -> Figure:
    """A panel for each kind of pairs: tokens from left to right, a lane for each layer, the lowest layer lowest.

    An arc leads from a source to a target on its right: above the lane by the scan, below it by the conv. Its width,
    and the number at large ones, are the effect; dashed arcs have a negative one. At the lane's right end stands the
    effect of all its edges by one way, and under the panel that of the layers before and after the one looked at.

    Args:
        result: columns corruption (or the group), part, layer, way, source, target and effect; `meta["labels"]`.
    """
    require(result, "part", "layer", "way", "source", "target", "effect")
    group, table, labels = group_column(result, "part", "layer"), result.table, result.meta["labels"]
    layer = result.meta["arguments"]["layer"]
    arcs = table[(table["part"] == "edge") & (table["effect"].abs() >= SHOWN)]
    strongest = arcs.assign(size=arcs["effect"].abs()).groupby("layer")["size"].max()
    lanes = sorted(int(one) for one in strongest.sort_values(ascending=False, kind="stable").index[:LANES]) or [layer]
    panels = list(table.groupby(group, sort=False))
    length = max(map(len, labels.values()))
    longest = max(len(literal(label)) for some in labels.values() for label in some)
    columns = 1 if len(panels) == 1 or length > 30 else 2
    height = 0.8 + 0.68 * len(lanes) + 0.075 * longest
    rows = -(-len(panels) // columns)
    figure = new_figure(columns * (1.45 + 0.17 * length), 0.5 + rows * height)
    cells = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in cells[len(panels) :]:
        axes.set_axis_off()
    for axes, (kind, panel) in zip(cells, panels, strict=False):
        _panel(axes, panel, list(labels[str(kind)]), lanes, layer)
        axes.set_title(str(kind).replace("->", "→"), parse_math=False, loc="left")
    for way, colour in COLOURS.items():
        cells[0].plot([], [], color=colour, linewidth=2.5, label=f"by the {way}")
    free = cells[-1] if len(cells) > len(panels) else cells[0]
    figure.legend(
        *cells[0].get_legend_handles_labels(),
        loc="center" if free is cells[-1] else "upper right",
        bbox_to_anchor=(0.5, 0.5) if free is cells[-1] else (1, 1.25),
        bbox_transform=free.transAxes,
        frameon=False,
        ncols=1 if free is cells[-1] else 2,
        title="token to token" if free is cells[-1] else None,
    )
    set_heading(figure, result, "What moves between tokens", prompts_note(result))
    return figure


def _panel(axes: Axes, panel: pd.DataFrame, labels: list[str], lanes: list[int], layer: int) -> None:
    """One kind of pairs."""
    edges = panel[(panel["part"] == "edge") & panel["layer"].isin(lanes)]
    edges = edges[edges["effect"].abs() >= SHOWN].sort_values("effect", key=np.abs)
    furthest = max(2, int((edges["target"] - edges["source"]).max())) if len(edges) else 2
    whole = panel[panel["part"] == "layer"].set_index(["layer", "way"])["effect"].to_dict()
    last = len(labels) - 1
    for lane, index in enumerate(lanes):
        axes.plot([0, last], [lane, lane], color=LIGHT_GREY, linewidth=0.8, zorder=0)
        axes.scatter(range(last + 1), [lane] * (last + 1), s=5, color=GREY, zorder=1, linewidth=0)
        for way, up in (("scan", 0.2), ("conv", -0.16)):
            value = whole.get((index, way), float("nan"))
            if np.isfinite(value):
                axes.text(
                    last + 0.7, lane + up, f"{way} {_number(value)}", color=COLOURS[way], fontsize=7.5, va="center"
                )
    for edge in edges.to_dict("records"):
        _arc(axes, edge, lanes.index(edge["layer"]), furthest)
    axes.set_yticks(range(len(lanes)), [f"layer {index}" for index in lanes])
    for tick, index in zip(axes.get_yticklabels(), lanes, strict=True):
        tick.set_fontweight("bold" if index == layer else "normal")
    axes.set_xticks(range(last + 1), [literal(one).replace("->", "→") for one in labels], rotation=90)
    for tick, label in zip(axes.get_xticklabels(), labels, strict=True):
        tick.set_color(VERMILION if "->" in label else "black")
    axes.tick_params(length=0)
    axes.set(xlim=(-0.6, last + 0.6), ylim=(-0.45, len(lanes) - 0.15))
    for spine in axes.spines.values():
        spine.set_visible(False)
    if rest := [f"{part} layer {layer}: {_number(value)}" for part, value in _windows(panel).items()]:
        axes.set_xlabel(f"everything between tokens {', '.join(rest)}", fontsize=8.5, labelpad=2)


def _windows(panel: pd.DataFrame) -> dict[str, float]:
    """The effects of all that goes between tokens in the layers before and after one."""
    both = panel[panel["way"] == "both"].set_index("part")["effect"]
    return {part: float(both[part]) for part in WINDOWS if part in both.index}


def _arc(axes: Axes, edge: Mapping, lane: int, furthest: int) -> None:
    """Half an ellipse from source to target, above the lane or below it."""
    source, target, effect = edge["source"], edge["target"], edge["effect"]
    span, size = target - source, min(1.0, abs(effect))
    tall = 0.15 + 0.45 * span / furthest if edge["way"] == "scan" else -(0.11 + 0.04 * span)
    angle = np.linspace(np.pi, 0, 60)
    across, up = (source + target) / 2 + span / 2 * np.cos(angle), lane + tall * np.sin(angle)
    axes.plot(
        across,
        up,
        color=COLOURS[edge["way"]],
        linewidth=0.6 + 3.4 * size,
        alpha=0.35 + 0.6 * size,
        linestyle="-" if effect > 0 else (0, (2, 1)),
        solid_capstyle="butt",
        zorder=2 + size,
    )
    if abs(effect) >= NUMBERED:
        below = edge["way"] == "conv"
        axes.annotate(
            _number(effect),
            ((source + target) / 2, lane + tall),
            xytext=(0, -2 if below else -1),
            textcoords="offset points",
            fontsize=7.5,
            ha="center",
            va="top" if below else "center",
            zorder=5,
            path_effects=[withStroke(linewidth=2, foreground="white")],
        )


def _number(value: float) -> str:
    """Two decimals, without the zero before the point."""
    text = f"{value:.2f}".replace("-0.00", "0.00")
    return text.replace("-", "−").replace("0.", ".", 1) if abs(value) < 1 else text
