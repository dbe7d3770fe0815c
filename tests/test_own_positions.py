"""Patches at each row's own positions: against the equations by hand, each row alone, and the sweep."""

from __future__ import annotations

import pytest
import torch

from mamba_ioi import generate
from mamba_ioi.interventions.patch import Patch, Resample
from mamba_ioi.interventions.readout import Readout
from mamba_ioi.interventions.run import cache, run
from mamba_ioi.interventions.sweep import sweep
from mamba_ioi.models.model import wrap
from mamba_ioi.trace.sites import SITES

from .conftest import random_mamba
from .plain import forward_by_hand

BY_POSITION = [name for name, site in SITES.items() if site.by_position]
SWEPT = [name for name in BY_POSITION if SITES[name].owner != "model"]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # the RMSNorm of transformers computes in float32
OWN = torch.tensor([[1, 5], [3, -1], [-1, -1], [8, 0]])


@pytest.fixture(scope="module")
def double():
    return wrap(random_mamba(seed=2).double(), None, model_id="double")


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 61, (4, 9), generator=torch.Generator().manual_seed(1))


def layer_of(site: str) -> int | None:
    return None if SITES[site].owner == "model" else 1


def value_for(model, site: str, *sizes: int, tap: bool = False) -> torch.Tensor:
    letters = SITES[site].shape[2 : -1 if tap else None]
    shape = [model.sizes()[letter] for letter in letters]
    value = torch.rand(*sizes, *shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return 0.1 + value  # of positive steps, so that no logarithm is asked for


def by_hand(model, ids, site: str, make, tap: int | None = None):
    """Logits by the equations, the site's value passing through ``make(there, row, column)`` at each own position."""

    def put(value, t=None):
        value = value.clone()
        for row, column in (OWN >= 0).nonzero().tolist():
            position = int(OWN[row, column])
            if t is None:
                target = value[row, position] if tap is None else value[row, position][..., tap - 1]
                target[...] = make(target.clone(), row, column)
            elif t == position:
                value[row] = make(value[row].clone(), row, column)
        return value

    with torch.no_grad():
        return forward_by_hand(model._module, ids, {(site, layer_of(site)): put})["hook_logits"]


@pytest.mark.parametrize("site", BY_POSITION)
def test_every_site_against_the_equations(double, ids, site: str) -> None:
    value = value_for(double, site, 4, 2)
    found = run(double, ids, [Patch(site, layer_of(site), value, OWN)], positions="all")
    expected = by_hand(double, ids, site, lambda there, row, column: value[row, column])
    torch.testing.assert_close(found, expected, **CLOSE)
    plain = run(double, ids, positions="all")
    changed = [(found[row] - plain[row]).abs().max() > 1e-3 for row in range(4)]
    assert changed == [True, True, False, True], "a row without positions runs as it is"


@pytest.mark.parametrize("site", ["layer_input", "h", "conv_slice", "delta", "logits"])
def test_values_that_broadcast_and_callables(double, ids, site: str) -> None:
    for shape in ((1, 1), (4, 1), (1, 2)):
        value = value_for(double, site, *shape)
        found = run(double, ids, [Patch(site, layer_of(site), value, OWN)], positions="all")
        whole = value.expand(4, 2, *value.shape[2:])
        expected = by_hand(double, ids, site, lambda there, row, column, whole=whole: whole[row, column])
        torch.testing.assert_close(found, expected, **CLOSE)
    found = run(double, ids, [Patch(site, layer_of(site), 0.25, OWN)], positions="all")
    expected = by_hand(double, ids, site, lambda there, row, column: torch.full_like(there, 0.25))
    torch.testing.assert_close(found, expected, **CLOSE)
    seen = []

    def half(there):
        seen.append(tuple(there.shape[:2]))
        return there / 2

    found = run(double, ids, [Patch(site, layer_of(site), half, OWN)], positions="all")
    torch.testing.assert_close(found, by_hand(double, ids, site, lambda there, row, column: there / 2), **CLOSE)
    assert set(seen) == ({(4, 1)} if site == "h" else {(4, 2)})


def test_one_tap_at_own_positions(double, ids) -> None:
    value = value_for(double, "conv_slice", 4, 2, tap=True)
    found = run(double, ids, [Patch("conv_slice", 1, value, OWN, slice=-2)], positions="all")
    expected = by_hand(double, ids, "conv_slice", lambda there, row, column: value[row, column], tap=-2)
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("site", SWEPT)
def test_the_sweep_equals_a_run_of_each_row(small, ids, site: str) -> None:
    """Values from a source run and values that are given, mixed with changes at common positions."""
    source = ids.clone()
    source[0, 3:], source[1, 1:], source[3, 0] = (ids[0, 3:] + 1) % 61, (ids[1, 1:] + 2) % 61, (ids[3, 0] + 5) % 61
    last = torch.tensor([8, 7, 8, 6])
    own = torch.tensor([[1, 5], [3, -1], [2, 4], [6, 0]])
    zeros = torch.zeros(4, dtype=torch.long)
    tokens = torch.arange(12).view(4, 3)
    readout = Readout(tokens, last, zeros, zeros + 1, zeros[:, None])
    value = value_for(small, site, 4, 2).float()
    there = cache(small, source, [(site, 0)])["blocks.0.hook_" + site]
    picked = there[torch.arange(4)[:, None], own.clamp(min=0)]
    interventions = [
        [],
        [Resample(site, 0, own)],
        [Patch(site, 2, value, own)],
        [Patch(site, 2, value[:1, :1], own[:, :1])],
        [Resample(site, 0, own), Patch("out_proj", 1, 0.0, [4])],
        [Resample(site, 0, own), Resample("layer_input", 2, 5)],
        [Resample(site, 0, torch.full((4, 1), -1))],
    ]
    plainly = [
        [],
        [Patch(site, 0, picked, own)],
        [Patch(site, 2, value, own)],
        [Patch(site, 2, value[:1, :1], own[:, :1])],
        [Patch(site, 0, picked, own), Patch("out_proj", 1, 0.0, [4])],
        [
            Patch(site, 0, picked, own),
            Patch("layer_input", 2, cache(small, source, [("layer_input", 2)])["layer_input", 2][:, [5]], 5),
        ],
        [],
    ]
    found = sweep(small, ids, interventions, readout, source=source)
    for number, patches in enumerate(plainly):
        expected = run(small, ids, patches, positions=last).gather(1, tokens)
        torch.testing.assert_close(found[number], expected, rtol=2e-5, atol=2e-5)
        for row in range(4 if number in (1, 4) else 0):  # and each row alone, at the positions it has as a list
            alone = []
            for patch in patches:
                at, new = patch.positions, patch.value
                if isinstance(at, torch.Tensor):
                    has = at[row] >= 0
                    at = at[row][has].tolist()
                    new = new.expand(4, has.shape[0], *new.shape[2:])[row : row + 1, has]
                elif isinstance(new, torch.Tensor):
                    new = new[row : row + 1]
                alone.append(Patch(patch.site, patch.layer, new, at))
            single = run(small, ids[row : row + 1], alone, positions=last[row : row + 1]).gather(
                1, tokens[row : row + 1]
            )
            torch.testing.assert_close(found[number, row], single[0], rtol=2e-5, atol=2e-5)


def test_cache_memory_and_generation(small, ids) -> None:
    patch = Patch("h", 1, 0.0, OWN)
    whole = cache(small, ids, [("h", 1), ("y", 2)], patches=[patch])
    for row in range(4):
        at = OWN[row][OWN[row] >= 0].tolist()
        alone = cache(small, ids[row : row + 1], [("h", 1), ("y", 2)], patches=[Patch("h", 1, 0.0, at)] if at else [])
        for key, value in whole.items():
            torch.testing.assert_close(value[row], alone[key][0], rtol=1e-5, atol=1e-6)
    parts = cache(small, ids, [("h", 1), ("y", 2)], patches=[patch], batch_rows=3)
    for key, value in whole.items():
        torch.testing.assert_close(parts[key], value, rtol=1e-5, atol=1e-6)
    made = generate(small, ids, 3, patches=[Patch("out_proj", 0, 3.0, OWN)])
    text = ids
    for _ in range(3):
        logits = run(small, text, [Patch("out_proj", 0, 3.0, OWN)])
        text = torch.cat([text, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(made, text)


@pytest.mark.untyped
def test_tensors_lists_and_arrays_say_the_same(small, ids) -> None:
    at = {"own": OWN, "lists": OWN.tolist(), "numpy": OWN.numpy()}
    found = [run(small, ids, [Patch("ssm_input", 1, 0.5, where)]) for where in at.values()]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (OWN[:3], r"each row's own positions are whole numbers of shape \[4, k\], not of shape \(3, 2\)"),
        (OWN.float(), "not torch.float32"),
        (OWN + 1, "row 3 of a patch's positions: 9 is no position of a prompt with 9 positions"),
        (OWN - 1, "row 1 of a patch's positions: -2 is no position"),
        (torch.tensor([[0, 1], [2, 2], [0, 1], [0, 1]]), "row 1 of a patch's positions names position 2 twice"),
        ([[0], [1], [2, 3], [4]], r"whole numbers of shape \[4, k\], not \[\[0\]"),
        (OWN[:, :0], "not of shape"),
    ],
)
def test_own_positions_that_do_not_fit(small, ids, positions, message: str) -> None:
    zeros = torch.zeros(4, dtype=torch.long)
    readout = Readout(zeros[:, None], zeros + 8, zeros, zeros, zeros[:, None])
    for use in (
        lambda: run(small, ids, [Patch("layer_input", 1, 0.0, positions)]),
        lambda: sweep(small, ids, [[Resample("layer_input", 1, positions)]], readout, source=ids),
    ):
        with pytest.raises(ValueError, match=message):
            use()
    with pytest.raises(ValueError, match="has no positions"):
        run(small, ids, [Patch("A", 1, 0.0, OWN)])
    with pytest.raises(ValueError, match="does not fit"):
        run(small, ids, [Patch("layer_input", 1, torch.zeros(4, 3, small.d_model), OWN)])
