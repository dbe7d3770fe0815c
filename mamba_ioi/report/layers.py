"""What Figures 4 to 6 say: does the model do the task, and is one layer a bottleneck (paper, Section 4.1)."""

from __future__ import annotations

import pandas as pd

from .evidence import Finding, Number, Results, Setting, by_kind, listed, plural, shown

ABLE = 0.9
"""The accuracy from which on a model is said to do the task."""
HALFWAY, TWICE = 0.5, 2.0
MINIMAL = 0.05
NOWHERE = "No pair has any of the marks that it goes by."
LAYER_UNKNOWN = "At which layer to look is not known: no bottleneck is recorded, and no other result names one."


def peaks_by(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """The row of largest effect, over places, of each kind of pairs and value of a column."""
    return table.loc[table.groupby(["kind", column], sort=False)["effect"].idxmax()]


def task(results: Results, setting: Setting) -> Finding:
    """Figure 5's first bar: the intact model."""
    row = results["fig5"].table.set_index("layer").loc[-1]
    known = (setting.paper or {}).get("task", {})
    numbers = (
        Number("accuracy", row.accuracy, row.accuracy_low, row.accuracy_high, int(row.n), known.get("accuracy")),
        Number("probability of the answer", row.probability, row.low, row.high, int(row.n), known.get("probability")),
    )
    holds = bool(row.accuracy >= ABLE)
    doubt = "" if holds else " What follows says little about a circuit for a task that the model does not do."
    others = "the prompt's other names" if setting.own else "the other candidates"
    sentence = (
        f"With nothing changed, the answer beats {others} in {shown(row.accuracy)} of the prompts; its "
        f"mean probability among them is {shown(row.probability)}.{doubt}"
    )
    return Finding("fig5", holds, sentence, f"accuracy is at least {ABLE}", numbers)


def resampled(results: Results, setting: Setting) -> Finding:
    """Figure 4: how far each layer's input moves the answer."""
    return _resampled("fig4", results, setting)


def resampled_by_mark(results: Results, setting: Setting) -> Finding:
    """Figure 4 by marks, over all templates: likewise."""
    return _resampled("fig4_marks", results, setting)


def _resampled(figure: str, results: Results, setting: Setting) -> Finding:
    measured = by_kind(results[figure].table).dropna(subset="effect")
    if measured.empty:
        return Finding(figure, None, NOWHERE)
    peaks = peaks_by(measured, "layer")
    means = peaks.groupby("layer")["effect"].mean()
    others = means.drop(0, errors="ignore").sort_values(ascending=False, kind="stable")
    if others.empty:
        return Finding(figure, None, "The model has no layer besides layer 0, which is set aside.")
    first, kinds = int(others.index[0]), peaks["kind"].unique()
    known = setting.bottleneck
    layer = known if known is not None and known in others.index else first
    rest = others.drop(layer)
    contest = peaks[peaks["layer"] != 0]
    leaders = contest.loc[contest.groupby("kind")["effect"].idxmax(), "layer"]
    leads = int((leaders == layer).sum())
    next_layer = int(rest.index[0]) if len(rest) else None
    apart = next_layer is None or means[layer] >= TWICE * means[next_layer]
    holds: bool | None = bool(leads == len(kinds) and means[layer] >= HALFWAY and apart)
    beside = [] if next_layer is None else [f"the next layer, {next_layer}, {shown(means[next_layer])}"]
    if layer != first:
        beside[0] = f"layer {first}, {shown(means[first])}"
    beside += [f"layer 0, {shown(means[0])}"] if 0 in means else []
    who, whose = "it", "its"
    if layer != first:
        opening = f"Layer {first} comes first here, and not the bottleneck, layer {layer}"
        who, whose = f"layer {layer}", f"layer {layer}'s"
    elif not setting.normalized:
        opening = f"Layer {layer} comes first"
    else:
        opening = f"Layer {layer} stands out" if holds else f"No layer stands out; layer {layer} comes first"
    unsure = "" if setting.normalized else setting.doubt(results[figure])
    place = "position" if "position" in measured else "mark"
    moved = setting.moves(f"up to {shown(means[layer])}") + (" to the corrupt prompt's" if setting.normalized else "")
    sentence = (
        f"{opening}: resampling {whose} input at one {place} {moved}{'; ' if beside else ''}{listed(beside)}. Layer 0 "
        f"set aside, {who} leads in {leads} of {setting.kinds(len(kinds))}.{unsure}"
    )
    holds = None if unsure else holds
    rule = (
        f"layer 0 set aside, one layer has the largest peak in every {setting.kind}, its mean peak is at least "
        f"{HALFWAY}, and at least {TWICE:g} times the next layer's"
    )
    own = peaks[peaks["layer"] == layer]
    paper = setting.paper if figure == "fig4" and setting.paper else {}
    numbers = (
        Number("the layer", layer, paper=paper.get("bottleneck")),
        *(
            Number(f"layer {layer}, {row.kind}, at {row.place}", row.effect, row.low, row.high, int(row.n))
            for row in own.itertuples()
        ),
    )
    more = tuple(Number(f"layer {index}, mean peak", value) for index, value in means.items())
    return Finding(figure, holds, sentence, rule, numbers, more)


def removed(results: Results, setting: Setting) -> Finding:
    """Figure 5: the answer without each layer."""
    table = results["fig5"].table.set_index("layer")
    others = table.drop(index=[-1, 0], errors="ignore").sort_values("probability", kind="stable")
    if others.empty:
        return Finding("fig5", None, "The model has no layer besides layer 0, which is set aside.")
    first = others.iloc[0]
    layer = int(first.name)
    expected = layer if setting.bottleneck is None else setting.bottleneck
    apart = len(others) < 2 or first.high < others.iloc[1].low
    holds = bool(layer == expected and first.high < table.loc[-1].low and apart)
    parts = [f"{shown(first.probability)} without layer {layer}"]
    parts += [f"{shown(others.iloc[1].probability)} without layer {int(others.index[1])}"] if len(others) > 1 else []
    parts += [f"{shown(table.loc[0].probability)} without layer 0"] if 0 in table.index else []
    verdict = (
        f"Layer 0 set aside, the model can spare layer {layer} least"
        if holds
        else f"Layer 0 set aside, removing layer {layer} costs most, which does not set layer {expected} apart"
    )
    sentence = f"{verdict}: the answer's mean probability is {shown(table.loc[-1].probability)}, {listed(parts)}."
    rule = (
        f"layer 0 set aside, removing layer {expected} leaves the lowest probability, with an interval below the next "
        f"layer's and the intact model's"
    )
    known = (setting.paper or {}).get("fig5", {})
    lines = [*([0] if 0 in table.index else []), *(int(index) for index in others.index)]

    def rows(layers: list[int]) -> tuple[Number, ...]:
        found = []
        for index in layers:
            row, name = table.loc[index], f"without layer {index}"
            theirs = (known.get(kind, {}).get(str(index)) for kind in ("probability", "accuracy"))
            probability, accuracy = theirs
            found += [
                Number(f"probability {name}", row.probability, row.low, row.high, int(row.n), probability),
                Number(f"accuracy {name}", row.accuracy, row.accuracy_low, row.accuracy_high, int(row.n), accuracy),
            ]
        return tuple(found)

    if known:
        sentence += " The paper's are of 10 pairs, 20 rows."
    told = [index for index in lines if index in (0, layer) or str(index) in known.get("probability", {})]
    return Finding("fig5", holds, sentence, rule, rows(told), rows([index for index in lines if index not in told]))


def spared(results: Results, setting: Setting) -> Finding:
    """Figure 5's greedy removal; it decides nothing about a bottleneck."""
    result = results["fig5_greedy"]
    count, of = int(result.meta["removable"]), len(result.table) - 1
    share = (setting.paper or {}).get("fig5_greedy", {}).get("removable_share")
    row = result.table.iloc[count]
    sentence = (
        f"Removed one after another, {count} of {plural(of, 'layer')} can go before accuracy is more than {MINIMAL} "
        f"below the intact model's; it is then {shown(row.accuracy)}."
    )
    if share is not None:
        sentence += " The paper says about half, with minimal impact on accuracy, and gives no threshold."
    numbers = (
        Number("share of layers that can go", count / of, paper=share),
        Number("accuracy without them", row.accuracy, row.accuracy_low, row.accuracy_high, int(row.n)),
    )
    return Finding("fig5_greedy", None, sentence, numbers=numbers)


def cross_talk(results: Results, setting: Setting) -> Finding:
    """Figure 6: which layers the minimal sets hold."""
    result = results["fig6"]
    unreached = {tuple(kind) for kind in result.meta.get("unreached", [])}
    kinds = {
        kind: [int(layer) for layer in rows.sort_values("step")["layer"] if layer >= 0]
        for kind, rows in result.table.groupby(result.meta.get("kind", ["template", "corruption"]), sort=False)
    }
    sets = [layers for kind, layers in kinds.items() if kind not in unreached]
    target = result.meta["arguments"].get("target")
    if not sets:
        sentence = f"There are no minimal sets: even with every layer restored, accuracy stays at {target} or below."
        return Finding("fig6", None, sentence)
    counts = pd.Series([layer for layers in sets for layer in layers], dtype=int).value_counts().sort_index()
    layer = setting.bottleneck
    if layer is None:
        layer = int(counts.drop(0, errors="ignore").idxmax()) if set(counts.index) - {0} else 0
    inside = sum(layer in layers for layers in sets)
    first, alone = sum(layers[:1] == [layer] for layers in sets), sum(layers == [layer] for layers in sets)
    size = sum(map(len, sets)) / len(sets)
    left_out = f" {plural(len(unreached), 'kind')} of prompts with no such set are left out." if unreached else ""
    sentence = (
        f"Layer {layer} is in {inside} of {plural(len(sets), 'minimal set')} of layers that must move information "
        f"between tokens, restored first in {first}, alone in {alone}; layer 0 is in {int(counts.get(0, 0))}. The sets "
        f"have {shown(size)} layers on average.{left_out}"
    )
    known = (setting.paper or {}).get("fig6", {})
    layers = sorted({layer, 0, *counts.index.tolist(), *map(int, known)})
    shares = {
        index: Number(
            f"share of sets with layer {index}",
            int(counts.get(index, 0)) / len(sets),
            n=len(sets),
            paper=known.get(str(index), 0.0) if known else None,
        )
        for index in layers
    }
    told = [layer, *([0] if layer != 0 else [])]
    return Finding(
        "fig6",
        inside == len(sets),
        sentence,
        f"layer {layer} is in every minimal set that reaches the accuracy",
        tuple(shares[index] for index in told),
        tuple(shares[index] for index in layers if index not in told),
    )
