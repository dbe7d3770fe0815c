"""`planted_recall`, whose circuit is known: every method of the recall study finds it, and nothing beside it."""

from __future__ import annotations

import pytest
import torch

from mamba_ioi import planted_recall
from mamba_ioi.circuits import eap
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


def test_the_same_seed_gives_the_same_weights() -> None:
    one, two, other = (planted_recall(n_keys=4, seed=seed)._module.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("wrong", [{"slice": 0}, {"slice": -4}, {"layer": 2}, {"n_layers": 0}, {"n_keys": 1}])
def test_refuses_what_cannot_be_built(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        planted_recall(**wrong)
