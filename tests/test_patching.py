"""`cache`, `run` and `Patch`, against the equations, torch hooks and recurrences written out by hand."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mamba_ioi import Patch, cache, run
from mamba_ioi.models.model import wrap
from mamba_ioi.tasks.names import NAMES
from mamba_ioi.trace.sites import SITES

from .conftest import random_mamba
from .plain import edited, forward_by_hand, mixer_by_hand, prompt_tokenizer

LAYER_SITES = [name for name, site in SITES.items() if site.owner != "model"]
BY_POSITION = [name for name, site in SITES.items() if site.by_position]


@pytest.fixture(scope="module")
def plain(small, tokens):
    """Every activation of the tokens by the equations."""
    with torch.no_grad():
        return forward_by_hand(small._module, tokens)


@pytest.fixture(scope="module")
def logits(small, tokens):
    """The untouched model's logits [B, L, V]."""
    with torch.no_grad():
        return small._module(tokens, use_cache=False).logits


@pytest.fixture(scope="module")
def reader():
    """A random Mamba with a tokenizer of the prompts' words."""
    return wrap(random_mamba(vocab_size=600), prompt_tokenizer(list(NAMES[:40])), model_id="reader")


def key_of(name, layer=1):
    return f"hook_{name}" if SITES[name].owner == "model" else f"blocks.{layer}.hook_{name}"


def layer_of(name, layer=1):
    return None if SITES[name].owner == "model" else layer


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def close(value, expected, tolerance=1e-5):
    torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance)


class TestCache:
    """What `cache` reads."""

    @pytest.mark.parametrize("name", SITES)
    def test_every_spelling(self, small, tokens, plain, name):
        key = key_of(name)
        spellings = [key, name] if SITES[name].owner == "model" else [key, (name, 1), (f"hook_{name}", 1), name]
        for spelling in spellings:
            acts = cache(small, tokens, [spelling])
            bare = spelling == name and SITES[name].owner != "model"
            assert list(acts) == ([f"blocks.{i}.hook_{name}" for i in range(3)] if bare else [key])
            for found, value in acts.items():
                close(value, plain[found])

    @pytest.mark.parametrize("name", BY_POSITION)
    def test_one_position(self, small, tokens, plain, name):
        acts = cache(small, tokens, [f"{key_of(name)}.7", key_of(name)])
        close(acts[f"{key_of(name)}.7"], plain[key_of(name)][:, 7])
        close(acts[key_of(name)], plain[key_of(name)])

    def test_lookups(self, small, tokens):
        acts = cache(small, tokens, iter(["conv", "embed", ("h", 2)]))
        assert acts["conv", 1] is acts["blocks.1.hook_conv"]
        assert acts["embed"] is acts["hook_embed"]
        assert len(acts) == 5
        for missing in (("h", 1), "norm", "blocks.7.hook_conv", ("conv", 3)):
            with pytest.raises(KeyError):
                acts[missing]

    def test_a_single_name(self, small, tokens):
        assert list(cache(small, tokens, "blocks.0.hook_y")) == ["blocks.0.hook_y"]

    def test_everything_in_one_run(self, small, tokens, plain):
        acts = cache(small, tokens, list(reversed(SITES)))
        assert set(acts) == set(plain)
        for key, value in acts.items():
            close(value, plain[key])

    def test_layers_after_the_last_site_and_the_head_do_not_run(self, small, tokens, monkeypatch):
        ran, linear = [], F.linear
        monkeypatch.setattr(F, "linear", lambda x, weight, bias=None: ran.append(weight) or linear(x, weight, bias))
        cache(small, tokens, ["embed", ("conv", 1)])
        layers = small._module.backbone.layers
        entered = [any(weight is layer.mixer.in_proj.weight for weight in ran) for layer in layers]
        assert entered == [True, True, False]
        assert not any(weight is small._module.lm_head.weight for weight in ran)
        cache(small, tokens, ["norm"])
        assert any(weight is layers[2].mixer.in_proj.weight for weight in ran)

    def test_patches(self, small, tokens):
        patches = [Patch("resid_post", 0, 0.5, [3])]
        acts = cache(small, tokens, ["resid_post", ("layer_input", 1)], patches=patches)
        assert torch.equal(acts["resid_post", 0][:, 3], torch.full((4, 12), 0.5))
        assert torch.equal(acts["layer_input", 1], acts["resid_post", 0])
        with torch.no_grad():
            block = small._module.backbone.layers[1]
            close(acts["resid_post", 1], block(acts["resid_post", 0]))

    def test_what_was_read_is_the_callers_own(self, small, tokens, logits):
        acts = cache(small, tokens, SITES)
        for value in acts.values():
            assert not value.requires_grad
            value.fill_(float("nan"))
        close(run(small, tokens, positions="all"), logits)


class TestRun:
    """What `run` returns."""

    def test_positions(self, small, tokens, logits):
        close(run(small, tokens), logits[:, -1])
        close(run(small, tokens, positions="all"), logits)
        rows = torch.tensor([0, 8, -1, 4])
        close(run(small, tokens, positions=rows), logits[torch.arange(4), rows])

    def test_positions_where_logits_are_patched(self, small, tokens):
        value = noise(4, 9, 61)
        rows = torch.tensor([0, 8, 3, 4])
        out = run(small, tokens, [Patch("logits", None, value)], positions=rows)
        assert torch.equal(out, value[torch.arange(4), rows])

    def test_texts_are_read_at_their_own_last_token(self, reader):
        texts = ["Then, Aaron and Abby", "Then", "Friends Adam, Alice and Amy"]
        together = run(reader, texts)
        lengths = [len(reader.tokenizer(text)["input_ids"]) for text in texts]
        assert len(set(lengths)) == 3
        for text, row in zip(texts, together, strict=True):
            ids = torch.tensor([reader.tokenizer(text)["input_ids"]])
            with torch.no_grad():
                close(row, reader._module(ids, use_cache=False).logits[0, -1])
            close(run(reader, text)[0], row)
        assert run(reader, texts, positions="all").shape == (3, max(lengths), 600)

    @pytest.mark.parametrize("length", [1, 2, 3])
    def test_short_prompts(self, small, tokens, logits, length):
        ids = tokens[:, :length]
        close(run(small, ids), logits[:, length - 1])
        acts = cache(small, ids, SITES)
        patches = [Patch(name, layer_of(name), acts[key_of(name)]) for name in SITES]
        close(run(small, ids, patches, positions="all"), logits[:, :length])

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_other_precisions(self, tokens, dtype):
        model = wrap(random_mamba(dtype=dtype), None, model_id="random")
        with torch.no_grad():
            expected = model._module(tokens, use_cache=False).logits
        limit = 5e-2 if dtype == torch.bfloat16 else 1e-5
        acts = cache(model, tokens, SITES)
        for name in SITES:
            out = run(model, tokens, [Patch(name, layer_of(name), acts[key_of(name)])], positions="all")
            assert out.dtype == dtype
            assert (out - expected).abs().max() <= limit * expected.abs().max(), name

    def test_right_padding_changes_nothing_before_it(self, small, tokens, logits):
        padded = torch.cat([tokens, torch.zeros(4, 5, dtype=torch.long)], 1)
        patches = [Patch("h", 1, noise(4, 2, 24, 4), [2, 5]), Patch("conv", 2, 0.3, 4)]
        close(
            run(small, padded, patches, positions=torch.full((4,), 8)),
            run(small, tokens, patches),
        )
        close(run(small, padded, positions="all")[:, :9], logits)

    def test_ids_of_other_integer_types(self, small, tokens, logits):
        assert torch.equal(run(small, tokens.to(torch.uint8)), run(small, tokens))


class TestPatchAtEverySite:
    """Properties of a patch that hold wherever it is."""

    @pytest.mark.parametrize("name", SITES)
    @pytest.mark.parametrize("positions", [None, [2, 7]])
    def test_own_values_change_nothing(self, small, tokens, plain, logits, name, positions):
        if positions and not SITES[name].by_position:
            return
        for layer in range(3):
            value = plain[key_of(name, layer)]
            value = value if positions is None else value[:, positions]
            out = run(small, tokens, [Patch(name, layer_of(name, layer), value, positions)], positions="all")
            assert (out - logits).abs().max() < 1e-5

    @pytest.mark.parametrize("name", SITES)
    def test_a_float_moves_what_follows_and_nothing_before(self, small, tokens, name):
        before = run(small, tokens, positions="all")
        positions = [4] if SITES[name].by_position else None
        out = run(small, tokens, [Patch(name, layer_of(name), -0.7, positions)], positions="all")
        start = 4 if positions else 0
        assert torch.allclose(out[:, :start], before[:, :start], rtol=0, atol=1e-6)
        assert (out[:, start:] - before[:, start:]).abs().amax((1, 2)).min() > 1e-4

    @pytest.mark.parametrize("name", LAYER_SITES)
    def test_nothing_upstream_changes(self, small, tokens, plain, name):
        acts = cache(small, tokens, SITES, patches=[Patch(name, 1, -0.7)])
        order = [key_of(site, layer) for layer in range(3) for site in LAYER_SITES]
        for key in order[: order.index(key_of(name))]:
            if name == "layer_input" or key != "blocks.1.hook_layer_input":
                close(acts[key], plain[key])
        assert (acts[key_of(name)] == -0.7).all()

    @pytest.mark.parametrize("name", BY_POSITION)
    def test_broadcasting(self, small, tokens, plain, name):
        """[B, 1, ...], [1, P, ...] and [...] equal the same values written out for every row and position."""
        tail = plain[key_of(name)].shape[2:]
        site = (name, layer_of(name))
        for shape in ((4, 1, *tail), (1, 3, *tail), (4, 3, *tail), tail, (1, 1, *tail), (3, *tail)):
            value = noise(*shape)
            before = value.clone()
            given = run(small, tokens, [Patch(*site, value, [1, 6, 3])], positions="all")
            written = run(small, tokens, [Patch(*site, value.expand(4, 3, *tail).clone(), [1, 6, 3])], positions="all")
            close(given, written, 1e-6)
            assert torch.equal(value, before)
            acts = cache(small, tokens, [key_of(name)], patches=[Patch(*site, value, [1, 6, 3])])
            assert torch.equal(acts[key_of(name)][:, [1, 6, 3]], value.expand(4, 3, *tail))

    @pytest.mark.parametrize("name", SITES)
    def test_a_callable(self, small, tokens, name):
        """By hand: each value halved and moved at two positions, states one after another."""
        layer, positions = layer_of(name), [5, 2] if SITES[name].by_position else None

        def edit(value, t=None):
            if t is not None:
                return value * 0.5 + 0.1 if t in positions else value
            if positions is None:
                return value * 0.5 + 0.1
            value = value.clone()
            value[:, positions] = value[:, positions] * 0.5 + 0.1
            return value

        shapes = []

        def fn(value):
            shapes.append(tuple(value.shape))
            return value * 0.5 + 0.1

        logits = run(small, tokens, [Patch(name, layer, fn, positions)], positions="all")
        hand = copy.deepcopy(small._module).double()
        close(logits.double(), forward_by_hand(hand, tokens, {(name, layer): edit})["hook_logits"], 1e-4)
        length = {"h": 1}.get(name, 2)
        assert shapes[0][: 1 if positions is None else 2] == ((4, length) if positions else shapes[0][:1])

    @pytest.mark.parametrize("name", BY_POSITION)
    def test_an_alias_with_a_position(self, small, tokens, plain, name):
        value = noise(4, *plain[key_of(name)].shape[2:])
        expected = run(small, tokens, [Patch(name, layer_of(name), value[:, None], [7])], positions="all")
        for given in (value, value[:, None]):
            out = run(small, tokens, [Patch(f"{key_of(name)}.7", layer_of(name), given)], positions="all")
            assert torch.equal(out, expected)
        assert torch.equal(run(small, tokens, [Patch(f"{key_of(name)}.7", None, value)], positions="all"), expected)

    @pytest.mark.parametrize("name", SITES)
    def test_several_patches_at_one_site_apply_in_order(self, small, tokens, plain, name):
        shape = plain[key_of(name)].shape
        one, other = noise(*shape), -noise(*shape)
        patches = [Patch(name, layer_of(name), one), Patch(name, layer_of(name), other)]
        out = run(small, tokens, patches, positions="all")
        close(out, run(small, tokens, patches[1:], positions="all"), 1e-6)
        if SITES[name].by_position:
            patches[1] = Patch(name, layer_of(name), other[:, [5]], [-4])
            mixed = torch.cat([one[:, :5], other[:, 5:6], one[:, 6:]], 1)
            out = run(small, tokens, patches, positions="all")
            close(out, run(small, tokens, [Patch(name, layer_of(name), mixed)], positions="all"), 1e-6)

    def test_the_order_of_the_list_does_not_matter_between_sites(self, small, tokens):
        patches = [
            Patch(name, layer_of(name, layer), 0.2 + 0.1 * layer, [layer + 2])
            for name in BY_POSITION
            for layer in range(3 if SITES[name].owner != "model" else 1)
        ]
        expected = run(small, tokens, patches, positions="all")
        for seed in range(2):
            order = torch.randperm(len(patches), generator=torch.Generator().manual_seed(seed)).tolist()
            assert torch.equal(run(small, tokens, [patches[i] for i in order], positions="all"), expected)

    def test_nan_is_a_value(self, small, tokens):
        out = run(small, tokens, [Patch("conv", 1, float("nan"), [5])], positions="all")
        assert out[:, :5].isfinite().all() and out[:, 5:].isnan().all()


class TestAgainstPlainComputations:
    """Patches whose effect is computed without the library."""

    def patched(self, small, tokens, edits):
        with edited(small._module, edits), torch.no_grad():
            return small._module(tokens, use_cache=False).logits

    @pytest.mark.parametrize("positions", [[4], [1, 6], [0], [8]])
    def test_states(self, small, tokens, positions):
        value = noise(4, len(positions), 24, 4)
        put = {("h", 1): lambda h, t: value[:, positions.index(t)] if t in positions else h}
        out = run(small, tokens, [Patch("h", 1, value, positions)], positions="all")
        close(out, self.patched(small, tokens, put))

    def test_states_follow_the_recurrence(self, small, tokens, plain):
        value = noise(4, 24, 4)
        h = cache(small, tokens, ["blocks.1.hook_h"], patches=[Patch("blocks.1.hook_h.3", 1, value)])["h", 1]
        close(h[:, :3], plain["blocks.1.hook_h"][:, :3])
        assert torch.equal(h[:, 3], value)
        A_bar, B_bar, x = (plain[f"blocks.1.hook_{name}"] for name in ("A_bar", "B_bar", "ssm_input"))
        expected = value
        for t in range(4, 9):
            expected = A_bar[:, t] * expected + B_bar[:, t] * x[:, t, :, None]
            close(h[:, t], expected)

    @pytest.mark.parametrize("tap", [-3, -2, -1, 0])
    def test_one_tap_at_one_output_position(self, small, tokens, plain, tap):
        value = noise(4, 24)

        def put(terms):
            terms = terms.clone()
            terms[:, 5, :, tap - 1] = value
            return terms

        expected = self.patched(small, tokens, {("conv_slice", 1): put})
        for patch in (
            Patch("conv_slice", 1, value[:, None], [5], slice=tap),
            Patch("blocks.1.hook_conv_slice.5", None, value, slice=tap),
            Patch("blocks.1.hook_conv_slice.5", 1, value[:, None], slice=tap),
        ):
            close(run(small, tokens, [patch], positions="all"), expected)
        terms = plain["blocks.1.hook_conv_slice"].clone()
        source = 5 + tap
        weight = small._module.backbone.layers[1].mixer.conv1d.weight[:, 0, tap - 1].detach()
        close(terms[:, 5, :, tap - 1], weight * plain["blocks.1.hook_in_proj"][:, source])
        conv = plain["blocks.1.hook_conv"][:, 5] - terms[:, 5, :, tap - 1] + value
        acts = cache(small, tokens, ["blocks.1.hook_conv"], patches=[Patch("conv_slice", 1, value[:, None], 5, tap)])
        close(acts["conv", 1][:, 5], conv)
        close(acts["conv", 1][:, 6:], plain["blocks.1.hook_conv"][:, 6:])

    def test_a_whole_tap(self, small, tokens):
        def put(terms):
            terms = terms.clone()
            terms[..., 2] = 0.25
            return terms

        out = run(small, tokens, [Patch("conv_slice", 2, 0.25, slice=-1)], positions="all")
        close(out, self.patched(small, tokens, {("conv_slice", 2): put}))

    def test_layer_input_reaches_one_layer_and_resid_pre_the_stream(self, small, tokens, plain):
        value = noise(4, 9, 12)
        acts = cache(small, tokens, ["resid_post"], patches=[Patch("layer_input", 1, value)])
        layers = small._module.backbone.layers
        with torch.no_grad():
            added = mixer_by_hand(layers[1].mixer, layers[1].norm(value), {})
        close(acts["resid_post", 1], plain["blocks.1.hook_resid_pre"] + added)
        acts = cache(small, tokens, ["resid_post"], patches=[Patch("resid_pre", 1, value)])
        close(acts["resid_post", 1], value + added)

    @pytest.mark.parametrize("name", ["in_proj", "out_proj", "layer_input", "ssm_input"])
    def test_hooks(self, small, tokens, name):
        width = {"in_proj": 24, "ssm_input": 24}.get(name, 12)
        value = noise(4, 2, width)

        def put(current):
            current = current.clone()
            current[:, [3, 6]] = value
            return current

        out = run(small, tokens, [Patch(name, 1, value, [3, 6])], positions="all")
        close(out, self.patched(small, tokens, {(name, 1): put}))

    @pytest.mark.parametrize(
        ("name", "module", "columns"),
        [
            ("skip", "mixer.in_proj", slice(24, 48)),
            ("delta_1", "mixer.x_proj", slice(0, 3)),
            ("B", "mixer.x_proj", slice(3, 7)),
            ("C", "mixer.x_proj", slice(7, 11)),
            ("resid_post", "", slice(0, 12)),
            ("normalized_input", "norm", slice(0, 12)),
        ],
    )
    def test_outputs_of_modules(self, small, tokens, name, module, columns):
        seen = []
        value = noise(4, 1, columns.stop - columns.start)

        def hook(_, args, output):
            seen.append(output[..., columns].clone())
            output = output.clone()
            output[:, 4:5, columns] = value
            return output

        handle = small._module.backbone.layers[1].get_submodule(module).register_forward_hook(hook)
        with torch.no_grad():
            expected = small._module(tokens, use_cache=False).logits
        handle.remove()
        close(cache(small, tokens, [(name, 1)])[name, 1], seen[0], 1e-6)
        close(run(small, tokens, [Patch(name, 1, value, [4])], positions="all"), expected)

    @pytest.mark.parametrize("name", ["A", "delta", "delta_2", "A_bar", "B_bar", "y", "ssm_output", "after_skip"])
    def test_inside_the_scan(self, small, tokens, plain, name):
        """The rest of the layer computed again from the patched value."""
        a = {site: plain[key_of(site)] for site in LAYER_SITES}
        value = noise(*a[name].shape).abs() * (-1 if name == "A" else 1)
        a[name] = value
        mixer = small._module.backbone.layers[1].mixer
        with torch.no_grad():
            if name == "delta_2":
                a["delta"] = F.softplus(value)
            if name in ("A", "delta", "delta_2"):
                a["A_bar"] = torch.exp(a["delta"][..., None] * a["A"])
            if name in ("delta", "delta_2"):
                a["B_bar"] = a["delta"][..., None] * a["B"][:, :, None]
            h, states = torch.zeros(4, 24, 4), []
            for t in range(9):
                h = a["A_bar"][:, t] * h + a["B_bar"][:, t] * a["ssm_input"][:, t, :, None]
                states.append(h)
            if name not in ("y", "ssm_output", "after_skip"):
                a["y"] = (torch.stack(states, 1) * a["C"][:, :, None]).sum(-1)
            if name not in ("ssm_output", "after_skip"):
                a["ssm_output"] = a["y"] + mixer.D * a["ssm_input"]
            if name != "after_skip":
                a["after_skip"] = a["ssm_output"] * F.silu(a["skip"])
            expected = mixer.out_proj(a["after_skip"])
        out = cache(small, tokens, ["blocks.1.hook_out_proj"], patches=[Patch(name, 1, value)])["out_proj", 1]
        close(out, expected, 1e-4)


WRONG_PATCHES = [
    (("convv", 1, 0.0), "unknown site 'convv'"),
    ((5, 1, 0.0), "a site is a name"),
    (("conv", 3, 0.0), "layer from 0 to 2, not 3"),
    (("conv", -1, 0.0), "layer from 0 to 2, not -1"),
    (("conv", None, 0.0), "layer from 0 to 2, not None"),
    (("conv", True, 0.0), "an integer, not True"),
    (("conv", 1.0, 0.0), "an integer, not 1.0"),
    (("conv", "1", 0.0), "an integer, not '1'"),
    (("embed", 0, 0.0), "outside the layers"),
    (("blocks.1.hook_conv", 2, 0.0), "names layer 1, but layer 2"),
    (("blocks.1.hook_embed", None, 0.0), "outside the layers"),
    (("blocks.9.hook_conv", None, 0.0), "layer from 0 to 2, not 9"),
    (("blocks.1.hook_conv.9", None, 0.0), "9 positions: use 0 to 8"),
    (("blocks.1.hook_conv.2", None, 0.0, [2]), "names its position"),
    (("blocks.1.hook_A.2", None, 0.0), "has no positions"),
    (("conv", 1, 0.0, [9]), "9 positions: use 0 to 8"),
    (("conv", 1, 0.0, [-10]), "9 positions: use 0 to 8"),
    (("conv", 1, 0.0, []), "9 positions: use 0 to 8"),
    (("conv", 1, 0.0, [2, 2]), "twice"),
    (("conv", 1, 0.0, [2, -7]), "twice"),
    (("conv", 1, 0.0, [1.5]), "integers, not"),
    (("conv", 1, 0.0, "all"), "integers, not 'all'"),
    (("conv", 1, 0.0, torch.arange(9) > 4), "integers, not"),
    (("A", 1, 0.0, [2]), "no positions"),
    (("h_start", 1, 0.0, [2]), "no positions"),
    (("conv", 1, 0.0, None, 0), "at the site 'conv_slice'"),
    (("conv_slice", 1, 0.0, None, 1), r"\[-3, -2, -1, 0\]"),
    (("conv_slice", 1, 0.0, None, -4), r"\[-3, -2, -1, 0\]"),
    (("conv_slice", 1, 0.0, None, False), "slice=False"),
    (("conv_slice", 1, 0.0, None, -1.0), "slice=-1.0"),
    (("conv", 1, torch.zeros(4, 9, 23)), r"\(4, 9, 23\) does not fit"),
    (("conv", 1, torch.zeros(5, 9, 24)), r"\(5, 9, 24\) does not fit"),
    (("conv", 1, torch.zeros(4, 9, 24), [1, 2]), r"\(4, 2, 24\)"),
    (("conv", 1, torch.zeros(2, 4, 9, 24)), "does not fit"),
    (("h", 1, torch.zeros(4, 24, 4), [1]), "does not fit"),
    (("blocks.1.hook_h.7", None, torch.zeros(3, 24, 4)), "does not fit"),
    (("conv_slice", 1, torch.zeros(4, 9, 24, 4), None, -1), r"\(4, 9, 24\)"),
    (("conv_slice", 1, 0.0, [2], torch.tensor([0, 1])), "slices are"),
    (("conv", 1, None), "not NoneType"),
    (("conv", 1, "0"), "not str"),
    (("conv", 1, [0.0]), "not list"),
    (("conv", 1, torch.zeros((), dtype=torch.complex64)), "not torch.complex64"),
]


@pytest.mark.parametrize(("patch", "words"), WRONG_PATCHES)
def test_wrong_patches(small, tokens, patch, words):
    for act in (lambda p: run(small, tokens, p), lambda p: cache(small, tokens, ["embed"], patches=p)):
        with pytest.raises(ValueError, match=words) as error:
            act([Patch(*patch)])
        assert "\n" not in str(error.value)


def test_positions_that_are_no_numbers(small, tokens):
    with pytest.raises(ValueError, match=r"positions are None, .*, not \{\}"):
        run(small, tokens, [], positions={})


def test_sites_that_are_no_names(small, tokens):
    with pytest.raises(ValueError, match=r"sites are names or \(name, layer\) pairs, not None"):
        cache(small, tokens, None)


@pytest.mark.parametrize("patches", [Patch("conv", 1, 0.0), ["conv"], [None], [("conv", 1, 0.0)]])
def test_patches_of_another_type(small, tokens, patches):
    with pytest.raises(ValueError, match="entries are Patch"):
        run(small, tokens, patches)


@pytest.mark.parametrize(
    ("sites", "words"),
    [
        ([], "no site"),
        (["blocks.1.hook_nothing"], "unknown site"),
        (["hook_conv"], "needs a layer"),
        (["blocks.1.hook_h.9"], "outside the prompt's 9 positions"),
        (["blocks.1.hook_A.1"], "no positions"),
        ([("h", 3)], "layer from 0 to 2"),
        ([("blocks.1.hook_h", 2)], "names layer 1"),
        (["blocks.1.hook_embed"], "outside the layers"),
        ([3], "a site is a name"),
        (("conv", 1), "a site is a name"),
        ([("conv", 1, 2)], "a site is a name"),
        (["blocks.1.hook_h.-1"], "unknown site"),
    ],
)
def test_wrong_sites(small, tokens, sites, words):
    with pytest.raises(ValueError, match=words):
        cache(small, tokens, sites)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (torch.zeros(2, 3), "integers of shape"),
        (torch.zeros(2, 3, dtype=torch.bool), "integers of shape"),
        (torch.zeros(3, dtype=torch.long), "integers of shape"),
        (torch.zeros(0, 3, dtype=torch.long), "integers of shape"),
        (torch.zeros(3, 0, dtype=torch.long), "integers of shape"),
        (torch.tensor([[0, 600]]), "from 0 to 599, not 0 to 600"),
        (torch.tensor([[-1, 2]]), "from 0 to 599, not -1 to 2"),
        ("", "not empty"),
        (["Then", ""], "not empty"),
        ([], "not empty"),
        ([[1, 2]], "not empty"),
        (5, "not empty"),
        (None, "not empty"),
        ({"Then": 1}, "not empty"),
    ],
)
def test_wrong_tokens(reader, wrong, words):
    for act in (lambda: run(reader, wrong), lambda: cache(reader, wrong, ["embed"])):
        with pytest.raises(ValueError, match=words):
            act()


class DropsSpace:
    """A tokenizer of words alone."""

    pad_token_id = 0

    def __call__(self, texts, **_):
        return {"input_ids": [[1] * len(text.split()) for text in texts]}


def test_a_text_of_no_tokens_among_others():
    """A tokenizer may drop white space: such a row has no last token to read."""
    model = wrap(random_mamba(vocab_size=600), prompt_tokenizer(["Aaron"]), model_id="drops")
    model.tokenizer = DropsSpace()
    with pytest.raises(ValueError, match="not empty"):
        run(model, ["Then", " "])
    assert run(model, ["Then", "Then then"]).shape == (2, 600)


def test_texts_without_a_tokenizer(small):
    with pytest.raises(ValueError, match="no tokenizer"):
        run(small, "Then")


@pytest.mark.parametrize(
    ("positions", "words"),
    [
        ("last", "'last'"),
        (torch.tensor([0, 1]), r"\[4\], not \(2,\)"),
        (3, r"\[4\], not \(\)"),
        (torch.tensor([0.0, 1.0, 2.0, 3.0]), "one integer a row"),
        (torch.tensor([True] * 4), "one integer a row"),
        (torch.tensor([0, 0, 0, 9]), "9 positions"),
        (torch.tensor([0, 0, 0, -10]), "9 positions"),
    ],
)
def test_wrong_reading_positions(small, tokens, positions, words):
    with pytest.raises(ValueError, match=words):
        run(small, tokens, positions=positions)


@pytest.mark.untyped
@pytest.mark.parametrize(
    "positions", [2, np.int64(2), torch.tensor(2), torch.tensor([2]), (2,), np.array([2]), range(2, 3)]
)
def test_spellings_of_positions(small, tokens, positions):
    expected = run(small, tokens, [Patch("conv", 1, 0.0, [2])])
    assert torch.equal(run(small, tokens, [Patch("conv", 1, 0.0, positions)]), expected)
