"""The recall study's claims, and the rules that decide each from the study's tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from ..zoo import RECALL
from .claims import Question
from .evidence import Finding, Number, Results, Setting, listed, shown

MAMBA, NOCONV, MAMBA2, ATTENTION = RECALL
"""The subjects by their names."""
LEARNED = 0.95
"""The accuracy from which a subject is said to do the task."""
TRAINED_ON = 6
"""How many pairs the subjects' training prompts have."""
HALF = 0.5
"""What is restored where a place is said to hold what was changed."""
AFTER_KEY = ("value", "value+1", "value+2")
"""The places after the key, and before the divider, where a pair can be bound in the context."""
IN_ORDER = ("block in", "conv", "scan", "mixer out", "block out")
"""The components in the order in which they are computed."""
ALIKE = 0.7
"""The share of the cells from which estimates are said to find the places that interchange finds."""
SEEN = 0.05
"""The least estimate of a place that is said to be found: ranks among estimates of nothing say nothing."""

QUESTIONS = (
    Question(
        "learned",
        "Mamba, Mamba-2 and attention learn the task",
        "Transformers and Mamba solve associative recall; what they solve it by differs.",
        None,
    ),
    Question(
        "induction",
        "Mamba does induction",
        "A changed key is restored at the value's place: the pair was bound there, in the context, and the query finds "
        "it. Direct retrieval restores it at the last position alone.",
        None,
    ),
    Question(
        "conv",
        "Mamba binds the pair by its short convolution, not by its scan",
        "Mamba does induction by its short convolution, not by its SSM.",
        None,
    ),
    Question(
        "fails",
        "Without the short convolution, Mamba fails",
        "With a kernel of 1, Mamba does not do induction on associative recall.",
        None,
    ),
    Question("heads", "Mamba-2 does induction", "", None),
    Question("transformer", "The transformer does induction", "Transformers do induction, by attention.", None),
    Question("estimated", "Attribution finds what interchange finds", "", None),
)
"""The claims; rows of the catalogue name them by their keys."""


def learned(results: Results, setting: Setting) -> Finding:
    """From the accuracies at as many pairs as were trained on."""
    numbers = {name: _accuracy(results, name) for name in RECALL}
    wanted = [name for name in RECALL if name != NOCONV]
    does = [name for name in wanted if numbers[name].value >= LEARNED]
    fails = [name for name in wanted if name not in does]
    told = "; ".join(f"{name} answers {numbers[name].text}" for name in RECALL)
    verdict = f"{listed(does)} {'does' if len(does) == 1 else 'do'} the task" if does else "none does the task"
    without = f", {listed(fails)} {'does' if len(fails) == 1 else 'do'} not" if fails and does else ""
    return Finding(
        "recall_accuracy",
        not fails,
        f"Of prompts with {TRAINED_ON} pairs: {told}. So of those with a conv or attention {verdict}{without}.",
        f"each of {listed(wanted)} is right in {LEARNED} of the prompts with {TRAINED_ON} pairs",
        tuple(numbers.values()),
    )


def fails(results: Results, setting: Setting) -> Finding:
    """From the accuracy of the Mamba without a conv, beside the one with it."""
    with_conv, without = _accuracy(results, MAMBA), _accuracy(results, NOCONV)
    return Finding(
        "recall_accuracy",
        None if with_conv.value < LEARNED else without.value < LEARNED,
        f"With the convolution Mamba is right in {with_conv.with_interval} of the prompts with {TRAINED_ON} pairs, "
        f"without it in {without.with_interval}; one of the prompt's values at random is right in "
        f"{shown(1 / TRAINED_ON)}.",
        f"Mamba is right in {LEARNED} of the prompts, and in fewer without the convolution",
        (with_conv, without),
    )


def induction(results: Results, setting: Setting) -> Finding:
    """Whether Mamba binds a pair in the context."""
    return _binds(results, MAMBA)


def heads(results: Results, setting: Setting) -> Finding:
    """Whether Mamba-2 does."""
    return _binds(results, MAMBA2)


def transformer(results: Results, setting: Setting) -> Finding:
    """Whether the transformer does."""
    return _binds(results, ATTENTION)


def conv(results: Results, setting: Setting) -> Finding:
    """Which component is the first that holds a changed key after the key's own place."""
    table = _of(results, "recall_interchange", MAMBA, "key")
    there = table[table["place"].isin(AFTER_KEY) & (table["restored"] >= HALF)]
    rule = (
        f"of the components in the order in which they are computed, the first with {HALF} of a changed key at a place "
        f"from the value to two tokens after it is a conv"
    )
    if there.empty:
        return Finding("recall_interchange", None, "Nothing holds a changed key after its own place.", rule)
    order = there["layer"] * len(IN_ORDER) + there["component"].map(IN_ORDER.index)
    first = there[order == order.min()].nlargest(1, "restored").iloc[0]
    layer = table[(table["layer"] == first["layer"]) & (table["place"] == first["place"])].set_index("component")
    before = layer.loc["block in"]
    return Finding(
        "recall_interchange",
        first["component"] == "conv",
        f"The first that holds a changed key after its own place is the {first['component']} of layer "
        f"{first['layer']}, at {first['place']}: it restores {shown(float(first['restored']))}, what the block takes "
        f"in there {shown(float(before['restored']))}.",
        rule,
        tuple(_number(row, f"{row['component']} of layer {row['layer']} at {row['place']}") for row in _rows(layer)),
    )


def taps(results: Results, setting: Setting) -> Finding:
    """Which edge from the key to a later place carries it: a tap's, or the scan's."""
    table = _of(results, "recall_edges", MAMBA, "key")
    table = table[table["target"].isin(AFTER_KEY) & (table["source"] == "key")].dropna(subset="restored")
    rule = "of all edges from the key to the three tokens after it, the one that restores most is a tap's, not a scan's"
    if table.empty:
        return Finding("recall_edges", None, "No edge could be measured.", rule)
    ranked = table.sort_values("restored", ascending=False, kind="stable")
    best = {kind: ranked[ranked["via"].str.startswith(kind)].iloc[0] for kind in ("conv", "scan")}
    told = {
        kind: f"{row['via']} of layer {row['layer']} from {row['source']} to {row['target']} restores "
        f"{shown(float(row['restored']))}"
        for kind, row in best.items()
    }
    return Finding(
        "recall_edges",
        bool(best["conv"]["restored"] > best["scan"]["restored"]),
        f"Of the taps, {told['conv']}; of the scans, {told['scan']}.",
        rule,
        tuple(
            _number(row, f"{row['via']} of layer {row['layer']}, to {row['target']}") for row in _rows(ranked.head(6))
        ),
    )


def estimated(results: Results, setting: Setting) -> Finding:
    """Of the cells that restore half, how many attribution ranks first, for each subject that does the task."""
    keys = ["subject", "change", "layer", "component", "place"]
    both = results["recall_attribution"].table.merge(results["recall_interchange"].table[[*keys, "restored"]], on=keys)
    both = both.dropna(subset=["estimate", "restored"])
    numbers = []
    for name in dict.fromkeys(both["subject"]):
        part = both[both["subject"] == name]
        held = part["restored"] >= HALF
        if _accuracy(results, name).value >= LEARNED and held.any():
            first = part.nlargest(int(held.sum()), "estimate")
            seen = held[first.index] & (first["estimate"] >= SEEN)
            numbers.append(Number(f"{name}: share of the cells", float(seen.mean()), n=int(held.sum())))
    told = listed([f"{number.text} of {number.n} of {number.what.split(':')[0]}" for number in numbers])
    return Finding(
        "recall_attribution",
        all(number.value >= ALIKE for number in numbers) if numbers else None,
        f"Of the cells where interchange restores {HALF} or more, the share that is among as many cells with the "
        f"largest estimates, each {SEEN} at least: {told}."
        if numbers
        else "No subject does the task.",
        f"for each subject that does the task, the share is {ALIKE} or more",
        tuple(numbers),
    )


def _binds(results: Results, subject: str) -> Finding:
    """Whether something between the key and the divider holds a changed key: induction, else direct retrieval."""
    table = _of(results, "recall_interchange", subject, "key")
    rule = (
        f"the subject does the task, and some activation at the value, or at one of the two tokens after it, restores "
        f"{HALF} of a changed key"
    )
    measured = table.dropna(subset="restored")
    able = "recall_accuracy" not in results or _accuracy(results, subject).value >= LEARNED
    if measured.empty or not able:
        return Finding(
            "recall_interchange", None, f"{subject} does not do the task; there is nothing to restore.", rule
        )
    best = {
        place: measured[measured["place"] == place].nlargest(1, "restored").iloc[0]
        for place in dict.fromkeys(measured["place"])
    }
    bound = max((best[place] for place in AFTER_KEY if place in best), key=lambda row: row["restored"])
    holds = bool(bound["restored"] >= HALF)
    where = f"{bound['component']} of layer {bound['layer']} at {bound['place']}"
    at_value = f"at the value's own place {shown(float(best['value']['restored']))}" if "value" in best else ""
    return Finding(
        "recall_interchange",
        holds,
        f"Of a changed key, {where} brings {shown(float(bound['restored']))} of the right answer back ({at_value} at "
        f"the most): " + ("induction." if holds else "direct retrieval, as only the key and the last position do."),
        rule,
        tuple(
            _number(row, f"most at {place}: {row['component']} of layer {row['layer']}") for place, row in best.items()
        ),
    )


def _accuracy(results: Results, subject: str) -> Number:
    table = results["recall_accuracy"].table
    row = table[(table["subject"] == subject) & (table["pairs"] == TRAINED_ON)].iloc[0]
    return Number(f"{subject}: accuracy", *(float(row[name]) for name in ("accuracy", "low", "high")), n=int(row["n"]))


def _of(results: Results, figure: str, subject: str, change: str) -> pd.DataFrame:
    table = results[figure].table
    return table[(table["subject"] == subject) & (table["change"] == change)]


def _rows(table: pd.DataFrame) -> Sequence[dict[str, Any]]:
    kept = table.reset_index() if table.index.name else table
    return kept.dropna(subset="restored").to_dict("records")  # pyright: ignore[reportReturnType]


def _number(row: Any, what: str) -> Number:
    return Number(what, *(float(row[name]) for name in ("restored", "low", "high")), n=int(row["n"]))
