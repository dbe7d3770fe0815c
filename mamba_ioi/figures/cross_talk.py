"""Figure 6: which layers' token cross-talk a minimal set of layers needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from mamba_ioi.figures.style import BLUE, SKY, new_figure, paper_style, require, set_heading

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure

    from mamba_ioi.result import Result

KIND = ("template", "corruption")


@paper_style()
def cross_talk(result: Result) -> Figure:
    """A bar a layer: the share of the minimal sets, one for each kind of pairs, that the layer is in.

    Darker bars are layers in every set. A layer is in a set if its conv input had to be restored to pass the target
    accuracy, all layers' being resampled at the start. Kinds that never pass it have no minimal set: they are left
    out, and counted in the heading.

    Args:
        result: columns that say the kind (`meta["kind"]`, or template and corruption), step, layer (−1 at the
            start), accuracy; `meta["n_layers"]` says how many layers to show, else up to the last one in a set;
            `meta["unreached"]` lists the kinds, such as [template, corruption], that never pass the target.
    """
    kind = result.meta.get("kind", KIND)
    require(result, *kind, "step", "layer", "accuracy")
    unreached = result.meta.get("unreached", [])
    shares, sets = minimal_set_shares(result.table, result.meta.get("n_layers"), unreached, kind)
    figure = new_figure(max(6.0, 1.6 + 0.21 * len(shares)), 3.2)
    axes = figure.subplots()
    colours = [BLUE if share == 1 else SKY for share in shares]
    bars = axes.bar(shares.index, shares, color=colours, width=0.8)
    numbers = [f"{share:.2f}".removeprefix("0") if share else "" for share in shares]
    axes.bar_label(bars, numbers, fontsize=6.5, padding=1.5)
    axes.set_xticks(shares.index, [str(layer) for layer in shares.index], rotation=90 if len(shares) > 24 else 0)
    axes.set(xlabel="layer", ylabel="share of minimal sets", ylim=(0, 1.09), xlim=(-0.7, len(shares) - 0.3))
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    note = f"{sets} {'set' if sets == 1 else 'sets'}"
    if unreached:
        note += f", {len(unreached)} without one"
    set_heading(figure, result, "Layers in the minimal token cross-talk sets", note)
    return figure


def minimal_set_shares(
    table: pd.DataFrame,
    n_layers: int | None = None,
    unreached: Sequence[Sequence] = (),
    kind: Sequence[str] = KIND,
) -> tuple[pd.Series, int]:
    """For each layer 0, 1, … the share of the kinds whose minimal set it is in; how many sets.

    Args:
        table: columns that say the kind, and layer (−1 at the start).
        n_layers: how many layers to count; None for up to the last one in a set.
        unreached: kinds without a minimal set, which are left out.
        kind: the columns that say the kind.
    """
    kind = list(kind)
    left_out = {tuple(one) for one in unreached}
    table = table[[row not in left_out for row in table[kind].itertuples(index=False, name=None)]]
    sets = table.groupby(kind).ngroups
    members = table.loc[table["layer"] >= 0, [*kind, "layer"]].drop_duplicates()
    if n_layers is None:
        n_layers = int(members["layer"].max()) + 1 if len(members) else 1
    return members["layer"].value_counts().reindex(range(n_layers), fill_value=0) / max(sets, 1), sets
