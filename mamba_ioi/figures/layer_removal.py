"""Figure 5: what removing layers does, one at a time and one after another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.ticker import MultipleLocator

from mamba_ioi.figures.style import (
    BLUE,
    GREY,
    SKY,
    VERMILION,
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

PROBABILITY = "probability of the answer among the candidates"


@paper_style()
def layer_removal(result: Result) -> Figure:
    """Bars: the answer's probability among the candidates with one layer zero-ablated; dots: the accuracy.

    The dashed line is the probability with no layer removed (the row of layer −1). Whiskers are intervals, where the
    table has them: low … high of the probability, accuracy_low … accuracy_high of the accuracy.

    Args:
        result: columns layer, probability, accuracy, and n and the intervals' columns if known.
    """
    require(result, "layer", "probability", "accuracy")
    table = result.table.sort_values("layer")
    intact, removed = table[table["layer"] < 0], table[table["layer"] >= 0]
    layers = removed["layer"].to_numpy()
    figure = new_figure(max(6.0, 1.6 + 0.21 * len(layers)), 3.6)
    axes = figure.subplots()
    whiskers: dict[str, Any] = {"elinewidth": 0.8, "capsize": 1.5}
    axes.bar(
        layers - 0.05,
        removed["probability"],
        yerr=error_lengths(removed, "probability"),
        color=SKY,
        width=0.7,
        label=PROBABILITY,
        error_kw=whiskers | {"ecolor": "#303030"},
    )
    axes.errorbar(
        layers + 0.15,
        removed["accuracy"],
        yerr=error_lengths(removed, "accuracy", "accuracy_low", "accuracy_high"),
        fmt="o",
        color=VERMILION,
        markersize=3.2,
        label="accuracy",
        **whiskers,
    )
    if len(intact):
        level = intact["probability"].iloc[0]
        label = f"probability with no layer removed ({level:.3f})"
        axes.axhline(level, color="black", linestyle="--", linewidth=1, label=label)
    axes.set(xlabel="layer removed (zero-ablated)", ylabel="probability, accuracy", ylim=(0, 1.03))
    axes.set_xticks(layers, [str(layer) for layer in layers], rotation=90 if len(layers) > 24 else 0)
    axes.set_xlim(np.min(layers, initial=0) - 0.7, np.max(layers, initial=0) + 0.7)
    figure.legend(loc="outside lower center", ncols=3 if len(layers) > 30 else 1, frameon=False)
    set_heading(figure, result, "Removing one layer", prompts_note(result))
    return figure


@paper_style()
def greedy_layer_removal(result: Result) -> Figure:
    """Accuracy and probability as layers are removed one after another, the least needed first.

    The lower axis names the layer removed at each step (`none` where the layer is −1), the upper axis counts. Bands
    are intervals, where the table has them: accuracy_low … accuracy_high, and low … high of the probability. A
    vertical line stands before the first layer whose removal harms accuracy, if the result says which.

    Args:
        result: columns step, layer, accuracy, probability, and n and the intervals' columns if known;
            `meta["removable"]` is the number of layers that go before accuracy falls.
    """
    require(result, "step", "layer", "accuracy", "probability")
    table = result.table.sort_values("step")
    steps = table["step"].to_numpy()
    figure = new_figure(max(6.0, 1.6 + 0.21 * len(steps)), 3.8)
    axes = figure.subplots()
    axes.plot(steps, table["accuracy"], "-o", color=VERMILION, markersize=3.5, linewidth=1.4, label="accuracy")
    axes.plot(steps, table["probability"], "--s", color=BLUE, markersize=3, linewidth=1.2, label=PROBABILITY)
    for low, high, colour in (("accuracy_low", "accuracy_high", VERMILION), ("low", "high", BLUE)):
        if {low, high} <= set(table.columns):
            axes.fill_between(steps, table[low], table[high], color=colour, alpha=0.15, linewidth=0)
    removable = result.meta.get("removable", steps.max())
    if removable < steps.max():
        label = f"{removable} removed before accuracy falls"
        axes.axvline(removable + 0.5, color=GREY, linestyle=":", linewidth=1.2, label=label)
    names = ["none" if layer < 0 else str(layer) for layer in table["layer"]]
    axes.set_xticks(steps, names, rotation=90 if len(steps) > 24 else 0)
    axes.set(xlabel="layer removed at this step, in addition to those before", ylabel="accuracy, probability")
    axes.set(ylim=(0, 1.03), xlim=(steps.min() - 0.7, steps.max() + 0.7))
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.6)
    count = axes.secondary_xaxis("top")
    count.set_xlabel("number of layers removed")
    count.xaxis.set_major_locator(MultipleLocator(5 if len(steps) > 16 else 1))
    count.spines["top"].set(visible=True, color=GREY)
    figure.legend(loc="outside lower center", ncols=3 if len(steps) > 30 else 1, frameon=False)
    set_heading(figure, result, "Greedy layer removal", prompts_note(result))
    return figure
