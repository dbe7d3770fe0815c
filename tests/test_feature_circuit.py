"""Features as nodes: edges beside torch hooks, sums that come out, the planted circuit; circuits of features."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from mamba_ioi import IOIDataset, Patch, Splice, experiments, planted, run
from mamba_ioi.models.model import wrap

from .conftest import RANDOM
from .plain import edited, values
from .test_feature_effects import LAYER, Names, effect, logit_diffs, pairs  # noqa: F401 (a fixture)
from .test_features import Dictionary

QUIET = {"progress": False}


class Smooth(Dictionary):
    """Without kinks, which a few steps of a path would miss."""

    def encode(self, x):
        return torch.tanh((x - self.bias) @ self.down)


@pytest.fixture(scope="module")
def models():
    return {family: wrap(build(), None, model_id="random") for family, build in RANDOM.items()}


@pytest.fixture(params=RANDOM)
def either(request, models):
    return models[request.param]


@pytest.fixture
def model(models):
    return models["mamba"]


def both(module, data, site, layer):
    return [values(module, ids, site, layer) for ids in (data.clean_tokens, data.corrupt_tokens)]


def moved(module, data, edit, up, down, sae, target):
    """How far each row's target goes under an edit upstream, and how far it goes in the corrupt prompts."""
    here, there = both(module, data, *down)
    with edited(module, {up: edit}):
        new = values(module, data.clean_tokens, *down)
    goes = []
    for row, last in enumerate(data.last_position.tolist()):
        with torch.no_grad():
            before, after, end = (one[row, : last + 1].double() for one in (here, new, there))
            parts = [sae.encode(one) for one in (before, after, end)]
            if target == -1:
                parts = [one - sae.decode(part) for one, part in zip((before, after, end), parts, strict=True)]
            else:
                parts = [part[..., target] for part in parts]
        change = parts[2] - parts[0]
        goes.append(((parts[1] - parts[0]) * change).sum().item())
        goes.append((change**2).sum().item())
    return torch.tensor(goes).view(-1, 2)


@pytest.mark.parametrize("down", [("in_proj", 1), ("out_proj", 2)])
def test_measured_edges_are_those_of_hooks(either, pairs, down) -> None:  # noqa: F811
    model, module, up = either, either._module, ("layer_input", LAYER)
    here, there = both(module, pairs, *up)
    above, below = Dictionary(here.shape[-1]), Dictionary(both(module, pairs, *down)[0].shape[-1], seed=1).double()
    result = experiments.feature_edges(
        model, pairs, (above, *up), (below, *down), sources=[2, 0, -1], targets=[5, 1, -1], steps=1, **QUIET
    )
    assert list(result.table.columns) == ["source", "target", "effect", "low", "high", "estimate", "n"]
    assert len(result.table) == 9 and result.table.effect.abs().is_monotonic_decreasing
    for row in result.table.itertuples():
        with torch.no_grad():
            found, other = above.encode(here), above.encode(there)
            if row.source == -1:
                new = above.decode(found) + there - above.decode(other)
            else:
                new = here + (other - found)[..., row.source, None] * above.up[row.source]
        goes = moved(module, pairs, lambda _, new=new: new, up, down, below, row.target)
        assert row.effect == pytest.approx(float(goes[:, 0].sum() / goes[:, 1].sum()), abs=1e-4)
        assert row.low <= row.effect <= row.high and row.n == 3
    assert result.table.effect.abs().max() > 0.05


@pytest.mark.parametrize(("up", "down"), [("h", ("layer_input", 2)), ("ssm_input", ("h", 2)), ("out_proj", ("y", 2))])
def test_estimates_into_a_target_add_up_to_what_the_site_does(either, pairs, up, down) -> None:  # noqa: F811
    model, module, up = either, either._module, (up, LAYER)
    there = both(module, pairs, *up)[1]
    below = Smooth(both(module, pairs, *down)[0].shape[-1], seed=1)
    sources = {"sources": range(-1, 7), "targets": [3, -1, 2]}
    result = experiments.feature_edges(
        model, pairs, (Dictionary(there.shape[-1]), *up), (below, *down), steps=10, **sources, **QUIET
    )
    for target, rows in result.table.groupby("target"):
        goes = moved(
            module, pairs, lambda _, t=None: there if t is None else there[:, t], up, down, below.double(), target
        )
        below.float()
        expected = float(goes[:, 0].sum() / goes[:, 1].sum())
        assert rows.estimate.sum() == pytest.approx(expected, abs=1e-2)
        assert abs(expected) > 5e-3


def test_the_features_that_matter_are_chosen(model, pairs) -> None:  # noqa: F811
    saes = Dictionary(model.d_model), Dictionary(model.d_inner, seed=1)
    result = experiments.feature_edges(
        model, pairs, (saes[0], "layer_input", 1), (saes[1], "ssm_input", 1), top=2, steps=3, **QUIET
    )
    for column, sae, site in (("source", saes[0], "layer_input"), ("target", saes[1], "ssm_input")):
        effects = experiments.feature_effects(model, pairs, sae, site, 1, top=0, steps=3, **QUIET).table
        assert set(result.table[column]) == {-1, *effects.feature[effects.feature >= 0][:2]}
    with torch.inference_mode():
        again = experiments.feature_edges(
            model, pairs, (saes[0], "layer_input", 1), (saes[1], "ssm_input", 1), top=2, steps=3, **QUIET
        )
    assert again.table.equals(result.table)


def test_no_way_between_two_sites_is_no_edge(model, pairs) -> None:  # noqa: F811
    """The gate is computed beside the conv."""
    saes = Dictionary(model.d_inner), Dictionary(model.d_inner, seed=1)
    result = experiments.feature_edges(
        model, pairs, (saes[0], "skip", 1), (saes[1], "ssm_input", 1), top=2, steps=2, **QUIET
    )
    assert (result.table.effect == 0).all() and (result.table.estimate == 0).all()


def test_a_transformer_s_stream_carries_all(pairs) -> None:  # noqa: F811
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=61, n_positions=16, n_embd=12, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    model = wrap(GPT2LMHeadModel(config).eval(), None, model_id="random")
    sides = (Dictionary(12), "resid_post", 0), (Smooth(12, seed=1), "resid_post", 1)
    table = experiments.feature_edges(
        model, pairs, *sides, sources=range(-1, 7), targets=range(-1, 7), steps=10, **QUIET
    ).table
    torch.testing.assert_close(
        torch.tensor(table.groupby("target").estimate.sum().to_numpy()), torch.ones(8).double(), rtol=0, atol=1e-2
    )


@pytest.mark.parametrize("family", RANDOM)
def test_each_name_drives_itself_in_planted(family) -> None:
    model = planted(n_layers=4, layer=2, n_names=12, seed=5, family=family)
    data = IOIDataset.generate(model.tokenizer, 2)
    one, names = data[:1], list(model.planted.name_ids)
    place = int((one.clean_tokens != one.corrupt_tokens)[0].nonzero()[0])
    swapped = {names.index(int(ids[0, place])) for ids in (one.clean_tokens, one.corrupt_tokens)}
    other = next(name for name in range(12) if name not in swapped)
    sides = ((Names(model), site, 2) for site in ("ssm_input", "y"))
    chosen = [*swapped, other]
    table = experiments.feature_edges(model, one, *sides, sources=chosen, targets=chosen, **QUIET).table
    for row in table.itertuples():
        if row.target == other:  # it is alike in both prompts
            assert torch.isnan(torch.tensor([row.effect, row.low, row.high, row.estimate])).all()
            continue
        expected = float(row.source == row.target)
        assert row.effect == pytest.approx(expected, abs=0.02)
        assert row.estimate == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("rest", ["resample", "zero"])
@pytest.mark.parametrize("keep_error", [True, False])
def test_circuits_of_features_are_those_of_hooks(model, pairs, rest, keep_error) -> None:  # noqa: F811
    here, there = both(model._module, pairs, "layer_input", LAYER)
    sae = Dictionary(here.shape[-1])
    effects = experiments.feature_effects(model, pairs, sae, "layer_input", LAYER, top=0, steps=2, **QUIET)
    top = [int(one) for one in effects.table.feature if one >= 0]
    kept = {"ks": [3, 0, 7], "effects": effects, "rest": rest, "keep_error": keep_error}
    result = experiments.feature_faithfulness(model, pairs, sae, "layer_input", LAYER, **kept, **QUIET)
    assert list(result.table.k) == [3, 3, 0, 0, 7, 7] and list(result.table.kept) == ["top", "random"] * 3
    for row in result.table[result.table.kept == "top"].itertuples():
        with torch.no_grad():
            found, other = sae.encode(here), sae.encode(there)
            new = other.clone() if rest == "resample" else torch.zeros_like(other)
            new[..., top[: row.k]] = found[..., top[: row.k]]
            errors = here - sae.decode(found), there - sae.decode(other)
            value = sae.decode(new) + (errors[0] if keep_error else errors[1] if rest == "resample" else 0)
        nld = 1 - effect(model._module, pairs, lambda _, value=value: value)
        assert row.nld == pytest.approx(float(nld.mean()), abs=1e-4)
        right = logit_diffs(model._module, pairs, lambda _, value=value: value) > 0
        assert row.accuracy == pytest.approx(float(right.double().mean()), abs=1e-6)
        if rest == "zero":
            patch = Patch("layer_input", LAYER, Splice(sae, keep_error, top[: row.k]))
            logits = run(model, pairs.clean_tokens, [patch], positions=pairs.last_position)
            with torch.no_grad(), edited(model._module, {("layer_input", LAYER): lambda _, value=value: value}):
                expected = model._module(pairs.clean_tokens, use_cache=False).logits
            torch.testing.assert_close(logits, expected[torch.arange(3), pairs.last_position], rtol=0, atol=1e-4)
    if keep_error and rest == "resample":
        whole = result.table[result.table.k == 7]
        assert (whole.nld - 1).abs().max() < 1e-4


def test_random_features_are_of_those_that_are_active(model, pairs) -> None:  # noqa: F811
    """A dictionary of which two features alone are ever above 0: every draw of two is those."""
    sae = Dictionary(model.d_model)
    with torch.no_grad():
        sae.down[:, 2:] = 0.0
    arguments = {"ks": [2], "draws": 3, **QUIET}
    result = experiments.feature_faithfulness(model, pairs, sae, "layer_input", LAYER, **arguments)
    assert result.meta["active"] == 2
    top, random = result.table.itertuples()
    assert random.nld_low == random.nld_high == pytest.approx(random.nld) == pytest.approx(top.nld)
    default = experiments.feature_faithfulness(model, pairs, sae, "layer_input", LAYER, **QUIET).table
    assert list(default.k) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("family", RANDOM)
def test_the_names_that_are_swapped_do_the_task_in_planted(family) -> None:
    model = planted(n_layers=4, layer=2, n_names=12, seed=5, family=family)
    one = IOIDataset.generate(model.tokenizer, 1)[:1]
    table = experiments.feature_faithfulness(
        model, one, Names(model), "ssm_input", 2, ks=[0, 2], keep_error=False, **QUIET
    ).table
    none, _, two, _ = table.itertuples()
    assert none.nld == pytest.approx(0, abs=1e-3) and none.accuracy == 0
    assert two.nld == pytest.approx(1, abs=1e-3) and two.accuracy == 1


def test_features_are_judged_on_other_pairs(model, pairs) -> None:  # noqa: F811
    sae = Dictionary(model.d_model)
    effects = experiments.feature_effects(model, pairs, sae, "layer_input", LAYER, top=0, steps=2, **QUIET)
    other = replace(effects, table=effects.table[::-1].reset_index(drop=True))
    found = [
        experiments.feature_faithfulness(
            model, pairs, sae, "layer_input", LAYER, ks=[2], effects=one, **QUIET
        ).table.nld[0]
        for one in (None, effects, other)
    ]
    assert found[0] == found[1] != found[2]


def test_the_memory_changes_nothing(model, pairs, monkeypatch) -> None:  # noqa: F811
    saes = Dictionary(model.d_model), Dictionary(model.d_inner, seed=1)
    sides = (saes[0], "layer_input", 1), (saes[1], "ssm_input", 1)

    effects = experiments.feature_effects(model, pairs, *sides[0], top=0, steps=1, **QUIET)

    def tables():
        edges = experiments.feature_edges(model, pairs, *sides, sources=[0], targets=[2, -1], steps=2, **QUIET).table
        kept = experiments.feature_faithfulness(
            model, pairs, *sides[0], ks=[3], effects=effects, draws=1, **QUIET
        ).table
        return edges.sort_values(["source", "target"]).drop(columns="n"), kept.drop(columns="kept")

    whole = tables()
    monkeypatch.setattr(model, "memory", 1)
    for one, other in zip(whole, tables(), strict=True):
        torch.testing.assert_close(
            torch.tensor(one.to_numpy()), torch.tensor(other.to_numpy()), rtol=0, atol=1e-4, equal_nan=True
        )


def test_bad_input_is_refused(model, pairs) -> None:  # noqa: F811
    sae = Dictionary(model.d_model)
    early, late = (sae, "layer_input", 1), (sae, "out_proj", 1)
    with pytest.raises(ValueError, match=r"blocks\.1\.hook_layer_input does not come after blocks\.1\.hook_out_proj"):
        experiments.feature_edges(model, pairs, late, early)
    with pytest.raises(ValueError, match="does not come after"):
        experiments.feature_edges(model, pairs, late, late)
    with pytest.raises(ValueError, match="upstream is a dictionary with its site and layer"):
        experiments.feature_edges(model, pairs, sae, late)
    with pytest.raises(ValueError, match=r"targets are features from 0 to 6, or -1 for the error, each once, not"):
        experiments.feature_edges(model, pairs, early, late, sources=[1], targets=[7])
    with pytest.raises(ValueError, match="features are looked at all positions of a layer's site"):
        experiments.feature_edges(model, pairs, (sae, "A", 0), late)
    for more, said in (
        ({"ks": [8]}, r"ks are numbers of features from 0 to 7, each once, not \[8\]"),
        ({"ks": []}, "ks are numbers of features"),
        ({"rest": "mean"}, "the rest is to 'resample' or to 'zero', not 'mean'"),
        ({"draws": 0}, "draws must be a whole number of at least 1, not 0"),
        ({"effects": experiments.direct_effects(model, pairs)}, "effects are a result of feature_effects"),
    ):
        with pytest.raises(ValueError, match=said):
            experiments.feature_faithfulness(model, pairs, *early, **more)
    wide = Dictionary(model.d_model, features=9)
    effects = experiments.feature_effects(model, pairs, wide, "layer_input", 1, top=0, steps=1, **QUIET)
    with pytest.raises(ValueError, match="effects are of 9 features, and the dictionary has 7"):
        experiments.feature_faithfulness(model, pairs, *early, effects=effects)
