"""Edges inside the mixers of hybrids: cuts by hand in forwards in float64, and scores by small changes there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from mamba_ioi.circuits import (
    Circuit,
    Graph,
    acdc,
    eap,
    evaluate,
    exact_effects,
    minimal_circuit,
    to_dot,
    token_edges,
    top_k,
)
from mamba_ioi.circuits.forward import record
from mamba_ioi.circuits.resample import resampled_logits
from mamba_ioi.circuits.search import scored_graph
from mamba_ioi.models.model import MambaModel, wrap

from .hybrid_models import FAMILIES, MODELS, close, differences, exact, scan_layers, short_pairs
from .plain_hybrids import cut_by_hand, run_by_hand

PAIRS = short_pairs()
SOME = ["jamba", "zamba2", "falcon_h1"]
LAST = torch.full((3,), 6)
RUNS: dict[str, tuple[tuple[dict, Tensor], tuple[dict, Tensor]]] = {}


@pytest.fixture(params=FAMILIES)
def model(request) -> MambaModel:
    return MODELS[request.param]


def both_runs(model: MambaModel) -> tuple[tuple[dict, Tensor], tuple[dict, Tensor]]:
    """The clean and the corrupt run by hand: the activations, and the difference of the answers' logits."""
    if model.model_id not in RUNS:
        runs = (run_by_hand(exact(model), ids) for ids in (PAIRS.clean_tokens, PAIRS.corrupt_tokens))
        here, there = ((acts, differences(logits, PAIRS)) for acts, logits in runs)
        RUNS[model.model_id] = here, there
    return RUNS[model.model_id]


def changed(model: MambaModel, edge: tuple, ssm: str) -> dict[tuple[str, int], Tensor]:
    """What an edge's cut puts in the place of the clean run's values, by site: at all positions, or at one."""
    src, dst, *position = edge
    layer, at = int(src.split(".")[0]), position or list(range(7))
    (here, _), (there, _) = both_runs(model)

    def put(name: str, new: Tensor | None = None, part: object = slice(None)) -> dict[tuple[str, int], Tensor]:
        value = here[name, layer].clone()
        value[:, at, ..., part] = (there[name, layer] if new is None else new)[:, at, ..., part]
        return {(name, layer): value}

    if "conv[" in dst:
        taps = here["conv_slice", layer].shape[-1]
        return put("conv_slice", part=int(dst.split("[")[1][:-1]) + taps - 1)
    if "skip" in src + dst:
        return put("skip")
    if "write[" in src:
        source = int(src.split("[")[1][:-1])
        return put("y", torch.stack([cut_by_hand(here, there, layer, [source], t) for t in range(7)], 1))
    if src.endswith("controls"):
        return put("A_bar") | put("C")
    if ssm == "states" and dst.endswith("ssm"):
        return put("h")
    if ssm == "states":  # what C of this run reads of the other's states
        h, C = there["h", layer], here["C", layer]
        read = C if h.dim() == 4 else C.repeat_interleave(h.shape[2] // C.shape[2], 2)
        return put("y", torch.einsum("b...pn,b...n->b...p", h, read).flatten(2))
    return put("conv" if dst.endswith("ssm") else "ssm_output")


def with_values(values: dict[tuple[str, int], Tensor]) -> dict[tuple[str, int], Callable]:
    """Edits that put the values in place; states where they differ from the run's."""
    edits: dict[tuple[str, int], Callable] = {}
    for (name, layer), value in values.items():
        if name == "h":
            raise AssertionError("states are put in place position by position")
        edits[name, layer] = lambda _, value=value: value
    return edits


def effect_by_hand(model: MambaModel, edge: tuple, ssm: str) -> float:
    """The change of the mean NLD when the edge alone is cut."""
    (_, high), (there, low) = both_runs(model)
    values = changed(model, edge, ssm)
    held = {key: value for key, value in values.items() if key[0] == "h"}
    edits = with_values({key: value for key, value in values.items() if key not in held})
    for key in held:
        at = edge[2:] or range(7)
        edits[key] = lambda h, t, key=key, at=at: there[key][:, t] if t in at else h
    logits = run_by_hand(exact(model), PAIRS.clean_tokens, edits)[1]
    return ((differences(logits, PAIRS) - high) / (high - low).abs()).mean().item()


def inner(table):
    """The rows of edges inside mixers."""
    return table[[layer_in(row.src, row.dst) for row in table.itertuples()]]


def layer_in(src: str, dst: str) -> bool:
    ends = ("conv", "ssm", "skip", "write", "controls")
    return any(node.split(".")[-1].startswith(ends) for node in (src, dst) if "." in node)


@pytest.mark.slow
@pytest.mark.conformance("fine")
@pytest.mark.parametrize("ssm", ["conv", "states"])
def test_effects_of_edges(model, ssm):
    table = exact_effects(model, PAIRS, fine=True, ssm=ssm).table
    found, seen = inner(table), 0.0
    taps = 4
    assert len(found) == len(scan_layers(model)) * (taps + 4)
    for row in found.itertuples():
        effect = effect_by_hand(model, (row.src, row.dst), ssm)
        assert row.score == pytest.approx(effect, rel=5e-3, abs=1e-3), (row.src, row.dst)
        seen = max(seen, abs(effect))
    assert seen > 0.02
    rest = exact_effects(model, PAIRS, parts=True).table.set_index(["src", "dst"]).score
    others = table.drop(found.index).set_index(["src", "dst"]).score
    assert list(others.index) == list(rest.index)  # attention and MLPs stay whole
    assert others.tolist() == pytest.approx(rest.tolist(), abs=2e-4)


@pytest.mark.slow
@pytest.mark.conformance("fine")
@pytest.mark.parametrize("model", [family for family in FAMILIES if " " not in family], indirect=True)
@pytest.mark.parametrize("ssm", ["conv", "states", "tokens"])
def test_effects_of_edges_at_positions(model, ssm):
    table = inner(exact_effects(model, PAIRS, fine=True, ssm=ssm, positional=True).table)
    some = table[table.position.isin([2, 4, 6]) & (table.score.abs() > 1e-3)]
    some = some[~some.src.str.contains("write") | (some.position == 6)].iloc[::7]
    for row in some.itertuples():
        effect = effect_by_hand(model, (row.src, row.dst, row.position), ssm)
        assert row.score == pytest.approx(effect, rel=5e-3, abs=1e-3), (row.src, row.dst, row.position)
    assert len(some) >= 3 and (table.score[table.position < 2].abs() < 1e-5).all()


def slope_by_hand(model: MambaModel, edge: tuple) -> float:
    """The derivative of the mean NLD as the edge's value goes from this run's to the other's."""
    (here, high), (_, low) = both_runs(model)
    values, small, ends = changed(model, edge, "conv"), 1e-3, []
    if edge[0].endswith("controls"):  # what they change at the scan's output counts
        layer = int(edge[0].split(".")[0])
        acts = run_by_hand(exact(model), PAIRS.clean_tokens, with_values(values))[0]
        values = {("y", layer): acts["y", layer]}
    for sign in (1, -1):
        moved = {key: here[key] + sign * small * (value - here[key]) for key, value in values.items()}
        ends.append(differences(run_by_hand(exact(model), PAIRS.clean_tokens, with_values(moved))[1], PAIRS))
    return ((ends[0] - ends[1]) / (high - low).abs()).mean().item() / (2 * small)


@pytest.mark.conformance("fine")
def test_scores_at_the_clean_run_are_derivatives(model):
    """One step of gradients, against small changes of each inner value, up and down; norms are in float32."""
    table = eap(model, PAIRS, steps=1, fine=True).table
    found, parts = inner(table), eap(model, PAIRS, steps=1, parts=True).table
    largest = found.score.abs().max()
    assert largest > 0.01
    for row in found.itertuples():
        slope = slope_by_hand(model, (row.src, row.dst))
        assert row.score == pytest.approx(slope, rel=1e-2, abs=2e-3 * largest), (row.src, row.dst)
    assert table.drop(found.index).score.tolist() == pytest.approx(parts.score.tolist(), rel=1e-4, abs=1e-6)


@pytest.mark.conformance("fine")
def test_scores_of_writes_and_controls_are_derivatives(model):
    table = eap(model, PAIRS, steps=1, fine=True, positional=True, ssm="tokens").table
    carried = table[table.src.str.contains("write|controls") & (table.position >= 2)]
    largest = carried.score.abs().max()
    some = carried[carried.score.abs() > 0.01 * largest].iloc[::2]
    assert len(some) >= 5
    for row in some.itertuples():
        slope = slope_by_hand(model, (row.src, row.dst, row.position))
        assert row.score == pytest.approx(slope, rel=2e-2, abs=5e-3 * largest), (row.src, row.dst, row.position)


@pytest.mark.parametrize("model", SOME, indirect=True)
@pytest.mark.parametrize("variant", ["standard", "paper"])
def test_positions_of_an_edge_sum_to_it(model, variant):
    whole = eap(model, PAIRS, steps=3, fine=True, variant=variant).table
    apart = eap(model, PAIRS, steps=3, fine=True, variant=variant, positional=True).table
    sums, largest = apart.groupby(["src", "dst"]).score.sum(), whole.score.abs().max()
    for row in whole.itertuples():
        assert sums[row.src, row.dst] == pytest.approx(row.score, rel=1e-3, abs=1e-4 * largest)


@pytest.mark.parametrize("model", SOME, indirect=True)
@pytest.mark.parametrize("ssm", ["conv", "states", "tokens"])
def test_resampling_from_the_run_itself_changes_nothing(model, ssm):
    graph = Graph(model.n_layers, True, 7, ssm).on(model)
    ids = PAIRS.clean_tokens
    run = record(model, ids, LAST, graph=graph)
    keep = torch.rand(2, 1, len(graph.pairs), 7, generator=torch.Generator().manual_seed(0)) < 0.5
    logits = resampled_logits(model, graph, ids, LAST, run, keep)
    for one in logits:
        close(one, run.logits)
    assert not torch.allclose(
        resampled_logits(model, graph, ids, LAST, record(model, PAIRS.corrupt_tokens, LAST, graph=graph), keep), logits
    )


@pytest.mark.parametrize("model", SOME, indirect=True)
def test_dead_ends_change_nothing(model):
    """Edges that lie on no path by `Graph.prune` may be cut or kept in any circuit."""
    for ssm in ("conv", "states", "tokens"):
        graph = Graph(model.n_layers, True, 7, ssm).on(model)
        generator = torch.Generator().manual_seed(1)
        keep = torch.stack([torch.rand(graph.whole().shape, generator=generator) < share for share in (0.5, 0.7, 0.9)])
        pruned = torch.stack([graph.prune(one) for one in keep])
        corrupt = record(model, PAIRS.corrupt_tokens, LAST, graph=graph)
        one, other = (
            resampled_logits(model, graph, PAIRS.clean_tokens, LAST, corrupt, masks[:, None])
            for masks in (keep, pruned)
        )
        assert (pruned != keep).any() and pruned.any()
        close(one, other)


def test_a_shared_block_brings_earlier_positions_to_a_mixer():
    """Zamba2's: a path from an early token to the gate of a later one."""
    model = MODELS["zamba2"]
    edges = [("embed", "1", 2), ("1", "1.skip", 6), ("1.skip", "1", 6), ("1", "output", 6)]
    circuit = Circuit.of(model, edges)
    assert circuit.pruned().edges == circuit.edges
    nothing = evaluate(model, PAIRS, Circuit.of(model, [], fine=True, length=7), absolute=False)
    assert abs(evaluate(model, PAIRS, circuit, absolute=False).nld - nothing.nld) > 1e-3


@pytest.mark.parametrize("model", SOME, indirect=True)
def test_circuits(model, tmp_path):
    """Found, stored, drawn and measured; a coarse circuit that is made fine does what it did."""
    scores = eap(model, PAIRS, steps=2, fine=True, parts=True)
    graph, _ = scored_graph(scores)
    assert graph == Graph(model.n_layers, fine=True).on(model) and len(graph.mixers) >= len(scan_layers(model))
    assert scored_graph(scores.table, model.n_layers)[0].pairs == graph.pairs
    coarse = Circuit.of(model, [edge for edge in Graph(model.n_layers).edges() if edge != ("embed", "1")])
    for start in (coarse, top_k(scores, len(graph) // 2)):
        found = acdc(model, PAIRS, start, threshold=0.2)
        again = Circuit.load(found.save(tmp_path / "circuit.json"))
        assert again.edges == found.edges and again.graph == found.graph == graph
        assert evaluate(model, PAIRS, again).nld == pytest.approx(found.nld, abs=1e-4)
        assert to_dot(found).count("->") >= len(found)
    mask = Graph(model.n_layers).mask(coarse.edges)
    fine = Circuit.of(model, graph.edges(Graph(model.n_layers).on(model).refine(mask, graph.parts)[1]))
    one, other = (evaluate(model, PAIRS, circuit, absolute=False) for circuit in (coarse, fine))
    assert other.nld == pytest.approx(one.nld, abs=1e-4) and one.nld != pytest.approx(1, abs=1e-3)
    assert minimal_circuit(model, PAIRS, scores, 0.3).graph == graph


@pytest.mark.parametrize("model", SOME, indirect=True)
def test_token_edges(model):
    """Those of `token_edges` are those of the graph."""
    both = token_edges(model, PAIRS, steps=2), eap(model, PAIRS, steps=2, fine=True, positional=True, ssm="tokens")
    alone, table = both[0].table, both[1].table.set_index(["src", "dst", "position"]).score
    assert set(alone.layer) == set(scan_layers(model))
    largest = alone.score.abs().max()
    assert largest > 1e-3
    for row in alone.itertuples():
        other = table[f"{row.layer}.write[{row.source}]", f"{row.layer}.ssm", row.target]
        assert row.score == pytest.approx(other, rel=1e-3, abs=1e-4 * largest)


def test_where_there_is_no_mixer():
    config = GPT2Config(vocab_size=61, n_embd=16, n_layer=2, n_head=2)
    model = wrap(GPT2LMHeadModel(config).eval(), None, model_id="gpt2")
    coarse = Circuit.of(model, Graph(2).edges())
    for use in (lambda: eap(model, PAIRS, fine=True), lambda: exact_effects(model, PAIRS, fine=True)):
        with pytest.raises(ValueError, match="edges inside a layer need a Mamba; gpt2 is"):
            use()
    with pytest.raises(ValueError, match="edges inside a layer need a Mamba"):
        acdc(model, PAIRS, coarse)
