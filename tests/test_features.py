"""Dictionaries of features: spliced into runs, beside torch hooks on the Hugging Face model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mamba_ioi import Patch, Splice, cache, generate, run
from mamba_ioi.models.model import wrap

from .conftest import RANDOM
from .plain import edited

SITES = ("layer_input", "in_proj", "out_proj")
"""Those that a torch hook on a module of the model sees."""
LAYER = 1


class Dictionary(nn.Module):
    """A small autoencoder of random weights: encode is a ReLU of a linear map, decode another linear map."""

    def __init__(self, width: int, features: int = 7, seed: int = 0) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.down = nn.Parameter(torch.randn(width, features, generator=draw) / width**0.5)
        self.up = nn.Parameter(torch.randn(features, width, generator=draw))
        self.bias = nn.Parameter(torch.randn(width, generator=draw) / 5)

    def encode(self, x):
        return torch.relu((x - self.bias) @ self.down)

    def decode(self, found):
        return found @ self.up + self.bias


@pytest.fixture(scope="module", params=RANDOM)
def model(request):
    return wrap(RANDOM[request.param](), None, model_id="random")


@pytest.fixture(params=SITES)
def site(request):
    return request.param


@pytest.fixture
def sae(model, tokens, site):
    return Dictionary(cache(model, tokens, [(site, LAYER)])[site, LAYER].shape[-1])


def by_hand(sae, keep_error, features, value, positions=None):
    """An edit of a module's value, feature by feature, from the dictionary's weights."""

    def edit(x):
        found = ((x - sae.bias) @ sae.down).clamp(min=0)
        new = found.clone()
        for feature in range(found.shape[-1]):
            if features is not None and value is None and feature not in features:
                new[..., feature] = 0.0
            elif features is not None and value is not None and feature in features:
                new[..., feature] = value if isinstance(value, float) else value[..., features.index(feature)]
        made = new @ sae.up + sae.bias + (x - found @ sae.up - sae.bias if keep_error else 0)
        if positions is None:
            return made
        whole = x.clone()
        whole[:, positions] = made[:, positions]
        return whole

    return edit


FORMS = {
    "as it is": (None, None),
    "one to a number": ([2], 1.5),
    "several to a tensor": ([5, 0], torch.tensor([0.5, -2.0])),
    "each row's own": ([1, 3], torch.arange(8.0).reshape(4, 1, 2)),
    "some alone": ([1, 4], None),
    "none": ([], None),
}


@pytest.mark.parametrize("keep_error", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_edit_by_hand(model, tokens, site, sae, form, keep_error) -> None:
    features, value = FORMS[form]
    splice = Splice(sae, keep_error, features, value)
    with torch.no_grad(), edited(model._module, {(site, LAYER): by_hand(sae, keep_error, features, value)}):
        expected = model._module(tokens, use_cache=False).logits
    found = run(model, tokens, [Patch(site, LAYER, splice)], positions="all")
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    changed = (found - run(model, tokens, positions="all")).abs().max()
    assert (changed < 1e-5) if (form == "as it is" and keep_error) else (changed > 1e-2)


def test_a_splice_that_keeps_its_error_changes_nothing(model, tokens, site, sae) -> None:
    sites = [("resid_post", layer) for layer in range(3)]
    plain, found = (cache(model, tokens, sites, patches=patches) for patches in ([], [Patch(site, LAYER, Splice(sae))]))
    for key in plain:
        torch.testing.assert_close(found[key], plain[key], rtol=0, atol=1e-5)


def test_a_splice_at_some_positions(model, tokens, site, sae) -> None:
    edit = by_hand(sae, True, [2], 3.0, [1, 5])
    with torch.no_grad(), edited(model._module, {(site, LAYER): edit}):
        expected = model._module(tokens, use_cache=False).logits
    splice = Splice(sae, features=2, value=3.0)
    found = run(model, tokens, [Patch(site, LAYER, splice, [1, 5])], positions="all")
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    own = Patch(site, LAYER, splice, torch.tensor([[1, 5], [5, 1], [1, 5], [1, 5]]))
    torch.testing.assert_close(run(model, tokens, [own], positions="all"), expected, rtol=0, atol=2e-5)


def test_what_cache_reads_after_a_splice(model, tokens, site, sae) -> None:
    before = cache(model, tokens, [(site, LAYER)])[site, LAYER]
    after = cache(model, tokens, [(site, LAYER)], patches=[Patch(site, LAYER, Splice(sae, False, [0, 6]))])
    with torch.no_grad():
        torch.testing.assert_close(after[site, LAYER], by_hand(sae, False, [0, 6], None)(before), rtol=0, atol=1e-5)


def test_generation(model, tokens, site, sae) -> None:
    """The prompt's edit lasts, and that of new tokens acts where each is read, as if the text were run anew."""
    patch, other = Patch(site, LAYER, Splice(sae, features=[2], value=4.0)), Patch(site, LAYER, Splice(sae, False))
    first, ids = tokens.shape[1], tokens
    with torch.no_grad():
        for _ in range(4):
            new = list(range(first, ids.shape[1]))

            def edit(x, new=new):
                x = by_hand(sae, True, [2], 4.0, list(range(first)))(x)
                return by_hand(sae, False, None, None, new)(x)

            with edited(model._module, {(site, LAYER): edit}):
                logits = model._module(ids, use_cache=False).logits[:, -1]
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(generate(model, tokens, 4, patches=[patch], new_patches=[other]), ids)
    assert not torch.equal(generate(model, tokens, 4), ids)


def test_states_are_encoded_as_they_have_become(model, tokens) -> None:
    width = cache(model, tokens, [("h", LAYER)])["h", LAYER].shape[-1]
    sae = Dictionary(width, seed=3)
    edit = by_hand(sae, True, [1], 2.0)
    with torch.no_grad(), edited(model._module, {("h", LAYER): lambda h, t: edit(h)}):
        expected = model._module(tokens, use_cache=False).logits
    found = run(model, tokens, [Patch("h", LAYER, Splice(sae, features=[1], value=2.0))], positions="all")
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_a_dictionary_in_its_own_precision(model, tokens, site, sae) -> None:
    splice = Splice(sae.double(), features=[2], value=1.0)
    seen = []
    encode = sae.encode
    sae.encode = lambda x: seen.append(x.dtype) or encode(x)
    logits = run(model, tokens, [Patch(site, LAYER, splice)])
    assert seen == [torch.float64] and logits.dtype == torch.float32


def test_bad_input_is_refused(model, tokens, site, sae) -> None:
    with pytest.raises(ValueError, match="a splice needs encode and decode, and int has no encode"):
        Splice(3)
    with pytest.raises(ValueError, match=r"value=1\.0 without features"):
        Splice(sae, value=1.0)
    for features in ([-1], [2, 2]):
        with pytest.raises(ValueError, match="counted from 0, and each is named once"):
            Splice(sae, features=features)
    with pytest.raises(ValueError, match="features are integers"):
        Splice(sae, features=[0.5])
    with pytest.raises(ValueError, match="a feature's value is a number or a tensor, not 'high'"):
        Splice(sae, features=[1], value="high")
    with pytest.raises(ValueError, match="the dictionary has 7 features, 0 to 6, not 7"):
        run(model, tokens, [Patch(site, LAYER, Splice(sae, features=[7]))])
    with pytest.raises(ValueError, match=r"a value of shape \(3,\) does not fit the features there, \(4, 9, 2\)"):
        run(model, tokens, [Patch(site, LAYER, Splice(sae, features=[1, 2], value=torch.ones(3)))])
