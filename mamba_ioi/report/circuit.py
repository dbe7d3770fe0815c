"""What Figure 11, Section 4.4 and Appendix D say: where the bottleneck writes, and how small a circuit is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from .evidence import Finding, Number, Results, Setting, Table, by_kind, plural, shown
from .layers import LAYER_UNKNOWN, NOWHERE

CUTS = {
    "conv": "resampling the conv's output, and with it x, B, C and delta",
    "conv, beside the time step": "resampling the conv's output, and with it x, B and C, delta staying live",
    "states": "overwriting all states h with the corrupt run's, C and D x staying live",
}
TENTH = 0.1
LOSS = 0.05
HALF = 0.5
TARGET = 0.85
"""The accuracy that the paper asks of a circuit (App. D.1)."""


def written(results: Results, setting: Setting) -> Finding:
    """Figure 11: at which positions what the bottleneck adds to the residual stream matters."""
    layer = setting.bottleneck
    if layer is None:
        return Finding("fig11", None, LAYER_UNKNOWN)
    table = by_kind(results["fig11"].table)
    own = table[table["layer"] == layer].dropna(subset="effect")
    if own.empty:
        return Finding("fig11", None, NOWHERE)
    at_end = own["mark"] == "last" if "mark" in own else own["position"] == own["position"].max()
    final, earlier = own[at_end].set_index("kind"), own[~at_end]
    if final.empty or earlier.empty:
        return Finding("fig11", None, "It takes the last token and others beside it to say where a layer writes.")
    size = earlier["effect"].abs()
    largest = earlier.loc[size.groupby(earlier["kind"]).idxmax()].set_index("kind")
    matters = bool((final["low"] > 0).all())
    quiet = bool((largest["effect"].abs() <= TENTH * final.loc[largest.index, "effect"]).all())
    by_marks = "mark" in own
    place = "mark" if by_marks else "position"
    doubt = " By marks only some places are looked at: this decides nothing." if by_marks else ""
    holds = matters and quiet
    mean, rest = final["effect"].mean(), largest["effect"].abs().mean()
    if holds:
        opening = f"Layer {layer} writes what the answer needs at the last position alone"
        opening += " among the marks" if by_marks else ""
    elif matters:
        opening = f"Layer {layer} writes at the last position, and not there alone"
    else:
        opening = f"What layer {layer} writes at the last position does not move the answer in every {setting.kind}"
    sentence = (
        f"{opening}: resampling its output there {setting.moves(shown(mean))}, and at the earlier "
        f"{place} that matters most {shown(rest)} (means of {setting.kinds(len(final))}).{doubt}"
    )
    rule = (
        f"in every {setting.kind}, the last position's effect has an interval above 0, and no earlier position's is "
        f"larger than {TENTH} of it"
    )
    numbers = [
        Number(f"layer {layer}, {name}, last position", row.effect, row.low, row.high, int(row.n))
        for name, row in final.iterrows()
    ]
    numbers += [
        Number(f"layer {layer}, {name}, largest earlier, at {row.place}", row.effect, row.low, row.high, int(row.n))
        for name, row in largest.iterrows()
    ]
    return Finding("fig11", None if by_marks else holds, sentence, rule, tuple(numbers))


def cut(results: Results, setting: Setting) -> Finding:
    """Section 4.4: the positional circuit without the bottleneck's edges before the last position."""
    result = results["sec44"]
    table, layer = result.table.set_index("circuit"), result.meta["arguments"].get("layer")
    whole, without, n = table.loc["whole"], table.loc["cut"], result.meta.get("n_rows")
    gone = int(whole.n_edges - without.n_edges)
    accuracy, nld = whole.accuracy - without.accuracy, whole.nld - without.nld
    holds: bool | None = bool(accuracy <= LOSS and nld <= LOSS)
    if gone:
        leave = "leaves" if gone == 1 else "leave"
        sentence = (
            f"Without the {plural(gone, 'edge')} that {leave} layer {layer} before the last position, the positional "
            f"circuit's {'held-out ' if setting.held_out else ''}accuracy goes from {shown(whole.accuracy)} to "
            f"{shown(without.accuracy)}, its NLD from {shown(whole.nld)} to {shown(without.nld)}."
        )
    else:
        sentence = (
            f"The positional circuit has no edge that leaves layer {layer} before the last position, so there is "
            f"nothing to cut; {'held out, ' if setting.held_out else ''}its accuracy is {shown(whole.accuracy)} and "
            f"its NLD {shown(whole.nld)}."
        )
    if whole.accuracy_high < TARGET:
        holds = None
        sentence += f" As the circuit itself misses the accuracy of {TARGET}, this decides nothing."
    known = (setting.paper or {}).get("positional", {})
    theirs = {"whole": known, "cut": known.get("only_last_of_39", {})}
    found_on = {row["circuit"]: row for row in result.meta.get("found_on", ()) if setting.held_out}

    def measures(name: str, row: Mapping | pd.Series, where: str, n: int | None, theirs: Mapping) -> list[Number]:
        return [
            Number(
                f"{name} circuit, {measure}{where}",
                row[column],
                row.get(f"{column}_low"),
                row.get(f"{column}_high"),
                n,
                theirs.get(column),
            )
            for column, measure in (("accuracy", "accuracy"), ("nld", "NLD"))
        ]

    numbers = (
        *(number for name in ("whole", "cut") for number in measures(name, table.loc[name], "", n, {})),
        *(
            number
            for name, row in found_on.items()
            for number in measures(name, row, ", on the pairs it was found on", None, theirs.get(name, {}))
        ),
    )
    counts = (Number("edges, whole circuit", int(whole.n_edges)), Number("edges cut", gone))
    rule = f"the circuit's accuracy reaches {TARGET}, and accuracy and NLD fall by at most {LOSS} each"
    return Finding("sec44", holds, sentence, rule, (*numbers, *counts))


def minimal(results: Results, setting: Setting) -> Finding:
    """Appendix D.1: the minimal circuit by EAP."""
    known: dict[str, Any] = {}
    if setting.paper:
        from ..reference import eap_circuit

        eap = setting.paper["eap"]
        _, nld, accuracy = next(row for row in eap["curve"] if row[0] == eap["kept"])
        dead = len(eap_circuit()) - len(eap_circuit().pruned())
        known = {
            "prefix": eap["kept"],
            "n_edges": eap["kept"] - dead,
            "of": eap["edges"],
            "accuracy": accuracy,
            "nld": nld,
        }
    return _circuit("appd1", results, setting, "EAP", known, {})


def fine(results: Results, setting: Setting) -> Finding:
    """Appendix D.2: ACDC inside the layers."""
    graph = results["appd2"].meta.get("graph", {})
    cut = graph.get("ssm", "conv")
    acdc = (setting.paper or {}).get("acdc", {}) if cut == "states" else {}
    known = {"on_paths": acdc["kept"], "of": acdc["edges"]} if acdc else {}
    held_out = {"accuracy": acdc.get("held_out_accuracy"), "nld": acdc.get("held_out_nld")}
    beside = ", beside the time step" if cut == "conv" and graph.get("direct_step") else ""
    remark = f" The edge conv -> ssm was cut by {CUTS[cut + beside]}."
    if acdc:
        remark += (
            " The authors cut it so, too. Their held-out numbers may leave cut slices out, as such scores do in the "
            "version of their code that could be run."
        )
    return _circuit("appd2", results, setting, "ACDC, with the layers' parts", known, held_out, remark)


def positional(results: Results, setting: Setting) -> Finding:
    """Appendix D.3: the minimal circuit by positional EAP."""
    known = (setting.paper or {}).get("positional", {})
    found_on = {"of": known.get("edges"), "accuracy": known.get("accuracy"), "nld": known.get("nld")}
    return _circuit("appd3", results, setting, "positional EAP", found_on, {})


def _circuit(
    figure: str,
    results: Results,
    setting: Setting,
    method: str,
    known: Mapping,
    known_held_out: Mapping,
    remark: str = "",
) -> Finding:
    result = results[figure]
    circuit = result.meta["circuit"]
    others = "held_out" in circuit
    held_out = circuit["held_out" if others else "found_on"]
    where = "held out" if others else "on the pairs it was found on"
    random = held_out.get("random")
    count, of, target = int(circuit["n_edges"]), int(circuit["of"]), float(circuit.get("target", TARGET))
    reaches = held_out.get("accuracy_high", held_out["accuracy"]) >= target
    best_random = -math.inf if random is None else random.get("accuracy_high", random["accuracy"])
    beats = held_out.get("accuracy_low", held_out["accuracy"]) > best_random
    holds = bool(count <= HALF * of and reaches and beats)
    sentence = (
        f"By {method}, a circuit of {count} of {plural(of, 'edge')} ({shown(count / of)}) has, on {setting.judged_on} "
        f"and with everything outside it resampled, an accuracy of {shown(held_out['accuracy'])} and an NLD of "
        f"{shown(held_out['nld'])}"
    )
    if random is not None:
        sentence += f"; a random circuit of as many edges has {shown(random['accuracy'])} and {shown(random['nld'])}"
    short = [
        text
        for wrong, text in (
            (count > HALF * of, "it is more than half of the graph"),
            (not reaches, f"it misses the accuracy of {target:g}"),
            (not beats, "it is not clearly better than the random one"),
        )
        if wrong
    ]
    sentence += (f": {', and '.join(short)}." if short else ".") + remark
    rule = (
        f"at most half of the edges; {where}, the accuracy's interval reaches {target:g} and lies above that of a "
        f"random circuit of as many edges"
    )

    def scores(where: str, found: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[Number]:
        return [
            Number(
                f"{where}, {measure}",
                found[column],
                found.get(f"{column}_low"),
                found.get(f"{column}_high"),
                found.get("n_rows"),
                theirs.get(column),
            )
            for column, measure in (("accuracy", "accuracy"), ("nld", "NLD"))
        ]

    own = {"accuracy": circuit["accuracy"], "nld": circuit["nld"], "n_rows": result.meta.get("n_rows")}
    counts = {"prefix": "edges of the ranking up to there", "on_paths": "edges kept, on a path of kept edges"}
    numbers = [
        *(
            Number(what, int(circuit[key]), paper=known[key])
            for key, what in counts.items()
            if key in known and key in circuit
        ),
        Number("edges kept", count, paper=known.get("n_edges")),
        Number("edges of the graph", of, paper=known.get("of")),
        *(scores("on the pairs it was found on", own, known) if others else []),
        *scores(where, held_out, known_held_out),
        *(scores(f"random circuit, {where}", random, {}) if random else []),
    ]
    if "kl" in held_out:
        numbers.append(Number(f"{where}, KL from the whole model (nats)", held_out["kl"], n=held_out.get("n_rows")))
    return Finding(figure, holds, sentence, rule, tuple(numbers), tables=_agreement(result.meta.get("paper", [])))


def _agreement(records: list[list[dict[str, Any]]]) -> tuple[Table, ...]:
    """What `mamba_ioi.reference` found on comparing edges with the authors', as tables."""

    def cell(value: Any) -> str:
        return value if isinstance(value, str) else shown(value)

    return tuple(
        Table(
            "Agreement with the authors' edges" if "kind" in rows[0] else "Agreement with the authors' scores",
            tuple(rows[0]),
            tuple(tuple(cell(row[column]) for column in rows[0]) for row in rows),
        )
        for rows in records
        if rows
    )
