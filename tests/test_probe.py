"""Probes on planted: what is written into the prompt or a state is read from there on, and not before."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from mamba_ioi import IOIDataset, PromptPairs, experiments, planted

from .conftest import RANDOM

ARRIVAL = 1
"""A name enters the planted layer's SSM one position after its token: through slice -1."""


@pytest.fixture(scope="module", params=RANDOM)
def model(request):
    return planted(n_layers=3, layer=1, slice=-ARRIVAL, n_names=6, seed=3, family=request.param)


@pytest.fixture(scope="module")
def data(model):
    """Prompts of 6 names, 24 of them different in the first three."""
    return IOIDataset.generate(model.tokenizer, 40)


@pytest.fixture
def sklearn():
    return pytest.importorskip("sklearn")


def at(result, layer: int = 1):
    """Accuracy and control by position."""
    rows = result.table[result.table.layer == layer]
    return dict(zip(rows.position, rows.accuracy, strict=True)), dict(zip(rows.position, rows.control, strict=True))


@pytest.mark.usefixtures("sklearn")
@pytest.mark.parametrize("slot", [1, 2])
def test_a_slots_name_is_read_where_it_was_written_and_not_before(model, data, slot) -> None:
    position = int(data.marks[f"n{slot}"][0])
    result = experiments.probe(model, data, "h", 1, f"n{slot}", positions=range(position - 2, 10), progress=False)
    accuracy, control = at(result)
    chance = float(data.clean_tokens[:, position].bincount().max()) / len(data)
    assert set(result.table.n) == {len(data)} and set(result.table.classes) == {6}
    for place in accuracy:
        if place < position:
            assert accuracy[place] < chance + 0.15
        elif place == position + ARRIVAL:
            assert accuracy[place] > 0.95
        assert control[place] < chance + 0.15
    assert list(result.table.columns) == [
        "layer",
        "position",
        "label",
        "accuracy",
        "low",
        "high",
        "control",
        "classes",
        "n",
    ]
    assert (result.table.low <= result.table.accuracy).all() and (result.table.accuracy <= result.table.high).all()


def names_in_either_order(model, data) -> PromptPairs:
    """Prompts where one name stands in the first or second slot, and the other slot's name is any."""
    who, *others = model.planted.name_ids
    first, second = (int(data.marks[name][0]) for name in ("n1", "n2"))
    tokens = data.clean_tokens.clone()
    draw = torch.Generator().manual_seed(1)
    for row in range(len(tokens)):
        other = others[int(torch.randint(len(others), (), generator=draw))]
        tokens[row, [first, second]] = torch.tensor([who, other] if row % 2 else [other, who])
    length = torch.full((len(tokens),), 8)
    marks = {"n1": torch.full_like(length, first), "n2": torch.full_like(length, second)}
    where = torch.tensor([first if row % 2 else second for row in range(len(tokens))])
    columns = {"answers": torch.full_like(length, who), "corrupt_answers": torch.full_like(length, others[0])}
    marks |= {"who": where}
    return PromptPairs(clean_tokens=tokens[:, :9], corrupt_tokens=tokens[:, :9], marks=marks, **columns)


@pytest.mark.usefixtures("sklearn")
@pytest.mark.parametrize("target", ["who", "answer"])
def test_a_names_slot_is_read_where_it_was_written_and_not_before(model, data, target) -> None:
    pairs = names_in_either_order(model, data)
    first = int(pairs.marks["n1"][0])
    places = range(first - 2, first + 2)
    accuracy, control = at(
        experiments.probe(model, pairs, "ssm_input", 1, target, what="slot", positions=places, progress=False)
    )
    assert accuracy[first + ARRIVAL] > 0.95
    for place in (first - 2, first - 1):
        assert accuracy[place] < 0.65
    assert max(control.values()) < 0.75


@pytest.mark.usefixtures("sklearn")
def test_rows_of_different_lengths_are_read_at_marks(model) -> None:
    pairs = IOIDataset.generate(model.tokenizer, 30, templates="all")
    assert pairs.position_labels is None
    result = experiments.probe(model, pairs, "resid_pre", [0, 2], "n1", progress=False)
    found = result.table.set_index(["layer", "mark"]).accuracy
    assert list(result.table.mark[:6]) == ["n1", "n2", "n3", "n4", "n5", "last"]
    assert found[0, "n1"] == 1 and found[2, "n1"] == 1 and found[0, "n2"] < 0.6


@pytest.mark.usefixtures("sklearn")
@pytest.mark.parametrize("swapped", [False, True])
def test_rows_that_share_a_prompt_are_in_one_fold(small, swapped) -> None:
    """Labels that nothing tells but the prompt itself: a probe that had seen it, or its other half, would know."""
    draw = torch.Generator().manual_seed(0)
    clean = torch.randint(0, 61, (24, 4), generator=draw)
    corrupt = clean.clone()
    corrupt[:, 3] = (clean[:, 3] + 1) % 61
    answers = torch.randint(0, 2, (24,), generator=draw)
    order = torch.arange(24).repeat(3)
    one, other = clean[order], corrupt[order]
    if swapped:
        one, other = torch.cat([clean, corrupt]), torch.cat([corrupt, clean])
        order = torch.arange(24).repeat(2)
    labels = answers[order]
    pairs = PromptPairs(clean_tokens=one, corrupt_tokens=other, answers=labels, corrupt_answers=1 - labels)
    result = experiments.probe(small, pairs, "resid_pre", 0, positions=2, folds=3, progress=False)
    assert float(result.table.accuracy[0]) < 0.8


@pytest.mark.usefixtures("sklearn")
def test_labels_rarer_than_folds(small) -> None:
    """Each label in three rows of five folds: it is still read where it stands."""
    draw = torch.Generator().manual_seed(4)
    tokens = torch.randint(0, 61, (12, 4), generator=draw)
    tokens[:, 1] = torch.arange(12) % 4
    marks = {"here": torch.ones(12, dtype=torch.long)}
    ids = torch.zeros(12, dtype=torch.long)
    pairs = PromptPairs(clean_tokens=tokens, corrupt_tokens=tokens, answers=ids, corrupt_answers=ids + 1, marks=marks)
    table = experiments.probe(small, pairs, "resid_pre", 0, "here", positions=[0, 1], progress=False).table
    assert table.accuracy[1] == 1 and table.accuracy[0] < 0.7 and set(table.n) == {12}


@pytest.mark.usefixtures("sklearn")
def test_the_memory_and_the_call_change_no_result(small, tokens, monkeypatch) -> None:
    many = torch.randint(0, 61, (30, 5), generator=torch.Generator().manual_seed(2))
    answers = (many[:, 1] % 2).long()
    pairs = PromptPairs(clean_tokens=many, corrupt_tokens=many, answers=answers, corrupt_answers=1 - answers)
    whole = experiments.probe(small, pairs, "h", progress=False).table
    assert len(whole) == 3 * 5
    monkeypatch.setattr(small, "memory", 1)
    part = experiments.probe(small, pairs, "h", [1], positions=[3, 1], progress=False).table
    expected = whole[whole.layer == 1].set_index("position").loc[[3, 1]]
    assert part.accuracy.tolist() == expected.accuracy.tolist() and part.control.tolist() == expected.control.tolist()


@pytest.mark.usefixtures("sklearn")
def test_several_targets_and_sites_are_each_a_probe(model, data) -> None:
    """In the state a name of the first slot stays; in what the scan is given, it has come and gone."""
    arguments = {"sites": ("ssm_input", "h"), "targets": ("n1", "n2"), "marks": ("n1+1", "n3+1")}
    result = experiments.probes(model, data, **arguments, progress=False)
    assert result.meta["arguments"]["layer"] == model.planted.layer == 1, "the bottleneck"
    assert list(result.table.columns[:4]) == ["site", "target", "layer", "mark"] and len(result.table) == 8
    for (site, target), rows in result.table.groupby(["site", "target"], sort=False):
        alone = experiments.probe(model, data, site, 1, target, marks=["n1+1", "n3+1"], progress=False).table
        assert rows.drop(columns=["site", "target"]).to_numpy().tolist() == alone.to_numpy().tolist()
    found = result.table.set_index(["site", "target", "mark"]).accuracy
    assert found["ssm_input", "n1", "n1+1"] > 0.95 > 0.4 > found["ssm_input", "n1", "n3+1"]
    assert found["h", "n1", "n1+1"] > 0.95 and found["h", "n2", "n1+1"] < 0.4
    with pytest.raises(ValueError, match="layers are whole numbers from 0 to 2"):
        experiments.probes(model, data, 3, **arguments)


def test_without_scikit_learn_a_sentence_says_so(model, data, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ValueError, match=r"^probes need scikit-learn: pip install 'mamba-ioi\[probe\]'$"):
        experiments.probe(model, data, "h", 1, "n1")


@pytest.mark.usefixtures("sklearn")
def test_bad_input_is_refused(model, data) -> None:
    for match, site, target, more in [
        ("the data have no mark 'n9'", "h", "n9", {}),
        ("what is 'token' or 'slot', not 'word'", "h", "n1", {"what": "word"}),
        ("the slot of 'n1' is not one of several in these rows", "h", "n1", {"what": "slot"}),
        ("probes read all positions of a layer's site, and 'A'", "A", "n1", {}),
        ("folds must be a whole number of at least 2, not 1", "h", "n1", {"folds": 1}),
        ("at 3 there are .* different pairs and 6 labels: probes in 900 folds", "h", "n1", {"folds": 900}),
        ("unknown site 'hh'", "hh", "n1", {}),
    ]:
        with pytest.raises(ValueError, match=match):
            experiments.probe(model, data, site, 1, target, positions=3, progress=False, **more)
    with pytest.raises(ValueError, match="the answers are sets of tokens"):
        experiments.probe(model, replace(data, answers=data.answers[:, None]), "h", 1)
