"""A Mamba-2 under the methods: what is planted in it is found, and what is computed is what a forward by hand gives."""

from __future__ import annotations

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mamba_ioi
from mamba_ioi import IOIDataset, Patch, cache, run
from mamba_ioi.experiments import conv_slices, state_similarity
from mamba_ioi.interventions.patch import Resample
from mamba_ioi.interventions.readout import Readout
from mamba_ioi.interventions.sweep import sweep
from mamba_ioi.models.model import MambaModel, wrap

from .conftest import random_mamba2
from .plain import forward_by_hand


def drawn(seed: int) -> dict:
    """A planted Mamba-2's arguments, drawn at random; it has a layer that sets the flag."""
    rng = random.Random(f"mamba2 {seed}")
    n_layers = rng.randint(2, 4)
    return {
        "family": "mamba2",
        "n_layers": n_layers,
        "layer": rng.randrange(1, n_layers),
        "slice": rng.choice((0, -1, -2, -3)),
        "n_names": rng.randint(6, 9),
        "seed": rng.randrange(10**6),
    }


@pytest.fixture(scope="module", params=[1, 2])
def model(request: pytest.FixtureRequest) -> MambaModel:
    return mamba_ioi.planted(**drawn(request.param))


@pytest.fixture(scope="module")
def data(model: MambaModel) -> IOIDataset:
    return IOIDataset.generate(model.tokenizer, 5, seed=11)


def right(model: MambaModel, data: IOIDataset, patches: list[Patch]) -> list[bool]:
    """Whether each prompt's most likely token is the answer."""
    logits = run(model, data.clean_tokens, patches, positions=data.last_position)
    return (logits.argmax(-1) == data.answers).tolist()


# ---------------------------------------------------------------------------------------------------------------------
# The channels of x, B and C
# ---------------------------------------------------------------------------------------------------------------------


def test_names_come_in_through_the_channels_of_x(model, data) -> None:
    """Pairs differ in a name; the flag, which goes through B, is the same in both."""
    everything = conv_slices(model, data, progress=False)
    names = {channels: conv_slices(model, data, channels=channels, progress=False) for channels in ("x", "B", "C")}
    assert names["B"].meta["arguments"]["channels"] == "B" and everything.meta["arguments"]["channels"] is None
    effects = {channels: torch.from_numpy(result.table.effect.to_numpy().copy()) for channels, result in names.items()}
    torch.testing.assert_close(
        effects["x"], torch.from_numpy(everything.table.effect.to_numpy().copy()), rtol=1e-5, atol=1e-6
    )
    assert effects["x"].max() > 0.99 and set(everything.table.slice[effects["x"].numpy() > 0.01]) == {
        model.planted.slice
    }
    assert effects["B"].abs().max() < 1e-3 and effects["C"].abs().max() < 1e-3


@pytest.mark.parametrize("channels", ["x", "B", "C"])
@pytest.mark.parametrize("slice", [-3, -2, -1, 0])
def test_names_and_their_flags_come_in_through_one_slice(model, data, channels, slice) -> None:
    """Without the terms of x no name comes in; without those of B none is told from what comes after the place."""
    found = right(model, data, [Patch("conv_slice", model.planted.layer, 0.0, None, slice, channels)])
    needed = slice == model.planted.slice and channels in "xB"
    assert not any(found) if needed else all(found)


def part_of(value: Tensor, model: MambaModel, channels: str) -> Tensor:
    """A view of the channels of x, B or C, which are the value's third dimension."""
    shared = model.n_groups * model.d_state
    return value.split([model.d_inner, shared, shared], dim=2)["xBC".index(channels)]


@pytest.mark.parametrize("site", ["in_proj", "conv_slice", "conv"])
@pytest.mark.parametrize("channels", ["x", "B", "C"])
def test_a_change_of_some_channels(model, data, site, channels) -> None:
    """By number, by tensor, by callable, in a sweep and resampled: against the forward by hand, and nowhere else."""
    layer, ids, corrupt = 0, data.clean_tokens[:3], data.corrupt_tokens[:3]
    exact, key = model._module, f"blocks.0.hook_{site}"
    there = forward_by_hand(exact, corrupt)[key]
    tap = -1 if site == "conv_slice" else None

    def expected(change) -> Tensor:
        def edit(value: Tensor) -> Tensor:
            value = value.clone()
            view = part_of(value, model, channels)
            view = view if tap is None else view[..., tap - 1]
            view[:, [4, 9]] = change(view[:, [4, 9]])
            return value

        return forward_by_hand(exact, ids, {(site, layer): edit})

    def check(found: Tensor, by_hand: Tensor) -> None:
        torch.testing.assert_close(found, by_hand, rtol=1e-4, atol=1e-4)

    with torch.no_grad():
        other = part_of(there, model, channels)[:, [4, 9]]
        other = other if tap is None else other[..., tap - 1]
        for value, change in (
            (0.25, lambda view: 0.25),
            (other, lambda view: other),
            (lambda view: view * -2, lambda view: view * -2),
        ):
            patch = Patch(site, layer, value, [4, 9], tap, channels)
            by_hand = expected(change)
            check(run(model, ids, [patch], positions="all"), by_hand["hook_logits"])
            check(cache(model, ids, [key], patches=[patch])[key], by_hand[key])
        readout = Readout.of(data[:3])
        resampled = [[Resample(site, layer, [4, 9], tap, channels)]]
        found = sweep(model, ids, resampled, readout, source=corrupt)[0]
        logits = expected(lambda view: other)["hook_logits"][torch.arange(3), data.last_position[:3]]
    check(found, logits.gather(1, readout.read))


def test_channels_that_are_not_there(model, data) -> None:
    for patch, words in (
        (Patch("conv", 1, 0.0, channels="D"), "channels are one of x, B, C, or None for all of them, not 'D'"),
        (Patch("conv", 1, 0.0, channels=["x"]), "channels are one of x, B, C"),
        (Patch("ssm_input", 1, 0.0, channels="x"), "channels='x' at the site 'ssm_input'"),
        (Patch("conv", 1, torch.zeros(3), channels="B"), r"does not fit the site 'conv' there, \(1, 20, 32\)"),
    ):
        with pytest.raises(ValueError, match=words):
            run(model, data.clean_tokens[:1], [patch])
    tiny = mamba_ioi.load_model("tiny")
    pairs = IOIDataset.generate(tiny.tokenizer, 1)
    with pytest.raises(ValueError, match=r"channels='B' at the site 'conv_slice' of tiny: .* in a Mamba-2"):
        conv_slices(tiny, pairs, 0, channels="B")


# ---------------------------------------------------------------------------------------------------------------------
# Against a forward by hand
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny", "tiny-mamba2"])
def test_what_tokens_write_beside_the_states(name) -> None:
    model, text = mamba_ioi.load_model(name), "<|endoftext|>Then, Mary and John went to the store"
    table = state_similarity(model, text, 1, progress=False).table
    acts = forward_by_hand(copy.deepcopy(model._module).double(), model.to_tokens(text)[0])
    write, h = (acts[f"blocks.1.hook_{site}"][0].flatten(1) for site in ("write", "h"))
    expected = F.cosine_similarity(write[:, None], h[None], dim=-1)
    torch.testing.assert_close(
        torch.tensor(table.similarity.to_numpy()), expected.detach().flatten(), rtol=1e-4, atol=1e-5
    )


EXACT = wrap(random_mamba2(4, torch.float64), None, model_id="random")
LENGTHS = [7, 250]
"""Shorter than our chunk of 96 positions, and longer than it; both longer than transformers' own, of 3."""


@pytest.mark.parametrize("length", LENGTHS)
def test_our_own_chain_in_float64(length) -> None:
    """To 1e-6 of each site's largest value; transformers' own forward, which norms in float32, to 1e-5."""
    model = EXACT
    ids = torch.randint(0, 61, (2, length), generator=torch.Generator().manual_seed(length))
    with torch.no_grad():
        expected, untouched = forward_by_hand(model._module, ids), model._module(ids, use_cache=False).logits
        found = cache(model, ids, list(model.known_sites()))
        logits = run(model, ids, [Patch("h", 1, lambda h: h, [2])], positions="all")
        plain = run(model, ids, positions="all")
    assert len(found) == 3 * 23 + 3
    for key, value in found.items():
        assert (value - expected[key]).abs().max() < 1e-6 * expected[key].abs().max() + 1e-12, key
    by_hand = expected["hook_logits"]
    for given, limit in ((plain, 1e-6), (logits, 1e-6), (untouched, 1e-5)):
        assert (given - by_hand).abs().max() < limit * by_hand.abs().max()


@pytest.mark.parametrize("name", EXACT.known_sites())
def test_its_own_values_change_nothing(name) -> None:
    """Written back at some positions of a prompt of several chunks; other values there do change the run."""
    model, site = EXACT, EXACT.known_sites()[name]
    ids = torch.randint(0, 61, (2, 110), generator=torch.Generator().manual_seed(5))
    layer, positions = (None if site.owner == "model" else 1), [0, 50, 97] if site.by_position else None
    key = f"hook_{name}" if layer is None else f"blocks.1.hook_{name}"
    own = cache(model, ids, [key])[key]
    own = own if positions is None else own[:, positions]
    expected = run(model, ids, positions="all")
    found = run(model, ids, [Patch(name, layer, own, positions)], positions="all")
    assert (found - expected).abs().max() < 1e-6 * expected.abs().max()
    moved = run(model, ids, [Patch(name, layer, own + 0.5, positions)], positions="all")
    assert (moved - expected).abs().max() > 1e-3
