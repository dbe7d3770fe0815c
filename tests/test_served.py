"""Names that an envoy does not serve: nothing is assigned to them, in a trace or outside, and a sentence says why."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from mamba_ioi import load_model
from mamba_ioi.interventions.patch import Patch
from mamba_ioi.interventions.run import cache, run
from mamba_ioi.models.model import MambaModel, wrap
from mamba_ioi.trace.sites import SITES, owner

from .conftest import random_mamba

X = torch.zeros(1)
LAYER = "model.backbone.layers[1]"
SENTENCES = {
    ("layers.1.mixer", "ssm_inputs"): f"is {LAYER}.mixer.ssm_input meant",
    ("layers.1.mixer", "in_proj"): f"a module: .* the site 'in_proj' is {LAYER}.in_proj$",
    ("layers.1.mixer", "out_proj"): f"a module: .* the site 'out_proj' is {LAYER}.out_proj$",
    ("layers.1.mixer", "resid_pre"): f"that is {LAYER}.resid_pre",
    ("layers.1.mixer", "logits"): "that is model.logits",
    ("layers.1.mixer", "hook_h"): f"that is {LAYER}.mixer.h$",
    ("layers.1.mixer", "h_3"): "can be assigned to are gate, .* h_start, h, y, ",
    ("layers.1.mixer", "scan"): "is a method",
    ("layers.1.mixer", "A_log"): "is the module's own",
    ("layers.1.mixer", "D"): "is the module's own",
    ("layers.1.mixer", "conv1d"): f"is a module: assign to {LAYER}.mixer.conv1d.output",
    ("layers.1.mixer.conv1d", "outputs"): "conv1d.output meant",
    ("layers.1.mixer.conv1d", "conv"): f"that is {LAYER}.mixer.conv$",
    ("layers.1.mixer.dt_proj", "outputs"): "dt_proj.output meant",
    ("layers.1.mixer.x_proj", "outputs"): "x_proj.output meant",
    ("layers.1.mixer.in_proj", "weight"): "is the module's own",
    ("layers.1.norm", "outputs"): "norm.output meant",
    ("layers.1", "ssm_input"): f"that is {LAYER}.mixer.ssm_input$",
    ("layers.1", "ssm_inputs"): f"is {LAYER}.mixer.ssm_input meant",
    ("layers.1", "skip"): f"is a method.* the site 'skip' is {LAYER}.mixer.skip$",
    ("layers.1", "mixer"): f"is a module: assign to {LAYER}.mixer.output",
    ("layers.1", "norm"): "is a module: .* the site 'norm' is model.norm$",
    ("layers.1", "resid"): f"is {LAYER}.resid_p.* meant",
    ("layers", "foo"): "can be assigned to are output, input, inputs$",
    ("", "ssm_input"): r"that is model.backbone.layers\[i\].mixer.ssm_input",
    ("", "logit"): "is model.logits meant",
    ("", "memroy"): "is model.memory meant",
    ("", "n_layers"): "is read only",
    ("", "trace"): "is a method",
    ("", "lm_head"): "is a module: assign to model.lm_head.output",
}


def envoy(model: MambaModel, path: str):
    return model.get(path) if path else model


def matching(sentence: str) -> str:
    return sentence.replace("layers[1]", r"layers\[1\]")


@pytest.mark.parametrize(("path", "name"), SENTENCES)
def test_a_name_that_is_no_site(small: MambaModel, tokens: torch.Tensor, path: str, name: str) -> None:
    before = run(small, tokens)
    with pytest.raises(ValueError, match=matching(SENTENCES[path, name])):
        setattr(envoy(small, path), name, X)
    with pytest.raises(ValueError, match=matching(SENTENCES[path, name])), small.trace(tokens):
        setattr(envoy(small, path), name, X)
    assert torch.equal(run(small, tokens), before)


@pytest.mark.parametrize("site", SITES)
def test_each_site_has_one_owner(small: MambaModel, site: str) -> None:
    """Elsewhere the site is refused, and the sentence spells where it is."""
    attribute = SITES[site].attribute
    owners = {"model": small, "layer": small.layers[1], "mixer": small.layers[1].mixer}
    own = owners.pop(SITES[site].owner)
    for other in owners.values():
        with pytest.raises(ValueError, match=rf"[\w\]]\.{attribute}$") as error:
            setattr(other, attribute, X)
        spelled = str(error.value).rsplit(" ", 1)[-1].replace("[i]", "[1]")
        assert eval(spelled.rpartition(".")[0], {"model": small}) is own


def test_reading_another_owners_site(small: MambaModel) -> None:
    with pytest.raises(AttributeError, match=matching(f"that is {LAYER}.mixer.ssm_input")):
        _ = small.layers[1].ssm_input
    with pytest.raises(AttributeError, match=r"has 3 modules, and no \[7\]"):
        _ = small.layers[7]
    assert not hasattr(small.layers[1].mixer, "ssm_inputs")


def test_skip_of_a_mixer_is_the_gate(small: MambaModel, tokens: torch.Tensor) -> None:
    value = torch.randn(4, 9, 24)
    with torch.no_grad(), small.trace(tokens):
        small.layers[1].mixer.skip = value
        logits = small.logits.save()
    expected = run(small, tokens, [Patch("skip", 1, value)])
    assert torch.allclose(logits[:, -1], expected, atol=1e-5)
    assert not torch.allclose(expected, run(small, tokens), atol=1e-2)
    mixer = small.layers[1].mixer
    for attempt in (lambda: mixer.skip[:, 2], lambda: mixer.skip.clone(), lambda: mixer.skip.__setitem__(0, 1.0)):
        with pytest.raises(ValueError, match=r"nnsight's method.*\.mixer\.gate$"):
            attempt()


def test_skip_of_a_mixer_is_still_a_method(small: MambaModel, tokens: torch.Tensor) -> None:
    with torch.no_grad(), small.trace(tokens):
        before = small.layers[1].resid_pre.save()
        small.layers[1].mixer.skip(before * 0)
        after = small.layers[1].resid_post.save()
    assert torch.equal(before, after)


def test_what_nnsight_serves_can_still_be_assigned_to(tokens: torch.Tensor) -> None:
    model = wrap(random_mamba(), None, model_id="random")
    plain = run(model, tokens)
    value = cache(model, tokens, [("out_proj", 1)])["out_proj", 1]
    with torch.no_grad(), model.trace(tokens):
        model.layers[1].mixer.output = value * 2
        model.layers[2].norm.input = model.layers[2].norm.input * 1
        logits = model.logits.save()
    expected = run(model, tokens, [Patch("out_proj", 1, value * 2)])
    assert torch.allclose(logits[:, -1], expected, atol=1e-5) and not torch.allclose(plain, expected, atol=1e-3)

    model.layers[1].adapter = torch.nn.Linear(12, 12)
    assert model.layers[1].adapter.path.endswith("layers.1.adapter")
    model.memory, model.tokenizer = 10**9, None
    model.trace = model.trace  # a callable in place of a method, as those who count calls do
    del model.trace
    with model.edit() as (_, edited):
        edited.layers[1].mixer.output = value * 2
    with torch.no_grad(), edited.trace(tokens):
        assert torch.allclose(edited.logits[:, -1], expected, atol=1e-5)
    with torch.no_grad():
        model.layers[1].mixer.out_proj.weight *= 2
    assert torch.allclose(run(model, tokens), expected, atol=1e-5)
    with pytest.raises(ValueError, match="has no 'logit'"):
        edited.logit = X
    with pytest.raises(ValueError, match="has no 'logit'"):
        copy.deepcopy(model.layers[1]).logit = X


def test_planted_is_as_it_was_planted() -> None:
    model = load_model("planted")
    with pytest.raises(AttributeError):
        model.planted.layer = 0
    assert not hasattr(load_model("tiny"), "planted")


def test_a_model_that_is_no_mamba() -> None:
    module = GPT2LMHeadModel(GPT2Config(vocab_size=31, n_embd=8, n_layer=2, n_head=2, n_positions=16)).eval()
    model = wrap(module, None, model_id="gpt2")
    with pytest.raises(ValueError, match="output meant"):
        model.transformer.h[1].attn.outputs = X
    with pytest.raises(ValueError, match="memory meant"):
        model.memroy = 1
    ids = torch.arange(6)[None]
    with torch.no_grad(), model.trace(ids):
        model.transformer.h[1].output = model.transformer.h[0].output
        logits = model.lm_head.output.save()
    with torch.no_grad():
        module.transformer.h = module.transformer.h[:1]
        module.config.n_layer = 1
        assert torch.allclose(logits, module(ids).logits, atol=1e-5)


def test_patches_and_caches_name_the_nearest_site(small: MambaModel, tokens: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="unknown site 'ssm_inputs'; is 'ssm_input' meant"):
        run(small, tokens, [Patch("ssm_inputs", 1, 0.0)])
    with pytest.raises(ValueError, match="is 'delta_2' meant"):
        cache(small, tokens, ["blocks.1.hook_delta2"])
    assert owner(small, SITES["skip"], 1) is small.layers[1].mixer


def test_a_note_of_one_s_own_on_the_model(tokens: torch.Tensor) -> None:
    """Like no name of ours, it is kept; on a layer it is refused."""
    model = wrap(random_mamba(), None, model_id="random")
    model.checkpoint_step = 7
    assert model.checkpoint_step == 7
    for name in ("memroy", "ssm_input", "logit", "hook_embed"):
        with pytest.raises(ValueError, match=f"has no '{name}'"):
            setattr(model, name, X)
    with pytest.raises(ValueError, match="has no 'checkpoint_step'"):
        model.layers[1].checkpoint_step = 7
