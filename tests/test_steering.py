"""Means of sites, and vectors that are added: by the equations and torch hooks, and what a planted model must do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mamba_ioi import IOIDataset, Patch, PromptPairs, cache, generate, planted, run
from mamba_ioi.experiments import means
from mamba_ioi.interventions.readout import Readout
from mamba_ioi.models.model import wrap
from mamba_ioi.sweep import sweep
from mamba_ioi.trace.sites import SITES

from . import hybrid_models
from .conftest import RANDOM
from .plain import NAMES, forward_by_hand, prompt_tokenizer, values

LAYER = 1
OWN = torch.tensor([[2, 5], [0, -1], [-1, -1], [8, 3]])
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # the RMSNorm of transformers computes in float32
DOUBLE = {family: wrap(make(dtype=torch.float64), None, model_id=family) for family, make in RANDOM.items()}
CASES = [
    (family, name) for family, model in DOUBLE.items() for name, site in model.known_sites().items() if site.by_position
]


@pytest.fixture(params=DOUBLE)
def model(request):
    return DOUBLE[request.param]


def layer_of(name: str) -> int | None:
    return LAYER if name not in SITES or SITES[name].owner != "model" else None


def vector_for(model, name: str, *lead: int) -> Tensor:
    """A small random value of a site, with so many dimensions in front."""
    there = cache(model, torch.zeros(1, 2, dtype=torch.long), [name if layer_of(name) is None else (name, LAYER)])
    shape = next(iter(there.values())).shape[2:]
    draw = torch.Generator().manual_seed(len(name))
    return (
        torch.rand(*lead, *shape, generator=draw, dtype=torch.float64) / 4
    )  # above 0, so that no delta turns negative


def by_hand(model, ids: Tensor, name: str, added: dict[tuple[int, int], Tensor]) -> Tensor:
    """The logits once a vector is added at each (row, position), by the equations."""

    def put(value: Tensor, t: int | None = None) -> Tensor:
        value = value.clone()
        for (row, position), vector in added.items():
            if t is None:
                value[row, position] += vector
            elif t == position:
                value[row] += vector
        return value

    with torch.no_grad():
        return forward_by_hand(model._module, ids, {(name, layer_of(name)): put})["hook_logits"]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_a_vector_is_added_at_every_site(family, name, tokens) -> None:
    """At common positions, at each row's own, and nothing where it is zero."""
    model = DOUBLE[family]
    vector = vector_for(model, name)
    found = run(model, tokens, [Patch(name, layer_of(name), vector, [1, -2], add=True)], positions="all")
    added = {(row, position): vector for row in range(4) for position in (1, 7)}
    torch.testing.assert_close(found, by_hand(model, tokens, name, added), **CLOSE)
    each = vector_for(model, name, 4, 2)
    found = run(model, tokens, [Patch(name, layer_of(name), each, OWN, add=True)], positions="all")
    added = {(row, int(OWN[row, k])): each[row, k] for row in range(4) for k in range(2) if OWN[row, k] >= 0}
    torch.testing.assert_close(found, by_hand(model, tokens, name, added), **CLOSE)
    plain = run(model, tokens, positions="all")
    assert (found[2] - plain[2]).abs().max() < 1e-6 < 1e-4 < (found[0] - plain[0]).abs().max()
    nothing = run(model, tokens, [Patch(name, layer_of(name), 0 * vector, add=True)], positions="all")
    torch.testing.assert_close(nothing, plain, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["resid_post", "ssm_input", "h", "conv_slice", "out_proj"])
def test_a_sweep_adds_as_a_run_does(model, tokens, name) -> None:
    """Beside a patch with the same tensor, which takes the place of what is there, and in batches of any size."""
    vector, each = vector_for(model, name, 1, 1), vector_for(model, name, 4, 2)
    interventions = [
        [Patch(name, LAYER, vector, [3], add=True)],
        [Patch(name, LAYER, vector, [3])],
        [Patch(name, LAYER, each, OWN, add=True), Patch("resid_pre", 2, 0.1, [4], add=True)],
        [Patch(name, LAYER, vector, [3], add=True), Patch(name, LAYER, vector, [3], add=True)],
        [Patch(name, LAYER, vector, [3]), Patch(name, LAYER, vector, [3], add=True)],
    ]
    ids = torch.arange(4)
    readout = Readout(torch.arange(61).expand(4, -1), torch.full((4,), 8), ids, ids + 1, torch.stack([ids, ids + 1], 1))
    expected = torch.stack([run(model, tokens, patches, positions=readout.last) for patches in interventions])
    torch.testing.assert_close(sweep(model, tokens, interventions, readout), expected, **CLOSE)
    twice, once, put = expected[3], expected[0], expected[1]
    assert (twice - once).abs().max() > 1e-4 and (once - put).abs().max() > 1e-4
    model.memory = 1
    try:
        torch.testing.assert_close(sweep(model, tokens, interventions, readout), expected, **CLOSE)
        for patches, whole in zip(interventions, expected, strict=True):
            torch.testing.assert_close(run(model, tokens, patches, positions=readout.last), whole, **CLOSE)
    finally:
        model.memory = None


@pytest.mark.parametrize("name", ["resid_post", "h", "ssm_input"])
def test_a_steered_generation_is_that_of_the_equations(model, tokens, name) -> None:
    """The growing text is run anew, with the vector at every position that was read."""
    vector, ids = 3 * vector_for(model, name), tokens[:, :5]
    patch = Patch(name, LAYER, vector, add=True)
    found = generate(model, ids, 4, patches=[patch], new_patches=[patch])
    expected = ids
    for _ in range(4):
        added = {(row, position): vector for row in range(4) for position in range(expected.shape[1])}
        logits = by_hand(model, expected, name, added)[:, -1]
        expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], 1)
    assert found.tolist() == expected.tolist() != generate(model, ids, 4).tolist()
    nothing = replace(patch, value=torch.zeros_like(vector))
    assert torch.equal(generate(model, ids, 4, patches=[nothing], new_patches=[nothing]), generate(model, ids, 4))


def test_bad_patches_are_refused(model, tokens) -> None:
    for match, patch in [
        ("add=True adds a tensor or a number; a callable returns", Patch("y", LAYER, lambda value: value, add=True)),
        ("add of a patch is True or False, not 'yes'", Patch("y", LAYER, 1.0, add="yes")),
        (r"a value of shape \(3,\) does not fit the site 'resid_post' there", Patch("resid_post", 0, torch.ones(3))),
    ]:
        with pytest.raises(ValueError, match=match):
            run(model, tokens, [patch])


# ---------------------------------------------------------------------------------------------------------------------
# Means
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=RANDOM)
def reader(request):
    tokenizer = prompt_tokenizer(NAMES)
    return wrap(RANDOM[request.param](seed=8, vocab_size=len(tokenizer)), tokenizer, model_id="random")


@pytest.fixture(scope="module")
def pairs(reader) -> IOIDataset:
    return IOIDataset.generate(reader.tokenizer, 15, seed=2, templates="all", symmetric=False)


def mean_by_hand(reader, pairs, site: str, rows: list[int], at: str, prompts: str = "clean_tokens") -> Tensor:
    """One prompt at a time, without its padding."""
    found = []
    for row in rows:
        ids = getattr(pairs, prompts)[row, : pairs.last_position[row] + 1]
        name, _, offset = at.partition("+")
        position = int(pairs.last_position[row] if name == "last" else pairs.marks[name][row]) + int(offset or 0)
        found.append(values(reader._module, ids[None], site, LAYER)[0, position])
    return torch.stack(found).mean(0)


@pytest.mark.parametrize("site", ["ssm_input", "h", "out_proj"])
def test_means_are_those_of_one_prompt_at_a_time(reader, pairs, site) -> None:
    every = list(range(len(pairs)))
    whole = means(reader, pairs, site, LAYER, "last", progress=False)
    assert whole.labels == ("all",) and whole.counts.tolist() == [15] and whole.values.dtype == torch.float32
    torch.testing.assert_close(whole["all"], mean_by_hand(reader, pairs, site, every, "last"), rtol=1e-4, atol=1e-5)
    by_group = means(reader, pairs, site, LAYER, "n2+1", by="template", progress=False)
    for label, count in zip(by_group.labels, by_group.counts.tolist(), strict=True):
        rows = [row for row in every if pairs.groups["template"][row] == label]
        expected = mean_by_hand(reader, pairs, site, rows, "n2+1")
        torch.testing.assert_close(by_group[label], expected, rtol=1e-4, atol=1e-5)
        assert count == len(rows)
    by_name = means(reader, pairs, site, LAYER, "n1+1", by="n1", prompts="corrupt", progress=False)
    assert by_name.counts.sum() == 15 and len(by_name.labels) > 3
    for index, label in enumerate(by_name.labels):
        names = pairs.corrupt_tokens.gather(1, pairs.marks["n1"][:, None])[:, 0].tolist()
        rows = [row for row in every if reader.tokenizer.decode([names[row]]) == label]
        expected = mean_by_hand(reader, pairs, site, rows, "n1+1", "corrupt_tokens")
        torch.testing.assert_close(by_name[label], expected, rtol=1e-4, atol=1e-5)
        assert by_name.tokens[index] == names[rows[0]] and by_name.counts[index] == len(rows)
        token = torch.tensor([names[rows[0]]] * 2)
        torch.testing.assert_close(by_name.of(token), torch.stack([by_name[label]] * 2))


def test_rows_without_the_mark_are_left_out(reader, pairs) -> None:
    first = pairs.marks["n1"].clone()
    first[::2] = -1
    some = PromptPairs(
        clean_tokens=pairs.clean_tokens,
        corrupt_tokens=pairs.corrupt_tokens,
        answers=pairs.answers,
        corrupt_answers=pairs.corrupt_answers,
        last_position=pairs.last_position,
        marks={"here": first, "there": pairs.marks["n2"]},
    )
    rows = list(range(1, 15, 2))
    found = means(reader, some, "y", LAYER, "here", progress=False)
    torch.testing.assert_close(found["all"], mean_by_hand(reader, pairs, "y", rows, "n1"), rtol=1e-4, atol=1e-5)
    assert found.counts.tolist() == [7]
    assert means(reader, some, "y", LAYER, "there", by="here", progress=False).counts.sum() == 7
    answers = means(reader, some, "y", LAYER, "here", by="answer", progress=False)
    assert answers.tokens.tolist() == sorted({int(pairs.answers[row]) for row in rows})


def test_the_memory_changes_no_mean(reader, pairs, monkeypatch) -> None:
    whole = means(reader, pairs, "h", LAYER, "last", by="answer", progress=False)
    monkeypatch.setattr(reader, "memory", 1)
    part = means(reader, pairs, "h", LAYER, "last", by="answer", progress=False)
    torch.testing.assert_close(part.values, whole.values, rtol=1e-5, atol=1e-6)
    assert part.counts.tolist() == whole.counts.tolist()


@pytest.mark.parametrize(
    ("family", "site", "after"),
    [("bamba", "attn_out", "resid_mid"), ("jamba", "mlp_out", "resid_post"), ("falcon_h1", "resid_mid", None)],
)
def test_means_of_a_hybrid_s_parts_are_added(family, site, after) -> None:
    """What is added to a part's output is added to the stream."""
    model = hybrid_models.MODELS[family]
    pairs = hybrid_models.short_pairs()
    layer = next(i for i in range(model.n_layers) if site in model.sites_of(i))
    clean, corrupt = (
        means(model, pairs, site, layer, "last", prompts=one, progress=False) for one in ("clean", "corrupt")
    )
    vector = clean["all"] - corrupt["all"]
    expected = cache(model, pairs.clean_tokens, [(site, layer)])[site, layer][:, -1].mean(0)
    torch.testing.assert_close(clean["all"], expected, rtol=1e-4, atol=1e-5)
    patch = Patch(site, layer, vector, -1, add=True)
    if after is not None:  # where the part's output has just been added
        plain, steered = (
            cache(model, pairs.clean_tokens, [(after, layer)], patches=some)[after, layer] for some in ([], [patch])
        )
        torch.testing.assert_close(steered[:, -1], plain[:, -1] + vector, rtol=1e-4, atol=1e-4)
    callable_one = Patch(site, layer, lambda value: value + vector, -1)
    torch.testing.assert_close(run(model, pairs.clean_tokens, [patch]), run(model, pairs.clean_tokens, [callable_one]))


@pytest.mark.parametrize("family", RANDOM)
@pytest.mark.parametrize("slot", [1, 2, 3])
def test_a_difference_of_two_names_means_turns_the_answer(family, slot) -> None:
    """On planted: it becomes the name that is added, and in another layer nothing does."""
    model = planted(n_layers=3, layer=1, slice=-1, n_names=6, seed=3, family=family)
    mark = f"n{slot}+1"
    every = IOIDataset.generate(model.tokenizer, 200, seed=1)
    found = means(model, every, "ssm_input", model.planted.layer, mark, by=f"n{slot}", progress=False)
    assert sorted(label.strip() for label in found.labels) == sorted(model.planted.names)
    at = every.positions_of(f"n{slot}")[:, None]
    here = every.clean_tokens.gather(1, at)[:, 0] == every.answers  # the answer stands in this slot
    fresh = (every.clean_tokens != every.corrupt_answers[:, None]).all(1)  # and the other name nowhere
    data = every[here & fresh]
    assert len(data) > 10
    vector = found.of(data.corrupt_answers) - found.of(data.answers)
    where = data.positions_of(mark)[:, None]
    rows = torch.arange(len(data))

    def ahead(patches) -> Tensor:
        logits = run(model, data.clean_tokens, patches)
        return logits[rows, data.answers] > logits[rows, data.corrupt_answers]

    assert ahead([]).all()
    assert not ahead([Patch("ssm_input", model.planted.layer, vector[:, None], where, add=True)]).any()
    assert ahead([Patch("ssm_input", 2, vector[:, None], where, add=True)]).all()
    assert ahead([Patch("ssm_input", model.planted.layer, 0 * vector[:, None], where, add=True)]).all()


def test_bad_input_is_refused(reader, pairs) -> None:
    sets = PromptPairs(
        clean_tokens=pairs.clean_tokens,
        corrupt_tokens=pairs.corrupt_tokens,
        answers=pairs.answers[:, None],
        corrupt_answers=pairs.corrupt_answers[:, None],
        last_position=pairs.last_position,
        marks={"never": torch.full((15,), -1)},
    )
    for match, data, call in [
        ("unknown site 'hh'", pairs, {"site": "hh"}),
        ("means are of a layer's site at a mark, and 'A' is none", pairs, {"site": "A"}),
        ("needs a layer from 0 to 2, not 3", pairs, {"layer": 3}),
        ("the data have no mark 'n9'", pairs, {"mark": "n9"}),
        (
            "by is a group or a mark: the data have no mark 'kind'.*; groups are 'corruption', 'template'",
            pairs,
            {"by": "kind"},
        ),
        ("by is a group or a mark: the answers are sets of tokens", sets, {"by": "answer"}),
        ("no row has the mark 'never'", sets, {"mark": "never"}),
        ("prompts are 'clean' or 'corrupt', not 'both'", pairs, {"prompts": "both"}),
    ]:
        arguments = {"site": "y", "layer": 1, "mark": "last", "progress": False} | call
        with pytest.raises(ValueError, match=match):
            means(reader, data, arguments.pop("site"), arguments.pop("layer"), arguments.pop("mark"), **arguments)
    found = means(reader, pairs, "y", 1, "last", by="template", progress=False)
    with pytest.raises(ValueError, match="there is no mean of 'x'; there are those of "):
        found["x"]
    with pytest.raises(ValueError, match="these means are by the labels of a group, not by token"):
        found.of(pairs.answers)
    by_answer = means(reader, pairs[:2], "y", 1, "last", by="answer", progress=False)
    missing = next(int(one) for one in pairs.answers if one not in by_answer.tokens)
    with pytest.raises(ValueError, match=f"there is no mean of token {missing}: no row has it there"):
        by_answer.of(torch.tensor([missing]))
