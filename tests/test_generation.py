"""Sites at every step of a generation, with and without the cache, held to growing prompts recomputed by hand."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from transformers import DynamicCache, MambaForCausalLM

from mamba_ioi import Patch, generate
from mamba_ioi.models.model import load_model, wrap
from mamba_ioi.tasks.ioi import IOIDataset
from mamba_ioi.trace.sites import SITES, owner

from .conftest import random_mamba
from .plain import forward_by_hand

STEPS, LAYER = 4, 1
NAMES_OF_THE_CACHE = ("cache_params", "past_key_values", "cache")
EDITED = [name for name, site in SITES.items() if site.by_position]
CACHE = next(name for name in inspect.signature(MambaForCausalLM.forward).parameters if name in NAMES_OF_THE_CACHE)
GREEDY = {"max_new_tokens": STEPS, "do_sample": False}


@pytest.fixture(scope="module")
def model():
    """A random Mamba that never ends a text."""
    module = random_mamba(3)
    module.generation_config.eos_token_id = None
    return wrap(module, None, model_id="random")


@pytest.fixture(scope="module")
def exact(model):
    """The same weights in float64, for recomputations by hand."""
    return copy.deepcopy(model._module).double()


@pytest.fixture(scope="module", params=[7, 2], ids=["long", "short"])
def prompt(request) -> torch.Tensor:
    """Prompts [2, L], also of fewer tokens than the conv has taps."""
    return torch.randint(0, 61, (2, request.param), generator=torch.Generator().manual_seed(request.param))


def place(model, name, layer=LAYER):
    """The envoy that has the site."""
    return owner(model, SITES[name], None if SITES[name].owner == "model" else layer)


def plus(value, at):
    """The value with 0.5 more at some positions."""
    value = value.clone()
    value[:, at] += 0.5
    return value


def edits_at(name, positions, layer=LAYER):
    """What `forward_by_hand` takes to add 0.5 at some positions of a site."""
    if name == "h":
        return {("h", layer): lambda h, t: h + 0.5 if t in positions else h}
    return {(name, None if SITES[name].owner == "model" else layer): lambda value: plus(value, sorted(positions))}


def grow(exact, ids, edits, steps=STEPS):
    """Tokens and last logits of a greedy generation whose every step is one forward by hand with ``edits(step)``."""
    logits = []
    for step in range(steps):
        logits.append(forward_by_hand(exact, ids, edits(step))["hook_logits"][:, -1])
        ids = torch.cat([ids, logits[-1].argmax(-1, keepdim=True)], dim=1)
    return ids, logits


def close(value, expected):
    torch.testing.assert_close(value.double(), expected.double(), rtol=1e-4, atol=2e-5)


def agree(ids, logits, expected):
    """Tokens and each step's logits are those of `grow`."""
    assert torch.equal(ids, expected[0])
    assert len(logits) == len(expected[1])
    for value, right in zip(logits, expected[1], strict=True):
        close(value, right)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", SITES)
def test_reading_at_every_step(model, exact, prompt, name, use_cache):
    site, envoy = SITES[name], place(model, name)
    with torch.no_grad(), model.generate(prompt, **GREEDY, use_cache=use_cache) as tr:
        found = list().save()
        for _ in tr.iter[0:STEPS]:
            found.append(getattr(envoy, site.attribute))
        ids = tr.result.save()
    assert torch.equal(ids, model._module.generate(prompt, **GREEDY))
    assert len(found) == STEPS
    for step, value in enumerate(found):
        acts = forward_by_hand(exact, ids[:, : prompt.shape[1] + step])
        start = "" if name in ("embed", "norm", "logits") else f"blocks.{LAYER}."
        expected = acts[f"{start}hook_{name}"]
        if step and use_cache and name == "h_start":
            expected = acts[f"{start}hook_h"][:, -2]  # what the cache holds
        elif step and use_cache and site.by_position:
            expected = expected[:, -1:]
        if name == "logits":  # transformers may leave out all but the last
            value, expected = value[:, -1], expected[:, -1]
        close(value, expected)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", EDITED)
def test_editing_at_every_step(model, exact, prompt, name, use_cache):
    """With the cache an edit lasts through the states; without it, only the step's own edits act."""
    first, site, envoy = prompt.shape[1] - 1, SITES[name], place(model, name)
    with torch.no_grad(), model.generate(prompt, **GREEDY, use_cache=use_cache) as tr:
        logits = list().save()
        for _ in tr.iter[0:STEPS]:
            getattr(envoy, site.attribute)[:, -1] += 0.5
            logits.append(model.logits[:, -1].clone())
        ids = tr.result.save()
    agree(
        ids,
        logits,
        grow(exact, prompt, lambda step: edits_at(name, range(first if use_cache else first + step, first + step + 1))),
    )


@pytest.mark.parametrize("name", [name for name in EDITED if name not in ("norm", "logits")])
def test_an_edit_of_the_prompt_lasts(model, exact, prompt, name):
    site, envoy = SITES[name], place(model, name)
    with torch.no_grad(), model.generate(prompt, **GREEDY) as tr:
        logits = list().save()
        getattr(envoy, site.attribute)[:, 0] += 0.5
        for _ in tr.iter[0:STEPS]:
            logits.append(model.logits[:, -1].clone())
        ids = tr.result.save()
    agree(ids, logits, grow(exact, prompt, lambda step: edits_at(name, {0})))


@pytest.mark.parametrize("use_cache", [True, False])
def test_several_sites_in_one_loop(model, exact, prompt, use_cache):
    """Sites of one location, of one operation, of several layers, and nnsight's own values between them."""
    names = (
        "resid_pre",
        "layer_input",
        "in_proj",
        "skip",
        "conv",
        "ssm_input",
        "B",
        "C",
        "delta",
        "h",
        "y",
        "out_proj",
    )
    first = prompt.shape[1] - 1
    with torch.no_grad(), model.generate(prompt, **GREEDY, use_cache=use_cache) as tr:
        logits = list().save()
        for _ in tr.iter[0:STEPS]:
            for layer in (0, 2):
                model.layers[layer].input.clone()
                for name in names:
                    getattr(place(model, name, layer), SITES[name].attribute)[:, -1] += 0.5
                    if name == "in_proj":
                        model.layers[layer].mixer.in_proj.output.clone()
            logits.append(model.logits[:, -1].clone())
        ids = tr.result.save()

    def edits(step):
        at = range(first if use_cache else first + step, first + step + 1)
        return {key: edit for layer in (0, 2) for name in names for key, edit in edits_at(name, at, layer).items()}

    agree(ids, logits, grow(exact, prompt, edits))


def test_steps_that_are_left_out(model, exact, prompt):
    """Loops over some steps only, and a second loop over the step that is running."""
    first, mixer = prompt.shape[1] - 1, model.layers[LAYER].mixer
    with torch.no_grad(), model.generate(prompt, **GREEDY) as tr:
        for _ in tr.iter[[1, 3]]:
            mixer.ssm_input[:, -1] += 0.5
        for _ in tr.iter[3:4]:
            mixer.delta[:, -1] += 0.5
        ids = tr.result.save()
    at = {1: {first + 1}, 3: {first + 1, first + 3}}

    def edits(step):
        found = {} if step < 1 else edits_at("ssm_input", at[1] if step < 3 else at[3])
        return found if step < 3 else found | edits_at("delta", {first + 3})

    assert torch.equal(ids, grow(exact, prompt, edits)[0])


@pytest.mark.parametrize("use_cache", [True, False])
def test_states_patched_by_scan(model, exact, prompt, use_cache):
    first, mixer = prompt.shape[1] - 1, model.layers[LAYER].mixer
    state = torch.randn(2, 24, 4, generator=torch.Generator().manual_seed(5))
    with torch.no_grad(), model.generate(prompt, **GREEDY, use_cache=use_cache) as tr:
        logits = list().save()
        for _ in tr.iter[0:2]:
            mixer.scan({-1: state})
            logits.append(model.logits[:, -1].clone())
        for _ in tr.iter[2:STEPS]:
            logits.append(model.logits[:, -1].clone())
        ids = tr.result.save()

    def edits(step):
        at = range(first, first + min(step, 1) + 1) if use_cache else {first + step} if step < 2 else ()
        return {("h", LAYER): lambda h, t: state.double() if t in at else h}

    agree(ids, logits, grow(exact, prompt, edits))


@pytest.mark.parametrize("name", ["h_start", "A"])
def test_sites_without_positions(model, exact, prompt, name):
    """The state before a step is the cache's: one that is written there is what the step begins from."""
    length, mixer = prompt.shape[1], model.layers[LAYER].mixer
    with torch.no_grad(), model.generate(prompt, **GREEDY) as tr:
        for _ in tr.iter[1:2]:
            setattr(mixer, name, getattr(mixer, name) * 0.5)
        ids = tr.result.save()

    def halved(h, t):
        return h * 0.5 if t == length - 1 else h

    first = grow(exact, prompt, lambda step: {}, 1)[0]
    if name == "h_start":  # only the steps after the first see it
        assert torch.equal(ids, grow(exact, first, lambda step: {("h", LAYER): halved}, STEPS - 1)[0])
        return
    rate = forward_by_hand(exact, prompt)[f"blocks.{LAYER}.hook_A"]

    def decay(A_bar):  # of the first generated token
        A_bar = A_bar.clone()
        A_bar[:, length] = A_bar[:, length].sqrt()
        return A_bar

    assert rate.shape == (24, 4)
    assert torch.equal(ids, grow(exact, first, lambda step: {("A_bar", LAYER): decay}, STEPS - 1)[0])


@pytest.mark.parametrize("name", ["in_proj", "conv", "ssm_input", "delta", "h", "out_proj"])
def test_invokes_of_one_generation(model, exact, prompt, name):
    """Each invoke edits its own row at every step; the other's is as if alone."""
    first, site = prompt.shape[1] - 1, SITES[name]
    with torch.no_grad(), model.generate(**GREEDY) as tr:
        with tr.invoke(prompt[:1]):
            for _ in tr.iter[0:STEPS]:
                getattr(place(model, name), site.attribute)[:, -1] += 0.5
        with tr.invoke(prompt[1:]):
            for _ in tr.iter[0:STEPS]:
                getattr(place(model, name), site.attribute).clone()
        with tr.invoke():
            ids = tr.result.save()
    expected = grow(exact, prompt[:1], lambda step: edits_at(name, range(first, first + step + 1)))[0]
    assert torch.equal(ids[:1], expected)
    assert torch.equal(ids[1:], model._module.generate(prompt[1:], **GREEDY))


@pytest.mark.parametrize("records", [False, True])
@pytest.mark.parametrize("name", EDITED)
def test_a_trace_that_goes_on_from_a_cache(model, exact, prompt, name, records):
    """One token, with the cache of the prompt before it given by hand; one that records calls the whole conv."""
    site = SITES[name]
    cache = DynamicCache(config=model._module.config)
    with torch.no_grad():
        model._module(prompt[:, :-1], **{CACHE: cache}, use_cache=True)
    for layer in cache.layers:
        layer.record_past = records
    with torch.no_grad(), model.trace(prompt[:, -1:], **{CACHE: cache}, use_cache=True):
        getattr(place(model, name), site.attribute)[:, -1] += 0.5
        logits = model.logits[:, -1].save()
    expected = forward_by_hand(exact, prompt, edits_at(name, {prompt.shape[1] - 1}))
    close(logits, expected["hook_logits"][:, -1])


def test_generation_uses_the_cache_as_transformers_does(model, prompt):
    lengths = {}
    for use_cache in (None, True, False):
        given = {} if use_cache is None else {"use_cache": use_cache}
        with torch.no_grad(), model.generate(prompt, **GREEDY, **given) as tr:
            seen = list().save()
            for _ in tr.iter[0:STEPS]:
                seen.append(model.layers[0].input.shape[1])
        lengths[use_cache] = seen
    start = prompt.shape[1]
    assert lengths[None] == lengths[True] == [start, *[1] * (STEPS - 1)]
    assert lengths[False] == list(range(start, start + STEPS))


def test_sampled_generation_is_not_changed_by_reading(model, prompt):
    sampled = {"max_new_tokens": STEPS, "do_sample": True}
    torch.manual_seed(0)
    plain = model._module.generate(prompt, **sampled)
    torch.manual_seed(0)
    with torch.no_grad(), model.generate(prompt, **sampled) as tr:
        for _ in tr.iter[0:STEPS]:
            for name in ("resid_pre", "in_proj", "ssm_input", "h", "resid_post"):
                getattr(place(model, name), SITES[name].attribute)
        ids = tr.result.save()
    assert torch.equal(ids, plain)


def test_a_prompt_of_tiny(model):
    """What a reader sees first: the next tokens are the same whichever site is looked at."""
    tiny = load_model("tiny")
    tokens = IOIDataset.generate(tiny.tokenizer, 3, seed=3).clean_tokens[:1]
    plain = tiny._module.generate(tokens, max_new_tokens=5, do_sample=False)
    assert plain[0, tokens.shape[1] :].tolist() == [285, 12, 258, 258, 411]
    for name in ("resid_post", "resid_pre", "layer_input", "in_proj", "out_proj", "ssm_input"):
        with torch.no_grad(), tiny.generate(tokens, max_new_tokens=5, do_sample=False) as tr:
            for _ in tr.iter[0:5]:
                getattr(place(tiny, name, 2), SITES[name].attribute)
            ids = tr.result.save()
        assert torch.equal(ids, plain), name


class TestGenerate:
    """The declared form."""

    def test_without_patches(self, model, prompt):
        assert torch.equal(generate(model, prompt, STEPS), model._module.generate(prompt, **GREEDY))
        assert torch.equal(
            generate(model, prompt, 1), model._module.generate(prompt, max_new_tokens=1, do_sample=False)
        )

    def test_an_end_of_text_token_ends_nothing(self, prompt):
        module = random_mamba(3)
        expected = grow(copy.deepcopy(module).double(), prompt, lambda step: {})[0]
        module.generation_config.eos_token_id = int(expected[0, prompt.shape[1]])
        assert torch.equal(generate(wrap(module, None, model_id="ends"), prompt, STEPS), expected)

    @pytest.mark.parametrize("name", EDITED)
    def test_patches_of_the_prompt_and_of_new_tokens(self, model, exact, prompt, name):
        """Callables add 0.5 at the prompt's first position and at every new token."""
        length, layer = prompt.shape[1], None if SITES[name].owner == "model" else LAYER
        ids = generate(
            model,
            prompt,
            STEPS,
            patches=[Patch(name, layer, lambda value: value + 0.5, positions=[0])],
            new_patches=[Patch(name, layer, lambda value: value + 0.5)],
        )
        assert torch.equal(ids, grow(exact, prompt, lambda step: edits_at(name, {0, *range(length, length + step)}))[0])

    @pytest.mark.parametrize("name", ["layer_input", "conv", "ssm_input", "delta", "h", "A_bar", "out_proj"])
    def test_values(self, model, exact, prompt, name):
        """One value a row and position, a float, and an alias that names a position."""
        length = prompt.shape[1]
        shape = forward_by_hand(exact, prompt)[f"blocks.{LAYER}.hook_{name}"].shape
        values = torch.randn(2, 2, *shape[2:], generator=torch.Generator().manual_seed(7)) / 2
        patches = [
            Patch(name, LAYER, values, positions=[length, length + 2]),
            Patch(f"blocks.0.hook_{name}.{length + 1}", None, values[:, 0].abs()),
            Patch(name, 2, 0.25, positions=[length + 1]),
        ]
        ids = generate(model, prompt, STEPS, new_patches=patches)

        def put(known):
            def edit(value, t=None):
                if t is not None:
                    return known[t].expand_as(value) if t in known else value
                value = value.clone()
                for position, new in known.items():
                    if position < value.shape[1]:
                        value[:, position] = new
                return value

            return edit

        known = {
            LAYER: {length: values[:, 0].double(), length + 2: values[:, 1].double()},
            0: {length + 1: values[:, 0].abs().double()},
            2: {length + 1: torch.tensor(0.25, dtype=torch.float64)},
        }
        assert torch.equal(ids, grow(exact, prompt, lambda step: {(name, i): put(one) for i, one in known.items()})[0])

    def test_one_tap_and_the_state_before_a_token(self, model, exact, prompt):
        """Half the state before a token is half of how much of it the token keeps."""
        length = prompt.shape[1]
        patches = [Patch("conv_slice", LAYER, 0.5, slice=-1), Patch("h_start", 2, lambda h: h * 0.5)]
        ids = generate(model, prompt, STEPS, new_patches=patches)

        def tap(value):
            value = value.clone()
            value[:, length:, :, -2] = 0.5
            return value

        def half(value):
            value = value.clone()
            value[:, length:] *= 0.5
            return value

        assert torch.equal(ids, grow(exact, prompt, lambda step: {("conv_slice", LAYER): tap, ("A_bar", 2): half})[0])

    def test_a_callable_sees_the_site_and_the_state_as_it_has_become(self, model, prompt):
        shapes, states = [], []

        def keep(h):
            states.append(h.clone())
            return h * 0 if len(states) == 1 else h

        def look(delta):
            shapes.append(tuple(delta.shape))
            return delta

        generate(model, prompt, 2, patches=[Patch("delta", 1, look, [0, 1]), Patch("h", 1, keep, [0, 1])])
        assert shapes == [(2, 2, 24)]
        acts = forward_by_hand(copy.deepcopy(model._module).double(), prompt)
        inflow = acts["blocks.1.hook_B_bar"][:, 1] * acts["blocks.1.hook_ssm_input"][:, 1, :, None]
        assert states[0].shape == states[1].shape == (2, 1, 24, 4)
        close(states[1][:, 0], inflow)  # nothing is left of the state before it

    def test_the_memory_changes_no_result(self, model, prompt):
        """Rows go through in parts, and a callable sees all of them."""
        values = torch.randn(2, 2, 24, generator=torch.Generator().manual_seed(8))
        later = [Patch("ssm_input", LAYER, values, positions=[prompt.shape[1], prompt.shape[1] + 1])]
        seen = []

        def swap(delta):
            seen.append(len(delta))
            return delta.flip(0)

        for patches in ([Patch("conv", 1, values[:, :1], [0])], [Patch("delta", 1, swap)]):
            expected = generate(model, prompt, STEPS, patches=patches, new_patches=later)
            model.memory = 1
            try:
                found = generate(model, prompt, STEPS, patches=patches, new_patches=later)
            finally:
                model.memory = None
            assert torch.equal(found, expected)
        assert seen == [2, 2]

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"max_new_tokens": 0}, "max_new_tokens"),
            ({"max_new_tokens": 2.5}, "max_new_tokens"),
            ({"new_patches": [Patch("h", 1, 0.0, [0])]}, "7 to 9"),
            ({"new_patches": [Patch("h", 1, 0.0, [10])]}, "7 to 9"),
            ({"new_patches": [Patch("h", 1, 0.0, [-1])]}, "7 to 9"),
            ({"new_patches": [Patch("h", 1, 0.0, [])]}, "7 to 9"),
            ({"new_patches": [Patch("A", 1, 0.0, [7])]}, "no positions"),
            ({"new_patches": [Patch("blocks.1.hook_h.7", None, 0.0, [7])]}, "names its position"),
            ({"new_patches": [Patch("h", 1, torch.zeros(2, 3, 24, 4), [7, 8])]}, "does not fit"),
            ({"new_patches": [Patch("h", 1, torch.zeros(5))]}, "does not fit"),
            ({"new_patches": Patch("h", 1, 0.0)}, "list"),
            ({"new_patches": [3]}, "list"),
            ({"new_patches": [Patch("delta", 1, lambda value: "much")]}, "callable"),
            ({"new_patches": [Patch("delta", 1, lambda value: value[..., :3])]}, "shape"),
            ({"patches": [Patch("h", 1, 0.0, [7])]}, "position"),
            ({"max_new_tokens": 1, "new_patches": [Patch("h", 1, 0.0, [7])]}, "none"),
        ],
    )
    def test_what_does_not_fit(self, model, arguments, words):
        tokens = torch.randint(0, 61, (2, 7))
        with pytest.raises(ValueError, match=words):
            generate(model, tokens, **{"max_new_tokens": STEPS} | arguments)

    def test_texts(self):
        tiny = load_model("tiny")
        data = IOIDataset.generate(tiny.tokenizer, 2, seed=3)
        ids = generate(tiny, list(data.clean_text), 2)
        tokens = tiny.tokenizer(list(data.clean_text), return_tensors="pt", add_special_tokens=False)["input_ids"]
        assert torch.equal(ids, generate(tiny, tokens, 2))
        with pytest.raises(ValueError, match="one length"):
            generate(tiny, [data.clean_text[0], data.clean_text[0] + " the"], 2)
