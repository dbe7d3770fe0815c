"""The rule on what moves from token to token: at the bottleneck, or before it (an open question of the paper's)."""

from __future__ import annotations

from .evidence import Finding, Number, Results, Setting, listed, shown

SHARE, HALF = 0.1, 0.5
"""Below what effect the layers before the bottleneck count as passing nothing on, and from what effect it does."""
MOST = 3
"""How many edges, and other layers, are named."""


def exchange(results: Results, setting: Setting) -> Finding:
    """Token flow: what all edges between tokens do before, in and after the bottleneck, and the largest edges."""
    result = results["flow"]
    table, layer = result.table.rename(columns={result.table.columns[0]: "kind"}), result.meta["arguments"]["layer"]
    kinds = setting.kinds(table["kind"].nunique())
    whole = table[table["part"] == "layer"].dropna(subset="effect")
    means = whole.groupby(["layer", "way"])["effect"].mean()
    windows = table[table["way"] == "both"]
    sums = windows.groupby("part")["effect"].mean()
    edges = table[table["part"] == "edge"].sort_values("effect", ascending=False, kind="stable")
    rule = (
        f"all edges between tokens before the bottleneck, resampled, have an effect below {SHARE} on average over "
        f"{'corruptions' if setting.own else 'kinds of pairs'}, and those of its scan one of at least {HALF}"
    )
    numbers = tuple(
        Number(f"{row.kind}, layers {row.part} layer {layer}", row.effect, row.low, row.high, int(row.n))
        for row in windows.sort_values("part", ascending=False, kind="stable").itertuples()
    )
    more = tuple(
        Number(f"{row.kind}, {edge_name(row)}", row.effect, row.low, row.high, int(row.n)) for row in edges.itertuples()
    )
    if (layer, "scan") not in means:
        return Finding("flow", None, f"Layer {layer} has no scan.", rule, numbers, more)
    by = {way: shown(means[layer, way]) for way in ("scan", "conv")}
    around = [f", {shown(sums[part])} in all layers {part} it" for part in ("before", "after") if part in sums]
    others = means.drop(index=layer, level="layer").groupby("layer").max().sort_values(ascending=False, kind="stable")
    notable = [f"layer {one} ({shown(value)})" for one, value in others.items() if value >= SHARE][:MOST]
    beside = f" Beside it, {listed(notable)} moves at least {SHARE}." if notable and setting.normalized else ""
    largest = edges[edges["way"] == "scan"].drop_duplicates("kind").head(MOST)
    first = [f"{edge_name(row)} ({shown(row.effect)}; {row.kind})" for row in largest.itertuples()]
    sentence = (
        f"On average over {kinds}, resampling all that tokens give each other by the scan of layer {layer} "
        f"{setting.moves(by['scan'])}, and {by['conv']} by its conv{''.join(around)}.{beside} The largest edges of a "
        f"scan: {'; '.join(first) or 'none'}.{setting.doubt(result)}"
    )
    means_of = tuple(
        Number(f"mean over {kinds}, layer {one}, by the {way}", value) for (one, way), value in means.items()
    )
    holds = None
    if "before" in sums and setting.normalized:
        holds = bool(sums["before"] < SHARE and means[layer, "scan"] >= HALF)
    return Finding("flow", holds, sentence, rule, numbers, (*means_of, *more))


def edge_name(row) -> str:
    """``layer 1, by the scan, from ',' to 'to'``."""
    ends = (row.source_label or str(row.source), row.target_label or str(row.target))
    return f"layer {row.layer}, by the {row.way}, from {' to '.join(map(repr, ends))}"
