"""Results of made-up circuits, as `mamba_ioi.circuits.pipeline` makes them, for the tests of their figures."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd

from mamba_ioi.circuits import Graph
from mamba_ioi.circuits.circuit import edge_table
from mamba_ioi.result import Result

LABELS = [f"pos{p}" for p in range(20)]
for _slot, _p in enumerate((3, 5, 7, 13, 15), 1):
    LABELS[_p] = f"n{_slot}"
LABELS[-1] = "out"


def circuit_result(experiment: str, table: pd.DataFrame, n_layers: int = 6, **extra) -> Result:
    model = SimpleNamespace(model_id="tiny" if n_layers < 20 else "state-spaces/mamba-370m-hf", n_layers=n_layers)
    return Result.create(experiment, table, model=model, arguments={}, position_labels=LABELS, **extra)


def known(n_edges: int, of: int) -> dict:
    return {
        "n_edges": n_edges,
        "of": of,
        "accuracy": 0.9,
        "nld": 0.8,
        "threshold": 1e-4,
        "found_by": "a test",
        "held_out": {"accuracy": 0.875, "nld": 0.75},
    }


def matrices(n_layers: int = 6) -> Result:
    """Every edge's score and effect; a fifth of the edges are kept, and tested only those in large models."""
    random, table = np.random.default_rng(0), edge_table(Graph(n_layers).edges())
    table["score"] = random.normal(0, 0.01, len(table))
    table.loc[0, "score"] = -0.8
    table["kept"] = table["score"] <= table["score"].quantile(0.2)
    table["effect"] = -table["score"] + random.normal(0, 0.001, len(table))
    if n_layers > 8:
        table.loc[~table["kept"], "effect"] = np.nan
    circuit = known(int(table["kept"].sum()), len(table))
    graph = {"n_layers": n_layers, "fine": False, "length": None}
    how = "each edge resampled alone"
    return circuit_result("edge_matrices", table, n_layers, circuit=circuit, effects=how, graph=graph)


def parts(n_layers: int = 6) -> Result:
    """An ACDC table of the fine graph: what is dropped in odd layers was not tested."""
    random, table = np.random.default_rng(1), edge_table(Graph(n_layers, fine=True).edges())
    table["kept"] = random.uniform(size=len(table)) < 0.4
    table["effect"] = np.where(table["kept"], random.exponential(0.05, len(table)), np.nan)
    graph = {"n_layers": n_layers, "fine": True, "length": None, "ssm": "states"}
    circuit = known(int(table["kept"].sum()), len(table))
    return circuit_result("layer_parts", table, n_layers, circuit=circuit, graph=graph)


def positional(n_layers: int = 6) -> Result:
    """Names from embed to all layers and on to the last but one, which writes the output; a few other edges."""
    bottleneck = str(n_layers - 2)
    edges = [("embed", str(layer), p) for layer in range(n_layers - 1) for p in (3, 5, 7, 13, 15)]
    edges += [(str(layer), bottleneck, p) for layer in range(n_layers - 2) for p in (3, 5, 15)]
    edges += [("0", str(layer), 3) for layer in range(1, n_layers - 2)] + [(bottleneck, "output", 19)]
    edges += [
        (bottleneck, str(n_layers - 1), 16),
        (bottleneck, str(n_layers - 1), 19),
        (str(n_layers - 1), "output", 19),
    ]
    graph = Graph(n_layers, length=20)
    table = edge_table(graph.edges(graph.mask(edges)))
    table["score"] = np.random.default_rng(2).normal(-0.01, 0.02, len(table))
    table["kept"] = True
    circuit = known(len(table), len(graph))
    return circuit_result(
        "positional_circuit",
        table,
        n_layers,
        circuit=circuit,
        graph={"n_layers": n_layers, "fine": False, "length": 20},
    )


def cut() -> Result:
    rows = [("whole", 200, 0.852, 0.877, 0.5), ("cut", 180, 0.838, 0.873, 0.6)]
    table = pd.DataFrame(rows, columns=["circuit", "n_edges", "accuracy", "nld", "kl"])
    model = SimpleNamespace(model_id="tiny", n_layers=6)
    return Result.create("last_position_only", table, model=model, arguments={"layer": 4}, n_rows=200)


CIRCUIT_EXAMPLES = {
    "edge_matrices": matrices,
    "layer_parts": parts,
    "positional_circuit": positional,
    "last_position_only": cut,
}
