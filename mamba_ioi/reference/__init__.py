"""The numbers and edge lists that the paper's authors found in mamba-370m, as data, and comparisons with one's own.

Sources: the paper (arXiv 2407.14008) and its authors' logs and circuit files. Node names are those of
`mamba_ioi.circuits`.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import Any

import pandas as pd

from ..circuits import Circuit, overlap, rank_correlation, top_k
from ..circuits.graph import Graph
from ..result import Result

N_LAYERS = 48
NAMES = ("n1", "n2", "n3", "n4", "n5")
TOP = 10

__all__ = [
    "acdc_circuit",
    "compare_circuit",
    "compare_scores",
    "eap_circuit",
    "is_paper_model",
    "numbers",
    "positional_edges",
]


@cache
def _read(name: str) -> dict[str, Any]:
    return json.loads(resources.files(__name__).joinpath(f"{name}.json").read_text(encoding="utf-8"))


def numbers() -> dict[str, Any]:
    """The paper's numbers: ``bottleneck, task, example, fig5, fig5_greedy, fig6, fig9, eap, acdc, positional``."""
    return json.loads(json.dumps(_read("numbers")))


def is_paper_model(model_id: str | None) -> bool:
    """Whether a model is the one these numbers are of: mamba-370m, in its authors' format or Hugging Face's."""
    return str(model_id).rstrip("/").rsplit("/", 1)[-1] in ("mamba-370m", "mamba-370m-hf")


def eap_circuit() -> Circuit:
    """The 188 edges of App. D.1: the shortest prefix of the authors' ranking with accuracy above 0.85 (5 steps).

    Seven of them are dead ends (into layers 31 and 34, from which no edge of the list leads on).
    """
    data = _read("eap")
    edges = tuple((src, dst) for src, receivers in data["receivers"].items() for dst in receivers)
    known = {"accuracy": data["accuracy"], "nld": data["nld"], "meta": {"found_by": "the authors"}}
    return Circuit(edges, data["n_layers"], **known)


def acdc_circuit() -> Circuit:
    """The 364 edges of App. D.2, found from `eap_circuit` at threshold 1e-4; its edges conv -> ssm carry the states.

    The authors took out what lies on no path of kept edges: 11 edges that their test had kept, 10 of them slices
    without conv -> ssm, which change the run through C and D x (the table has their effects). The accuracy and NLD are
    the paper's, 0.88 and 0.84; in the version of the authors' code that could be run such scores leave cut slices out,
    so that these edges need not have them.

    Its table has all 1609 edges: src, dst, position, kept, and effect: the drop of the mean NLD when the edge was
    resampled, NaN where the authors' file has none (edges that were dropped, and those that cannot be tested).
    """
    data = _read("acdc")
    graph = Graph(data["n_layers"], fine=True)
    effects = {(src, dst): value for src, dst, value in data["kept"] + data["tested_and_pruned"]}
    kept = {(src, dst) for src, dst, _ in data["kept"]}
    table = pd.DataFrame(graph.pairs, columns=["src", "dst"])
    table["position"] = -1
    table["kept"] = [pair in kept for pair in graph.pairs]
    table["effect"] = pd.Series([effects.get(pair) for pair in graph.pairs], dtype=float)
    summary = _read("numbers")["acdc"]
    return Circuit(
        tuple(kept),
        graph.n_layers,
        fine=True,
        accuracy=summary["held_out_accuracy"],
        nld=summary["held_out_nld"],
        table=table,
        meta={"found_by": "the authors", "threshold": data["threshold"]},
        ssm="states",
    )


def positional_edges() -> tuple[tuple[str, str, int], ...]:
    """The positional circuit's edges from embed, from 0, into 39 and from 39 (App. D.3.1, D.3.2, D.3.4 and D.3.5).

    The paper lists the others in pictures only. Positions are those of an aligned prompt of 20 tokens.
    """
    data = _read("positional")
    at, missing = data["positions"], {"embed": data["from_embed_missing"], "0": data["from_0_missing"]}
    edges: set[tuple[str, str, int]] = set()
    for src, without in missing.items():
        for layer in range(0 if src == "embed" else 1, data["n_layers"]):
            if layer not in without["all"]:
                edges |= {(src, str(layer), at[name]) for name in NAMES if layer not in without[name]}
    for layer in range(39):
        edges |= {(str(layer), "39", at[name]) for name in NAMES if layer not in data["into_39_missing"][name]}
    for label, layers in data["into_39_besides"].items():
        edges |= {(str(layer), "39", at[label]) for layer in layers}
    for label, layers in data["from_39"].items():
        edges |= {("39", str(layer), at[label]) for layer in layers}
    graph = Graph(data["n_layers"], length=max(at.values()) + 1)
    return tuple(edge for edge in graph.edges(graph.mask(edges)) if len(edge) == 3)


def compare_scores(scores: Result) -> pd.DataFrame:
    """How EAP scores of mamba-370m agree with the authors' (coarse, without positions).

    Returns:
        A table with columns quantity, value, and what it is of: the overlap of the best 10 edges with the authors' best
        10, of the best 188 with their 188, and the rank correlation with the effects that their ACDC run measured.

    Raises:
        ValueError: if the scores are not of a model with 48 layers, or keep positions or marks apart.
    """
    table = scores.table
    if scores.meta.get("n_layers") != N_LAYERS or "mark" in table or (table.position >= 0).any():
        raise ValueError("the authors' scores are those of mamba-370m: 48 layers, without positions")
    coarse = table[~table.src.str.contains(".", regex=False) & ~table.dst.str.contains(".", regex=False)]
    mine = Result(coarse, scores.meta)
    theirs = eap_circuit()
    top = [tuple(edge) for edge in _read("numbers")["eap"]["top"]]
    best = overlap(top_k(mine, TOP, prune=False), top)
    kept = overlap(top_k(mine, len(theirs), prune=False), theirs)
    effects = acdc_circuit().table
    effects = effects.assign(score=-effects.effect)
    return pd.DataFrame(
        [
            (f"overlap at {TOP}", best["precision"], "with the authors' best edges by EAP"),
            (f"overlap at {len(theirs)}", kept["precision"], "with the authors' EAP circuit"),
            ("rank correlation", rank_correlation(mine, effects), "with the effects in the authors' ACDC run"),
        ],
        columns=["quantity", "value", "of"],
    )


def compare_circuit(circuit: Circuit) -> pd.DataFrame:
    """How a circuit of mamba-370m agrees with the authors': by kind of edge, what is shared.

    A coarse circuit is compared with `eap_circuit`, a fine one with `acdc_circuit`, a positional one with
    `positional_edges` (on the edges that the paper lists). Of a fine circuit the edges on a path of kept edges count,
    as the authors prune; the dead ends of `eap_circuit` count only beside a circuit that has some, too.

    Returns:
        A table with columns kind, found, theirs, shared, precision, recall, jaccard; the first row is of all edges. Of
        a fine circuit also ssm: what its edges conv -> ssm carry; the authors' carry ``states``.

    Raises:
        ValueError: if the circuit is not of a model with 48 layers.
    """
    if circuit.n_layers != N_LAYERS:
        raise ValueError(f"the authors' circuits have {N_LAYERS} layers, this one has {circuit.n_layers}")
    mine: tuple = circuit.edges
    if circuit.length is not None:
        theirs: tuple = positional_edges()
        mine = tuple(edge for edge in mine if edge[0] in ("embed", "0", "39") or edge[1] == "39")
        mine = tuple(edge for edge in mine if "." not in edge[0] + edge[1] and edge[:2] != ("embed", "output"))
    else:
        others = acdc_circuit() if circuit.fine else eap_circuit()
        if circuit.fine:
            mine = circuit.on_paths().edges
        elif len(circuit.pruned()) == len(circuit):
            others = others.pruned()
        theirs = others.edges
    rows = []
    for kind in ("all", *dict.fromkeys(map(_kind, (*theirs, *mine)))):
        a, b = ([edge for edge in edges if kind in ("all", _kind(edge))] for edges in (mine, theirs))
        of = {"ssm": circuit.ssm} if circuit.fine else {}
        rows.append({"kind": kind, "found": len(a), "theirs": len(b), **overlap(a, b), **of})
    return pd.DataFrame(rows)


def _kind(edge: tuple) -> str:
    """What sort of edge it is: ``embed -> layer``, ``layer -> layer``, ``-> output``, ``conv``, ``ssm``, ``skip``."""
    src, dst = edge[:2]
    for part in ("conv[", "skip", "ssm"):
        if f".{part}" in src + dst:
            return part.strip("[")
    if dst == "output":
        return "-> output"
    return "embed -> layer" if src == "embed" else "layer -> layer"
