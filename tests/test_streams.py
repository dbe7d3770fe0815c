"""Activations in batches and in folders: as `cache` gives them in one piece, batches as memory asks, kills survived."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mamba_ioi import IOIDataset, PromptPairs, StoredCache, activations, cache, cache_to
from mamba_ioi.interventions import run as running
from mamba_ioi.models.model import wrap

from .conftest import RANDOM
from .plain import NAMES, prompt_tokenizer

SITES = [("resid_post", 0), ("h", 1), "blocks.2.hook_conv.4", "norm"]


@pytest.fixture
def batches(monkeypatch):
    """The number of rows of each batch that runs."""
    asked, read = [], running.read_sites
    monkeypatch.setattr(
        running, "read_sites", lambda model, ids, plan: asked.append(len(ids)) or read(model, ids, plan)
    )
    return asked


@pytest.fixture(scope="module", params=RANDOM)
def model(request):
    return wrap(RANDOM[request.param](), None, model_id="random")


def equal(stored, expected) -> None:
    assert list(stored) == list(expected)
    for key, value in expected.items():
        torch.testing.assert_close(stored[key], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("positions", [None, [0, -1], torch.tensor([[1], [8], [0], [5]])], ids=str)
def test_batches_are_what_cache_gives_in_one_piece(model, tokens, positions) -> None:
    for site, layer in (("h", 1), ("embed", None), ("logits", None)):
        at = [site if layer is None else (site, layer)]
        expected = next(iter(cache(model, tokens, at, positions=positions, batch_rows=4).values()))
        parts = list(activations(model, tokens, site, layer, positions=positions, batch_rows=3))
        assert [len(part) for part in parts] == [3, 1]
        torch.testing.assert_close(torch.cat(parts), expected, rtol=0, atol=1e-6)


def test_an_alias_names_layer_and_position(model, tokens) -> None:
    (found,) = activations(model, tokens, "blocks.1.hook_ssm_input.3", None)
    torch.testing.assert_close(found, cache(model, tokens, [("ssm_input", 1)])["ssm_input", 1][:, 3])


def test_pairs_give_their_clean_prompts(model, tokens) -> None:
    other = (tokens + 1) % 61
    ids = torch.ones(4, dtype=torch.long)
    pairs = PromptPairs(clean_tokens=tokens, corrupt_tokens=other, answers=ids, corrupt_answers=2 * ids)
    (found,) = activations(model, pairs, "y", 2)
    torch.testing.assert_close(found, cache(model, tokens, [("y", 2)])["y", 2])


def test_texts_are_read_as_cache_reads_them() -> None:
    tokenizer = prompt_tokenizer(NAMES)
    model = wrap(RANDOM["mamba"](vocab_size=len(tokenizer)), tokenizer, model_id="random")
    texts = IOIDataset.generate(tokenizer, 2).clean_text
    found = torch.cat(list(activations(model, texts, "resid_post", 1, positions=3, batch_rows=1)))
    torch.testing.assert_close(found, cache(model, texts, [("resid_post", 1)], positions=3)["resid_post", 1])
    with pytest.raises(ValueError, match="outside text 1"):
        activations(model, [texts[0], texts[1][:20]], "resid_post", 1, positions=12)


def test_small_memory_asks_for_small_batches(model, tokens, batches, monkeypatch, tmp_path) -> None:
    """As `cache` sizes them, whatever is asked for, and each when it is wanted."""
    many = tokens.repeat(5, 1)
    monkeypatch.setattr(model, "memory", 2**30)
    expected = cache(model, many, ["h"])
    assert batches == [20]
    row = 4 * sum(value[0].numel() for value in expected.values())
    monkeypatch.setattr(model, "memory", 16 * row)
    cache(model, many, ["h"])
    rows = batches[1]
    assert 1 < rows < 16 and batches[1:] == [rows] * (20 // rows) + [20 % rows] * bool(20 % rows)
    sizes = batches[1:]
    del batches[:]
    stored = cache_to(tmp_path / "h", model, many, ["h"], progress=False)
    assert batches == sizes and [len(part) for part in stored.batches(("h", 0))] == sizes
    equal(stored, expected)
    del batches[:]
    monkeypatch.setattr(model, "memory", 1)
    stream = activations(model, many, "h", 1)
    first = next(stream)
    assert batches == [1] and len(first) == 1
    assert [len(part) for part in stream] == [1] * 19
    assert list(map(len, activations(model, many, "h", 1, batch_rows=8))) == [8, 8, 4]


@pytest.mark.parametrize("positions", [None, [0, -1]], ids=str)
def test_a_folder_is_what_cache_gives(model, tokens, tmp_path, positions, batches) -> None:
    sites = SITES if positions is None else [SITES[0], SITES[1], SITES[3]]
    folder = tmp_path / "folder"
    stored = cache_to(folder, model, tokens, sites, positions=positions, batch_rows=3, progress=False)
    expected = cache(model, tokens, sites, positions=positions)
    equal(stored, expected)
    torch.testing.assert_close(stored["h", 1], expected["h", 1])
    torch.testing.assert_close(stored.rows(("h", 1), 2, 4), expected["h", 1][2:4])
    torch.testing.assert_close(stored.rows("norm", 1, 2), expected["norm"][1:2])
    torch.testing.assert_close(torch.cat(list(stored.batches("blocks.0.hook_resid_post"))), expected["resid_post", 0])
    assert sorted(path.name for path in folder.glob("*.*")) == [
        "meta.json",
        "rows-000000000-000000003.safetensors",
        "rows-000000003-000000004.safetensors",
    ]
    del batches[:]
    equal(
        cache_to(folder, model, tokens, sites, positions=positions, progress=False), expected
    )  # nothing is left to do
    assert batches == []
    equal(StoredCache(folder), expected)
    with pytest.raises(KeyError):
        _ = stored["y", 1]
    with pytest.raises(ValueError, match="stop must be a whole number from 1 to 4, not 5"):
        stored.rows("norm", 0, 5)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="where files are mapped is told by Linux alone")
def test_what_is_read_is_memory_mapped(model, tokens, tmp_path) -> None:
    stored = cache_to(tmp_path, model, tokens, [("resid_post", 0)], progress=False)
    value = stored["resid_post", 0]
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if f"{tmp_path}/rows" in line]
    spans = [tuple(int(end, 16) for end in line[0].split("-")) for line in maps]
    assert any(start <= value.data_ptr() < end for start, end in spans)


MEASURED = """
import sys, torch
from pathlib import Path
from mamba_ioi import activations, cache_to, load_model

torch.set_num_threads(1)

def bytes_of(name):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])

model = load_model("tiny")
model.memory = 50_000_000
tokens = torch.randint(5, 500, (2000, 20))
sites = [("resid_post", layer) for layer in range(model.n_layers)]
list(activations(model, tokens[:2], "resid_post", model.n_layers - 1))
before = bytes_of("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
stored = cache_to(sys.argv[1], model, tokens, sites, progress=False)
print(bytes_of("VmHWM") - before, sum(file.stat().st_size for file in stored.folder.glob("rows-*")))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="a peak is measured by Linux alone")
def test_the_memory_that_is_set_is_what_2000_prompts_take(tmp_path) -> None:
    """All layers' resid_post, which are 92 MB, with 50 MB for batches: no more than that above the model."""
    command = [sys.executable, "-c", MEASURED, str(tmp_path / "stored")]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    above, stored = map(int, done.stdout.split())
    assert stored > 2000 * 20 * 6 * 96 * 4 and above < 50e6


def killed_in_the_third(folder, model, tokens, before: bool) -> None:
    """Another process writes, and is killed before, or while, its third file gets its name."""
    child = os.fork()
    if child == 0:
        real, seen = os.replace, []

        def replaced(source, target):
            seen.append(target)
            if len(seen) == 4:  # the first is that of meta.json
                if before:
                    os.truncate(source, 100)
                else:
                    real(source, target)
                os.kill(os.getpid(), signal.SIGKILL)
            real(source, target)

        os.replace = replaced
        cache_to(folder, model, tokens, SITES, batch_rows=1, progress=False)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("before", [True, False])
def test_a_killed_run_goes_on(model, tokens, tmp_path, before, batches) -> None:
    killed_in_the_third(tmp_path, model, tokens, before)
    done = 2 if before else 3
    assert len(list(tmp_path.glob("rows-*"))) == done and len(list(tmp_path.glob(".rows-*.part"))) == before
    with pytest.raises(ValueError, match=f"holds {done} of 4 rows: call cache_to again"):
        StoredCache(tmp_path)
    stored = cache_to(tmp_path, model, tokens, SITES, batch_rows=2, progress=False)
    assert batches == [4 - done]
    equal(stored, cache(model, tokens, SITES))
    assert not list(tmp_path.glob(".rows-*"))


def test_another_runs_folder_is_refused(model, tokens, tmp_path) -> None:
    arguments = {"batch_rows": 3, "progress": False}
    cache_to(tmp_path, model, tokens, [("y", 1)], **arguments)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.*")}
    other = wrap(RANDOM[model.family](seed=5), None, model_id="random")
    for entry, call in {
        "prompts": lambda: cache_to(tmp_path, model, tokens.flip(0), [("y", 1)], **arguments),
        "rows": lambda: cache_to(tmp_path, model, tokens[:3], [("y", 1)], **arguments),
        "sites": lambda: cache_to(tmp_path, model, tokens, [("y", 2)], **arguments),
        "positions": lambda: cache_to(tmp_path, model, tokens, [("y", 1)], positions=[0], **arguments),
        "weights": lambda: cache_to(tmp_path, other, tokens, [("y", 1)], **arguments),
    }.items():
        with pytest.raises(ValueError, match=f"another run, whose entry '{entry}' is .*: choose another folder"):
            call()
    assert before == {path.name: path.read_bytes() for path in tmp_path.glob("*.*")}


def test_bad_input_is_refused(model, tokens, tmp_path) -> None:
    with pytest.raises(ValueError, match="unknown site 'hh'"):
        activations(model, tokens, "hh", 1)
    with pytest.raises(ValueError, match="the site 'A' is the same for all prompts"):
        activations(model, tokens, "A", 1)
    with pytest.raises(ValueError, match="batch_rows must be a whole number of at least 1, not 0"):
        cache_to(tmp_path / "new", model, tokens, ["h"], batch_rows=0, progress=False)
    with pytest.raises(ValueError, match=r"is no folder of activations: meta.json is missing"):
        StoredCache(tmp_path)
    (tmp_path / "rows-000000000-000000003.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no meta.json that says of which run it is"):
        cache_to(tmp_path, model, tokens, ["h"], progress=False)
    pairs = PromptPairs(clean_tokens=tokens, corrupt_tokens=tokens, answers=[1] * 4, corrupt_answers=[2] * 4)
    with pytest.raises(ValueError, match="of clean_tokens"):
        activations(model, replace(pairs, clean_tokens=tokens + 60), "h", 1)
    hook = model._module.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="a forward hook on the model"):
        cache_to(tmp_path / "hooked", model, tokens, ["h"], progress=False)
    hook.remove()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file where a folder should be"):
        cache_to(tmp_path / "file", model, tokens, ["h"], progress=False)
