"""Every experiment finds what is planted: layer, slice and seed drawn at random."""

from __future__ import annotations

import random

import pytest
import torch

from mamba_ioi.experiments import (
    EXPERIMENTS,
    balanced_pairs,
    bottleneck,
    conv_slices,
    cross_talk,
    greedy_layer_removal,
    layer_removal,
    name_means,
    name_pca,
    name_steering,
    resample_ablation,
    state_similarity,
)
from mamba_ioi.models.model import MambaModel, wrap
from mamba_ioi.tasks.ioi import IOIDataset
from mamba_ioi.zoo.planted import build_planted, planted_names

from . import plain


def planted(**arguments) -> MambaModel:
    names = planted_names(arguments["n_names"], arguments["seed"])
    module, truth = build_planted(plain.prompt_tokenizer(list(names)), **arguments)
    model = wrap(module, plain.prompt_tokenizer(list(names)), model_id="planted")
    model.planted = truth
    return model


@pytest.fixture(
    scope="module",
    params=[("mamba", 0), ("mamba", -1), ("mamba", -2), ("mamba2", -1), ("mamba2", -2)],
    ids=lambda param: f"{param[0]}{param[1]}",
)
def model(request: pytest.FixtureRequest) -> MambaModel:
    family, tap = request.param
    draw = random.Random(f"planted {-tap}" if family == "mamba" else f"{family} {-tap}")
    n_layers = draw.randint(3, 5)
    return planted(
        family=family,
        n_layers=n_layers,
        layer=draw.randrange(1, n_layers),
        slice=tap,
        n_names=draw.randint(6, 9),
        seed=draw.randrange(10**6),
    )


@pytest.fixture(scope="module")
def data(model: MambaModel) -> IOIDataset:
    return IOIDataset.generate(model.tokenizer, 12, seed=11)


def differs(label: str) -> bool:
    return "->" in label


def assert_effects(table, matters) -> None:
    """Effect 1 in the rows where ``matters`` and 0 elsewhere."""
    assert matters.any() and not matters.all()
    assert (table.loc[matters, "effect"] - 1).abs().max() < 1e-2
    assert table.loc[~matters, "effect"].abs().max() < 1e-2


def test_the_bottleneck(model: MambaModel, data: IOIDataset) -> None:
    assert bottleneck(model, data) == model.planted.layer


def test_layer_input_matters_at_the_name_that_differs(model: MambaModel, data: IOIDataset) -> None:
    table = resample_ablation(model, data, progress=False).table
    assert_effects(table, (table["layer"] == model.planted.layer) & table["label"].map(differs))


def test_states_matter_from_the_name_s_arrival_on(model: MambaModel, data: IOIDataset) -> None:
    table = resample_ablation(model, data, "h", progress=False).table
    names = table[table["label"].map(differs)].groupby("corruption")["position"].first()
    arrived = table["position"] >= table["corruption"].map(names) - model.planted.slice
    assert_effects(table, (table["layer"] == model.planted.layer) & arrived)


def test_out_proj_matters_at_the_last_position(model: MambaModel, data: IOIDataset) -> None:
    table = resample_ablation(model, data, "out_proj", progress=False).table
    written = table["position"].isin(model.planted.written_positions)
    assert_effects(table, (table["layer"] == model.planted.layer) & written)


def test_the_conv_slice(model: MambaModel, data: IOIDataset) -> None:
    result = conv_slices(model, data, progress=False)
    assert result.meta["arguments"]["layer"] == model.planted.layer
    table = result.table
    names = resample_ablation(model, data, layers=[0], progress=False).table
    names = names[names["label"].map(differs)].groupby("corruption")["position"].first()
    arrives = table["position"] == table["corruption"].map(names) - model.planted.slice
    assert_effects(table, (table["slice"] == model.planted.slice) & arrives)


@pytest.mark.slow
def test_the_minimal_cross_talk_sets(model: MambaModel) -> None:
    result = cross_talk(model, balanced_pairs(model.tokenizer, 2), progress=False)
    sets = result.table.groupby(["template", "corruption"])["layer"].apply(list)
    assert len(sets) == 20 and result.meta["unreached"] == []
    assert all(layers == [-1, *model.planted.cross_talk] for layers in sets)
    assert set(result.table.groupby("step")["accuracy"].unique().map(tuple)) == {(0.0,), (1.0,)}


def test_the_layers_that_cannot_be_removed(model: MambaModel) -> None:
    data = IOIDataset.generate(model.tokenizer, 20, seed=12, templates="all")
    table = layer_removal(model, data, progress=False).table
    needed = table["layer"].isin(model.planted.needed_layers)
    assert (table.loc[~needed, "accuracy"] == 1).all() and (table.loc[needed, "accuracy"] < 0.7).all()
    greedy = greedy_layer_removal(model, data, progress=False)
    count = len(model.planted.needed_layers)
    assert greedy.meta["removable"] == model.n_layers - count
    assert set(greedy.table["layer"].tolist()[-count:]) == set(model.planted.needed_layers)


def test_names_are_steered_where_they_must_be(model: MambaModel) -> None:
    truth = model.planted
    table = name_steering(model, truth.layer, 100, 12, offset=-truth.slice, progress=False).table
    assert (table["n"] > 0).all()
    for row in table.itertuples():
        succeeds = truth.replace_succeeds if row.method == "replace" else truth.subtract_add_succeeds
        expected = float((row.source_slot, row.target_slot) in succeeds)
        assert (row.success, row.low, row.high) == (expected,) * 3, row


def test_names_are_not_steered_where_they_never_arrive(model: MambaModel) -> None:
    elsewhere = next(offset for offset in (1, 2, 0) if offset != -model.planted.slice)
    table = name_steering(model, model.planted.layer, 30, 6, offset=elsewhere, progress=False).table
    assert table["success"].max() == 0


def test_means_hold_each_name_in_its_own_channel(model: MambaModel) -> None:
    truth = model.planted
    means = name_means(model, truth.layer, 60, offset=-truth.slice, progress=False)
    channels = dict(zip(truth.names, truth.name_channels, strict=True))
    own = torch.tensor([channels[name] for name in means.names])
    filled = means.means[:, :, own]
    seen = means.counts > 0
    for i in range(len(means.names)):
        others = [k for k in range(len(own)) if k != i]
        assert (filled[i, seen[i], i] > 3).all() and filled[i, seen[i]][:, others].abs().max() < 1e-3
    shares = name_pca(model, means=means, progress=False).meta["explained_variance"]
    assert 0 < shares[1] <= shares[0] < 0.6, "as many directions as names, none of them above the others"


def test_the_state_keeps_what_arrived(model: MambaModel) -> None:
    """The answer's contribution stays in the state to the end; nothing is there before its first token."""
    truth = model.planted
    data = IOIDataset.generate(model.tokenizer, 1, seed=1, symmetric=False)
    table = state_similarity(model, data.clean_text, truth.layer, progress=False).table
    similarity = torch.from_numpy(table["similarity"].to_numpy().reshape(20, 20).copy())
    slot = data.clean_names[0].tolist().index(int(data.answers[0]))
    at = truth.arrival_positions[slot]
    assert (similarity[at, at:] > 0.3).all() and similarity[at, 19] > 0.5
    assert similarity[at, :3].abs().max() < 0.1


def available(name: str):
    """The experiment; a test of one that lacks a package is skipped."""
    if (lacks := EXPERIMENTS[name].lacks) is not None:
        pytest.skip(lacks)
    return EXPERIMENTS[name]


WITHOUT_DICTIONARY = [name for name, row in EXPERIMENTS.items() if not row.needs_dictionary]
"""Those that need none; a dictionary's figures are held to `tiny`, for which some ship."""


@pytest.mark.parametrize("name", WITHOUT_DICTIONARY)
def test_every_experiment_runs_from_the_table_and_has_a_figure(name: str) -> None:
    model = planted(n_layers=2, layer=1, slice=-1, n_names=6, seed=1)
    experiment = available(name)
    result = experiment(model, pairs=4, progress=False)
    assert result.meta["seed"] == 27 and len(result.table)
    pairs = {"pairs": 4 * experiment.multiple, "balanced": 4, "names": 4 * 125, "prompts": None}[experiment.input]
    assert result.meta.get("pairs", result.meta["arguments"].get("n_pairs")) == pairs
    if experiment.takes_layer:
        assert result.meta["arguments"]["layer"] == 1
        assert experiment(model, pairs=4, layer=0, progress=False).meta["arguments"]["layer"] == 0
    else:
        with pytest.raises(ValueError, match="goes through all layers"):
            experiment(model, pairs=4, layer=1)
    if not experiment.takes_channels:
        with pytest.raises(ValueError, match="tells no channels apart; channels='x' has no meaning there"):
            experiment(model, pairs=4, channels="x")
    assert result.plot().axes


@pytest.mark.slow
@pytest.mark.parametrize("name", WITHOUT_DICTIONARY)
def test_every_experiment_runs_on_a_mamba2_and_has_a_figure(name: str) -> None:
    model = planted(family="mamba2", n_layers=2, layer=1, slice=-1, n_names=6, seed=1)
    result = available(name)(model, pairs=2, progress=False)
    assert len(result.table) and result.plot().axes
