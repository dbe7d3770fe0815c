"""The graph of nodes and edges: its order, its masks, and which edges lie on a path."""

from __future__ import annotations

import itertools

import pytest
import torch

from mamba_ioi.circuits import Circuit, Graph
from mamba_ioi.circuits.graph import EMBED, OUTPUT, layer_of


def test_sizes_are_the_papers() -> None:
    assert len(Graph(48)) == 1225
    assert len(Graph(48, fine=True)) == 1609
    assert len(Graph(48, length=20)) == 24_500


@pytest.mark.parametrize("fine", [False, True])
def test_slices_say_where_edges_stand(fine: bool) -> None:
    graph = Graph(4, fine)
    assert len(set(graph.pairs)) == len(graph.pairs)
    for layer in range(5):
        name = str(layer) if layer < 4 else OUTPUT
        assert graph.pairs[graph.into(layer)] == tuple((src, name) for src in [EMBED, *map(str, range(layer))])
        if fine and layer < 4:
            inner = graph.pairs[graph.inside(layer)]
            assert len(inner) == 8 and all(layer_of(src) == layer_of(dst) == layer for src, dst in inner)
    covered = [i for layer in range(5) for i in (*range(len(graph.pairs))[graph.into(layer)],)]
    covered += [i for layer in range(4) for i in range(len(graph.pairs))[graph.inside(layer)]]
    assert sorted(covered) == list(range(len(graph.pairs)))


@pytest.mark.parametrize("graph", [Graph(3), Graph(3, True), Graph(3, False, 5), Graph(3, True, 5)], ids=str)
def test_mask_and_edges_are_inverse(graph: Graph) -> None:
    mask = torch.rand(len(graph.pairs), graph.width, generator=torch.Generator().manual_seed(0)) < 0.4
    assert torch.equal(graph.mask(graph.edges(mask)), mask)
    assert len(graph.edges()) == len(graph)


def paths(graph: Graph, kept: set) -> set:
    """Every edge on some path from embed to output, by walking all of them. Coarse or fine, without positions."""
    ends: dict[str, list[tuple[tuple[str, str], str]]] = {}
    for src, dst in kept:
        inner = "." in src or "." in dst
        start = src if not src.isdigit() or not graph.fine else f"{src} {'in' if inner else 'out'}"
        stop = dst if not dst.isdigit() or not graph.fine else f"{dst} {'out' if inner else 'in'}"
        ends.setdefault(start, []).append(((src, dst), stop))
    for layer, tap in itertools.product(range(graph.n_layers), (-3, -2, -1, 0)):
        ends.setdefault(f"{layer}.conv[{tap}]", []).append(((), f"{layer}.conv"))
        if graph.ssm == "states":  # C and D x
            ends.setdefault(f"{layer}.conv", []).append(((), f"{layer} out"))
    found: set = set()

    def walk(node: str, path: list) -> None:
        if node == OUTPUT:
            found.update(path)
        for edge, stop in ends.get(node, ()):
            walk(stop, [*path, edge])

    walk(EMBED, [])
    return found - {()}


@pytest.mark.parametrize("graph", [Graph(3), Graph(3, True), Graph(3, True, None, "states")], ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_pruning_keeps_what_lies_on_a_path(graph: Graph, seed: int) -> None:
    mask = torch.rand(len(graph.pairs), 1, generator=torch.Generator().manual_seed(seed)) < 0.45
    kept = set(graph.edges(mask))
    assert set(graph.edges(graph.prune(mask))) == paths(graph, kept)


def test_positions_pass_forward_only() -> None:
    graph = Graph(2, length=4)
    late = graph.mask([("embed", "0", 3), ("0", "1", 1), ("1", "output", 3)])
    assert not graph.prune(late).any()
    early = graph.mask([("embed", "0", 0), ("0", "1", 1), ("1", "output", 3), ("embed", "output", 1)])
    assert graph.edges(graph.prune(early)) == (("embed", "0", 0), ("0", "1", 1), ("1", "output", 3))


def test_a_slice_moves_positions() -> None:
    graph = Graph(1, fine=True, length=4)
    edges = [("0.conv", "0.ssm", 1), ("0.ssm", "0", 3), ("0", "output", 3)]
    shifted = [("embed", "0", 0), ("0", "0.conv[-1]", 1), *edges]
    assert set(graph.edges(graph.prune(graph.mask(shifted)))) == set(shifted)
    assert not graph.prune(graph.mask([("embed", "0", 1), ("0", "0.conv[-1]", 1), *edges])).any()


class Ways:
    """Which way leads from where to where, and along which of the edges that are kept, if it is one."""

    def __init__(self, kept: set) -> None:
        self.kept, self.ends = kept, {}

    def join(self, start, stop, edge=()) -> None:
        if not edge or edge in self.kept:
            self.ends.setdefault(start, []).append((edge, stop))

    def walked(self) -> set:
        """Every edge on a path from embed to the end, by walking all of them."""
        found: set = set()

        def walk(node, path: list) -> None:
            if node == "end":
                found.update(path)
            for edge, stop in self.ends.get(node, ()):
                walk(stop, [*path, edge])

        walk("embed", [])
        return found - {()}


def state_paths(graph: Graph, kept: set) -> set:
    """Every edge on a path, of one fine layer with positions whose ssm edges carry the states; by walking all."""
    ways = Ways(kept)
    join = ways.join
    for p in range(graph.length):
        join("embed", ("in", p), ("embed", "0", p))
        for s in range(-3, 1):
            if p + s >= 0:
                join(("in", p + s), ("conv", p), ("0", f"0.conv[{s}]", p))
        join(("conv", p), ("out", p))  # by C and D x
        join(("conv", p), ("h", p), ("0.conv", "0.ssm", p))
        join(("h", p - 1), ("h", p), ("0.conv", "0.ssm", p))  # a state that is cut does not go on either
        join(("h", p), ("out", p), ("0.ssm", "0", p))
        join(("in", p), ("gate", p), ("0", "0.skip", p))
        join(("gate", p), ("out", p), ("0.skip", "0", p))
    last = graph.length - 1
    join(("out", last), "end", ("0", "output", last))
    join("embed", "end", ("embed", "output", last))
    return ways.walked()


@pytest.mark.parametrize("seed", range(8))
def test_states_go_on_from_position_to_position(seed: int) -> None:
    graph = Graph(1, True, 5, "states")
    mask = torch.rand(len(graph.pairs), 5, generator=torch.Generator().manual_seed(seed)) < 0.5 + 0.05 * seed
    assert set(graph.edges(graph.prune(mask))) == state_paths(graph, set(graph.edges(mask)))


def test_what_the_ssm_edge_carries_is_one_of_three() -> None:
    with pytest.raises(ValueError, match="conv, states or tokens, not 'h'"):
        Graph(2, True, ssm="h")
    with pytest.raises(ValueError, match="kept apart by position: give a length"):
        Graph(2, True, ssm="tokens")


def test_writes_go_to_later_positions_alone() -> None:
    """A layer has 4 + 1 + 1 + 2 edges a position, and one from each position to each that is not before it."""
    graph = Graph(2, True, 5, "tokens")
    assert len(graph) == (1 + 2 + 3) * 5 + 2 * (8 * 5 + 15) == len(graph.edges()) == int(graph.whole().sum())
    edges = [("1.write[2]", "1.ssm", 4), ("1.controls", "1.ssm", 3), ("1.write[3]", "1.ssm", 3)]
    assert graph.edges(graph.mask(edges)) == (edges[1], edges[0], edges[2])
    assert graph.edges(graph.mask([("0.write[3]", "0.ssm")])) == tuple(("0.write[3]", "0.ssm", t) for t in (3, 4))
    for edge in (("1.write[2]", "1.ssm", 1), ("1.write[5]", "1.ssm", 4), ("1.conv", "1.ssm", 2)):
        with pytest.raises(ValueError, match="is not in"):
            graph.mask([edge])
    known = Graph.of(2, [("embed", "1", 0), ("1.write[0]", "1.ssm", 4)])
    assert known == Graph(2, True, 5, "tokens") and layer_of("1.write[12]") == layer_of("1.controls") == 1
    fine, mask = Graph(2, length=5, ssm="tokens").refine(Graph(2, length=5).mask([("embed", "1", 2)]))
    assert fine == graph and int(mask.sum()) == 1 + 2 * (8 * 5 + 15)


def token_paths(graph: Graph, kept: set) -> set:
    """Every edge on a path, of one fine layer whose writes and controls are edges; by walking all of them."""
    ways = Ways(kept)
    join = ways.join
    for p in range(graph.length):
        join("embed", ("in", p), ("embed", "0", p))
        for s in range(-3, 1):
            if p + s >= 0:
                join(("in", p + s), ("conv", p), ("0", f"0.conv[{s}]", p))
        for made in ("write", "controls"):
            join(("conv", p), (made, p))
            if graph.direct_step:
                join(("in", p), (made, p))
        join(("conv", p), ("ssm", p))  # by D x
        join(("controls", p), ("decay", p), ("0.controls", "0.ssm", p))
        for t in range(p, graph.length):
            join(("write", p), ("ssm", t), (f"0.write[{p}]", "0.ssm", t))
            join(("decay", p), ("ssm", t))
        join(("ssm", p), ("out", p), ("0.ssm", "0", p))
        join(("in", p), ("gate", p), ("0", "0.skip", p))
        join(("gate", p), ("out", p), ("0.skip", "0", p))
    last = graph.length - 1
    join(("out", last), "end", ("0", "output", last))
    join("embed", "end", ("embed", "output", last))
    return ways.walked()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("direct_step", [False, True])
def test_pruning_follows_writes_and_controls(seed: int, direct_step: bool) -> None:
    graph = Graph(1, True, 5, "tokens", direct_step)
    mask = torch.rand(len(graph.pairs), 5, generator=torch.Generator().manual_seed(seed)) < 0.3 + 0.06 * seed
    assert set(graph.edges(graph.prune(mask))) == token_paths(graph, set(graph.edges(mask)))


def test_refining_keeps_layers_whole() -> None:
    coarse = Graph(3)
    graph, mask = coarse.refine(coarse.mask([("embed", "1"), ("1", "output")]))
    assert graph == Graph(3, fine=True) and int(mask.sum()) == 2 + 3 * 8
    assert set(graph.edges(graph.prune(mask))) == {("embed", "1"), ("1", "output"), *graph.pairs[graph.inside(1)]}


@pytest.mark.parametrize(
    "edges",
    [
        [("embed", "7")],
        [("1", "0")],
        [("embed", "0", 2)],
        [("embed", "0.skip")],
        [("nowhere", "0")],
        [("0", "0.conv[-4]")],
    ],
)
def test_edges_outside_the_graph_are_refused(edges: list) -> None:
    with pytest.raises(ValueError, match="is not in"):
        Graph(3).mask(edges)


def test_unknown_nodes_are_refused() -> None:
    for name in ("39.gate", "x", "1.conv[1]", "", "-1"):
        with pytest.raises(ValueError, match="is no node"):
            layer_of(name)
    with pytest.raises(ValueError, match="either all"):
        Graph.of(3, [("embed", "0"), ("0", "output", 3)])


def test_cutting_to_the_last_position() -> None:
    edges = (("embed", "0", 2), ("0", "1", 1), ("0", "output", 3), ("1", "output", 3), ("0", "output", 2))
    circuit = Circuit(edges, 2, length=4, accuracy=0.5, nld=0.5)
    cut = circuit.only_last_position(0)
    assert cut.edges == (("embed", "0", 2), ("0", "output", 3), ("1", "output", 3)) and cut.accuracy is None
    with pytest.raises(ValueError, match="no positions"):
        Circuit((("embed", "0"),), 2).only_last_position(0)
    with pytest.raises(ValueError, match="layers are 0 to 1"):
        circuit.only_last_position(2)
