"""Knockout: cut what some tokens give to others inside the scans of a window of layers, window after window."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from ..checks import whole_number
from ..interventions.cut import Cut
from ..models.model import MambaModel
from ..result import Result
from ..tasks.pairs import Metric, PromptPairs, check_metric, metric_name
from .common import check_data, check_layers, check_places, mean_where, measured_runs

Places = Sequence[int] | Sequence[str] | int | str


def knockout(
    model: MambaModel,
    pairs: PromptPairs,
    sources: Places | None = None,
    targets: Places = "last",
    window: int = 1,
    layers: Sequence[int] | int | None = None,
    *,
    conv: bool = False,
    metric: Metric | None = None,
    progress: bool = True,
) -> Result:
    """Cut each source from each target in the scans of each window of layers, in the clean prompts (arXiv 2505.24244).

    Sources are positions of writes: a token that the conv reads through its tap -1 is written one position later, so
    that its mark as a source is ``n1+1``.

    Args:
        model: a model with scans.
        pairs: pairs of prompts.
        sources: marks or positions, counted from 0, each a source of its own; all marks of the data if None.
        targets: marks or positions, likewise.
        window: how many layers are cut at once; those of them that have no scan are left out
            (``meta["without_scan"]``).
        layers: the windows' first layers; all from which a whole window is there if None.
        conv: cut the taps of the conv from source to target too, as in `Cut`.
        metric: what is measured; the pairs' own if None. Under ``nld`` the effect is 1 - NLD; under another metric it
            is what the metric loses, clean run less cut run.
        progress: show a bar.

    Returns:
        A row for each source, target and window: ``source``, ``target``, ``layer`` (the window's first), ``effect``
        (the mean over rows), ``low`` and ``high`` (its bootstrap 95 % interval), ``accuracy`` (of the cut runs),
        ``accuracy_low`` and ``accuracy_high``, ``n`` (rows). Rows that have not both, or in which the source is after
        the target, are left out; where none is left, effect and accuracy are NaN.

    Raises:
        ValueError: for an unknown mark, a position, layer or window that is not there, positions where rows are not
            aligned, or sources that are after all targets in every row.
    """
    model.require_mamba("knockouts")
    check_data(model, pairs)
    window = whole_number(window, "window", least=1, most=model.n_layers)
    first = check_layers(model, range(model.n_layers - window + 1) if layers is None else layers)
    if (late := max(first)) + window > model.n_layers:
        raise ValueError(f"a window of {window} layers from layer {late} on: the model has {model.n_layers} layers")
    with_scan = [layer for layer in range(model.n_layers) if "write" in model.layer_sites(layer)]
    cut = {layer: [one for one in range(layer, layer + window) if one in with_scan] for layer in first}
    metric = check_metric(pairs, metric)
    given = [*pairs.marks] if sources is None else sources
    rows = [_rows(pairs, places) for places in (given, targets)]
    columns, there, cuts = [], [], []
    for (source, from_), (target, to), layer in product(rows[0].items(), rows[1].items(), first):
        if not cut[layer]:
            continue
        some = (from_ >= 0) & (to >= from_)
        columns.append((source, target, layer))
        there.append(some)
        if some.any():
            cuts.append([Cut(cut[layer], *(at.where(some, -1)[:, None] for at in (from_, to)), conv=conv)])
    if not columns:
        raise ValueError(f"no layer of the windows from {first} on has a scan")
    if not cuts:
        raise ValueError(f"in no row is a target of {targets!r} at or after a source of {given!r}")
    found = measured_runs(model, pairs, cuts, metric=metric, description="knockout" if progress else None)
    present = torch.stack(there)
    table = pd.DataFrame(columns, columns=["source", "target", "layer"])
    for name, values in zip(("effect", "accuracy"), found, strict=True):
        every = torch.full((len(columns), len(pairs)), float("nan"), dtype=torch.float64)
        every[present.any(1)] = values.double()
        ends = ("low", "high") if name == "effect" else ("accuracy_low", "accuracy_high")
        for column, value in zip((name, *ends), mean_where(every, present), strict=True):
            table[column] = value
    table["n"] = present.sum(1).numpy()
    arguments = {"sources": list(rows[0]), "targets": list(rows[1]), "window": window, "layers": first, "conv": conv}
    arguments |= {"rows": len(pairs), "metric": metric_name(metric)}
    without = sorted({one for layer in first for one in range(layer, layer + window)} - set(with_scan))
    return Result.create("knockout", table, model=model, arguments=arguments, without_scan=without)


def _rows(pairs: PromptPairs, places: Places) -> dict[int | str, Int[Tensor, "B"]]:
    """Each row's position of each place, -1 for none."""
    given = [places] if isinstance(places, str) else list(places) if isinstance(places, Iterable) else []
    named = [place for place in given if isinstance(place, str)]
    if named and len(named) == len(given):
        return {mark: pairs.positions_of(mark).cpu() for mark in map(str, check_places(pairs, None, named))}
    positions = check_places(pairs, places, None)  # pyright: ignore[reportArgumentType]
    return {place: torch.full((len(pairs),), place) for place in positions if isinstance(place, int)}
