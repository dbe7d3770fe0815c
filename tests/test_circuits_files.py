"""Circuits on disk: JSON, the MIB format and DOT; and the authors' circuits, as the package holds them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from mamba_ioi import reference
from mamba_ioi.circuits import Circuit, Graph, layer_view, to_dot, to_mib, top_k
from mamba_ioi.circuits.eap import score_table
from mamba_ioi.result import Result

FINE = Circuit(
    (("embed", "1"), ("1", "1.conv[-1]"), ("1.conv", "1.ssm"), ("1.ssm", "1"), ("1", "output"), ("embed", "output")),
    3,
    fine=True,
    accuracy=0.9,
    nld=0.8,
    meta={"found_by": "hand"},
)
POSITIONAL = Circuit((("embed", "0", 3), ("embed", "0", 5), ("0", "output", 6)), 2, length=7)


def scores(n_layers: int = 3, fine: bool = False) -> Result:
    graph = Graph(n_layers, fine)
    values = torch.randn(len(graph), generator=torch.Generator().manual_seed(0))
    return Result(score_table(graph, values[:, None]), {"experiment": "eap", "n_layers": n_layers})


@pytest.mark.parametrize("circuit", [FINE, POSITIONAL, top_k(scores(), 5), Circuit((), 4)], ids=repr)
def test_json_gives_the_circuit_back(circuit: Circuit, tmp_path: Path) -> None:
    path = circuit.save(tmp_path / "deep" / "circuit.json")
    again = Circuit.load(path)
    for name in ("edges", "n_layers", "fine", "length", "accuracy", "nld", "meta", "graph"):
        assert getattr(again, name) == getattr(circuit, name), name
    pd.testing.assert_frame_equal(again.table, circuit.table, check_dtype=len(circuit) > 0)
    assert [file.name for file in path.parent.iterdir()] == ["circuit.json"]
    circuit.save(path)  # over an older one


def test_an_acdc_table_survives(tmp_path: Path) -> None:
    authors = reference.acdc_circuit()
    again = Circuit.load(authors.save(tmp_path / "acdc.json"))
    pd.testing.assert_frame_equal(again.table, authors.table)
    assert again.table.effect.isna().sum() == 1609 - 293 - 11


def test_what_the_ssm_edge_carries_is_in_the_file(tmp_path: Path) -> None:
    """A file of the version before, which knew the conv's output only, says nothing of it."""
    path = replace(FINE, ssm="states").save(tmp_path / "circuit.json")
    assert Circuit.load(path).graph == Graph(3, True, None, "states")
    stored = json.loads(FINE.save(path).read_text())
    path.write_text(json.dumps({key: value for key, value in stored.items() if key != "ssm"} | {"format_version": 1}))
    assert Circuit.load(path).graph == FINE.graph == Graph(3, True)
    path.write_text(json.dumps({key: value for key, value in stored.items() if key != "ssm"}))
    with pytest.raises(ValueError, match="no complete circuit"):
        Circuit.load(path)


def test_files_that_are_no_circuits_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "circuit.json"
    with pytest.raises(ValueError, match="there is no file"):
        Circuit.load(path)
    stored = json.loads(FINE.save(path).read_text())
    for text, message in (
        ("{", "not readable as JSON"),
        ("[]", "is no circuit"),
        (json.dumps(stored | {"format_version": 99}), "format version 99"),
        (json.dumps({key: value for key, value in stored.items() if key != "edges"}), "no complete circuit"),
        (json.dumps(stored | {"edges": [["embed", "8"]]}), "is not in"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            Circuit.load(path)


def test_mib_format(tmp_path: Path) -> None:
    found = scores()
    circuit = top_k(found, 5, prune=False)
    stored = json.loads(to_mib(tmp_path / "mib.json", circuit, d_model=16, scores=found).read_text())
    assert stored["cfg"] == {"n_layers": 3, "n_heads": 0, "parallel_attn_mlp": False, "d_model": 16}
    assert set(stored["nodes"]) == {"input", "m0", "m1", "m2", "logits"}
    assert len(stored["edges"]) == 10 and sum(edge["in_graph"] for edge in stored["edges"].values()) == 5
    name = {"embed": "input", "output": "logits", "0": "m0", "1": "m1", "2": "m2"}
    for row in found.table.itertuples():
        edge = stored["edges"][f"{name[row.src]}->{name[row.dst]}"]
        assert edge["score"] == -row.score and edge["in_graph"] == ((row.src, row.dst) in circuit)
    best = sorted(stored["edges"].values(), key=lambda edge: -edge["score"])[:5]
    assert all(edge["in_graph"] for edge in best)
    for circuit in (FINE, POSITIONAL):
        with pytest.raises(ValueError, match="MIB format"):
            to_mib(tmp_path / "mib.json", circuit, d_model=16)


def test_dot() -> None:
    text = to_dot(POSITIONAL, labels=["a", "b", "c", "n1", "d", "n2", "out"])
    assert '"embed" -> "0" [label="n1, n2"];' in text and '"0" -> "output" [label="out"];' in text
    fine = to_dot(FINE)
    for line in (
        '"embed" -> "1 in";',
        '"1 in" -> "1.conv[-1]";',
        '"1.conv[-1]" -> "1.conv" [style=dashed];',
        '"1.conv" -> "1.ssm";',
        '"1.ssm" -> "1 out";',
        '"1 out" -> "output";',
    ):
        assert line in fine
    hidden = to_dot(FINE, hide=["1"])
    assert '"embed" -> "output";' in hidden and "1 in" not in hidden
    with pytest.raises(ValueError, match="is no node"):
        to_dot(FINE, hide=["layer 1"])


def test_single_layer_views() -> None:
    assert set(layer_view(FINE, 1).edges) == set(FINE.edges) - {("embed", "output")}
    with pytest.raises(ValueError, match="layers are 0 to 2"):
        layer_view(FINE, 3)


# ---------------------------------------------------------------------------------------------------------------------
# The authors' circuits
# ---------------------------------------------------------------------------------------------------------------------


def test_authors_circuits_are_the_released_ones(shared: Path) -> None:
    eap = json.loads((shared / "reference" / "eap188_mamba370m.json").read_text())["edges"]
    assert set(reference.eap_circuit().edges) == set(map(tuple, eap)) and len(eap) == 188

    acdc = json.loads((shared / "reference" / "acdc_mamba370m.json").read_text())["edges"]
    table = reference.acdc_circuit().table.set_index(["src", "dst"])
    assert len(table) == len(acdc) == 1609
    for edge in acdc:
        src, dst = (edge[end].removesuffix(".i").removesuffix(".o") for end in ("src", "dst"))
        row = table.loc[src, dst if edge["slice"] is None else f"{dst}[{edge['slice']}]"]
        assert row.kept == edge["kept"]
        assert row.effect == pytest.approx(
            float("nan") if edge["effect"] is None else edge["effect"], rel=1e-5, nan_ok=True
        )


def test_authors_circuits_have_the_papers_counts() -> None:
    summary = reference.numbers()["acdc"]
    circuit = reference.acdc_circuit()
    ends = [tuple(edge) for edge in circuit.edges]
    assert len(circuit) == summary["kept"] and len(circuit.graph) == summary["edges"]
    assert len(circuit.pruned()) == len(circuit)
    for tap, count in summary["conv_by_slice"].items():
        assert sum(dst.endswith(f"conv[{tap}]") for _, dst in ends) == count
    assert sum(dst.endswith(".skip") for _, dst in ends) == summary["skip"]
    assert sum(dst.endswith(".ssm") for _, dst in ends) == summary["ssm"]
    assert sum(dst == "output" for _, dst in ends) == summary["to_output"]
    untested = circuit.table[circuit.table.kept & circuit.table.effect.isna()]
    assert len(untested) == summary["untested"]


def test_positional_lists() -> None:
    edges = set(reference.positional_edges())
    assert ("embed", "1", 3) not in edges and ("embed", "1", 5) in edges  # layer 1 does not receive n1
    assert not [edge for edge in edges if edge[0] == "embed" and edge[1] in ("33", "44")]
    assert ("0", "4", 3) not in edges and ("0", "6", 5) not in edges and ("0", "6", 3) in edges
    assert ("34", "39", 6) in edges and ("34", "39", 5) not in edges and ("38", "39", 19) in edges
    assert {edge for edge in edges if edge[0] == "39" and edge[2] == 19} == {
        ("39", node, 19) for node in ("43", "45", "46", "47", "output")
    }


def test_comparisons() -> None:
    circuit = reference.eap_circuit()
    table = reference.compare_circuit(circuit)
    assert (table.jaccard == 1).all() and table.shared[0] == 188
    pruned = reference.compare_circuit(circuit.pruned())
    assert (pruned.jaccard == 1).all() and pruned.shared[0] == 188 - 7 and "ssm" not in pruned
    whole = reference.acdc_circuit()
    slices = [("1", "1.conv[0]"), ("28", "28.conv[-2]")]  # kept by the authors' test, and pruned without conv -> ssm
    more = replace(whole, edges=(*whole.edges, *slices))
    assert len(more.pruned()) == 366 and len(more.on_paths()) == 364 and len(replace(more, ssm="conv").pruned()) == 364
    for one in (more, replace(more, ssm="conv")):
        compared = reference.compare_circuit(one)
        assert (compared.jaccard == 1).all() and compared.theirs[0] == 364 and set(compared.ssm) == {one.ssm}
    fine = reference.compare_circuit(reference.acdc_circuit()).set_index("kind")
    assert fine.shared["conv"] == 51 and fine.shared["layer -> layer"] == 124 and (fine.jaccard == 1).all()
    with pytest.raises(ValueError, match="48 layers"):
        reference.compare_circuit(FINE)
    effects = reference.acdc_circuit().table.dropna(subset="effect").set_index(["src", "dst"]).effect
    graph = Graph(48)
    values = [-effects.get(pair, 0.0) for pair in graph.pairs]
    mine = Result(score_table(graph, torch.tensor(values)[:, None]), {"experiment": "eap", "n_layers": 48})
    compared = reference.compare_scores(mine).set_index("quantity").value
    assert compared["rank correlation"] == pytest.approx(1)
    assert compared["overlap at 10"] >= 0.7 and compared["overlap at 188"] > 0.85
    with pytest.raises(ValueError, match="48 layers"):
        reference.compare_scores(scores())
