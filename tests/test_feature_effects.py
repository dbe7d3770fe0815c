"""Effects of a dictionary's features: measured ones by torch hooks, estimates by where they have to agree."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from mamba_ioi import IOIDataset, PromptPairs, cache, experiments, planted
from mamba_ioi.models.model import wrap

from .conftest import RANDOM
from .plain import edited, values
from .test_features import Dictionary

LAYER = 1


class Linear(nn.Module):
    """A dictionary whose features are coordinates in some basis, exactly: decode undoes encode."""

    def __init__(self, directions: torch.Tensor) -> None:
        super().__init__()
        self.directions = nn.Parameter(directions)

    def encode(self, x):
        return x.double() @ torch.linalg.inv(self.directions)

    def decode(self, found):
        return found @ self.directions


@pytest.fixture(scope="module", params=RANDOM)
def model(request):
    return wrap(RANDOM[request.param](), None, model_id="random")


@pytest.fixture(scope="module")
def pairs(tokens):
    """Three pairs that differ in one token each, of two lengths."""
    clean = tokens[:3, :7].clone()
    last = torch.tensor([6, 5, 6])
    clean[1, 6] = 0
    corrupt = clean.clone()
    corrupt[torch.arange(3), torch.tensor([2, 5, 4])] = torch.tensor([7, 8, 9])
    answers = torch.tensor([11, 12, 13])
    columns = {"answers": answers, "corrupt_answers": answers + 10, "last_position": last}
    return PromptPairs(clean_tokens=clean, corrupt_tokens=corrupt, **columns)


def logit_diffs(module, pairs, edit=None, tokens=None, site="layer_input") -> torch.Tensor:
    """Each row's logit difference, with a torch hook at the site."""
    with torch.no_grad(), edited(module, {} if edit is None else {(site, LAYER): edit}):
        logits = module(pairs.clean_tokens if tokens is None else tokens, use_cache=False).logits
    rows = torch.arange(len(logits))
    logits = logits[rows, pairs.last_position]
    return logits[rows, pairs.answers] - logits[rows, pairs.corrupt_answers]


def effect(module, pairs, edit, site="layer_input") -> torch.Tensor:
    """1 - NLD of each row."""
    clean, corrupt = logit_diffs(module, pairs), logit_diffs(module, pairs, tokens=pairs.corrupt_tokens)
    return 1 - (logit_diffs(module, pairs, edit, site=site) - corrupt) / (clean - corrupt)


def by_feature(result) -> dict[int, tuple[float, float]]:
    return {int(row.feature): (row.effect, row.estimate) for row in result.table.itertuples()}


def test_measured_effects_are_those_of_hooks(model, pairs) -> None:
    site = "layer_input"
    here, there = (values(model._module, ids, site, LAYER) for ids in (pairs.clean_tokens, pairs.corrupt_tokens))
    sae = Dictionary(here.shape[-1])
    result = experiments.feature_effects(model, pairs, sae, site, LAYER, top=4, progress=False)
    assert list(result.table.columns) == ["feature", "effect", "low", "high", "estimate", "n"]
    assert sorted(result.table.feature) == list(range(-1, 7)) and set(result.table.n) == {3}
    assert result.table.estimate.abs().is_monotonic_decreasing
    measured = result.table.dropna()
    assert len(measured) == 5 and -1 in set(measured.feature)
    others = result.table[result.table.effect.isna()]
    assert others.estimate.abs().max() <= measured[measured.feature >= 0].estimate.abs().min()
    with torch.no_grad():
        found, other = sae.encode(here), sae.encode(there)
        for row in measured.itertuples():
            if row.feature == -1:
                new = sae.decode(found) + there - sae.decode(other)
            else:
                new = here + (other - found)[..., row.feature, None] * sae.up[row.feature]
            expected = effect(model._module, pairs, lambda _, new=new: new)
            assert row.effect == pytest.approx(float(expected.mean()), abs=1e-4)
    assert measured.effect.abs().max() > 0.1


@pytest.mark.parametrize("site", ["layer_input", "out_proj", "h"])
def test_estimates_add_up_to_the_effect_of_the_whole_site(model, pairs, site) -> None:
    there = values(model._module, pairs.corrupt_tokens, site, LAYER)
    expected = effect(model._module, pairs, lambda _, t=None: there if t is None else there[:, t], site)
    sae = Dictionary(there.shape[-1])
    result = experiments.feature_effects(model, pairs, sae, site, LAYER, top=0, steps=30, progress=False)
    assert result.table.estimate.sum() == pytest.approx(float(expected.mean()), abs=5e-3)
    assert abs(float(expected.mean())) > 0.05


def test_a_transformer_has_them_too(pairs) -> None:
    """The stream after the last layer is all that the answer is made of: resampled, it acts as the corrupt prompt."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=61, n_positions=16, n_embd=12, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    model = wrap(GPT2LMHeadModel(config).eval(), None, model_id="random")
    result = experiments.feature_effects(model, pairs, Dictionary(12), "resid_post", 1, steps=30, progress=False)
    assert result.table.estimate.sum() == pytest.approx(1, abs=5e-3)
    assert result.table.estimate.abs().max() > 0.1


def test_many_steps_agree_with_what_is_measured_where_features_are_exact(model, pairs) -> None:
    """Each row's prompts differ in a feature of its own, so that nothing else changes along its path."""
    at = torch.tensor([[2], [5], [4]])
    here, there = (
        cache(model, ids, [("layer_input", 0)], positions=at)["layer_input", 0][:, 0]
        for ids in (pairs.clean_tokens, pairs.corrupt_tokens)
    )
    width = here.shape[1]
    basis = torch.randn(width, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    basis[:3] = (there - here).double()
    result = experiments.feature_effects(model, pairs, Linear(basis), "layer_input", 0, steps=30, progress=False)
    found = by_feature(result)
    assert set(result.table.feature[:3]) == {0, 1, 2}
    assert min(abs(found[feature][0]) for feature in range(3)) > 0.01
    for feature, (measured, estimate) in found.items():
        assert estimate == pytest.approx(measured, abs=3e-3)
        assert feature in range(3) or abs(measured) < 1e-4


class Names:
    """The planted circuit's names at `ssm_input`: a feature for each, of its own channel."""

    def __init__(self, model) -> None:
        self.channels, self.width = list(model.planted.name_channels), model.d_inner

    def encode(self, x):
        return x[..., self.channels]

    def decode(self, found):
        whole = found.new_zeros(*found.shape[:-1], self.width)
        whole[..., self.channels] = found
        return whole


@pytest.mark.parametrize("family", RANDOM)
def test_the_names_are_found_in_planted(family) -> None:
    model = planted(n_layers=4, layer=2, n_names=12, seed=5, family=family)
    data = IOIDataset.generate(model.tokenizer, 2)
    names = list(model.planted.name_ids)
    for row in range(2):
        one = data[row]
        (place,) = (one.clean_tokens != one.corrupt_tokens)[0].nonzero()[:, 0].unique().tolist()[:1]
        swapped = {names.index(int(ids[0, place])) for ids in (one.clean_tokens, one.corrupt_tokens)}
        result = experiments.feature_effects(model, one, Names(model), "ssm_input", 2, top=12, progress=False)
        found = by_feature(result)
        assert set(result.table.feature[:2]) == swapped
        for feature, (measured, estimate) in found.items():
            assert (feature in swapped) == (abs(measured) > 0.1), feature
            assert estimate == pytest.approx(measured, abs=0.05)
        assert sum(measured for measured, _ in found.values()) == pytest.approx(1, abs=0.05)


def test_other_metrics_and_the_memory(model, pairs, monkeypatch) -> None:
    sae = Dictionary(cache(model, pairs.clean_tokens, [("y", LAYER)])["y", LAYER].shape[-1])
    arguments = {"top": 3, "progress": False}
    nld = experiments.feature_effects(model, pairs, sae, "y", LAYER, **arguments).table
    difference = experiments.feature_effects(model, pairs, sae, "y", LAYER, metric="logit_diff", **arguments).table
    one = pairs[:1]
    spread = float(logit_diffs(model._module, one)[0] - logit_diffs(model._module, one, tokens=one.corrupt_tokens)[0])
    of_one, lost = (
        experiments.feature_effects(model, one, sae, "y", LAYER, metric=metric, **arguments).table
        for metric in ("nld", "logit_diff")
    )
    for name in ("effect", "estimate"):
        torch.testing.assert_close(
            torch.tensor(of_one[name].to_numpy() * spread),
            torch.tensor(lost[name].to_numpy()),
            equal_nan=True,
            rtol=0,
            atol=2e-4,
        )
    assert not difference.equals(nld)
    monkeypatch.setattr(model, "memory", 1)
    small = experiments.feature_effects(model, pairs, sae, "y", LAYER, **arguments).table
    for name in ("feature", "effect", "estimate"):
        torch.testing.assert_close(
            torch.tensor(small[name].to_numpy()), torch.tensor(nld[name].to_numpy()), equal_nan=True, rtol=0, atol=1e-4
        )


def test_gradients_are_taken_in_any_mode_and_leave_none_behind(model, pairs) -> None:
    sae = Dictionary(model.d_model)
    with torch.inference_mode():
        experiments.feature_effects(model, pairs, sae, "out_proj", LAYER, top=1, steps=1, progress=False)
    assert all(one.grad is None for one in (*model._module.parameters(), *sae.parameters()))
    assert all(one.requires_grad for one in model._module.parameters())


def test_bad_input_is_refused(model, pairs) -> None:
    sae = Dictionary(model.d_model)
    for site, layer in (("A", 1), ("embed", None), ("blocks.1.hook_y.3", None)):
        with pytest.raises(ValueError, match="features are looked at all positions of a layer's site"):
            experiments.feature_effects(model, pairs, sae, site, layer)
    with pytest.raises(ValueError, match="has no encode"):
        experiments.feature_effects(model, pairs, object(), "out_proj", 1)
    with pytest.raises(ValueError, match="estimates are of metrics by name"):
        experiments.feature_effects(model, pairs, sae, "out_proj", 1, metric=lambda logits, pairs: logits[:, 0])
    with pytest.raises(ValueError, match="steps must be a whole number of at least 1, not 0"):
        experiments.feature_effects(model, pairs, sae, "out_proj", 1, steps=0)
