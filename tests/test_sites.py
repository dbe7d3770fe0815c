"""Every site in a plain nnsight trace: what it reads, what writing it changes, and what reading it leaves alone."""

from __future__ import annotations

import pytest
import torch
from nnsight.intervention.interleaver import OutOfOrderError

from mamba_ioi.interventions.run import cache
from mamba_ioi.models.model import wrap
from mamba_ioi.trace.sites import SITES, owner

from .conftest import random_mamba
from .plain import forward_by_hand

LAYER_SITES = [name for name, site in SITES.items() if site.owner != "model"]
IN_PLACE = [name for name, site in SITES.items() if site.by_position]


def read(model, ids, name, layer=1):
    """One site's value, read by its property in a plain trace."""
    site = SITES[name]
    with torch.no_grad(), model.trace(ids):
        value = getattr(owner(model, site, layer), site.attribute).save()
    return value


def plain_logits(model, ids):
    with torch.no_grad():
        return model._module(ids, use_cache=False).logits


@pytest.mark.parametrize("name", SITES)
def test_reading(small, tokens, name):
    expected = forward_by_hand(small._module, tokens)
    for layer in range(small.n_layers):
        key = f"hook_{name}" if SITES[name].owner == "model" else f"blocks.{layer}.hook_{name}"
        value = read(small, tokens, name, layer)
        torch.testing.assert_close(value, expected[key].detach(), rtol=1e-5, atol=1e-5)
        letters = {"B": 4, "L": 9, **small.sizes()}
        assert value.shape == tuple(letters[letter] for letter in SITES[name].shape)


@pytest.mark.parametrize("name", SITES)
def test_reading_changes_nothing(small, tokens, name):
    site = SITES[name]
    with torch.no_grad(), small.trace(tokens):
        _ = getattr(owner(small, site, 1), site.attribute)
        logits = small.lm_head.output.save()
    assert torch.equal(logits, plain_logits(small, tokens))


@pytest.mark.parametrize("name", SITES)
@pytest.mark.parametrize("how", ["assign", "in place"])
def test_writing_own_values_changes_nothing(small, tokens, name, how):
    site, own = SITES[name], read(small, tokens, name)
    with torch.no_grad(), small.trace(tokens):
        envoy = owner(small, site, 1)
        if how == "assign":
            setattr(envoy, site.attribute, own)
        else:
            getattr(envoy, site.attribute)[:] = own
        logits = small.lm_head.output.save()
    torch.testing.assert_close(logits, plain_logits(small, tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", IN_PLACE)
@pytest.mark.parametrize("how", ["assign", "in place"])
def test_a_change_at_a_position_moves_that_position_and_later_ones_only(small, tokens, name, how):
    site, before = SITES[name], plain_logits(small, tokens)
    value = read(small, tokens, name)[:, 4] * -2 + 1
    with torch.no_grad(), small.trace(tokens):
        envoy = owner(small, site, 1)
        if how == "assign":
            edited = getattr(envoy, site.attribute).clone()
            edited[:, 4] = value
            setattr(envoy, site.attribute, edited)
        else:
            getattr(envoy, site.attribute)[:, 4] = value
        logits = small.lm_head.output.save()
    assert (logits[:, :4] - before[:, :4]).abs().max() < 1e-6
    assert (logits[:, 4] - before[:, 4]).abs().max() > 1e-3
    if name not in ("norm", "logits"):
        assert (logits[:, 5:] - before[:, 5:]).abs().max() > 1e-6


def test_nothing_before_a_patched_site_changes(small, tokens):
    """In the patched layer, sites upstream of the patch keep their values; those downstream do not."""
    plain = forward_by_hand(small._module, tokens)
    upstream = {"conv_slice": ["gate"], "B": ["ssm_input"], "delta": ["delta_2", "A"], "y": ["h", "delta"]}
    for name, earlier in upstream.items():
        with torch.no_grad(), small.trace(tokens):
            mixer = small.layers[1].mixer
            seen = {other: getattr(mixer, other).clone() for other in earlier}
            getattr(mixer, name)[:, 3] += 1.0
            after = mixer.after_skip.clone().save()
            out = seen.save()
        for other in earlier:
            key = f"blocks.1.hook_{'skip' if other == 'gate' else other}"
            torch.testing.assert_close(out[other], plain[key].detach(), rtol=1e-5, atol=1e-5)
        assert (after - plain["blocks.1.hook_after_skip"]).abs().max() > 1e-3


def test_layer_input_reaches_this_layer_only(small, tokens):
    plain = forward_by_hand(small._module, tokens)
    with torch.no_grad(), small.trace(tokens):
        small.layers[1].layer_input[:, 4] = 0.5
        contribution = small.layers[1].out_proj.clone().save()
        after = small.layers[1].resid_post.clone().save()
    stream = plain["blocks.1.hook_resid_pre"].detach()
    torch.testing.assert_close(after - contribution, stream, rtol=1e-5, atol=1e-5)
    assert (contribution - plain["blocks.1.hook_out_proj"]).abs().max() > 1e-3


def test_a_saved_value_is_not_changed_by_a_later_edit(small, tokens):
    with torch.no_grad(), small.trace(tokens):
        before = small.layers[0].resid_post.save()
        small.layers[1].resid_pre[:] = 0.0
    torch.testing.assert_close(before, forward_by_hand(small._module, tokens)["blocks.0.hook_resid_post"].detach())


class TestScan:
    """`mixer.scan` and the state."""

    def states(self, model, ids, patch=None):
        with torch.no_grad(), model.trace(ids):
            h = model.layers[1].mixer.scan(patch).save()
            logits = model.lm_head.output.save()
        return h, logits

    def test_unpatched(self, small, tokens):
        h, logits = self.states(small, tokens)
        expected = forward_by_hand(small._module, tokens)["blocks.1.hook_h"]
        torch.testing.assert_close(h, expected.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(logits, plain_logits(small, tokens), rtol=0, atol=1e-5)

    def test_the_models_own_scan_does_not_run(self, small, tokens):
        """nnsight can look into a call that runs, and into none that was replaced."""
        with torch.no_grad(), small.trace(tokens):
            inside = len(list(small.layers[1].mixer.source.mamba_selective_scan_0.source)).save()
        assert inside > 0
        with pytest.raises(OutOfOrderError), torch.no_grad(), small.trace(tokens):
            small.layers[1].mixer.scan()
            _ = len(list(small.layers[1].mixer.source.mamba_selective_scan_0.source)).save()

    def test_mapping_and_callable_agree(self, small, tokens):
        value = torch.randn(4, 24, 4, generator=torch.Generator().manual_seed(3))
        by_mapping = self.states(small, tokens, {3: value})
        by_callable = self.states(small, tokens, lambda t, h: value if t == 3 else h)
        for one, other in zip(by_mapping, by_callable, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)

    def test_states_follow_a_patched_one(self, small, tokens):
        plain = forward_by_hand(small._module, tokens)
        value = torch.randn(4, 24, 4, generator=torch.Generator().manual_seed(3))
        h, logits = self.states(small, tokens, {3: value})
        A_bar, B_bar = plain["blocks.1.hook_A_bar"], plain["blocks.1.hook_B_bar"]
        x, expected = plain["blocks.1.hook_ssm_input"], value
        torch.testing.assert_close(h[:, :3], plain["blocks.1.hook_h"][:, :3].detach(), rtol=1e-5, atol=1e-5)
        for t in range(4, 9):
            expected = A_bar[:, t] * expected + B_bar[:, t] * x[:, t, :, None]
            torch.testing.assert_close(h[:, t], expected.detach(), rtol=1e-4, atol=1e-5)
        before = plain_logits(small, tokens)
        assert torch.allclose(logits[:, :3], before[:, :3], atol=1e-6)
        assert all((logits[:, t] - before[:, t]).abs().max() > 1e-5 for t in range(3, 9))

    def test_editing_h_in_place_equals_scan(self, small, tokens):
        value = torch.randn(4, 24, 4, generator=torch.Generator().manual_seed(3))
        with torch.no_grad(), small.trace(tokens):
            small.layers[1].mixer.h[:, 3] = value
            small.layers[1].mixer.h[:, 6] = 2 * value
            logits = small.lm_head.output.save()
        expected = self.states(small, tokens, {3: value, 6: 2 * value})[1]
        torch.testing.assert_close(logits, expected, rtol=0, atol=0)

    def test_each_row_and_channel_is_held_where_it_was_changed(self, small, tokens):
        value = torch.randn(4, 24, 4, generator=torch.Generator().manual_seed(3))
        with torch.no_grad(), small.trace(tokens):
            for row, position in enumerate([2, 5, 7, 2]):
                small.layers[1].mixer.h[row, position] = value[row]
            small.layers[1].mixer.h[:, 8, :3] = 0.0
            logits = small.lm_head.output.save()
        for row, position in enumerate([2, 5, 7, 2]):

            def patch(t, h, position=position, row=row):
                h = value[row : row + 1] if t == position else h
                return torch.cat([torch.zeros_like(h[:, :3]), h[:, 3:]], 1) if t == 8 else h

            alone = self.states(small, tokens[row : row + 1], patch)[1]
            torch.testing.assert_close(logits[row : row + 1], alone, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("grad", [False, True])
    def test_a_view_that_is_edited_again_after_other_reads(self, small, tokens, grad):
        value = torch.randn(4, 24, 4, generator=torch.Generator().manual_seed(3))
        with torch.set_grad_enabled(grad), small.trace(tokens):
            h = small.layers[1].mixer.h
            h[:, 3] = value
            y = small.layers[1].mixer.y.clone().save()
            h[:, 7] = 2 * value
            logits = small.lm_head.output.save()
        states, expected = self.states(small, tokens, {3: value, 7: 2 * value})
        torch.testing.assert_close(logits.detach(), expected, rtol=1e-5, atol=1e-5)
        C = forward_by_hand(small._module, tokens)["blocks.1.hook_C"].detach()
        torch.testing.assert_close(y[:, :7].detach(), (states * C[:, :, None]).sum(-1)[:, :7], rtol=1e-4, atol=1e-5)

    def test_own_states_change_nothing(self, small, tokens):
        h, logits = self.states(small, tokens)
        again, patched = self.states(small, tokens, {t: h[:, t] for t in range(9)})
        torch.testing.assert_close(again, h, rtol=0, atol=0)
        torch.testing.assert_close(patched, logits, rtol=0, atol=1e-6)

    def test_the_callable_sees_each_position_once_and_in_turn(self, small, tokens):
        seen = []

        def look(t, h):
            seen.append(t)
            return h

        self.states(small, tokens, look)
        assert seen == list(range(9))

    def test_other_stages_are_edited_together_with_the_state(self, small, tokens):
        value = torch.zeros(4, 24, 4)
        with torch.no_grad(), small.trace(tokens):
            mixer = small.layers[1].mixer
            mixer.delta[:, 5] *= 2
            mixer.scan({3: value})
            mixer.y[:, 7] = 1.0
            y, delta = mixer.y.clone().save(), mixer.delta.clone().save()
        plain = forward_by_hand(small._module, tokens)
        assert torch.equal(y[:, 7], torch.ones(4, 24))
        x, B, C = (plain[f"blocks.1.hook_{name}"] for name in ("ssm_input", "B", "C"))
        h = value
        for t in range(4, 7):
            decay = torch.exp(delta[:, t, :, None] * plain["blocks.1.hook_A"])
            h = decay * h + (delta[:, t] * x[:, t])[..., None] * B[:, t, None]
            torch.testing.assert_close(y[:, t], (h * C[:, t, None]).sum(-1).detach(), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(
        ("patch", "word"), [({9: 0.0}, "9 positions"), (7, "mapping"), ({0: torch.zeros(5)}, r"\(5,\)")]
    )
    def test_bad_patches(self, small, tokens, patch, word):
        with pytest.raises(ValueError, match=word):
            self.states(small, tokens, patch)


class TestModuleNames:
    """`mixer.in_proj`, `conv1d`, `x_proj`, `dt_proj`, `out_proj`: `.output` of all five."""

    @pytest.mark.parametrize("name", ["in_proj", "conv1d", "x_proj", "dt_proj", "out_proj"])
    def test_reading(self, small, tokens, name):
        with torch.no_grad(), small.trace(tokens):
            value = small.layers[1].mixer.get(name).output.save()
        plain = {k.removeprefix("blocks.1.hook_"): v for k, v in forward_by_hand(small._module, tokens).items()}
        plain["in_proj"] = torch.cat([plain["in_proj"], plain["skip"]], -1)
        plain["x_proj"] = torch.cat([plain["delta_1"], plain["B"], plain["C"]], -1)
        plain["conv1d"], plain["dt_proj"] = plain["conv"].mT, plain["delta_2"]
        torch.testing.assert_close(value, plain[name].detach(), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("name", ["in_proj", "conv1d", "x_proj", "dt_proj", "out_proj"])
    @pytest.mark.parametrize("how", ["assign", "in place"])
    def test_writing(self, small, tokens, name, how):
        index = (slice(None), slice(None), 4) if name == "conv1d" else (slice(None), 4)
        with torch.no_grad(), small.trace(tokens):
            module = small.layers[1].mixer.get(name)
            if how == "assign":
                value = module.output.clone()
                value[index] += 1.0
                module.output = value
            else:
                module.output[index] += 1.0
            after = small.layers[1].mixer.out_proj.output.clone().save()
            logits = small.lm_head.output.save()
        before = plain_logits(small, tokens)
        assert (logits[:, :4] - before[:, :4]).abs().max() < 1e-6
        assert (logits[:, 4] - before[:, 4]).abs().max() > 1e-3
        assert after.shape == (4, 9, 12)

    def test_in_execution_order_in_one_trace(self, small, tokens):
        with torch.no_grad(), small.trace(tokens):
            mixer = small.layers[1].mixer
            shapes = [
                tuple(mixer.in_proj.output.shape),
                tuple(mixer.conv1d.output.shape),
                tuple(mixer.x_proj.output.shape),
                tuple(mixer.dt_proj.output.shape),
                tuple(mixer.out_proj.output.shape),
            ].save()
        assert shapes == [(4, 9, 48), (4, 24, 9), (4, 9, 11), (4, 9, 24), (4, 9, 12)]


def test_all_sites_in_one_trace(small, tokens):
    with torch.no_grad(), small.trace(tokens):
        values = {}
        for name in SITES:
            site = SITES[name]
            values[name] = getattr(owner(small, site, 1), site.attribute).clone()
        out = values.save()
    plain = forward_by_hand(small._module, tokens)
    for name, value in out.items():
        key = f"hook_{name}" if SITES[name].owner == "model" else f"blocks.1.hook_{name}"
        torch.testing.assert_close(value, plain[key].detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in LAYER_SITES if SITES[name].by_position])
def test_invokes_see_and_edit_their_own_rows(small, tokens, name):
    site = SITES[name]
    with torch.no_grad(), small.trace() as tracer:
        with tracer.invoke(tokens[:1]):
            getattr(owner(small, site, 1), site.attribute)[:, 4] += 1.0
            edited = small.lm_head.output.save()
        with tracer.invoke(tokens[1:]):
            seen = getattr(owner(small, site, 1), site.attribute).clone().save()
            others = small.lm_head.output.save()
    plain = plain_logits(small, tokens)
    torch.testing.assert_close(others, plain[1:], rtol=0, atol=1e-5)
    torch.testing.assert_close(seen, read(small, tokens, name)[1:], rtol=1e-5, atol=1e-5)
    assert (edited[:, 4] - plain[:1, 4]).abs().max() > 1e-4
    with torch.no_grad(), small.trace(tokens[:1]):
        getattr(owner(small, site, 1), site.attribute)[:, 4] += 1.0
        alone = small.lm_head.output.save()
    torch.testing.assert_close(edited, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SITES)
def test_gradients_reach_every_site(tokens, name):
    """`.grad` of a site that was only read, against a finite difference of the site's own patch in float64."""
    model = wrap(random_mamba(dtype=torch.float32), None, model_id="random")
    site, step = SITES[name], 1e-2
    with model.trace(tokens):
        value = getattr(owner(model, site, 1), site.attribute)
        loss = model.lm_head.output[:, -1].pow(2).sum()
        with loss.backward():
            grad = value.grad.save()
    direction = torch.randn(grad.shape, generator=torch.Generator().manual_seed(0)) / grad.norm().clamp(min=1e-3)
    direction = grad / grad.norm() if grad.norm() > 0 else direction
    losses = []
    for sign in (1, -1):
        with torch.no_grad(), model.trace(tokens):
            edited = getattr(owner(model, site, 1), site.attribute)
            if name == "h":
                stages = model.layers[1].mixer
                stages.scan(lambda t, h, s=sign: h + s * step * direction[:, t])
            else:
                edited += sign * step * direction
            losses.append(model.lm_head.output[:, -1].pow(2).sum().item())
        losses = list(losses)
    measured = (losses[0] - losses[1]) / (2 * step)
    expected = (grad * direction).sum().item()
    assert measured == pytest.approx(expected, rel=2e-2, abs=2e-3)


def test_a_trace_with_the_generation_cache(small, tokens):
    with torch.no_grad(), small.trace(tokens, use_cache=True):
        small.layers[1].mixer.scan()
        logits = small.lm_head.output.save()
    torch.testing.assert_close(logits, plain_logits(small, tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_short_prompts(small, tokens, length):
    with torch.no_grad(), small.trace(tokens[:, :length]):
        h = small.layers[1].mixer.scan().save()
        terms = small.layers[2].mixer.conv_slice.save()
        logits = small.lm_head.output.save()
    assert h.shape[1] == terms.shape[1] == length
    torch.testing.assert_close(logits, plain_logits(small, tokens[:, :length]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches(small, tokens, side):
    mask = torch.ones_like(tokens)
    padding = slice(0, 3) if side == "left" else slice(6, 9)
    mask[0, padding] = 0
    with torch.no_grad():
        expected = small._module(tokens, attention_mask=mask, use_cache=False).logits
    with torch.no_grad(), small.trace(input_ids=tokens, attention_mask=mask):
        for layer in small.layers:
            layer.mixer.scan()
        logits = small.lm_head.output.save()
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.bfloat16, 5e-2)])
def test_other_precisions(tokens, dtype, tolerance):
    model = wrap(random_mamba(dtype=dtype), None, model_id="random")
    with torch.no_grad(), model.trace(tokens):
        h = model.layers[1].mixer.scan().save()
        logits = model.lm_head.output.save()
    assert h.dtype == torch.promote_types(dtype, torch.float32)
    expected = plain_logits(model, tokens)
    assert (logits - expected).abs().max() < tolerance * expected.abs().max()


def test_the_repr_lists_the_sites_with_their_shapes(small):
    text = repr(small.layers[0])
    for name in LAYER_SITES:
        assert f"({SITES[name].attribute}) -> Float[Tensor, '{' '.join(SITES[name].shape)}']" in text


def test_every_site_is_documented():
    for site in SITES.values():
        from mamba_ioi.trace.sites import LayerEnvoy, MixerEnvoy, ModelSites

        cls = {"model": ModelSites, "layer": LayerEnvoy, "mixer": MixerEnvoy}[site.owner]
        assert getattr(cls, site.attribute).__doc__


TOGETHER = [
    *(("A", name) for name in ("delta_2", "delta", "B_bar", "y")),
    *(("A_bar", "B_bar"), ("delta", "y"), ("y", "ssm_output"), ("delta_2", "after_skip"), ("conv_slice", "conv")),
    *(("delta_1", "B"), ("B", "C"), ("C", "B"), ("C", "delta_1"), ("in_proj", "gate"), ("gate", "in_proj")),
]


@pytest.mark.parametrize(("first", "second"), TOGETHER)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("between", [None, "first", "second"])
def test_values_read_together_can_be_edited_afterwards(small, tokens, first, second, grad, between):
    """Every edit counts, whatever was read before or between; what is edited is what the site then has."""
    values = cache(small, tokens, [("skip" if name == "gate" else name, 1) for name in (first, second)])
    new = {
        name: value * factor for name, value, factor in zip((first, second), values.values(), (0.5, 0.25), strict=True)
    }

    def at(name):
        return small.layers[1] if name == "in_proj" else small.layers[1].mixer

    with torch.set_grad_enabled(grad), small.trace(tokens):
        a, b = getattr(at(first), first), getattr(at(second), second)
        a[...] = new[first]
        if between is not None:
            getattr(at(first if between == "first" else second), first if between == "first" else second)
        b[...] = new[second]
        both = small.lm_head.output.save()
    with torch.no_grad(), small.trace(tokens):
        setattr(at(first), first, new[first])
        setattr(at(second), second, new[second])
        expected = small.lm_head.output.save()
    torch.testing.assert_close(both, expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad(), small.trace(tokens):
        setattr(at(first), first, new[first])
        alone = small.lm_head.output.save()
    assert (expected - alone).abs().max() > 1e-4


@pytest.mark.parametrize("order", ["delta h", "h delta", "assigned"])
def test_states_edited_at_a_position_follow_what_they_are_made_from(small, tokens, order):
    delta = cache(small, tokens, [("delta", 1)])["delta", 1]
    with torch.no_grad(), small.trace(tokens):
        mixer = small.layers[1].mixer
        if order == "delta h":
            step, h = mixer.delta, mixer.h
        else:
            h, step = mixer.h, mixer.delta
        if order == "assigned":
            mixer.delta = delta * 0.5
        else:
            step[...] = delta * 0.5
        h[:, 5] = 0.0
        found = small.lm_head.output.save()
    with torch.no_grad(), small.trace(tokens):
        mixer = small.layers[1].mixer
        mixer.delta = delta * 0.5
        mixer.scan({5: torch.zeros(())})
        expected = small.lm_head.output.save()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
