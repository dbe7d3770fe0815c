"""`cache` and `run` in batches of rows: no result depends on how many, and the memory that is allowed is kept to."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mamba_ioi import load_model
from mamba_ioi.interventions import run as running
from mamba_ioi.interventions.patch import Patch
from mamba_ioi.interventions.run import cache, run
from mamba_ioi.models.model import MambaModel
from mamba_ioi.trace.sites import SITES

from .plain import forward_by_hand

TEXTS = ["When John and Mary went to the shop, John gave the bag to", "Then Mary and Anna", "Anna and John had a long"]


@pytest.fixture(scope="module")
def plain(small: MambaModel, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every site, computed from the weights without the library."""
    with torch.no_grad():
        return forward_by_hand(small._module, tokens)


def counting(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each trace to come."""
    rows: list[int] = []
    for name in ("read_sites", "read_logits"):
        work = getattr(running, name)
        monkeypatch.setattr(
            running, name, lambda model, ids, *rest, work=work: rows.append(len(ids)) or work(model, ids, *rest)
        )
    return rows


@pytest.mark.parametrize("batch_rows", [None, 1, 3])
def test_positions_that_are_kept(small, tokens, plain, batch_rows) -> None:
    own = torch.tensor([[0, 8], [3, 2], [8, 1], [5, 5]])
    for positions, rows in ((4, [[4]] * 4), ([7, -9], [[7, 0]] * 4), (own, own.tolist())):
        found = cache(small, tokens, list(SITES), positions=positions, batch_rows=batch_rows)
        for key, value in found.items():
            expected = plain[key]
            if SITES[key.rpartition("hook_")[2]].by_position:
                expected = torch.stack([expected[row, at] for row, at in enumerate(rows)])
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-5)


def test_how_many_rows_run_at_once(small, tokens, plain, monkeypatch) -> None:
    rows = counting(monkeypatch)
    found = cache(small, tokens, ["A", "h"], batch_rows=3)
    assert rows == [3, 1]
    for key, value in found.items():
        torch.testing.assert_close(value, plain[key], rtol=0, atol=1e-5)
    monkeypatch.setattr(small, "memory", 1)
    assert_equal(cache(small, tokens, ["norm"])["norm"], plain["hook_norm"])
    assert rows[2:] == [1, 1, 1, 1]
    assert_equal(run(small, tokens), plain["hook_logits"][:, -1])
    assert rows[6:] == [1, 1, 1, 1]
    cache(small, tokens, ["norm"], batch_rows=4)
    assert rows[10:] == [4]
    for wrong in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="batch_rows must be a whole number of at least 1"):
            cache(small, tokens, ["norm"], batch_rows=wrong)


@pytest.mark.parametrize("name", SITES)
def test_each_row_gets_its_own_value(small, tokens, name, monkeypatch) -> None:
    """Values with rows, values that all rows share, and those whose first size only happens to be that of the rows."""
    site, layer = SITES[name], None if SITES[name].owner == "model" else 1
    sizes = {"B": 4, "L": 9, "D": 12, "E": 24, "N": 4, "R": 3, "K": 4, "V": 61}
    shape = [sizes[letter] for letter in site.shape]
    values = [
        torch.randn(shape[first:], generator=torch.Generator().manual_seed(2)).abs() for first in range(len(shape))
    ]
    rows = counting(monkeypatch)
    for value in values:
        value = -value if name == "A" else value
        whole = run(small, tokens, [Patch(name, layer, value)], positions="all")
        read = cache(
            small, tokens, ["resid_post"] if name != "logits" else ["logits"], patches=[Patch(name, layer, value)]
        )
        before = len(rows)
        with monkeypatch.context() as patch:
            patch.setattr(small, "memory", 1)
            assert_equal(run(small, tokens, [Patch(name, layer, value)], positions="all"), whole)
            assert_equal(run(small, tokens, [Patch(name, layer, value)]), whole[:, -1])
        again = cache(small, tokens, [*read], patches=[Patch(name, layer, value)], batch_rows=1)
        assert set(rows[before:]) == {1}
        for key in read:
            assert_equal(again[key], read[key])


def assert_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_tap_and_positions(small, tokens) -> None:
    value = torch.randn(4, 2, 24)
    patch = Patch("conv_slice", 1, value, [3, 5], slice=-1)
    whole = cache(small, tokens, ["conv_slice"], patches=[patch])["conv_slice", 1]
    apart = cache(small, tokens, ["conv_slice"], patches=[patch], batch_rows=1)["conv_slice", 1]
    assert_equal(apart, whole)
    assert torch.equal(whole[:, [3, 5], :, -2], value)


@pytest.mark.parametrize(
    ("positions", "words"),
    [
        (9, "position 9 is outside the prompt's 9 positions"),
        ([0, -10], "position -10 is outside the prompt's 9 positions"),
        (torch.tensor([[0], [1], [-1], [2]]), "position -1 is outside the prompt's 9 positions"),
        ([], "positions are an integer, a list of integers"),
        (1.0, "positions are an integer, a list of integers"),
        ([True], "positions are an integer, a list of integers"),
        ("all", "positions are an integer, a list of integers"),
        (torch.tensor([0, 1, 2, 3]), r"not a tensor of shape \(4,\): write positions\[:, None\] or a list"),
        (torch.zeros(3, 1, dtype=torch.long), r"here \[4, k\], not of shape \(3, 1\)"),
        (torch.zeros(4, 1, 1, dtype=torch.long), r"here \[4, k\], not of shape"),
    ],
)
def test_wrong_positions(small, tokens, positions, words) -> None:
    with pytest.raises(ValueError, match=words):
        cache(small, tokens, ["embed"], positions=positions)


def test_positions_twice(small, tokens) -> None:
    with pytest.raises(ValueError, match="an alias that names position 2: give one of the two"):
        cache(small, tokens, ["blocks.1.hook_h.2"], positions=1)


def test_no_position_of_a_text_is_padding() -> None:
    tiny = load_model("tiny")
    ids, last = tiny.to_tokens(TEXTS)
    own = cache(tiny, TEXTS, ["resid_post"], positions=last[:, None])["resid_post", 3]
    for row, text in enumerate(TEXTS):
        assert_equal(own[row, 0], cache(tiny, text, ["resid_post"])["resid_post", 3][0, -1])
    beyond = r"position \d+ is outside text 1, which has \d+ tokens"
    with pytest.raises(ValueError, match=beyond):
        cache(tiny, TEXTS, ["resid_post"], positions=int(last[0]))
    with pytest.raises(ValueError, match=beyond):
        cache(tiny, TEXTS, [f"blocks.1.hook_h.{int(last[0])}"])
    with pytest.raises(ValueError, match=beyond):
        run(tiny, TEXTS, positions=last[:1].expand(3))
    with pytest.raises(ValueError, match="position -1 "):
        cache(tiny, TEXTS, ["resid_post"], positions=-1)
    with pytest.raises(ValueError, match="position -2 counts from the end, and the texts end at different positions"):
        run(tiny, TEXTS, [Patch("resid_post", 1, 0.0, [0, -2])])
    one = run(tiny, TEXTS[:1], [Patch("resid_post", 1, 0.0, -1)])  # a text alone ends where its tokens do
    assert_equal(one, run(tiny, ids[:1, : last[0] + 1], [Patch("resid_post", 1, 0.0, -1)]))


MEASURED = """
import resource, torch
torch.set_num_threads(1)
from tests.conftest import random_mamba
from mamba_ioi import Patch, cache, run
from mamba_ioi.models.model import wrap
sizes = dict(hidden_size=128, num_hidden_layers=2, state_size=16, vocab_size=2000, time_step_rank=8)
model = wrap(random_mamba(**sizes), None, model_id="random")
model.memory = {memory}
ids = torch.randint(0, 2000, (96, 100))
work = lambda ids: {work}
work(ids[:1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = work(ids)
found = found.values() if isinstance(found, dict) else [found]
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before - sum(one.nbytes for one in found) // 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "work",
    [
        "run(model, ids, [Patch('A_bar', 1, 0.5)])",
        "cache(model, ids, ['h'], positions=[5])",
        "cache(model, ids, [('h', 1)])",
    ],
)
def test_the_memory_that_is_taken(work: str) -> None:
    """Beside the result 30 MB are used, and something for the allocator; all rows at once would take 157 MB for h."""
    command, root = [sys.executable, "-c", MEASURED.format(memory=30_000_000, work=work)], Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    assert int(done.stdout.split()[-1]) < 50_000
