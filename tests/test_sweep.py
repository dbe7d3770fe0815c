"""The sweep against a plain run of every intervention, whatever its memory, and what it leaves out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mamba_ioi.interventions.batches import entries
from mamba_ioi.interventions.patch import Patch, Resample
from mamba_ioi.interventions.readout import Readout
from mamba_ioi.interventions.run import cache, run
from mamba_ioi.interventions.sweep import Budget, sweep
from mamba_ioi.models.model import wrap
from mamba_ioi.trace.sites import SITES

from .conftest import random_mamba

SWEPT = [name for name, site in SITES.items() if site.owner != "model" and site.by_position]


@pytest.fixture(scope="module")
def prompts():
    """Clean and source tokens [7, 9] that part at different positions (one pair never), and where to read."""
    g = torch.Generator().manual_seed(5)
    clean = torch.randint(0, 61, (7, 9), generator=g)
    source = clean.clone()
    for row, position in enumerate([0, 2, 2, 5, 8, 3]):
        source[row, position:] = torch.randint(0, 61, (9 - position,), generator=g)
        source[row, position] = (clean[row, position] + 1) % 61
    last = torch.tensor([8, 8, 7, 8, 8, 6, 8])
    return clean, source, last


def readout(last):
    columns = torch.zeros(len(last), dtype=torch.long)
    tokens = torch.randint(0, 61, (len(last), 3), generator=torch.Generator().manual_seed(6))
    return Readout(tokens, last, columns, columns + 1, columns[:, None])


def plainly(model, clean, source, interventions, read):
    """A run of every intervention over the whole prompts, values from the source run's cache."""
    results = []
    for changes in interventions:
        patches = []
        for change in changes:
            if isinstance(change, Resample):
                key = f"hook_{change.site}" if change.layer is None else f"blocks.{change.layer}.hook_{change.site}"
                value = cache(model, source, [key])[key]
                value = value if change.slice is None else value[..., change.slice - 1]
                if change.positions is not None:
                    at = [change.positions] if isinstance(change.positions, int) else list(change.positions)
                    value = value[:, at]
                change = Patch(change.site, change.layer, value, change.positions, change.slice)
            patches.append(change)
        logits = run(model, clean, patches, positions=read.last)
        results.append(logits.gather(1, read.tokens))
    return torch.stack(results)


def check(model, prompts, interventions, **kwargs):
    clean, source, last = prompts
    read = readout(last)
    expected = plainly(model, clean, source, interventions, read)
    torch.testing.assert_close(
        sweep(model, clean, interventions, read, source=source, **kwargs), expected, rtol=1e-5, atol=1e-5
    )
    return expected


@pytest.mark.slow
@pytest.mark.parametrize("site", SWEPT)
def test_one_site_at_every_layer_and_position(small, prompts, site):
    cells = [[Resample(site, layer, position)] for layer in range(3) for position in range(9)]
    expected = check(small, prompts, [[], *cells])
    assert (expected[1:] - expected[0]).abs().max() > 1e-3


@pytest.mark.parametrize("tap", [-3, -2, -1, 0])
def test_conv_slices(small, prompts, tap):
    check(small, prompts, [[Resample("conv_slice", 1, position, tap)] for position in range(9)])


@pytest.mark.parametrize("positions", [None, (1, 4), (8,), (3, 0)])
def test_several_positions_and_layers_at_once(small, prompts, positions):
    together = [Resample("in_proj", 0, positions), Resample("h", 2, positions), Resample("skip", 1, 6)]
    check(small, prompts, [together, together[1:], [Resample("embed", None, positions)], []])


@pytest.mark.parametrize("memory", [100_000, 10**9])
def test_candidates_of_a_search_share_what_lies_below_their_difference(prompts, memory, monkeypatch):
    """Each candidate restores one of the resampled layers: it runs from that layer on, not from the first."""
    model = wrap(random_mamba(seed=2, num_hidden_layers=5), None, model_id="random")
    monkeypatch.setattr(model, "memory", memory)
    orders = []
    monkeypatch.setattr(
        "mamba_ioi.interventions.sweep.entries", lambda *given: orders.append(entries(*given)) or orders[-1]
    )
    everything = [Resample("in_proj", layer) for layer in range(5)]
    candidates = [everything[:layer] + everything[layer + 1 :] for layer in range(5)]
    check(model, prompts, [everything, *candidates, everything])
    if memory == 10**9:
        for order in orders:
            assert [entry.layer for entry in order] == [0, 1, 1, 2, 3, 4, 4]


def test_different_changes_share_only_what_is_the_same(small, prompts):
    """Mixed sites, positions, taps and given values at all layers, every subset of them."""
    value = torch.randn(7, 9, 12, generator=torch.Generator().manual_seed(8))
    changes = [
        Resample("in_proj", 0, (2, 4)),
        Patch("resid_pre", 1, value),
        Resample("conv_slice", 1, None, -1),
        Patch("resid_pre", 1, 2 * value[:, :2], (6, 7)),
        Resample("h", 2, 5),
    ]
    subsets = [[c for bit, c in enumerate(changes) if number >> bit & 1] for number in range(32)]
    check(small, prompts, [*subsets, changes[::-1], changes[1:4][::-1]])


def test_given_values(small, prompts):
    g = torch.Generator().manual_seed(7)

    def random(*shape):
        return torch.randn(*shape, generator=g)

    interventions = [
        [Patch("out_proj", 1, 0.0)],
        [Patch("ssm_input", 2, random(7, 1, 24), 3)],
        [Patch("h", 1, random(7, 2, 24, 4), [2, 5])],
        [Patch("h", 0, random(24, 4), 0), Patch("y", 2, random(7, 9, 24))],
        [Patch("conv_slice", 1, random(7, 2, 24), [1, 4], slice=-1)],
        [Patch("embed", None, random(7, 9, 12)), Resample("layer_input", 2, 5)],
        [Patch("delta", 0, 0.5, -1)],
    ]
    check(small, prompts, interventions)


@pytest.mark.parametrize("memory", [1, 100_000, 10**9])
def test_the_memory_changes_no_result(small, prompts, memory, monkeypatch):
    cells = [[Resample("layer_input", layer, position)] for layer in range(3) for position in range(9)]
    monkeypatch.setattr(small, "memory", memory)
    check(small, prompts, cells)
    if memory == 1:
        assert Budget.of(small, 9) == Budget(1, 1, 0)


def test_nothing_runs_where_the_prompts_have_not_parted(small, prompts, monkeypatch):
    import mamba_ioi.interventions.sweep as module

    started, run_batch = [], module.run_batch
    monkeypatch.setattr(
        module,
        "run_batch",
        lambda model, batch: started.append((batch.start, len(batch.rows))) or run_batch(model, batch),
    )
    clean, source, last = prompts
    sweep(small, clean, [[Resample("h", 1, position)] for position in range(9)], readout(last), source=source)
    # Row by row: from the position where it parts to its last one.
    expected = sum(max(0, end - start + 1) for start, end in zip([0, 2, 2, 5, 8, 3], [8, 8, 7, 8, 8, 6], strict=True))
    assert sum(rows for _, rows in started) == expected


@pytest.mark.parametrize(("positions", "runs"), [(9, 1), (5, 2), (0, 9)])
def test_the_source_prompts_run_once_where_their_values_fit(small, prompts, positions, runs, monkeypatch):
    import mamba_ioi.interventions.plan as module

    clean, source, last = prompts
    asked, read = [], module.read_sites
    monkeypatch.setattr(
        module, "read_sites", lambda model, ids, plan: asked.append(plan.reads) or read(model, ids, plan)
    )
    budget = replace(Budget.of(small, 9), values=positions * 3 * 7 * 24 * 4 * 4)  # layers, rows, E, N, bytes
    monkeypatch.setattr(Budget, "of", lambda *_: budget)
    cells = [[Resample("h", layer, position)] for layer in range(3) for position in range(9)]
    sweep(small, clean, cells, readout(last), source=source)
    assert len(asked) == runs and sum(map(len, asked)) == len(cells)


def test_a_resampled_value_counts_where_another_change_came_before(small, prompts):
    """Up to where the prompts part the source run has the clean value, but the patched run has another."""
    mixed = [
        [Patch("resid_pre", 0, 3.0, [1]), Resample("layer_input", 2, [1, 2, 3])],
        [Resample("conv", 1), Patch("embed", None, 0.5, 0)],
        [Patch("h", 0, 0.0, [0]), Resample("h", 1, [4])],
    ]
    check(small, prompts, mixed)


def test_length_one_and_float64():
    model = wrap(random_mamba(dtype=torch.float64), None, model_id="random")
    clean, source = torch.tensor([[3], [5]]), torch.tensor([[4], [5]])
    prompts = clean, source, torch.tensor([0, 0])
    check(model, prompts, [[Resample("layer_input", layer, 0)] for layer in range(3)])


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ([Resample("h", 1, 9)], "9 positions"),
        ([Resample("h", 3, 0)], "0 to 2"),
        ([Resample("nothing", 1)], "unknown site"),
        ([Resample("A", 1)], "positions"),
        ([Patch("norm", None, 0.0)], "inside the layers"),
        ([Patch("y", 0, torch.zeros(2))], r"\(2,\)"),
    ],
)
def test_bad_changes(small, prompts, changes, word):
    clean, source, last = prompts
    with pytest.raises(ValueError, match=word):
        sweep(small, clean, [changes], readout(last), source=source)


def test_a_resample_needs_a_source(small, prompts):
    clean, source, last = prompts
    with pytest.raises(ValueError, match="source"):
        sweep(small, clean, [[Resample("h", 1, 0)]], readout(last))
    with pytest.raises(ValueError, match="shape"):
        sweep(small, clean, [[Resample("h", 1, 0)]], readout(last), source=source[:, :5])


def test_callables_see_every_row(small, prompts):
    """Beside other changes, in the order given, and as a hook on the untouched model has it."""
    clean, _, last = prompts
    seen = []

    def scaled(view):
        seen.append(len(view))
        return view * torch.linspace(0.5, 2, len(view)).reshape(-1, *[1] * (view.dim() - 1))

    interventions = [
        [Patch("h", 1, scaled, [3])],
        [Resample("h", 1)],
        [Patch("resid_pre", 1, scaled)],
        [],
        [Patch("ssm_input", 0, scaled, [2, 5]), Resample("y", 2, [4])],
    ]
    expected = check(small, prompts, interventions)
    assert set(seen) == {7}
    rows = torch.linspace(0.5, 2, 7).reshape(-1, 1, 1)
    block = small._module.backbone.layers[1]
    handle = block.register_forward_pre_hook(lambda _, args: (args[0] * rows, *args[1:]))
    with torch.no_grad():
        hooked = small._module(clean).logits[torch.arange(7), last]
    handle.remove()
    torch.testing.assert_close(expected[2], hooked.gather(1, readout(last).tokens), rtol=1e-4, atol=1e-4)
