"""`planted_recall`, whose circuit is known: every method of the recall study, and of the package, finds it alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mamba_ioi import PromptPairs, experiments, planted_recall
from mamba_ioi.circuits import acdc, eap, evaluate, exact_effects, faithfulness, minimal_circuit, token_edges
from mamba_ioi.experiments import recall
from mamba_ioi.model import MambaModel
from mamba_ioi.tasks import generate

NEAR = 2e-3


@pytest.fixture(scope="module", params=[(1, 0, -1), (2, 0, -2), (2, 1, -3)], ids=str)
def model(request: pytest.FixtureRequest) -> MambaModel:
    n_layers, layer, slice = request.param
    return planted_recall(n_layers=n_layers, layer=layer, slice=slice, n_keys=9, seed=3)


@pytest.fixture(scope="module")
def bound(model: MambaModel) -> str:
    """The place where the pair is bound."""
    return ("value", "value+1", "value+2")[model.planted.shift]


def table(function, model: MambaModel, rows: int = 8):
    return function({"planted": model}, pairs=rows, progress=False).table


def ones(found, value: str, *columns: str) -> set[tuple]:
    """The cells in which a value is 1, once it has been seen that it is 0 in all others."""
    found = found[found["n"] > 0]
    whole = (found[value] - 1).abs() < NEAR
    assert (found[value][~whole].abs() < NEAR).all(), found[~whole & (found[value].abs() >= NEAR)]
    return set(found.loc[whole, list(columns)].itertuples(index=False, name=None))


def test_it_does_the_task_by_its_words_alone(model: MambaModel) -> None:
    assert (table(recall.recall_accuracy, model, 40)["accuracy"] == 1).all()
    data = generate("recall", model.tokenizer, 20, pairs=5)
    with torch.no_grad():  # Hugging Face's own forward
        logits = model._module(data.clean_tokens).logits[torch.arange(20), data.last_position]
    assert torch.equal(logits.argmax(1), data.answers)
    assert set(model.planted.keys) & set(model.planted.values) == set()
    assert set(data.answers.tolist()) <= set(model.planted.values)


def test_interchange_finds_where_the_pair_is_bound(model: MambaModel, bound: str) -> None:
    layer = model.planted.layer
    found = table(recall.recall_interchange, model)
    rest = found[found["place"] != "query"]  # a pair that is the last one may be bound at the divider or the query
    held = ones(rest[rest["place"] != "divider"], "restored", "change", "layer", "component", "place")
    before = [(one, component) for one in range(layer) for component in ("block in", "block out")]
    before += [(layer, "block in")]
    assert held == {
        *((change, one, component, change) for change in ("key", "value") for one, component in before),
        *((change, layer, "conv", bound) for change in ("key", "value")),
    }
    last = found[(found["place"] == "query") & (found["component"] != "conv")]
    after = [(one, component) for one in range(layer + 1, model.n_layers) for component in ("block in", "block out")]
    after += [(layer, component) for component in ("scan", "mixer out", "block out")]
    assert ones(last, "restored", "change", "layer", "component") == {
        (change, *where) for change in ("key", "value") for where in after
    }


def test_edges_are_the_binding_tap_and_the_scan_s_look_up(model: MambaModel, bound: str) -> None:
    layer, slice = model.planted.layer, model.planted.slice
    found = table(recall.recall_edges, model)
    expected = {
        ("key", layer, f"conv[{slice}]", "key", bound),
        ("value", layer, f"conv[{slice + 1}]", "value", bound),
        *((change, layer, "scan", bound, "query") for change in ("key", "value")),
    }
    for value in ("restored", "lost"):
        assert ones(found, value, "change", "layer", "via", "source", "target") == expected


def test_the_query_looks_at_the_binding_alone(model: MambaModel, bound: str) -> None:
    found = table(recall.recall_attention, model).set_index(["layer", "source"])["share"][model.planted.layer]
    assert found[bound] > 1 - NEAR
    assert found[["bos", "other", "key"]].max() < NEAR


def test_attribution_points_at_the_same_cells(model: MambaModel) -> None:
    keys = ["change", "layer", "component", "place"]
    both = table(recall.recall_attribution, model).merge(table(recall.recall_interchange, model), on=keys)
    both = both[both["place"].isin(("key", "value", "value+1", "value+2"))].dropna(subset=["estimate", "restored"])
    held = both["restored"] > 0.9
    assert held.any() and both["estimate"][held].min() > 0.3 and both["estimate"][~held].abs().max() < 0.02


def test_attribution_patching_of_edges_finds_the_taps(model: MambaModel) -> None:
    truth = model.planted
    for change, tap in (("key", truth.slice), ("value", truth.slice + 1)):
        data = generate("recall", model.tokenizer, 12, pairs=4, change=change)
        scores = eap(model, data, steps=3, fine=True).table.set_index(["src", "dst"])["score"]
        needed = {
            ("embed", str(truth.layer)),
            (str(truth.layer), f"{truth.layer}.conv[{tap}]"),
            (str(truth.layer), "output"),
        }
        needed |= {(f"{truth.layer}.conv", f"{truth.layer}.ssm"), (f"{truth.layer}.ssm", str(truth.layer))}
        assert needed <= set(truth.fine_edges) and set(scores.nsmallest(len(needed)).index) == needed
        others = scores.drop(list(needed))
        assert others.abs().max() < 0.05 * scores[list(needed)].abs().min()


# --- the package's other methods, on pairs that differ in the value ---------------------------------------------------


@pytest.fixture(scope="module")
def data(model: MambaModel) -> PromptPairs:
    """Pairs of one group. None asks for the last pair of a prompt, which is bound at the divider or the query."""
    drawn = generate("recall", model.tokenizer, 24, seed=4, pairs=4)
    return replace(
        drawn[[row for row, asked in enumerate(drawn.groups["asked"]) if asked < 4]], groups={}, metric="nld"
    )


MARKS = ["key", "value", "value+1", "value+2", "divider", "last"]


@pytest.mark.parametrize(
    ("site", "mark"), [("layer_input", "value"), ("conv", "bound"), ("y", "last"), ("out_proj", "last")]
)
def test_resample_ablation(model: MambaModel, data: PromptPairs, bound: str, site: str, mark: str) -> None:
    found = experiments.resample_ablation(model, data, site, marks=MARKS, progress=False).table
    assert ones(found, "effect", "layer", "mark") == {(model.planted.layer, bound if mark == "bound" else mark)}


def test_states_hold_the_pair_from_where_it_is_bound(model: MambaModel, data: PromptPairs, bound: str) -> None:
    found = experiments.resample_ablation(model, data, "h", marks=MARKS, progress=False).table
    after = MARKS[MARKS.index(bound) :]
    assert ones(found, "effect", "layer", "mark") == {(model.planted.layer, mark) for mark in after}


def test_the_tap_that_brings_the_value_in(model: MambaModel, data: PromptPairs, bound: str) -> None:
    truth = model.planted
    found = experiments.conv_slices(model, data, truth.layer, marks=MARKS[:4], progress=False).table
    assert ones(found, "effect", "slice", "mark") == {(truth.slice + 1, bound)}


def test_knockout_of_what_was_bound(model: MambaModel, data: PromptPairs, bound: str) -> None:
    """With the pair's write cut from the query nothing is left to answer with; no other cut changes anything."""
    found = experiments.knockout(model, data, MARKS[:4], progress=False).table
    cut = (found["source"] == bound) & (found["layer"] == model.planted.layer)
    assert found["effect"][cut].item() > 0.4 and found["accuracy"][cut].item() < 1
    assert found["effect"][~cut].abs().max() < NEAR and (found["accuracy"][~cut] == 1).all()


def test_the_layer_that_cannot_go(model: MambaModel, data: PromptPairs) -> None:
    found = experiments.layer_removal(model, data, progress=False).table.set_index("layer")["accuracy"]
    assert found[model.planted.layer] < 0.6 and (found.drop(model.planted.layer) == 1).all()
    if model.planted.layer > 0:
        assert experiments.bottleneck(model, data) == model.planted.layer
        sets = experiments.cross_talk(model, data, progress=False).table
        assert sets["layer"].tolist() == [-1, model.planted.layer] and sets["accuracy"].tolist() == [0, 1]


def test_what_is_written_of_the_answer(model: MambaModel, data: PromptPairs) -> None:
    layer = model.planted.layer
    lens = experiments.logit_lens(model, data, marks=["last"]).table.set_index("layer")["logit_diff"]
    whole = lens[model.n_layers - 1]
    assert (lens[lens.index >= layer] > 0.9 * whole).all() and lens[lens.index < layer].abs().max() < 0.1 * whole
    direct = experiments.direct_effects(model, data).table.set_index(["layer", "part"])["effect"]
    assert direct.drop((layer, "mixer")).abs().max() < 0.02 * direct[layer, "mixer"]


def test_circuits_are_the_planted_edges(model: MambaModel, data: PromptPairs) -> None:
    truth = model.planted
    node, tap = str(truth.layer), f"{truth.layer}.conv[{truth.slice + 1}]"
    scores = eap(model, data)
    found = minimal_circuit(model, data, scores, 0.99)
    assert set(found.edges) == {("embed", node), (node, "output")} and found.accuracy == 1
    judged = evaluate(model, data, found)
    assert judged.accuracy == 1 and abs(judged.nld - 1) < NEAR
    curves = faithfulness(model, data, scores, [0.67, 1.0]).table.set_index("ranking")["faithfulness"]
    assert (curves[["signed", "absolute"]] - 1).abs().max() < NEAR
    needed = {("embed", node), (node, tap), (f"{node}.conv", f"{node}.ssm"), (f"{node}.ssm", node), (node, "output")}
    exact = exact_effects(model, data, fine=True).table
    assert ones(exact.assign(effect=-exact["score"], n=len(data)), "effect", "src", "dst") == needed
    kept = acdc(model, data, threshold=0.01)
    assert set(kept.edges) == needed and kept.accuracy == 1


def test_the_token_edge_is_from_where_it_is_bound_to_the_query(model: MambaModel, data: PromptPairs) -> None:
    truth, aligned = model.planted, data[data.marks["value"] == 4]
    assert len(aligned) > 2
    for exact in (False, True):
        found = token_edges(model, aligned, exact=exact).table.sort_values("score", ignore_index=True)
        best, other = found.iloc[0], found.iloc[1]
        assert (best["layer"], best["source"], best["target"]) == (truth.layer, 4 + truth.shift, 10)
        assert best["score"] < -0.5 and abs(other["score"]) < 0.02


def test_the_same_seed_gives_the_same_weights() -> None:
    one, two, other = (planted_recall(n_keys=4, seed=seed)._module.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("wrong", [{"slice": 0}, {"slice": -4}, {"layer": 2}, {"n_layers": 0}, {"n_keys": 1}])
def test_refuses_what_cannot_be_built(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        planted_recall(**wrong)
