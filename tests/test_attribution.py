"""The one-pass estimates: at every site autograd by hand and finite differences, and beside measured effects."""

from __future__ import annotations

import pytest
import torch

from mamba_ioi import IOIDataset, experiments, load_model, planted
from mamba_ioi.interventions.attribution import attributed_effects
from mamba_ioi.interventions.patch import Patch
from mamba_ioi.interventions.readout import Readout
from mamba_ioi.interventions.run import cache, run
from mamba_ioi.models.model import wrap

from .conftest import RANDOM
from .plain import forward_by_hand

LENGTH = 6
MODELS = {
    family: wrap(build(num_hidden_layers=2, dtype=torch.float64), None, model_id="random")
    for family, build in RANDOM.items()
}
"""A random two-layer Mamba and Mamba-2 in float64; HF's own operations round to float32, ours do not."""
SITES = [
    (family, name)
    for family, model in MODELS.items()
    for name, site in model.known_sites().items()
    if site.owner != "model" and site.by_position
]


@pytest.fixture(scope="module", params=MODELS)
def double(request):
    return MODELS[request.param]


@pytest.fixture(scope="module")
def prompts():
    """Clean and source tokens [3, LENGTH], and which two logits are read where."""
    g = torch.Generator().manual_seed(3)
    clean, source = torch.randint(0, 61, (2, 3, LENGTH), generator=g)
    tokens = torch.tensor([[5, 9], [11, 2], [3, 60]])
    zeros = torch.zeros(3, dtype=torch.long)
    return clean, source, Readout(tokens, torch.tensor([5, 4, 5]), zeros, zeros + 1, tokens.new_tensor([[0, 1]] * 3))


def difference(model, tokens, read, patches=()):
    """The first logit less the second."""
    logits = run(model, tokens, patches, positions=read.last).gather(1, read.tokens)
    return logits[:, 0] - logits[:, 1]


@pytest.fixture(scope="module")
def by_hand(prompts):
    """By family, layer and site: the same estimates ``[L, B]``, from autograd through the forward by hand.

    A number that is 0 is added to every value of every site, and to each state, so that its gradient is the total
    derivative; of a state, through the states that follow from it.
    """
    clean, source, read = prompts
    found = {}
    for family, model in MODELS.items():
        there = forward_by_hand(model._module, source)
        here = forward_by_hand(model._module, clean)
        places = [(name, layer) for other, name in SITES if other == family for layer in (0, 1)]
        zeros = {place: torch.zeros_like(here[key(*place)], requires_grad=True) for place in places}
        edits = {place: plus(zero, by_position=place[0] == "h") for place, zero in zeros.items()}
        logits = forward_by_hand(model._module, clean, edits)["hook_logits"]
        value, source_value = (of_logits(all_logits, read) for all_logits in (logits, there["hook_logits"]))
        gradients = torch.autograd.grad(value.sum(), list(zeros.values()))
        for (name, layer), gradient in zip(places, gradients, strict=True):
            change = ((there[key(name, layer)] - here[key(name, layer)]) * gradient).flatten(2).sum(-1)
            found[family, name, layer] = (-change / (value - source_value)[:, None]).detach().transpose(0, 1)
    return found


def plus(zero, by_position):
    """An edit for `forward_by_hand` that adds it; to a state, what it has for the state's position."""
    return (lambda h, t: h + zero[:, t]) if by_position else (lambda value: value + zero)


def key(name, layer):
    return f"blocks.{layer}.hook_{name}"


def of_logits(logits, read):
    """The first token's logit less the second's, where each row is read, ``[B]``."""
    read_off = logits[torch.arange(len(logits)), read.last].gather(1, read.tokens)
    return read_off[:, 0] - read_off[:, 1]


@pytest.mark.parametrize(("family", "site"), SITES)
def test_the_estimate_is_the_total_derivative(prompts, by_hand, family, site):
    """At every layer and position."""
    clean, source, read = prompts
    found = attributed_effects(MODELS[family], clean, read, site, [0, 1], source=source)
    expected = torch.stack([by_hand[family, site, layer] for layer in (0, 1)]).to(found)
    assert expected.abs().amax((1, 2)).min() > 1e-3
    torch.testing.assert_close(found, expected, rtol=0, atol=float(expected.abs().max()) * 1e-5)


@pytest.mark.parametrize(("family", "site"), SITES)
def test_the_estimate_is_the_slope_of_the_effect(prompts, family, site):
    clean, source, read = prompts
    double = MODELS[family]
    estimates = attributed_effects(double, clean, read, site, [0, 1], source=source)
    assert estimates.shape == (2, LENGTH, 3)
    spread = difference(double, clean, read) - difference(double, source, read)
    step, rounding = 1e-2, 5e-5  # the model's logits and norms are float32 whatever its weights are
    for layer, position in ((0, 2), (1, 4)):
        here, there = (cache(double, tokens, [(site, layer)])[site, layer][:, [position]] for tokens in (clean, source))
        ends = [
            difference(double, clean, read, [Patch(site, layer, torch.lerp(here, there, at), position)])
            for at in (step, -step, 2 * step, -2 * step)
        ]
        near, far = (ends[0] - ends[1]) / (2 * step), (ends[2] - ends[3]) / (4 * step)
        slope = -(4 * near - far) / 3 / spread  # without the cubic term
        largest = slope.abs().max()
        assert largest > 1e-3
        atol = float(largest) * 5e-3 + rounding
        torch.testing.assert_close(estimates[layer, position].to(slope), slope, rtol=0, atol=atol)


def test_the_memory_changes_no_estimate(double, prompts, monkeypatch):
    clean, source, read = prompts
    whole = attributed_effects(double, clean, read, "h", [1], source=source)
    monkeypatch.setattr(double, "memory", 1)
    torch.testing.assert_close(attributed_effects(double, clean, read, "h", [1], source=source), whole)


def test_gradients_leave_the_parameters_as_they_were(double, prompts):
    clean, source, read = prompts
    attributed_effects(double, clean, read, "y", [0], source=source)
    parameters = list(double._module.parameters())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in parameters)


@pytest.mark.parametrize("name", ["tiny", "tiny-mamba2"])
def test_resample_ablation_estimated(name):
    model = load_model(name)
    data = IOIDataset.generate(model.tokenizer, 6)
    measured = experiments.resample_ablation(model, data, progress=False)
    result = experiments.resample_ablation(model, data, estimate="attribution", progress=False)
    assert result.meta["arguments"]["estimate"] == "attribution"
    key = ["corruption", "layer", "position"]
    assert result.table[key].equals(measured.table[key]) and not result.table.effect.equals(measured.table.effect)
    assert result.meta["measured_cells"] == 6 * 20 and result.meta["measured_rows"] == 8
    assert result.meta["rank_correlation"] > 0.5
    whole = result.table.effect.rank().corr(measured.table.effect.rank())
    assert abs(result.meta["rank_correlation"] - whole) < 0.2
    titles = " ".join(text.get_text() for text in result.plot().findobj() if hasattr(text, "get_text"))
    assert f"rank correlation with measured effects {result.meta['rank_correlation']:.2f}" in titles


def test_chosen_layers_and_positions_are_those_of_the_whole_map():
    model = load_model("tiny")
    data = IOIDataset.generate(model.tokenizer, 3)
    arguments = {"site": "h", "estimate": "attribution", "progress": False}
    whole = experiments.resample_ablation(model, data, **arguments).table
    part = experiments.resample_ablation(model, data, layers=[4, 1], positions=[7, 3], **arguments).table
    merged = part.merge(whole, on=["corruption", "layer", "position"])
    assert len(merged) == len(part) and (merged.effect_x - merged.effect_y).abs().max() < 1e-5


@pytest.mark.parametrize("family", MODELS)
def test_the_estimate_finds_what_was_planted(family):
    model = planted(n_layers=4, layer=2, slice=-1, n_names=12, seed=5, family=family)
    data = IOIDataset.generate(model.tokenizer, 8)
    result = experiments.resample_ablation(model, data, "out_proj", estimate="attribution", progress=False)
    largest = result.table.loc[result.table.groupby("corruption").effect.idxmax()]
    assert set(largest.layer) == {2} and set(largest.position) == {int(data.last_position[0])}


def test_an_unknown_estimate_is_refused():
    model = load_model("tiny")
    data = IOIDataset.generate(model.tokenizer, 1)
    with pytest.raises(ValueError, match="'attribution', not 'guess'"):
        experiments.resample_ablation(model, data, estimate="guess")
