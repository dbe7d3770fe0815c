"""Minimal circuits, ACDC, evaluation and faithfulness; on the planted model, whose circuit is known."""

from __future__ import annotations

import random

import pytest
import torch

import mamba_ioi
from mamba_ioi.circuits import (
    Circuit,
    Graph,
    acdc,
    eap,
    evaluate,
    exact_effects,
    faithfulness,
    last_position_only,
    minimal_circuit,
    overlap,
    top_k,
)
from mamba_ioi.circuits.measure import Evaluator
from mamba_ioi.circuits.search import prefix_mask, rank, scored_graph
from mamba_ioi.models.model import MambaModel, wrap
from mamba_ioi.tasks.ioi import IOIDataset

from . import plain_circuits
from .conftest import RANDOM
from .plain import NAMES, prompt_tokenizer

TOKENIZER = prompt_tokenizer(NAMES)


@pytest.fixture(scope="module")
def data() -> IOIDataset:
    return IOIDataset.generate(TOKENIZER, 4, seed=27)


@pytest.fixture(scope="module", params=RANDOM)
def model(request: pytest.FixtureRequest) -> MambaModel:
    return wrap(RANDOM[request.param](seed=2, vocab_size=len(TOKENIZER)), TOKENIZER, model_id="random")


def drawn(seed: int, family: str = "mamba") -> dict:
    """A planted model's arguments, drawn at random."""
    rng = random.Random(seed)
    n_layers = rng.randint(2, 6)
    return {
        "family": family,
        "n_layers": n_layers,
        "layer": rng.randrange(n_layers),
        "slice": rng.choice((0, -1, -2, -3)),
        "n_names": rng.randint(8, 24),
        "seed": rng.randrange(10**6),
    }


@pytest.fixture(scope="module", params=[(11,), (12,), (13,), (14,), (15, "mamba2"), (16, "mamba2")], ids=str)
def planted(request: pytest.FixtureRequest) -> tuple[MambaModel, IOIDataset]:
    model = mamba_ioi.planted(**drawn(*request.param))
    return model, IOIDataset.generate(model.tokenizer, 10, seed=27)


@pytest.mark.slow
@pytest.mark.parametrize(("batch_rows", "memory"), [(None, None), (1, None), (3, None), (None, 1), (3, 1)])
@pytest.mark.parametrize("known", [False, True])
def test_rows_are_those_of_the_data_wherever_they_begin(
    model: MambaModel, data, batch_rows, memory, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "memory", memory)
    graph = Graph(3, True)
    masks = torch.rand(3, len(graph.pairs), 1, generator=torch.Generator().manual_seed(1)) < 0.8
    evaluator = Evaluator(model, data, graph, batch_rows=batch_rows)
    assert (evaluator.runs is None) == (memory == 1), "what is held fits into the memory"
    assert len(set(evaluator.pairs.start.tolist())) > 1 and evaluator.pairs.order.tolist() != list(range(len(data)))
    if known:
        evaluator.start_from(masks[0])
    found = evaluator.measure(masks)
    for row in range(len(data)):
        alone = Evaluator(model, data[row : row + 1], graph).measure(masks)
        for name in ("nld", "kl", "logit_diff"):
            got, expected = getattr(found, name)[:, row], getattr(alone, name)[:, 0]
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("fine", [False, True])
@pytest.mark.parametrize("variant", ["standard", "paper"])
def test_scores_find_the_planted_edges(planted, fine: bool, variant: str) -> None:
    model, data = planted
    truth = set(model.planted.fine_edges) if fine else set(model.planted.edges)
    scores = eap(model, data, fine=fine, variant=variant)
    circuit = minimal_circuit(model, data, scores)
    assert set(circuit.edges) == truth and circuit.accuracy == 1 and circuit.nld == pytest.approx(1, abs=1e-3)
    assert (scores.table.set_index(["src", "dst"]).score[sorted(truth)] < -0.3).all()  # needed is negative
    assert set(top_k(scores, len(truth), by="absolute").edges) == truth
    assert set(top_k(scores, len(truth), by="random", prune=False).edges) != truth
    shuffled = minimal_circuit(model, data, scores, by="random")
    assert shuffled.meta["prefix"] > 2 * len(truth)


@pytest.mark.slow
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("ssm", ["conv", "states"])
def test_acdc_finds_the_planted_edges(planted, exact: bool, ssm: str) -> None:
    model, data = planted
    whole = Circuit.of(model, Graph(model.n_layers).edges())
    for fine, truth in ((False, set(model.planted.edges)), (True, set(model.planted.fine_edges))):
        found = acdc(model, data, whole, threshold=1e-2, fine=fine, exact=exact, ssm=ssm)
        assert found.ssm == found.meta["ssm"] == ssm
        assert set(found.edges) == truth
        table = found.table.set_index(["src", "dst"])
        assert set(table.index[table.kept]) == truth
        assert (table.effect[list(model.planted.edges)] > 0.5).all()


def test_held_out_evaluation_of_the_planted_circuit() -> None:
    model = mamba_ioi.planted(n_layers=3, layer=1, slice=-2, n_names=10, seed=4)
    found = evaluate(model, None, Circuit.of(model, model.planted.edges))
    assert found.n_rows == 200 and found.n_edges == 2
    assert found.accuracy == 1 and found.nld == pytest.approx(1, abs=1e-3) and found.kl < 1e-2
    assert found.random.nld < 0.5 and found.random.n_edges == 2


def test_positions_of_the_planted_circuit(planted) -> None:
    model, data = planted
    truth = model.planted
    circuit = minimal_circuit(model, data, eap(model, data, positional=True))
    expected = {("embed", str(truth.layer), p) for p in truth.name_positions}
    expected |= {(str(truth.layer), "output", p) for p in truth.written_positions}
    assert set(circuit.edges) <= expected and len(circuit) >= 3
    whole = Circuit.of(model, [("embed", str(truth.layer), p) for p in range(20)] + [(str(truth.layer), "output", 19)])
    cut = last_position_only(model, data, whole, truth.layer).table
    assert cut.nld.tolist() == pytest.approx([1, 1], abs=1e-3)
    spread = Circuit((*whole.edges, *((str(truth.layer), "output", p) for p in range(19))), model.n_layers, length=20)
    table = last_position_only(model, data, spread, truth.layer).table
    assert table.n_edges.tolist() == [40, 21] and table.nld.tolist() == pytest.approx([1, 1], abs=1e-3)


@pytest.mark.parametrize(
    "graph", [Graph(3), Graph(3, True), Graph(3, True, 20), Graph(3, True, None, "states")], ids=str
)
def test_whole_and_empty_circuit(model: MambaModel, data: IOIDataset, graph: Graph) -> None:
    for edges, nld in ((graph.edges(), 1), ((), 0)):
        circuit = Circuit(edges, 3, graph.fine, graph.length, ssm=graph.ssm)
        found = evaluate(model, data, circuit, absolute=False)
        assert found.nld == pytest.approx(nld, abs=1e-5) and found.n_edges == len(circuit)
        assert (found.kl == pytest.approx(0, abs=1e-6)) == (nld == 1)


@pytest.mark.parametrize("ssm", ["conv", "states"])
def test_evaluation_equals_the_twin(model: MambaModel, data: IOIDataset, ssm: str) -> None:
    graph = Graph(3, True)
    edges = graph.edges(torch.rand(len(graph.pairs), 1, generator=torch.Generator().manual_seed(3)) < 0.92)
    module, last = model._module, data.last_position
    clean, corrupt = (
        plain_circuits.mamba_run(module, tokens, last) for tokens in (data.clean_tokens, data.corrupt_tokens)
    )
    cut = set(graph.edges()) - set(edges)
    run = plain_circuits.mamba_run(module, data.clean_tokens, last, corrupt, cut, ssm=ssm)
    found = evaluate(model, data, Circuit(edges, 3, fine=True), ssm=ssm)
    assert found.ssm == ssm and found == evaluate(model, data, Circuit(edges, 3, fine=True, ssm=ssm))
    expected = plain_circuits.nld(run, clean, corrupt, data).mean().item()
    assert found.nld == pytest.approx(expected, rel=1e-3) and abs(expected - 1) > 0.05
    best = [
        max(names[names >= 0].tolist(), key=lambda name, row=row: row[name]) == answer
        for row, names, answer in zip(run.logits, data.candidates, data.answers.tolist(), strict=True)
    ]
    assert found.accuracy == pytest.approx(sum(best) / len(best))
    p, q = clean.logits.softmax(1), run.logits.softmax(1)
    assert found.kl == pytest.approx((p * (p / q).log()).sum(1).mean().item(), rel=1e-3)


def test_the_papers_binary_search(model: MambaModel, data: IOIDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the rule as App. D.1 writes it, on accuracies that are made up."""
    scores = eap(model, data, steps=1, fine=True)
    graph, _ = scored_graph(scores)
    for needed in (1, 2, 7, 20, len(graph) - 2):
        asked = []

        def means(self, masks, needed=needed, asked=asked):
            asked.append(int(masks.sum()))
            return FixedMeans(0.9 if asked[-1] >= needed else 0.5)

        monkeypatch.setattr(Evaluator, "measure", means)
        circuit = minimal_circuit(model, data, scores, prune=False)
        low, high = 0, len(graph) - 1
        while low < high:
            middle = -(-(low + high) // 2)
            low, high = (low, middle - 1) if middle >= needed else (middle, high)
        assert len(circuit) == min(len(graph) - 1, low + 1) == needed
        assert circuit.meta["reached"] and len(asked) <= 8


class FixedMeans:
    """What `Evaluator.measure` would return, with one accuracy."""

    def __init__(self, accuracy: float) -> None:
        self.accuracy = accuracy

    def means(self) -> dict[str, float]:
        return {"accuracy": self.accuracy, "nld": self.accuracy, "kl": 0.0, "logit_diff": 0.0}


def test_dead_ends_are_counted_and_change_nothing(model: MambaModel, data: IOIDataset) -> None:
    scores = eap(model, data, steps=2)
    raw, pruned = top_k(scores, 6, prune=False), top_k(scores, 6)
    assert len(raw) == 6 and pruned.meta["pruned"] == 6 - len(pruned)
    one, other = evaluate(model, data, raw), evaluate(model, data, pruned)
    assert one.nld == pytest.approx(other.nld, abs=1e-5) and one.kl == pytest.approx(other.kl, abs=1e-5)


def one_by_one(model: MambaModel, data: IOIDataset, graph: Graph, threshold: float) -> set:
    """ACDC as it is defined: one edge, one run, one decision; by the plain twin."""
    module, last = model._module, data.last_position
    clean, corrupt = (
        plain_circuits.mamba_run(module, tokens, last) for tokens in (data.clean_tokens, data.corrupt_tokens)
    )

    def measure(kept: set) -> float:
        cut = set(graph.edges()) - kept
        run = plain_circuits.mamba_run(module, data.clean_tokens, last, corrupt, cut, ssm=graph.ssm)
        return plain_circuits.nld(run, clean, corrupt, data).mean().item()

    direct = graph.direct_step and graph.ssm == "conv"
    order: list[tuple[str, str]] = [(str(src), "output") for src in (2, 1, 0, "embed")]
    for layer in (2, 1, 0):
        node = str(layer)
        if graph.fine:
            order += [(f"{node}.ssm", node)] if direct else []
            order += [(f"{node}.conv", f"{node}.ssm"), (node, f"{node}.skip")]
            order += [(node, f"{node}.conv[{s}]") for s in (0, -1, -2, -3)]
        order += [(str(src), node) for src in (*range(layer - 1, -1, -1), "embed")]
    kept = set(graph.edges())
    now = measure(kept)
    for edge in order:
        after = measure(kept - {edge})
        if now - after <= threshold:
            kept, now = kept - {edge}, after
    if graph.fine:
        for layer in ("0", "1", "2"):
            cut = not direct and (f"{layer}.conv", f"{layer}.ssm") not in kept
            kept -= {(f"{layer}.ssm", layer)} if cut else set()
            kept -= {(f"{layer}.skip", layer)} if (layer, f"{layer}.skip") not in kept else set()
    return set(graph.edges(graph.prune(graph.mask(kept))))


@pytest.mark.parametrize(
    ("fine", "threshold", "ssm"),
    [(False, 0.02, "conv"), (False, 0.2, "conv"), (True, 0.05, "conv"), (True, 0.05, "states")],
)
def test_exact_acdc_is_the_sequential_algorithm(
    model: MambaModel, data: IOIDataset, fine: bool, threshold: float, ssm: str
) -> None:
    found = acdc(model, data, None, threshold, fine, exact=True, ssm=ssm, batch_rows=40)
    graph = Graph(3, fine, None, ssm).on(model)
    expected = one_by_one(model, data, graph, threshold)
    assert set(found.edges) == expected and 0 < len(expected) < len(graph)


def test_the_ssm_edge_as_the_authors_cut_it() -> None:
    """Mean NLD on tiny with that edge of one layer cut alone, by their code and ours: 20 pairs, seed 27."""
    model = mamba_ioi.load_model("tiny")
    data = IOIDataset.generate(model.tokenizer, 20, seed=27)
    whole = set(Graph(model.n_layers, True).edges())
    measured = {
        ssm: [
            evaluate(model, data, Circuit(tuple(whole - {(f"{i}.conv", f"{i}.ssm")}), 6, True), ssm=ssm).nld
            for i in (0, 1, 2, 5)
        ]
        for ssm in ("states", "conv")
    }
    assert measured["states"] == pytest.approx([0.9987, 0.0965, 0.9766, 0.9943], abs=6e-5)
    assert measured["conv"] == pytest.approx([0.9449, 0.0793, 0.9498, 0.9658], abs=6e-5)


def test_what_the_ssm_edge_carries_is_kept_from_scores_to_circuits(model: MambaModel, data: IOIDataset) -> None:
    scores = exact_effects(model, data, fine=True, ssm="states")
    assert scores.meta["graph"]["ssm"] == scores.meta["arguments"]["ssm"] == "states"
    circuit = minimal_circuit(model, data, scores)
    assert circuit.ssm == "states" and evaluate(model, data, circuit).nld == pytest.approx(circuit.nld, abs=1e-5)
    curve = faithfulness(model, data, scores, (0.5, 1.0))
    graph = Graph(3, True, None, "states")
    half = Circuit(
        graph.edges(prefix_mask(graph, rank(scored_graph(scores)[1]), len(graph) // 2)), 3, True, ssm="states"
    )
    assert curve.meta["graph"]["ssm"] == "states" and top_k(scores, 9).ssm == "states"
    assert curve.table.nld[0] == pytest.approx(evaluate(model, data, half).nld, abs=1e-5)
    other = faithfulness(model, data, scores, (0.5, 1.0), ssm="conv")
    assert other.meta["graph"]["ssm"] == "conv" and abs(other.table.nld[0] - curve.table.nld[0]) > 1e-3


def test_joint_acdc_tests_against_the_circuit_at_hand(model: MambaModel, data: IOIDataset) -> None:
    threshold, graph = 0.05, Graph(3)
    found = acdc(model, data, None, threshold, fine=False)
    evaluator = Evaluator(model, data, graph)
    mask = torch.ones(len(graph.pairs), 1, dtype=torch.bool)
    for layer in (3, 2, 1, 0):
        mask = graph.prune(mask)
        before = evaluator.measure(mask[None]).nld.mean().item()
        dropped = []
        for i in range(len(graph.pairs))[graph.into(layer)]:
            if mask[i]:
                without = mask.clone()
                without[i] = False
                effect = before - evaluator.measure(without[None]).nld.mean().item()
                assert found.table.effect[i] == pytest.approx(effect, abs=1e-4)
                dropped += [i] if effect <= threshold else []
        mask[dropped] = False
    assert found.edges == graph.edges(graph.prune(mask))


def test_faithfulness_as_in_mib(model: MambaModel, data: IOIDataset) -> None:
    scores = exact_effects(model, data, absolute=False)
    fractions = (0.2, 0.5, 1.0)
    result = faithfulness(model, data, scores, fractions)
    graph, values = scored_graph(scores)
    evaluator = Evaluator(model, data, graph)

    def difference(mask: torch.Tensor) -> float:
        return evaluator.measure(mask[None]).logit_diff.mean().item()

    empty, whole = (difference(torch.full((len(graph.pairs), 1), value)) for value in (False, True))
    for by in ("signed", "absolute", "random"):
        curve = result.table[result.table.ranking == by]
        assert curve.n_edges.tolist() == [int(len(graph) * fraction) for fraction in fractions]
        masks = [prefix_mask(graph, rank(values, by), n) for n in curve.n_edges]
        expected = [(difference(mask) - empty) / (whole - empty) for mask in masks]
        assert curve.faithfulness.tolist() == pytest.approx(expected, abs=1e-4)
        a, b, c = expected
        assert result.meta["cpr"][by] == pytest.approx(0.3 * (a + b) / 2 + 0.5 * (b + c) / 2, abs=1e-4)
        away = [abs(1 - value) for value in expected]
        assert result.meta["cmd"][by] == pytest.approx(0.3 * sum(away[:2]) / 2 + 0.5 * sum(away[1:]) / 2, abs=1e-4)
        assert curve.faithfulness.iloc[-1] == pytest.approx(1, abs=1e-4)


def test_faithfulness_of_the_planted_model_beats_random(planted) -> None:
    model, data = planted
    found = faithfulness(model, data, eap(model, data, steps=2), (0.15, 0.3, 0.6, 1.0))
    assert found.meta["cpr"]["signed"] > found.meta["cpr"]["random"]
    assert found.meta["cmd"]["absolute"] < found.meta["cmd"]["random"]


def test_what_does_not_fit_is_refused(model: MambaModel, data: IOIDataset) -> None:
    scores = eap(model, data[:2], steps=1)
    for call, message in (
        (lambda: minimal_circuit(model, data, scores, target=85.0), "accuracy from 0 to 1"),
        (lambda: minimal_circuit(model, data, scores.table.iloc[1:]), "one number for each"),
        (lambda: minimal_circuit(model, data, scores.table.drop(columns="score")), "score is missing"),
        (lambda: top_k(scores, 99), "k is from 0 to 10"),
        (lambda: top_k(scores, 1.5), "a whole number, not 1.5"),
        (lambda: top_k(scores, 3, by="size"), "a ranking is one of"),
        (lambda: minimal_circuit(model, data, None), "scores are a Result or its table, not NoneType"),
        (lambda: eap(model, None), "the data are PromptPairs, not NoneType"),
        (lambda: overlap(3, []), "tuples .*, not int"),
        (lambda: overlap([], [3]), "tuples .*, not list"),
        (lambda: acdc(model, data, threshold=-1.0), "threshold"),
        (lambda: acdc(model, data, ssm="h"), "conv, states or tokens, not 'h'"),
        (lambda: exact_effects(model, data, fine=True, ssm=None), "conv, states or tokens, not None"),
        (lambda: eap(model, data, fine=True, ssm="states"), "ssm='conv' or 'tokens'"),
        (lambda: evaluate(model, data, Circuit((("embed", "output"),), 9)), "9 layers"),
        (lambda: evaluate(model, data, [("embed", "0")]), "a circuit is a Circuit, not list"),
        (lambda: faithfulness(model, data, scores, (0.5, 0.2)), "fractions increase"),
        (lambda: evaluate(model, data, Circuit((("embed", "0", 39),), 3, length=40)), "40 positions"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_overlap() -> None:
    assert overlap([("a", "b"), ("b", "c")], [("a", "b"), ("x", "y"), ("z", "y")]) == {
        "shared": 1,
        "precision": 1 / 2,
        "recall": 1 / 3,
        "jaccard": 1 / 4,
    }
