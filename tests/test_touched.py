"""Models that carry edits or hooks: their values are right, or they are refused, and without them all is as before."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.utils import prune

from mamba_ioi import Patch, cache, circuits, run
from mamba_ioi.experiments import (
    conv_slices,
    cross_talk,
    greedy_layer_removal,
    layer_removal,
    name_steering,
    resample_ablation,
    state_similarity,
)
from mamba_ioi.interventions.attribution import attributed_effects
from mamba_ioi.interventions.readout import Readout
from mamba_ioi.interventions.sweep import sweep
from mamba_ioi.models.model import CausalLM, MambaModel, load_model, wrap
from mamba_ioi.tasks.ioi import IOIDataset
from mamba_ioi.trace.touched import hooks

from . import plain
from .conftest import random_mamba
from .plain import forward_by_hand
from .test_any_model import CONFIGS, TOKENIZER, untouched


@pytest.fixture
def model() -> MambaModel:
    return load_model("tiny")


@pytest.fixture(scope="module")
def data() -> IOIDataset:
    return IOIDataset.generate(load_model("tiny").tokenizer, 3, seed=3)


def zero_first(_, args, output: Tensor) -> Tensor:
    """A hook that zeroes position 0."""
    output = output.clone()
    output[:, 0] = 0
    return output


@contextmanager
def hooked(
    model: CausalLM, path: str = "backbone.layers.0", hook: Callable = zero_first, kind: str = "forward"
) -> Iterator:
    """While open, the module carries the hook."""
    handle = getattr(model._module.get_submodule(path), f"register_{kind}_hook")(hook)
    try:
        yield
    finally:
        handle.remove()


def edited(model: MambaModel) -> MambaModel:
    """The model with position 0 zeroed after layer 0."""
    with model.edit() as (_, other):
        other.layers[0].resid_post[:, 0] = 0
    return other


def logits_of(model: CausalLM, tokens: Tensor) -> Tensor:
    """What transformers gives, hooks and all."""
    with torch.no_grad():
        return model._module(tokens, use_cache=False).logits


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


ANY = {
    "layer_removal": lambda model, data: layer_removal(model, data, progress=False),
    "greedy_layer_removal": lambda model, data: greedy_layer_removal(model, data, progress=False),
    "eap": lambda model, data: circuits.eap(model, data, steps=1),
    "exact_effects": lambda model, data: circuits.exact_effects(model, data),
    "acdc": lambda model, data: circuits.acdc(model, data, fine=False),
    "evaluate": lambda model, data: circuits.evaluate(model, data, circuits.Circuit.of(model, [("embed", "output")])),
}
MAMBAS = ANY | {
    "resample_ablation": lambda model, data: resample_ablation(model, data, progress=False),
    "estimated": lambda model, data: attributed_effects(
        model, data.clean_tokens, Readout.of(data), "h", [1], source=data.corrupt_tokens
    ),
    "conv_slices": lambda model, data: conv_slices(model, data, 1, progress=False),
    "cross_talk": lambda model, data: cross_talk(model, data, progress=False),
    "name_steering": lambda model, data: name_steering(model, 1, n_pairs=60, n_test=2, progress=False),
    "sweep": lambda model, data: sweep(model, data.clean_tokens, [[Patch("h", 1, 0.0, [3])]], Readout.of(data)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MAMBAS)
def test_what_cuts_or_rearranges_runs_refuses(name: str, model: MambaModel, data: IOIDataset) -> None:
    with (
        hooked(model),
        pytest.raises(ValueError, match=r"a forward hook on backbone.layers.0 would act at other") as error,
    ):
        MAMBAS[name](model, data)
    assert "\n" not in str(error.value)
    other = edited(model)
    with pytest.raises(ValueError, match=r"the edits of tiny would act at other positions or rows: .*clear_edits"):
        MAMBAS[name](other, data)
    other.clear_edits()
    assert MAMBAS[name](other, data) is not None
    assert MAMBAS[name](model, data) is not None


@pytest.mark.parametrize("name", ANY)
@pytest.mark.parametrize("kind", ["granite", "gptj"])
def test_other_models(name: str, kind: str) -> None:
    model = wrap(untouched(CONFIGS[kind]()), TOKENIZER, model_id=kind)
    data = IOIDataset.generate(TOKENIZER, 2, seed=1)
    hook = hooked(model, model.anatomy.blocks + ".1", lambda _, args: (args[0] * 2, *args[1:]), "forward_pre")
    with hook, pytest.raises(ValueError, match=r"a forward pre-hook on .*\.1 would act"):
        ANY[name](model, data)
    assert ANY[name](model, data) is not None


@pytest.mark.parametrize("position", [0, 1, 4, 9])
def test_a_resampled_value_in_a_hooked_run(position: int, model: MambaModel, data: IOIDataset) -> None:
    """With position 0 zeroed after layer 0; what a sweep would have run from the position on."""
    with hooked(model):
        value = cache(model, data.corrupt_tokens, [("in_proj", 1)])["in_proj", 1][:, [position]]
        found = run(model, data.clean_tokens, [Patch("in_proj", 1, value, [position])])
        close(found, plain.resampled(model._module, data, "in_proj", 1, position))


@pytest.mark.parametrize(
    "path", ["backbone.embeddings", "backbone.layers.0", "backbone.layers.2.mixer", "backbone.layers.3.mixer.in_proj",
             "backbone.layers.1.norm", "backbone.norm_f", "backbone", "lm_head"]
)  # fmt: skip
def test_run_is_that_of_the_hooked_model(path: str, model: MambaModel, data: IOIDataset) -> None:
    ids = data.clean_tokens

    def hook(module, args, output):
        if isinstance(output, Tensor):
            return zero_first(module, args, output)
        output.last_hidden_state = zero_first(module, args, output.last_hidden_state)
        return output

    plain_logits = logits_of(model, ids)
    with hooked(model, path, hook):
        expected = logits_of(model, ids)
        close(run(model, ids, positions="all"), expected)
        close(run(model, ids), expected[:, -1])
        close(run(model, ids, positions=torch.zeros(len(ids), dtype=torch.long)), expected[:, 0])
        below = cache(model, ids, ["h", ("resid_pre", 5)])
        patched = run(model, ids, [Patch("h", 4, below["h", 4])])
        close(patched, expected[:, -1])
    assert (expected - plain_logits).abs().max() > 1e-2
    close(run(model, ids, positions="all"), plain_logits)


def test_cache_is_that_of_the_hooked_model(model: MambaModel, data: IOIDataset) -> None:
    ids, seen = data.clean_tokens, {}
    for name, module in model._module.backbone.layers.named_children():
        module.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0].clone()))
    with hooked(model):
        logits_of(model, ids)
        found = cache(model, ids, ["resid_pre"])
        for layer in range(model.n_layers):
            expected = seen[str(layer)].clone()
            close(found["resid_pre", layer], expected)
        assert (found["resid_pre", 1][:, 0] == 0).all()
        assert state_similarity(model, data.clean_text[0], 1, progress=False).table is not None


@pytest.mark.parametrize(
    ("path", "site"),
    [
        ("", "resid_post"),
        (".mixer", "out_proj"),
        (".mixer.out_proj", "out_proj"),
        (".mixer.in_proj", "skip"),
        (".mixer.x_proj", "B"),
        (".norm", "normalized_input"),
    ],
)
def test_a_site_that_the_hook_changes_afterwards(path: str, site: str, model: MambaModel, data: IOIDataset) -> None:
    """nnsight serves what a module gives before the module's own hooks see it."""
    ids, path = data.clean_tokens, f"backbone.layers.0{path}"
    with hooked(model, path):
        for use in (lambda: cache(model, ids, [(site, 0)]), lambda: run(model, ids, [Patch(site, 0, 0.0)])):
            with pytest.raises(ValueError, match=f"a forward hook on {path} changes the site '{site}' after it can be"):
                use()
        assert cache(model, ids, [(site, 1)])[site, 1].isfinite().all()
    assert cache(model, ids, [(site, 0)])[site, 0].isfinite().all()


def test_a_hook_on_the_model_itself(model: MambaModel, data: IOIDataset) -> None:
    def double(_, args, output):
        output.logits = 2 * output.logits
        return output

    with hooked(model, "", double):
        with pytest.raises(
            ValueError, match="a forward hook on the model changes the site 'logits' after it can be read"
        ):
            run(model, data.clean_tokens)
        with pytest.raises(ValueError, match="changes the site 'logits'"):
            cache(model, data.clean_tokens, ["logits"])
        cache(model, data.clean_tokens, [("h", 1)])


def test_edits(model: MambaModel, data: IOIDataset) -> None:
    ids = data.clean_tokens
    with hooked(model):
        expected = logits_of(model, ids)
    other = edited(model)
    for one in (run(other, ids, positions="all"), cache(other, ids, ["logits"])["logits"]):
        close(one, expected)
    close(run(other, ids), expected[:, -1])
    assert (cache(other, ids, [("resid_post", 0)])["resid_post", 0][:, 0] == 0).all()
    with hooked(model):
        close(run(other, ids, [Patch("in_proj", 2, 0.3, [4])]), run(model, ids, [Patch("in_proj", 2, 0.3, [4])]))
    close(run(model, ids, positions="all"), logits_of(model, ids))


def test_edits_inside_the_scan(model: MambaModel, data: IOIDataset) -> None:
    """They hold whether or not the run looks into the scan as well."""
    ids = data.clean_tokens
    with model.edit() as (_, other):
        other.layers[1].mixer.h[:, 4] = 0
    close(run(other, ids), run(model, ids, [Patch("h", 1, 0.0, [4])]))
    assert (run(other, ids) - run(model, ids)).abs().max() > 1e-3
    patch, conv = Patch("h", 1, 0.0, [4]), Patch("conv", 1, 0.3, [6])
    close(cache(other, ids, [("h", 1)])["h", 1], cache(model, ids, [("h", 1)], patches=[patch])["h", 1])
    close(run(other, ids, [conv]), run(model, ids, [patch, conv]))


def test_an_edit_after_the_last_site_and_one_of_the_output(model: MambaModel, data: IOIDataset) -> None:
    ids = data.clean_tokens
    with model.edit() as (_, other):
        other.layers[3].mixer.in_proj.output[:, 0] = 0
        other.output.logits[:, -1] = 3.0
    found = cache(other, ids, [("resid_post", 0)])["resid_post", 0]
    close(found, cache(model, ids, [("resid_post", 0)])["resid_post", 0])
    assert (run(other, ids) == 3).all()


def test_edits_in_place(model: MambaModel, data: IOIDataset) -> None:
    with model.edit(inplace=True):
        model.layers[0].resid_post[:, 0] = 0
    with pytest.raises(ValueError, match="clear_edits"):
        layer_removal(model, data, progress=False)
    model.clear_edits()
    scores = plain.scores(logits_of(model, data.clean_tokens)[:, -1], data)
    row = layer_removal(model, data, progress=False).table.iloc[0]
    assert (row["accuracy"], row["probability"]) == pytest.approx(scores, abs=1e-5)


def test_which_hooks_count(model: MambaModel, data: IOIDataset) -> None:
    assert list(hooks(model)) == []
    logits_of(model, data.clean_tokens)
    model._module(data.clean_tokens, output_hidden_states=True)
    prune.l1_unstructured(model._module.backbone.layers[0].mixer.in_proj, "weight", 0.1)
    assert list(hooks(model, backward=True)) == [], "those that record or compute weights do not"
    with hooked(model, "backbone.layers.1.mixer", partial(zero_first)):
        assert list(hooks(model)) == [("a forward hook", "backbone.layers.1.mixer")]
    with hooked(model, "lm_head", lambda *_: None, "full_backward"):
        assert list(hooks(model)) == []
        assert list(hooks(model, backward=True)) == [("a backward hook", "lm_head")]
        with pytest.raises(ValueError, match="a backward hook on lm_head would act"):
            circuits.eap(model, data, steps=1)
        layer_removal(model, data, progress=False)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert list(hooks(model)) == [("a forward hook", "every module")]
        with pytest.raises(ValueError, match="a forward hook on every module"):
            run(model, data.clean_tokens)
    finally:
        handle.remove()
    run(model, data.clean_tokens)


def test_a_model_that_was_hooked_when_it_was_wrapped() -> None:
    """Its stream is looked at as soon as the hook is gone."""
    module = random_mamba(seed=1, vocab_size=len(TOKENIZER))
    handle = module.backbone.norm_f.register_forward_hook(zero_first)
    model = wrap(module, TOKENIZER, model_id="hooked")
    data = IOIDataset.generate(TOKENIZER, 2, seed=1)
    with pytest.raises(ValueError, match=r"a forward hook on backbone\.norm_f"):
        layer_removal(model, data, progress=False)
    handle.remove()
    row = layer_removal(model, data, progress=False).table.iloc[0]
    logits = plain.last_logits(module, data.clean_tokens, data.last_position)
    assert (row["accuracy"], row["probability"]) == pytest.approx(plain.scores(logits, data), abs=1e-5)


@pytest.mark.parametrize(
    "read", [(), ("conv",), ("delta",), ("h",), ("y",), ("conv", "ssm_input", "A_bar", "after_skip")]
)
def test_an_edit_inside_an_operation_that_a_trace_looks_into(small, tokens, read):
    """The edit and the trace are two workers at one operation; by hand, one forward with both changes."""

    def zero(h, t):
        return h * 0 if t == 4 else h

    def plus(delta):
        delta = delta.clone()
        delta[:, 6] += 0.5
        return delta

    with small.edit() as (_, edited):
        small.layers[1].mixer.h[:, 4] = 0
    exact = copy.deepcopy(small._module).double()
    with torch.no_grad(), edited.trace(tokens):
        for name in read:
            getattr(edited.layers[1].mixer, name)
        logits = edited.logits.save()
    expected = forward_by_hand(exact, tokens, {("h", 1): zero})["hook_logits"]
    torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=2e-5)
    with torch.no_grad(), edited.trace(tokens):
        edited.layers[1].mixer.delta[:, 6] += 0.5
        h = edited.layers[1].mixer.h.save()
        logits = edited.logits.save()
    expected = forward_by_hand(exact, tokens, {("h", 1): zero, ("delta", 1): plus})
    torch.testing.assert_close(h.double(), expected["blocks.1.hook_h"], rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(logits.double(), expected["hook_logits"], rtol=1e-4, atol=2e-5)


def test_an_edit_in_runs_of_several_lengths(small):
    """The edit's worker runs again in every trace and step, and tells nothing of the one before."""
    with small.edit() as (_, edited):
        small.layers[1].mixer.ssm_input[:, -1] = 0.5
    exact = copy.deepcopy(small._module).double()

    def last(value):
        value = value.clone()
        value[:, -1] = 0.5
        return value

    for length in (9, 2, 1, 6):
        ids = torch.randint(0, 61, (2, length), generator=torch.Generator().manual_seed(length))
        for use_cache in (False, True):
            with torch.no_grad(), edited.trace(ids, use_cache=use_cache):
                logits = edited.output.logits.save()
            expected = forward_by_hand(exact, ids, {("ssm_input", 1): last})["hook_logits"]
            torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=2e-5)
