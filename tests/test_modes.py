"""Edits that torch's version counter does not see, torch's ambient modes, and gradients asked for after reading."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch

from mamba_ioi import Patch, cache, circuits, experiments, run
from mamba_ioi.models.model import load_model, wrap
from mamba_ioi.tasks.ioi import IOIDataset
from mamba_ioi.trace.sites import SITES, owner

from .conftest import random_mamba
from .plain import forward_by_hand

LAYER = 1


@pytest.fixture(scope="module")
def exact(small):
    """The weights of `small` in float64, for what is computed by hand."""
    return copy.deepcopy(small._module).double()


def place(model, name):
    return owner(model, SITES[name], None if SITES[name].owner == "model" else LAYER)


def through_data(value):
    value.data[:, 2] = 0.5


def through_numpy(value):
    value.detach().numpy()[:, 2] = 0.5


def through_a_view(value):
    value[:, 2].data.fill_(0.5)


def through_new_data(value):
    other = value.detach().clone()
    other[:, 2] = 0.5
    value.data = other


def through_dlpack(value):
    torch.from_dlpack(value.detach())[:, 2] = 0.5


def through_storage(value):
    flat = torch.empty(0, dtype=value.dtype).set_(
        value.untyped_storage(), value.storage_offset(), value.shape, value.stride()
    )
    flat.copy_(torch.where(torch.arange(value.shape[1]).view(1, -1, *[1] * (value.dim() - 2)) == 2, 0.5, value))


UNSEEN = [through_data, through_numpy, through_a_view, through_new_data, through_dlpack, through_storage]


@pytest.mark.parametrize(
    ("edit", "mode"),
    [(edit, torch.no_grad) for edit in UNSEEN]
    + [(edit, torch.inference_mode) for edit in UNSEEN[:2]]
    + [(through_data, contextlib.nullcontext)],
)
@pytest.mark.parametrize("name", [name for name, site in SITES.items() if site.by_position])
def test_edits_that_no_counter_sees(small, exact, tokens, name, edit, mode):
    def put(value, t=None):
        if t is not None:
            return torch.full_like(value, 0.5) if t == 2 else value
        value = value.clone()
        value[:, 2] = 0.5
        return value

    envoy, attribute = place(small, name), SITES[name].attribute
    with mode(), small.trace(tokens):
        value = getattr(envoy, attribute)
        edit(value)
        logits = small.logits.save()
    layer = None if SITES[name].owner == "model" else LAYER
    expected = forward_by_hand(exact, tokens, {(name, layer): put})["hook_logits"]
    torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=2e-5)


def test_a_value_given_another_shape_is_refused(small, tokens):
    for name in ("delta", "ssm_input"):
        with pytest.raises(ValueError, match="shape"), torch.no_grad(), small.trace(tokens):
            getattr(place(small, name), name).data = torch.zeros(2, 2)
            small.logits.save()


def test_what_was_read_may_be_used_up_afterwards(small, tokens):
    """A copy that was edited goes to the model as it was when the trace moved on."""
    with torch.no_grad(), small.trace(tokens):
        value = small.layers[LAYER].resid_pre
        value[:, 2] = 0.5
        small.layers[LAYER].mixer.ssm_input.clone()
        value.zero_()
        logits = small.logits.save()
    with torch.no_grad(), small.trace(tokens):
        small.layers[LAYER].resid_pre[:, 2] = 0.5
        expected = small.logits.save()
    assert torch.equal(logits, expected)


@contextlib.contextmanager
def default_float64():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def gradients_off():
    torch.set_grad_enabled(False)
    try:
        yield
    finally:
        torch.set_grad_enabled(True)


def results(model, data) -> dict[str, torch.Tensor]:
    """Some of everything: runs, caches, sweeps, attribution, removal, edges."""

    def column(result, name):
        return torch.tensor(result.table[name].to_numpy())

    ablation, few = experiments.resample_ablation, circuits.Circuit.of(model, [("embed", "0"), ("0", "output")])
    return {
        "run": run(model, data.clean_tokens, [Patch("h", 1, 0.1, [3]), Patch("ssm_input", 2, 0.5, [4])]),
        "cache": cache(model, data.clean_tokens, [("h", 1)])["h", 1],
        "layer_input": column(ablation(model, data, layers=[0, 1]), "effect"),
        "h": column(ablation(model, data, site="h", layers=[1]), "effect"),
        "delta": column(ablation(model, data, site="delta", layers=[1]), "effect"),
        "attribution": column(ablation(model, data, layers=[0, 1], estimate="attribution"), "effect"),
        "removal": column(experiments.layer_removal(model, data), "probability"),
        "conv": column(experiments.conv_slices(model, data, layer=1), "effect"),
        "similarity": column(experiments.state_similarity(model, data.clean_text[:1], 1), "similarity"),
        "eap": column(circuits.eap(model, data, fine=True), "score"),
        "effects": torch.tensor(circuits.evaluate(model, data, few).nld),
    }


@pytest.fixture(scope="module")
def tiny_results():
    tiny = load_model("tiny")
    data = IOIDataset.generate(tiny.tokenizer, 2, seed=3)
    return tiny, data, results(tiny, data)


MODES = {
    "inference": (torch.inference_mode, 1e-6),
    "no_grad": (torch.no_grad, 1e-6),
    "gradients off": (gradients_off, 1e-6),
    "default float64": (default_float64, 1e-6),
    "autocast": (lambda: torch.autocast("cpu", dtype=torch.bfloat16), 0.15),  # the model's products are in bfloat16
}


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_ambient_modes(tiny_results, mode):
    tiny, data, expected = tiny_results
    context, tolerance = MODES[mode]
    with context():
        found = results(tiny, data)
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value.double(), rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("name", SITES)
def test_writing_its_own_value_under_autocast(small, tokens, name):
    """Against the untouched model under autocast; bfloat16 has 8 bits."""
    envoy, attribute = place(small, name), SITES[name].attribute
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = small._module(tokens, use_cache=False).logits
        with small.trace(tokens):
            setattr(envoy, attribute, getattr(envoy, attribute).clone())
            logits = small.logits.save()
    assert (logits - expected).abs().max() < 0.03 * expected.abs().max()


def test_a_float_keeps_its_precision_in_a_float64_model(tokens):
    model = wrap(random_mamba(dtype=torch.float64), None, model_id="double")
    value = torch.full((), 0.1, dtype=torch.float64)
    for site in ("h", "ssm_input", "out_proj"):
        given = run(model, tokens, [Patch(site, 1, 0.1, [2])])
        assert torch.equal(given, run(model, tokens, [Patch(site, 1, value, [2])]))


@pytest.mark.parametrize("before", [(), ("delta", "A_bar", "h"), ("h", "y", "ssm_output")])
@pytest.mark.parametrize("name", SITES)
def test_gradients_of_a_frozen_model_are_total(exact, tokens, name, before):
    """A value that asks for gradients after it was read, whatever else was read; by hand: of a zero added there."""
    model = wrap(copy.deepcopy(random_mamba()), None, model_id="frozen")
    model._module.requires_grad_(False)
    envoy, attribute = place(model, name), SITES[name].attribute
    read = [one for one in before if one != name] if SITES[name].owner == "mixer" else []
    with model.trace(tokens):
        if name in ("skip", "conv_slice", "conv", "ssm_input", "delta_1", "B", "C"):
            leaf = getattr(envoy, attribute).requires_grad_()
            [getattr(place(model, one), one) for one in read]
        else:
            [getattr(place(model, one), one) for one in read]
            leaf = getattr(envoy, attribute).requires_grad_()
        leaf = leaf.save()
        logits = model.logits.save()
    logits.square().sum().backward()
    layer = None if SITES[name].owner == "model" else LAYER
    probe = torch.zeros(leaf.shape, dtype=torch.float64, requires_grad=True)
    edit = (lambda h, t: h + probe[:, t]) if name == "h" else (lambda value: value + probe)
    hand = copy.deepcopy(exact).requires_grad_(False)
    forward_by_hand(hand, tokens, {(name, layer): edit})["hook_logits"].square().sum().backward()
    torch.testing.assert_close(leaf.grad.double(), probe.grad, rtol=1e-3, atol=1e-3)


def test_two_leaves_of_a_frozen_model(exact, tokens):
    """Each has its own total derivative, though one is made from the other."""
    model = wrap(copy.deepcopy(random_mamba()), None, model_id="frozen")
    model._module.requires_grad_(False)
    mixer = model.layers[LAYER].mixer
    with model.trace(tokens):
        delta, A_bar, h = mixer.delta, mixer.A_bar, mixer.h
        leaves = [value.requires_grad_() for value in (h, delta, A_bar)].save()
        logits = model.logits.save()
    assert torch.equal(logits, model._module(tokens, use_cache=False).logits) or torch.allclose(
        logits, model._module(tokens, use_cache=False).logits, atol=1e-5
    )
    logits.square().sum().backward()
    probes = {}

    def add(name):
        def edit(value, t=None):
            if name not in probes:
                shape = tokens.shape + value.shape[1:] if t is not None else value.shape
                probes[name] = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
            return value + (probes[name] if t is None else probes[name][:, t])

        return edit

    hand = copy.deepcopy(exact).requires_grad_(False)
    acts = forward_by_hand(hand, tokens, {(name, LAYER): add(name) for name in ("h", "delta", "A_bar")})
    acts["hook_logits"].square().sum().backward()
    for name, leaf in zip(("h", "delta", "A_bar"), leaves, strict=True):
        torch.testing.assert_close(leaf.grad.double(), probes[name].grad, rtol=1e-3, atol=1e-3)
