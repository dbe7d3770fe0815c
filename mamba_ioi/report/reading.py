"""Rules on what is read off the residual stream: which layers write the answer, and where the stream has it."""

from __future__ import annotations

from typing import Any

from .evidence import Finding, Number, Results, Setting, listed, shown

SHARE = 0.1
"""What share of the logit difference layers must write to count as writing the answer."""
READ = 0.5
"""How often the name of a slot must be read right; who knows the three names without their slots is right in 1/3."""
BEFORE_THE_REPEATS = "n4-1"
"""Where all three names have been read, and none a second time."""


def later_layers(results: Results, setting: Setting) -> Finding:
    """Direct effects: what the layers before, at and after the bottleneck write of the logit difference."""
    result = results["direct"]
    table, whole = result.table, float(result.meta["logit_diff"])
    layer = setting.bottleneck
    last = int(table["layer"].max())
    if layer is None:
        return Finding("direct", None, "Which layer is the bottleneck is not known here.")
    if whole <= 0:
        return Finding("direct", None, f"The mean logit difference is {shown(whole)}: there is no answer to share out.")
    sums = {
        "before the bottleneck": table[(table["layer"] >= 0) & (table["layer"] < layer)],
        "at the bottleneck": table[table["layer"] == layer],
        "after the bottleneck": table[table["layer"] > layer],
    }
    numbers = tuple(
        Number(f"share of the logit difference that layers {where} write", float(rows["effect"].sum()) / whole)
        for where, rows in sums.items()
    )
    after = numbers[2].value
    rule = f"layers after the bottleneck write at least {SHARE} of the logit difference"
    if layer == last:
        return Finding("direct", None, f"Layer {layer}, the bottleneck, is the last one.", rule, numbers)
    sentence = (
        f"The mean logit difference is {shown(whole)}: layer {layer} writes {shown(numbers[1].value)} of it at the "
        f"last position, the layers after it write {shown(after)}, and those before it {shown(numbers[0].value)}."
    )
    return Finding("direct", bool(after >= SHARE), sentence, rule, numbers)


def lens(results: Results, setting: Setting) -> Finding:
    """The logit lens at the last position: after which layer the answer is ahead, and the first in the vocabulary."""
    table = results["lens"].table
    place = "mark" if "mark" in table else "label"
    rows: list[dict[Any, Any]] = table[table[place] == ("last" if place == "mark" else "out")].to_dict("records")
    if not rows:
        return Finding("lens", None, "The last position was not looked at.")
    final = rows[-1]["logit_diff"]
    if final <= 0:
        return Finding("lens", None, f"After the last layer the mean logit difference is {shown(final)}.")
    half = next(index for index, row in enumerate(rows) if row["logit_diff"] >= final / 2)
    top = next((row["layer"] for row in rows if row["rank"] < 1.5), None)
    begins = "the embeddings" if rows[half]["layer"] < 0 else f"layer {rows[half]['layer']}"
    sentence = (
        f"At the last position the stream holds half of the final logit difference after {begins}; the answer is "
        + ("never first in the vocabulary." if top is None else f"first in the vocabulary after layer {top}.")
    )
    chosen = sorted({max(half - 1, 0), half, len(rows) - 1})
    numbers = tuple(
        Number(
            f"logit difference after layer {row['layer']}" if row["layer"] >= 0 else "logit difference before layer 0",
            float(row["logit_diff"]),
            row["low"],
            row["high"],
            int(row["n"]),
        )
        for row in (rows[index] for index in chosen)
    )
    return Finding("lens", None, sentence, "", numbers)


def slots(results: Results, setting: Setting) -> Finding:
    """Probes: is each slot's name read off the bottleneck's state, or just which names there are?"""
    table = results["probe"].table
    state = table[(table["site"] == "h") & (table["mark"] == BEFORE_THE_REPEATS)]
    arrived = table[(table["site"] == "ssm_input") & (table["mark"] == table["target"] + "+1")]
    if state.empty:
        return Finding("probe", None, f"The state was not looked at {BEFORE_THE_REPEATS}, before names come again.")

    def number(row: dict[Any, Any]) -> Number:
        what = f"{row['target']} read off {row['site']} at {row['mark']}"
        return Number(what, float(row["accuracy"]), row["low"], row["high"], int(row["n"]))

    kept = [number(row) for row in state.to_dict("records")]
    came = [number(row) for row in arrived.to_dict("records")]
    control = Number("the most that a probe of shuffled labels has there", float(state["control"].max()))
    listed_ones = listed([f"{one.text} for {row}" for one, row in zip(kept, state["target"], strict=True)])
    sentence = (
        f"Off layer {int(state['layer'].iloc[0])}'s state before the names come again, a linear probe reads each "
        f"slot's name right in {listed_ones}; with shuffled labels in at most {control.text}. Knowing the names "
        "without their slots would give 0.333."
    )
    if came:
        sentence += f" Off ssm_input a token after the name it is right in {listed([one.text for one in came])}."
    rule = f"the name of each slot is read off the state in at least {READ} of the prompts"
    holds = all(one.value >= READ for one in kept)
    every = tuple(number(row) for row in table.to_dict("records"))
    return Finding("probe", holds, sentence, rule, (*kept, control, *came), every)
