"""From pairs of prompts to the results that the paper's circuit figures show: App. D.1, D.2, D.3 and Section 4.4.

Each function scores edges on the pairs, finds a circuit, and judges it beside a random one: on held-out pairs, or on
the pairs that it was found on where there are no others (``meta["circuit"]`` has ``held_out`` or ``found_on``).
Edges are scored and cut as the authors do it, since their numbers stand beside these for mamba-370m: ``eap`` in its
variant ``paper``, and in ACDC the edges conv -> ssm by their states (``ssm="states"``). ``meta`` says both.
The Result's table lists edges; ``meta["circuit"]`` says how many were found and how well they do. `circuit_of` gives
the Circuit back from a stored result.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pandas as pd

from ..experiments.bottleneck import bottleneck
from ..result import Result
from ..tasks.pairs import PromptPairs, metric_name
from .acdc import acdc
from .circuit import Circuit
from .eap import eap
from .effects import KEY, exact_effects
from .evaluate import evaluate, last_position_only
from .graph import TAPS
from .search import minimal_circuit

TARGET, THRESHOLD = 0.85, 1e-4
"""The paper's: the accuracy asked for; the threshold of ACDC."""
VARIANT = "paper"
EXACT_EDGES = 200
"""Graphs of up to so many edges have each edge's effect measured alone; of larger ones, the circuit's by ACDC."""


def edge_matrices(model, data: PromptPairs, *, held_out: PromptPairs | None = None, progress: bool = False) -> Result:
    """App. D.1: every edge's attribution, the minimal circuit, and measured effects.

    Args:
        model: a model from `load_model`, of any kind.
        data: the pairs to find the circuit on; their own metric is what is scored.
        held_out: other pairs, to judge the circuit on; None: there are none.
        progress: show bars.

    Returns:
        A Result, a row an edge: src, dst, position (-1), score (of `eap`), kept, effect (drop of the mean NLD, NaN
        where it was not measured: ``meta["effects"]`` says how it was).
    """
    scores = eap(model, data, variant=VARIANT, progress=progress)
    circuit = minimal_circuit(model, data, scores, TARGET)
    table = scores.table.assign(kept=_kept(scores.table, circuit))
    if len(table) <= EXACT_EDGES:
        effects, how = -exact_effects(model, data, progress=progress).table.score, "each edge resampled alone"
    else:
        tested = acdc(model, data, circuit, THRESHOLD, fine=False, progress=progress).table
        effects, how = tested.effect, "the circuit's edges, by ACDC"
    return _result("edge_matrices", model, table.assign(effect=effects), circuit, data, held_out, effects=how)


def layer_parts(model, data: PromptPairs, *, held_out: PromptPairs | None = None, progress: bool = False) -> Result:
    """App. D.2: ACDC with conv slices, SSM and skip from the minimal circuit on, threshold 1e-4.

    Args:
        model: a Mamba.
        data: as in `edge_matrices`.
        held_out: likewise.
        progress: show bars.

    Returns:
        A Result, a row an edge of the fine graph: src, dst, position (-1), kept, effect. ``meta["circuit"]`` counts
        also the edges ``on_paths`` of kept edges, which is how the authors count: a slice without conv -> ssm, whose
        cut changes the run through C and D x, is not among those.
    """
    start = minimal_circuit(model, data, eap(model, data, variant=VARIANT, progress=progress), TARGET)
    circuit = acdc(model, data, start, THRESHOLD, ssm="states", progress=progress)
    return _result("layer_parts", model, circuit.table, circuit, data, held_out)


def positional_circuit(
    model, data: PromptPairs, *, held_out: PromptPairs | None = None, progress: bool = False
) -> Result:
    """App. D.3: the minimal circuit by attributions that are kept apart by position.

    Args:
        model: a model from `load_model`, of any kind.
        data: as in `edge_matrices`; for positions, aligned ones.
        held_out: likewise.
        progress: show bars.

    Returns:
        A Result, a row an edge: src, dst, position, score, kept. ``meta["position_labels"]`` names positions.
    """
    scores, circuit = _positional(model, data, progress)
    table = scores.table.assign(kept=_kept(scores.table, circuit))
    return _result("positional_circuit", model, table, circuit, data, held_out)


def last_position(
    model,
    data: PromptPairs,
    *,
    held_out: PromptPairs | None = None,
    layer: int | None = None,
    progress: bool = False,
) -> Result:
    """Section 4.4: the positional circuit without the edges of one layer before the last position.

    Args:
        model: a model from `load_model`; a Mamba if ``layer`` is not given.
        data: as in `edge_matrices`; for positions, aligned ones.
        held_out: likewise.
        layer: whose edges are cut; the bottleneck on these data if not given (39 in mamba-370m).
        progress: show bars.

    Returns:
        The Result of `last_position_only` on the held-out pairs, or where there are none on those that the circuit was
        found on (``meta["judged_on"]`` says ``held_out`` or ``found_on``); ``meta["found_on"]`` holds the rows of its
        table on the latter, which is what the paper gives.
    """
    layer = bottleneck(model, data, progress=progress) if layer is None else layer
    _, circuit = _positional(model, data, progress)
    found_on = last_position_only(model, data, circuit, layer)
    result = found_on if held_out is None else last_position_only(model, held_out, circuit, layer)
    extra = {"found_on": found_on.table.to_dict("records"), "variant": VARIANT}
    extra["judged_on"] = "found_on" if held_out is None else "held_out"
    return Result(result.table, result.meta | extra)


def circuit_of(result: Result) -> Circuit:
    """The circuit that a result of this module's shows, such as one that was stored by ``mamba-ioi reproduce``.

    Raises:
        ValueError: if the result holds no circuit.
    """
    known = result.meta.get("circuit")
    if known is None or "graph" not in result.meta:
        raise ValueError(f"the result of {result.meta['experiment']!r} holds no circuit")
    table, graph = result.table, result.meta["graph"]
    kept = table[table.kept]
    positions = [()] * len(kept) if graph["length"] is None else [(p,) for p in kept.position.tolist()]
    edges = tuple((src, dst, *p) for src, dst, p in zip(kept.src, kept.dst, positions, strict=True))
    return Circuit(
        edges,
        graph["n_layers"],
        graph["fine"],
        graph["length"],
        known["accuracy"],
        known["nld"],
        table,
        {"found_by": known["found_by"]},
        graph.get("ssm", "conv"),
        graph.get("direct_step", False),
        graph.get("taps", TAPS),
        graph.get("parts", False),
        graph.get("mixed_input", False),
    )


def _positional(model, data: PromptPairs, progress: bool) -> tuple[Result, Circuit]:
    scores = eap(model, data, positional=True, variant=VARIANT, progress=progress)
    return scores, minimal_circuit(model, data, scores, TARGET)


def _kept(table: pd.DataFrame, circuit: Circuit) -> list[bool]:
    inside = set(circuit.table[KEY].itertuples(index=False, name=None))
    return [edge in inside for edge in table[KEY].itertuples(index=False, name=None)]


def _result(
    experiment: str,
    model,
    table: pd.DataFrame,
    circuit: Circuit,
    data: PromptPairs,
    held_out: PromptPairs | None,
    **extra: Any,
) -> Result:
    """The Result, with what is known of its circuit, on the pairs it was found on and on held-out ones if there are."""
    graph = circuit.graph
    known = {
        "n_edges": len(circuit),
        "of": len(graph),
        "on_paths": len(circuit.on_paths()),
        "accuracy": circuit.accuracy,
        "nld": circuit.nld,
        "found_by": circuit.meta["found_by"],
        **{
            name: circuit.meta[name]
            for name in ("target", "reached", "prefix", "pruned", "threshold", "tested")
            if name in circuit.meta
        },
        "found_on" if held_out is None else "held_out": asdict(
            evaluate(model, data if held_out is None else held_out, circuit)
        ),
    }
    return Result.create(
        experiment,
        table,
        model=model,
        arguments={"variant": VARIANT, "metric": metric_name(data.metric)},
        circuit=known,
        graph=graph.stored(),
        position_labels=data.position_labels,
        n_rows=len(data.clean_tokens),
        **extra,
    )
