"""What Figures 7, 8 and 10 and Appendix D.2 say: through which taps of the conv names come in (paper, Section 4.2).

Each corruption changes one token of the prompt, a name; its label reads ``n1 C->D``.
"""

from __future__ import annotations

from typing import Any

import pandas as pd

from ..tasks.names import NAMES
from .evidence import Finding, Number, Results, listed, plural, shown
from .layers import LAYER_UNKNOWN, found_bottleneck, peaks_by

NOTABLE = 0.1
"""The effect from which on a tap counts at all; 1 is the whole way to the corrupt prompt's answer."""
HALF, STEP = 0.5, 0.2
REACH = 4
"""How many positions from a changed name on are looked at: the conv's width."""


def changed(table: pd.DataFrame) -> int | None:
    """The position whose token one corruption's rows change; None where the labels do not say."""
    at = table.loc[table["label"].astype(str).str.contains("->", regex=False), "position"].unique()
    return int(at[0]) if len(at) == 1 else None


def after_name(table: pd.DataFrame) -> pd.Series:
    """How far each row's position is from the name that its corruption changes; NaN where that is not known."""
    names = {corruption: changed(rows) for corruption, rows in table.groupby("corruption", sort=False)}
    return table["position"] - table["corruption"].map(names).astype(float)


def tap_name(tap: Any) -> str:
    """``−1``, ``0``."""
    return str(int(tap)).replace("-", "−")


def taps(results: Results, paper: dict[str, Any] | None) -> Finding:
    """Figure 8: which taps of the conv bring the names, and to which position."""
    result = results["fig8"]
    table = result.table.assign(after=after_name(result.table))
    layer = result.meta["arguments"]["layer"]
    peaks = peaks_by(table, "slice")
    means = peaks.groupby("slice")["effect"].mean().sort_index(ascending=False)
    counting = means[means >= max(NOTABLE, HALF * means.max())].sort_values(ascending=False, kind="stable")
    counted = [int(tap) for tap in counting.index]
    own = peaks[peaks["slice"].isin(counted)]
    arrivals = sorted(int(offset) for offset in own["after"].dropna().unique())
    holds = counted == [-1] and arrivals in ([1], [])
    if counted:
        brought = listed([f"{tap_name(tap)} ({shown(means[tap])} of the way)" for tap in counted])
        rest = listed([f"{tap_name(tap)} ({shown(mean)})" for tap, mean in means.items() if tap not in counted])
        sentence = (
            f"Layer {layer} takes names in through {'tap' if len(counted) == 1 else 'taps'} {brought} of its conv"
        )
        if arrivals:
            sentence += f", so that a name arrives {listed([f'{offset:+d}' for offset in arrivals])} from its own token"
        sentence += f"; the other taps: {rest or 'none'}. Effects are mean peaks over "
        sentence += f"{plural(peaks['corruption'].nunique(), 'corruption')}."
    else:
        sentence = f"No tap of layer {layer}'s conv moves the answer by {NOTABLE} or more: names do not come in there."
    rule = (
        f"tap −1 alone has a mean peak of at least {NOTABLE} and at least {HALF} of the largest, and in every "
        f"corruption its peak is one position after the changed name"
    )
    cells = tuple(
        Number(
            f"tap {tap_name(row.slice)}, {row.corruption}, into {row.label}", row.effect, row.low, row.high, int(row.n)
        )
        for row in peaks.sort_values("slice", ascending=False, kind="stable").itertuples()
    )
    numbers = tuple(Number(f"tap {tap_name(tap)}, mean peak", mean) for tap, mean in means.items())
    return Finding("fig8", holds, sentence, rule, numbers, cells)


def states(results: Results, paper: dict[str, Any] | None) -> Finding:
    """Figure 10: from which position on the bottleneck's state matters."""
    layer = found_bottleneck(results)
    if layer is None:
        return Finding("fig10", None, LAYER_UNKNOWN)
    table = results["fig10"].table
    own = table[table["layer"] == layer]
    own = own.assign(after=after_name(own))
    near = own[own["after"].between(0, REACH - 1)]
    final = own[own["position"] == own["position"].max()]
    if near.empty:
        return Finding("fig10", None, "The labels of the positions do not say where a name changes.")
    last = final["effect"].mean()
    course = near.groupby("after")["effect"].mean()
    rises = course.diff().fillna(course)
    steps = [int(offset) for offset, rise in rises.items() if rise >= STEP * last]
    holds = bool(steps == [1] and last >= HALF)
    if steps:
        how = f"begins to matter {listed([f'{offset:+d}' for offset in steps])} from a changed name"
        how += "" if len(steps) == 1 else f", in {len(steps)} steps"
    else:
        how = f"gains no weight within {REACH - 1} positions after a changed name"
    values = ", ".join(f"{shown(value)} at {int(offset):+d}" for offset, value in course.items())
    sentence = (
        f"Layer {layer}'s state {how}: resampled, it moves the answer {values}, and {shown(last)} of the way at the "
        f"last position."
    )
    rule = (
        f"among +0 to +{REACH - 1}, the effect rises by at least {STEP} of the last position's at +1 alone, and "
        f"at the last position it is at least {HALF}"
    )
    means = [Number(f"mean at {int(offset):+d}", value) for offset, value in course.items()]
    cells = tuple(
        Number(f"{row.corruption}, {where(row)}", row.effect, row.low, row.high, int(row.n))
        for rows, where in ((near, lambda row: f"{int(row.after):+d}"), (final, lambda row: "last position"))
        for row in rows.itertuples()
    )
    return Finding("fig10", holds, sentence, rule, (*means, Number("mean at the last position", last)), cells)


def kept_taps(results: Results, paper: dict[str, Any] | None) -> Finding:
    """Appendix D.2: which conv slices of the bottleneck ACDC keeps."""
    result, layer = results["appd2"], found_bottleneck(results)
    if layer is None:
        return Finding("appd2", None, LAYER_UNKNOWN)
    slices = result.table["dst"].str.extract(rf"^{layer}\.conv\[(-?\d+)\]$")[0]
    rows = result.table.assign(tap=slices)[slices.notna()].astype({"tap": int}).sort_values("tap", ascending=False)
    kept = rows[rows["kept"]]
    counted = kept[kept["effect"] >= HALF * kept["effect"].max()]
    holds = counted["tap"].tolist() == [-1]
    named = listed([f"{tap_name(row.tap)} (without it NLD falls by {shown(row.effect)})" for row in kept.itertuples()])
    sentence = (
        f"Of layer {layer}'s conv, ACDC keeps {'tap' if len(kept) == 1 else 'taps'} {named}."
        if named
        else f"ACDC keeps no tap of layer {layer}'s conv."
    )
    theirs: dict[str, float] = {}
    if paper and layer == paper["bottleneck"]:
        from ..reference import acdc_circuit

        measured = acdc_circuit().table.dropna(subset="effect")
        theirs = dict(zip(measured["dst"], measured["effect"], strict=True))
    numbers = tuple(
        Number(
            f"tap {tap_name(row.tap)}{'' if row.kept else ' (dropped)'}: fall of NLD",
            row.effect,
            n=result.meta["n_rows"],
            paper=theirs.get(row.dst),
        )
        for row in rows.itertuples()
    )
    rule = f"of the taps kept, −1 alone has an effect of at least {HALF} of the largest"
    return Finding("appd2", holds, sentence, rule, numbers)


def lines(results: Results, paper: dict[str, Any] | None) -> Finding:
    """Figure 7: after which tokens a contribution stays in the state. It is no intervention and decides nothing."""
    result = results["fig7"]
    later = result.table[result.table["j"] > result.table["i"]]
    tokens = later.groupby(["prompt", "i"]).agg(similarity=("similarity", "mean"), token=("label_i", "first"))
    names = tokens.index[tokens["token"].str.strip().isin(NAMES)]
    shifted = [tokens.index.intersection([(text, i + offset) for text, i in names]) for offset in range(REACH)]
    means = [tokens.loc[at, "similarity"].mean() for at in shifted]
    if not len(names):
        return Finding("fig7", None, "No token of its prompts is a name of the task's.")
    others = tokens.drop(shifted[0].union(shifted[1]))["similarity"]
    best = max(range(REACH), key=means.__getitem__)
    sentence = (
        f"In layer {result.meta['arguments']['layer']}, of the {REACH} positions from a name on, {best:+d} writes what "
        f"is most like later states (mean cosine {shown(means[best])}); the name itself has {shown(means[0])}, +1 "
        f"{shown(means[1])}, other tokens {shown(others.mean())}. This is no intervention and decides nothing."
    )
    numbers = [Number(f"mean cosine, {k:+d}", means[k], n=len(at)) for k, at in enumerate(shifted)]
    others_number = Number("mean cosine, tokens that are neither a name nor +1", others.mean(), n=len(others))
    return Finding("fig7", None, sentence, numbers=(*numbers, others_number))
