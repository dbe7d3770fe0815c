"""Rules on the features of a dictionary: which carry the answer, what they drive, and how few do the task alone."""

from __future__ import annotations

from typing import Any

from .circuit import HALF, TARGET
from .evidence import Finding, Number, Results, Setting, listed, plural, shown

FEW = 5
"""How many features or edges are named."""


def effects(results: Results, setting: Setting) -> Finding:
    """Which features carry the answer, and what the dictionary leaves unexplained of it."""
    table = results["features"].table
    named, error = table[(table["feature"] >= 0) & table["effect"].notna()], table[table["feature"] < 0]
    size = int(results["features"].meta["arguments"]["features"])
    top = named.head(FEW)
    sentence = (
        f"Of {size} features, those with the largest estimates are {listed([str(one) for one in top['feature']])}; "
        f"what the dictionary leaves unexplained {setting.moves(shown(float(error['effect'].iloc[0])))}."
    )
    numbers = [
        Number(
            f"feature {row['feature']}" if row["feature"] >= 0 else "error",
            row["effect"],
            row["low"],
            row["high"],
            row["n"],
        )
        for row in _rows(top) + _rows(error)
    ]
    total = Number("estimates of all features and the error, summed", float(table["estimate"].sum()))
    return Finding("features", None, sentence, "", (*numbers, total))


def edges(results: Results, setting: Setting) -> Finding:
    """Which edges between features are the largest."""
    result = results["features_edges"]
    table = result.table.dropna(subset="effect")
    between = table[(table["source"] >= 0) & (table["target"] >= 0)].head(FEW)
    if between.empty:
        return Finding("features_edges", None, "No downstream feature differs between clean and corrupt prompts.")
    sites = [result.meta["arguments"][side]["site"] for side in ("upstream", "downstream")]
    first = between.iloc[0]
    sentence = (
        f"The strongest edge runs from feature {int(first['source'])} of {sites[0]} to feature {int(first['target'])} "
        f"of {sites[1]}: alone it takes it {shown(float(first['effect']))} of the way to its value of the corrupt "
        f"prompts."
    )
    numbers = tuple(
        Number(f"{row['source']} to {row['target']}", row["effect"], row["low"], row["high"], row["n"])
        for row in _rows(between)
    )
    return Finding("features_edges", None, sentence, "", numbers)


def circuits(results: Results, setting: Setting) -> Finding:
    """How few features do the task alone, the others and the error resampled."""
    result = results["features_kept"]
    table, active = result.table, int(result.meta["active"])
    random = table[table["kept"] == "random"].set_index("k")
    rows = _rows(table[(table["kept"] == "top") & (table["k"] <= HALF * active)].sort_values("k"))
    where = "held-out pairs" if result.meta["judged_on"] == "held_out" else "the pairs that they were found on"
    rule = (
        f"with at most half of the active features, the accuracy's interval reaches {TARGET} and lies above every draw "
        f"of as many random ones"
    )
    if not rows:
        return Finding("features_kept", None, "No number of features up to half of them was kept.", rule)
    good = [
        row
        for row in rows
        if row["accuracy_high"] >= TARGET and row["accuracy_low"] > random.loc[row["k"], "accuracy_high"]
    ]
    row = good[0] if good else rows[-1]
    beside = random.loc[row["k"]]
    sentence = (
        f"Of {plural(active, 'feature')} that are active, {row['k']} alone have, on {where} and with all others and "
        f"the error resampled, an accuracy of {shown(row['accuracy'])} and an NLD of {shown(row['nld'])}; as many "
        f"random ones have {shown(float(beside['accuracy']))} and {shown(float(beside['nld']))}."
    )
    whole = _rows(table[table["kept"] == "top"].sort_values("k"))[-1]
    numbers = [
        Number(f"{name}, {row['k']} features{kind}", one[key], one[f"{key}_low"], one[f"{key}_high"], row["n"])
        for one, kind in ((row, ""), (dict(beside), ", random: all draws"))
        for key, name in (("accuracy", "accuracy"), ("nld", "NLD"))
    ]
    more = (
        Number(f"accuracy, {whole['k']} features", whole["accuracy"], whole["accuracy_low"], whole["accuracy_high"]),
        Number(f"NLD, {whole['k']} features", whole["nld"], whole["nld_low"], whole["nld_high"]),
    )
    return Finding("features_kept", bool(good), sentence, rule, tuple(numbers), more)


def _rows(table: Any) -> list[dict[str, Any]]:
    return table.to_dict("records")
