"""What Figures 7, 8 and 10 and Appendix D.2 say: through which taps of the conv names come in (paper, Section 4.2).

Each of the paper's corruptions changes one token of the prompt, a name; its label reads ``n1 C->D``. In pairs of other
tasks, too, the label of a token that differs has an arrow.
"""

from __future__ import annotations

from typing import Any

import pandas as pd

from ..tasks.names import NAMES
from .evidence import Finding, Number, Results, Setting, by_kind, listed, shown
from .layers import LAYER_UNKNOWN, NOWHERE, peaks_by

NOTABLE = 0.1
"""The effect from which on a tap counts at all; 1 is the whole way to the corrupt prompt's answer."""
HALF, STEP = 0.5, 0.2
MOST = 3
"""How many tokens are named where it is not known which count."""
REACH = 4
"""How many positions from a changed name on are looked at: the conv's width."""


def changed(table: pd.DataFrame) -> int | None:
    """The position whose token one kind's rows change; None where the labels do not say, or say several."""
    at = table.loc[table["label"].astype(str).str.contains("->", regex=False), "position"].unique()
    return int(at[0]) if len(at) == 1 else None


def after_change(table: pd.DataFrame) -> pd.Series:
    """How far each row's position is from the token that its kind of pairs changes; NaN where that is not known."""
    if "position" not in table:
        return pd.Series(float("nan"), index=table.index)
    places = {kind: changed(rows) for kind, rows in table.groupby("kind", sort=False)}
    return table["position"] - table["kind"].map(places).astype(float)


def tap_name(tap: Any) -> str:
    """``−1``, ``0``."""
    return str(int(tap)).replace("-", "−")


def taps(results: Results, setting: Setting) -> Finding:
    """Figure 8: which taps of the conv bring what differs, and to which position."""
    result = results["fig8"]
    table = by_kind(result.table)
    table = table.assign(after=after_change(table)).dropna(subset="effect")
    if table.empty:
        return Finding("fig8", None, NOWHERE)
    layer = result.meta["arguments"]["layer"]
    peaks = peaks_by(table, "slice")
    means = peaks.groupby("slice")["effect"].mean().sort_index(ascending=False)
    rule = (
        f"tap −1 alone has a mean peak of at least {NOTABLE} and at least {HALF} of the largest, and in every "
        f"{setting.kind} its peak is one position after the "
        f"{'changed name' if setting.own else 'token that differs, where labels say which one does'}"
    )
    counting = means[means >= max(NOTABLE, HALF * means.max())].sort_values(ascending=False, kind="stable")
    counted = [int(tap) for tap in counting.index]
    own = peaks[peaks["slice"].isin(counted)]
    arrivals = sorted(int(offset) for offset in own["after"].dropna().unique())
    holds = counted == [-1] and arrivals in ([1], [])
    what = "names" if setting.own else "what differs"
    over = f"Effects are mean peaks over {setting.kinds(peaks['kind'].nunique())}."
    by_tap = listed([f"{tap_name(tap)} ({shown(mean)})" for tap, mean in means.items() if tap not in counted])
    if not setting.normalized:
        listing = listed([f"{tap_name(tap)} ({shown(mean)})" for tap, mean in means.items()])
        sentence = f"Resampling taps of layer {layer}'s conv lowers {setting.metric} by: {listing}. {over}"
    elif counted:
        brought = listed([f"{tap_name(tap)} ({shown(means[tap])} of the way)" for tap in counted])
        sentence = (
            f"Layer {layer} takes {what} in through {'tap' if len(counted) == 1 else 'taps'} {brought} of its conv"
        )
        reads = sorted({int(offset) for offset in (own["after"] + own["slice"]).dropna()})
        if reads == [0]:
            arrives = "a name arrives" if setting.own else "it arrives"
            token = "its own token" if setting.own else "the token that differs"
            sentence += f", so that {arrives} {listed([f'{offset:+d}' for offset in arrivals])} from {token}"
        elif reads:
            token = "a name's own token" if setting.own else "the token that differs"
            part = "partly " if 0 in reads else ""
            offsets = listed([f"{offset:+d}" for offset in reads])
            sentence += f": there it reads {offsets} from {token}, {part}what earlier layers have put there"
        sentence += f"; the other taps: {by_tap or 'none'}. {over}"
    else:
        sentence = (
            f"No tap of layer {layer}'s conv moves the answer by {NOTABLE} or more: "
            f"{'names do' if setting.own else 'what differs does'} not come in there."
        )
    doubt = setting.doubt(result)
    holds = None if doubt else holds
    sentence += doubt
    cells = tuple(
        Number(f"tap {tap_name(row.slice)}, {row.kind}, into {row.place}", row.effect, row.low, row.high, int(row.n))
        for row in peaks.sort_values("slice", ascending=False, kind="stable").itertuples()
    )
    numbers = tuple(Number(f"tap {tap_name(tap)}, mean peak", mean) for tap, mean in means.items())
    return Finding("fig8", holds, sentence, rule, numbers, cells)


def states(results: Results, setting: Setting) -> Finding:
    """Figure 10: from which position on the bottleneck's state matters."""
    layer = setting.bottleneck
    if layer is None:
        return Finding("fig10", None, LAYER_UNKNOWN)
    table = by_kind(results["fig10"].table)
    own = table[table["layer"] == layer].dropna(subset="effect")
    if own.empty:
        return Finding("fig10", None, NOWHERE)
    if "position" not in own:
        return _states_by_mark(own, layer, setting)
    own = own.assign(after=after_change(own))
    near = own[own["after"].between(0, REACH - 1)]
    final = own[own["position"] == own["position"].max()]
    if near.empty:
        token = "a name changes" if setting.own else "the one token that differs stands"
        return Finding("fig10", None, f"The labels of the positions do not say where {token}.")
    last = final["effect"].mean()
    course = near.groupby("after")["effect"].mean()
    rises = course.diff().fillna(course)
    steps = [int(offset) for offset, rise in rises.items() if rise >= STEP * last]
    holds = bool(steps == [1] and last >= HALF) if setting.normalized else None
    token = "changed name" if setting.own else "token that differs"
    article = "a" if setting.own else "the"
    if setting.normalized and max(course.max(), last) < NOTABLE:
        how = "hardly matters"
    elif steps:
        how = f"begins to matter {listed([f'{offset:+d}' for offset in steps])} from {article} {token}"
        how += "" if len(steps) == 1 else f", in {len(steps)} steps"
    else:
        how = f"gains no weight within {REACH - 1} positions after {article} {token}"
    values = ", ".join(f"{shown(value)} at {int(offset):+d}" for offset, value in course.items())
    moved = f"moves the answer {values}" if setting.normalized else f"lowers {setting.metric} by {values}"
    sentence = (
        f"Layer {layer}'s state {how}: resampled, it {moved}, and {shown(last)}"
        f"{' of the way' if setting.normalized else ''} at the last position.{setting.doubt(results['fig10'])}"
    )
    rule = (
        f"among +0 to +{REACH - 1}, the effect rises by at least {STEP} of the last position's at +1 alone, and "
        f"at the last position it is at least {HALF}"
    )
    means = [Number(f"mean at {int(offset):+d}", value) for offset, value in course.items()]
    cells = tuple(
        Number(f"{row.kind}, {where(row)}", row.effect, row.low, row.high, int(row.n))
        for rows, where in ((near, lambda row: f"{int(row.after):+d}"), (final, lambda row: "last position"))
        for row in rows.itertuples()
    )
    return Finding("fig10", holds, sentence, rule, (*means, Number("mean at the last position", last)), cells)


def _states_by_mark(own: pd.DataFrame, layer: int, setting: Setting) -> Finding:
    """By marks it is not said how far a place is from the token that differs."""
    means = own.groupby("place", sort=False)["effect"].mean()
    values = listed([f"{shown(value)} at {place}" for place, value in means.items()])
    moved = f"moves the answer {values}" if setting.normalized else f"lowers {setting.metric} by {values}"
    sentence = (
        f"Resampled, layer {layer}'s state {moved}. By marks it is not known how far a place is from the token that "
        f"differs, so this decides nothing."
    )
    columns = (own[name] for name in ("kind", "place", "effect", "low", "high", "n"))
    cells = tuple(
        Number(f"{kind}, at {place}", effect, low, high, int(n))
        for kind, place, effect, low, high, n in zip(*columns, strict=True)
    )
    numbers = tuple(Number(f"mean at {place}", value) for place, value in means.items())
    return Finding("fig10", None, sentence, numbers=numbers, more=cells)


def kept_taps(results: Results, setting: Setting) -> Finding:
    """Appendix D.2: which conv slices of the bottleneck ACDC keeps."""
    result, layer = results["appd2"], setting.bottleneck
    if layer is None:
        return Finding("appd2", None, LAYER_UNKNOWN)
    slices = result.table["dst"].str.extract(rf"^{layer}\.conv\[(-?\d+)\]$")[0]
    rows = result.table.assign(tap=slices)[slices.notna()].astype({"tap": int}).sort_values("tap", ascending=False)
    kept = rows[rows["kept"]]
    counted = kept[kept["effect"] >= HALF * kept["effect"].max()]
    holds = counted["tap"].tolist() == [-1]
    named = listed(
        [
            f"{tap_name(row.tap)} (without it {setting.measure} falls by {shown(row.effect)})"
            for row in kept.itertuples()
        ]
    )
    sentence = (
        f"Of layer {layer}'s conv, ACDC keeps {'tap' if len(kept) == 1 else 'taps'} {named}."
        if named
        else f"ACDC keeps no tap of layer {layer}'s conv."
    )
    theirs: dict[str, float] = {}
    if setting.paper and layer == setting.paper["bottleneck"]:
        from ..reference import acdc_circuit

        measured = acdc_circuit().table.dropna(subset="effect")
        theirs = dict(zip(measured["dst"], measured["effect"], strict=True))
    numbers = tuple(
        Number(
            f"tap {tap_name(row.tap)}{'' if row.kept else ' (dropped)'}: fall of {setting.measure}",
            row.effect,
            n=result.meta["n_rows"],
            paper=theirs.get(row.dst),
        )
        for row in rows.itertuples()
    )
    rule = f"of the taps kept, −1 alone has an effect of at least {HALF} of the largest"
    return Finding("appd2", holds, sentence, rule, numbers)


def lines(results: Results, setting: Setting) -> Finding:
    """Figure 7: after which tokens a contribution stays in the state. It is no intervention and decides nothing."""
    result = results["fig7"]
    later = result.table[result.table["j"] > result.table["i"]]
    tokens = later.groupby(["prompt", "i"]).agg(similarity=("similarity", "mean"), token=("label_i", "first"))
    if not setting.own:
        return _longest_kept(tokens, result.meta["arguments"]["layer"])
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


def _longest_kept(tokens: pd.DataFrame, layer: int) -> Finding:
    """Which tokens' contributions are most like later states, of any prompts."""
    order = tokens.sort_values("similarity", ascending=False, kind="stable").head(MOST)
    named = listed([f"{row.token.strip() or repr(row.token)} ({shown(row.similarity)})" for row in order.itertuples()])
    mean = tokens["similarity"].mean()
    sentence = (
        f"In layer {layer}, the tokens whose contributions are most like later states are {named}, by mean cosine; all "
        f"tokens have {shown(mean)} on average. This is no intervention and decides nothing."
    )
    numbers = tuple(
        Number(f"mean cosine, {row.token.strip() or repr(row.token)} at {position}", row.similarity)
        for row, (_, position) in zip(order.itertuples(), order.index, strict=True)
    )
    return Finding("fig7", None, sentence, numbers=(*numbers, Number("mean cosine, all tokens", mean, n=len(tokens))))
