"""Dictionaries that ship, and folders in sae-lens's format: read as by hand, and as sae-lens reads them."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import mamba_ioi
from mamba_ioi import Patch, Splice, cache, load_dictionary, load_model, run, tasks
from mamba_ioi.zoo import DICTIONARIES

FOLDER = Path(mamba_ioi.__file__).parent / "zoo" / "tiny_features"
CARD = (FOLDER / "README.md").read_text(encoding="utf-8")
SITES = DICTIONARIES["tiny"]


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny")


def written(folder: Path, architecture: str, **config) -> dict[str, torch.Tensor]:
    """A folder as sae-lens writes it, and the weights in it."""
    draw = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (5, 9), "b_enc": (9,), "W_dec": (9, 5), "b_dec": (5,)}
    weights = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    save_file(weights, folder / "sae_weights.safetensors")
    config = {"architecture": architecture, "d_in": 5, "d_sae": 9, **config}
    (folder / "cfg.json").write_text(json.dumps(config), encoding="utf-8")
    return weights


@pytest.mark.parametrize("shifts", [True, False])
@pytest.mark.parametrize(("architecture", "k"), [("standard", None), ("topk", 3)])
def test_features_are_those_by_hand(tmp_path, architecture, k, shifts) -> None:
    given = {"apply_b_dec_to_input": shifts, "metadata": {"hook_name": "blocks.3.hook_out_proj"}}
    weights = written(tmp_path, architecture, **given, **({} if k is None else {"k": k}))
    sae = load_dictionary(tmp_path)
    assert sae.place == ("out_proj", 3)
    x = torch.randn(4, 2, 5, generator=torch.Generator().manual_seed(1))
    found = sae.encode(x)
    for row, features in zip(x.flatten(0, 1).double(), found.flatten(0, 1), strict=True):
        centred = row - weights["b_dec"].double() if shifts else row
        expected = [
            max(0.0, float(weights["W_enc"][:, i].double() @ centred + weights["b_enc"][i].double())) for i in range(9)
        ]
        for i in sorted(range(9), key=lambda i: expected[i])[: 9 - (k or 9)]:
            expected[i] = 0.0
        torch.testing.assert_close(features, torch.tensor(expected), rtol=0, atol=1e-5)
    made = torch.einsum("bcf,fw->bcw", found.double(), weights["W_dec"].double()) + weights["b_dec"].double()
    torch.testing.assert_close(sae.decode(found), made.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("site", SITES)
def test_what_ships_is_small_and_as_its_card_says(tiny, site) -> None:
    assert (FOLDER / site / "sae_weights.safetensors").stat().st_size <= 200_000
    sae = load_dictionary(f"tiny/{site}")
    assert sae.place == (site, 1) and sae.W_enc.shape[0] == (tiny.d_inner if site == "ssm_input" else tiny.d_model)
    pairs = tasks.generate("ioi", tiny.tokenizer, 200, seed=99, templates="all")
    there = torch.arange(pairs.clean_tokens.shape[1]) <= pairs.last_position[:, None]
    values = cache(tiny, pairs.clean_tokens, [sae.place])[sae.place][there]
    features = sae.encode(values)
    left = (values - sae.decode(features)).pow(2).sum() / (values - values.mean(0)).pow(2).sum()
    row = re.search(rf"^\| `{site}` \|.*$", CARD, re.M)
    assert row is not None
    size, k, explained = (float(cell) for cell in row[0].split("|")[2:5])
    assert (sae.W_enc.shape[1], sae.k) == (size, k)
    assert 1 - left == pytest.approx(explained, abs=0.005)
    assert (features != 0).sum(1).max() <= k


@pytest.mark.parametrize("site", SITES)
def test_sae_lens_reads_them_alike_and_is_spliced_as_it_is(tiny, site) -> None:
    SAE = pytest.importorskip("sae_lens").SAE
    theirs, ours = SAE.load_from_disk(FOLDER / site).to(dtype=torch.float32), load_dictionary(f"tiny/{site}")
    tokens = tasks.generate("ioi", tiny.tokenizer, 2).clean_tokens
    values = cache(tiny, tokens, [ours.place])[ours.place]
    torch.testing.assert_close(theirs.encode(values), ours.encode(values), rtol=0, atol=1e-4)
    for options in ({}, {"keep_error": False}, {"features": [3, 5], "value": 2.0}):
        one, other = (run(tiny, tokens, [Patch(*ours.place, Splice(sae, **options))]) for sae in (theirs, ours))
        torch.testing.assert_close(one, other, rtol=0, atol=1e-3)


def test_what_sae_lens_alone_reads_needs_it(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    for config in ({"architecture": "jumprelu"}, {"architecture": "standard", "normalize_activations": "layer_norm"}):
        written(tmp_path, **config)
        with pytest.raises(
            ValueError, match=rf"of the kind '{config['architecture']}', which sae-lens reads: pip inst"
        ):
            load_dictionary(tmp_path)


def test_bad_input_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="the dictionaries that ship with the package are tiny/ssm_input, tiny/out_pr"):
        load_dictionary("tiny/h")
    with pytest.raises(ValueError, match="holds no dictionary in sae-lens's format: FileNotFoundError"):
        load_dictionary(tmp_path)
    written(tmp_path, "topk")
    with pytest.raises(ValueError, match="holds no dictionary in sae-lens's format: KeyError: 'k'"):
        load_dictionary(tmp_path)
    written(tmp_path, "topk", k=10)
    with pytest.raises(ValueError, match="k must be a whole number from 1 to 9, not 10"):
        load_dictionary(tmp_path)
    written(tmp_path, "standard", d_sae=8)
    with pytest.raises(ValueError, match=r"W_enc has the shape \(5, 9\), and not \(5, 8\)"):
        load_dictionary(tmp_path)
    (tmp_path / "sae_weights.safetensors").write_bytes(b"none")
    with pytest.raises(ValueError, match="holds no dictionary in sae-lens's format"):
        load_dictionary(tmp_path)
