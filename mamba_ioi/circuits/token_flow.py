"""What moves between tokens, layer by layer: edges of scan and conv chosen by estimates, then measured one by one.

Two ways lead from one position to another inside a layer: the scan, by the writes, and the conv, by its taps. One pass
of `eap` estimates every such edge of every layer; those that are estimated to matter most are resampled alone, and so
is all that tokens give each other in the layers that matter most, before a layer, and after it.
"""

from __future__ import annotations

from typing import Any

import pandas as pd

from ..checks import whole_number
from ..experiments.bottleneck import bottleneck
from ..experiments.common import check_data, check_layer, mean_with_interval, resample_effects, rows_by_group
from ..experiments.labels import token_labels
from ..interventions.batches import divergence_index
from ..interventions.cut import Cut
from ..interventions.patch import Resample
from ..result import Result
from ..tasks.pairs import Metric, PromptPairs, check_metric, metric_name
from .eap import eap

WAYS = ("scan", "conv")
BOTH = "both"
PLACES = ["layer", "way", "source", "target"]
Change = list[Cut | Resample]


def token_flow(
    model,
    pairs: PromptPairs,
    layer: int | None = None,
    *,
    edges: int = 12,
    layers: int = 4,
    steps: int = 5,
    metric: Metric | None = None,
    progress: bool = True,
) -> Result:
    """Which layer moves what from where to where, for each kind of pairs; and what moves before a layer (Section 6).

    An edge is one term of the scan's sum at the target, resampled as in `Cut`, or one term of the conv's at the target,
    as in `conv_slices`. In both, positions are those inside the layer: what the conv reads through its tap -1 is
    written by the scan one position after the token.

    Args:
        model: a model whose scans are fine nodes of a circuit.
        pairs: aligned pairs of prompts.
        layer: before and after which layer all is resampled as well; the model's bottleneck on these data if None.
        edges: how many edges of each kind of pairs are measured, those that are estimated to matter most.
        layers: in how many layers all edges between tokens are resampled at once, likewise over all kinds; ``layer`` is
            one more where it is not among them.
        steps: of the estimate, as in `eap`.
        metric: what is measured; the pairs' own if None. Under ``nld`` effects are 1 - NLD; under another metric what
            it loses.
        progress: show bars.

    Returns:
        A row for each kind of pairs (label of the first group) and: each measured edge (``part`` is ``edge``); each
        layer with a scan (``layer``: all edges from a token to a later one, by one way); and the layers before and
        after ``layer`` (``before``, ``after``: by one way, and by both). Columns: the group, ``part``, ``layer``,
        ``way`` (``scan``, ``conv``, ``both``), ``source`` and ``target`` (-1 but for edges), ``source_label``,
        ``target_label``, ``estimate`` (of the effect; of many edges, the sum of theirs; NaN for ``both``), ``effect``,
        ``low`` and ``high`` (its bootstrap 95 % interval; NaN where it was not measured), ``n`` (rows).
        ``meta["labels"]`` names the positions of each kind.

    Raises:
        ValueError: for pairs that are not aligned, a layer that is not there, counts below 1, a model without the fine
            nodes, or a server whose sandbox has no gradients.
    """
    model.require_mamba("token flow")
    check_data(model, pairs, aligned="token_flow")
    edges, layers = whole_number(edges, "edges", least=1), whole_number(layers, "layers", least=1)
    steps = whole_number(steps, "steps", least=1)
    metric = check_metric(pairs, metric)
    scans = [one for one in range(model.n_layers) if "write" in model.layer_sites(one)]
    names, kinds = rows_by_group(pairs, ["part", *PLACES, "source_label", "target_label", "estimate", "effect"])
    layer = bottleneck(model, pairs, metric=metric, progress=progress) if layer is None else check_layer(model, layer)

    found = {kind: estimated(model, pairs[rows], steps, metric, progress) for kind, rows in kinds.items()}
    sums = {kind: table.groupby(["layer", "way"])["estimate"].sum() for kind, table in found.items()}
    strength = pd.concat([one.abs() for one in sums.values()]).groupby("layer").mean()
    strongest = strength.sort_values(ascending=False, kind="stable").index[:layers]
    whole = sorted({int(one) for one in strongest} | ({layer} & set(scans)))
    windows = {"before": [one for one in scans if one < layer], "after": [one for one in scans if one > layer]}

    tables, labels = [], {}
    for kind, rows in kinds.items():
        data = pairs[rows]
        table = found[kind]
        order = table["estimate"].abs().sort_values(ascending=False, kind="stable")
        chosen = table.loc[order[order > 0].index[:edges]].assign(part="edge")
        of_layers = sums[kind].reset_index().assign(part="layer")
        of_windows = [
            {"part": part, "layer": layer, "way": way, "estimate": _sum(sums[kind], some, way)}
            for part, some in windows.items()
            if some
            for way in (*WAYS, BOTH)
        ]
        table = pd.concat([chosen, of_layers, pd.DataFrame(of_windows)], ignore_index=True)
        table[["source", "target"]] = table[["source", "target"]].fillna(-1).astype(int)
        measured = (table["part"] != "layer") | table["layer"].isin(whole)
        first = int(divergence_index(data.clean_tokens, data.corrupt_tokens).min())
        stop = int(data.last_position.max()) + 1
        cuts = [change(model, row, windows, first, stop) for row in table[measured].to_dict("records")]
        note = f"token flow, {kind[0]}" if progress else None
        effects = resample_effects(model, data, cuts, metric=metric, description=note)
        for name, values in zip(("effect", "low", "high"), mean_with_interval(effects), strict=True):
            table.loc[measured, name] = values
        names_of = [*token_labels(data, model.tokenizer, kind[0]), ""]  # the last for -1
        for end in ("source", "target"):
            table[f"{end}_label"] = [names_of[position] for position in table[end]]
        labels[str(kind[0])] = names_of[:stop]
        tables.append(table.assign(**{names[0]: kind[0]}, n=len(rows)))
    columns = [names[0], "part", *PLACES, "source_label", "target_label", "estimate", "effect", "low", "high", "n"]
    arguments = {"layer": layer, "edges": edges, "layers": layers, "steps": steps, "rows": len(pairs)}
    arguments |= {"metric": metric_name(metric)}
    table = pd.concat(tables, ignore_index=True)[columns]
    return Result.create("token_flow", table, model=model, arguments=arguments, labels=labels)


def estimated(model, pairs: PromptPairs, steps: int, metric: Metric, progress: bool) -> pd.DataFrame:
    """Every edge from a token to a later one, with the estimate of its effect: a row for each layer, way and pair."""
    table = eap(
        model,
        pairs,
        steps=steps,
        positional=True,
        fine=True,
        ssm="tokens",
        absolute=False,
        metric=metric,
        progress=progress,
    ).table
    ends = table["src"].str.extract(r"^(\d+)\.write\[(\d+)\]$"), table["dst"].str.extract(r"^(\d+)\.conv\[-(\d+)\]$")
    parts = []
    for way, found in zip(WAYS, ends, strict=True):
        here = found.dropna().astype(int).set_axis(["layer", "at"], axis=1)
        target = table.loc[here.index, "position"]
        source = here["at"] if way == "scan" else target - here["at"]
        score = -table.loc[here.index, "score"]
        parts.append(
            pd.DataFrame({"layer": here["layer"], "way": way, "source": source, "target": target, "estimate": score})
        )
    table = pd.concat(parts, ignore_index=True)
    return table[(table["source"] < table["target"]) & (table["source"] >= 0)].reset_index(drop=True)


def change(model, row: dict[Any, Any], windows: dict[str, list[int]], first: int, stop: int) -> Change:
    """What is resampled for a row of the table; of all edges, between positions from ``first`` to before ``stop``."""
    layers, way = windows.get(row["part"], [row["layer"]]), row["way"]
    if row["part"] == "edge":
        source, target = row["source"], row["target"]
        if way == "scan":
            return [Cut(layers, source, target, resample=True)]
        return [Resample("conv_slice", layers[0], target, source - target)]
    made: Change = []
    if way != "conv":
        made += [Cut(layers, *both, resample=True) for both in rectangles(first, stop)]
    if way != "scan":
        every, taps = list(range(first, stop)), range(1 - model.d_conv, 0)
        made += [Resample("conv_slice", one, every, tap) for one in layers for tap in taps]
    return made


def rectangles(first: int, stop: int) -> list[tuple[list[int], list[int]]]:
    """Sources and targets that together are all pairs of a position and a later one, each once."""
    if stop - first < 2:
        return []
    middle = (first + stop) // 2
    here = list(range(first, middle)), list(range(middle, stop))
    return [here, *rectangles(first, middle), *rectangles(middle, stop)]


def _sum(sums: pd.Series, layers: list[int], way: str) -> float:
    """What is estimated of all edges of some layers by one way; of both ways nothing is."""
    if way == BOTH:
        return float("nan")
    return float(sum(sums[one, way] for one in layers))
