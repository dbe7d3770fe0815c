"""The page of what tokens read: what a browser shows on it, on real models and at the size of the largest ones."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from mamba_ioi import hidden_attention, load_model, token_contributions
from mamba_ioi.cli import main
from mamba_ioi.experiments.token_page import token_page
from mamba_ioi.figures.token_page import token_page as drawn
from mamba_ioi.models.model import wrap

from .browser import BROWSER, body_data
from .hybrid_models import build
from .plain import NAMES, prompt_tokenizer

PROMPT = "Then, Mary and John went to the store."
needs_browser = pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed")


def column_and_row(matrix: torch.Tensor, middle: int) -> list[float]:
    """What a token reads, and after it what reads it."""
    return [float(matrix[middle, j] if j <= middle else matrix[j, middle]) for j in range(len(matrix))]


@needs_browser
@pytest.mark.parametrize("name", ["tiny", "tiny-mamba2"])
def test_shown_in_a_browser(name, tmp_path) -> None:
    model = load_model(name)
    found = body_data(token_page(model, PROMPT, units=[0, 3]), tmp_path, fragment="#selftest")
    ids, _ = model.to_tokens(PROMPT)
    length, last = ids.shape[1], model.n_layers - 1
    assert "error" not in found and (int(found["panels"]), int(found["tokens"])) == (model.n_layers, length)
    assert (found["first"], found["last"]) == ("0, scan", f"{last}, scan")
    assert found["views"].split("|")[1:] == ["weights, the mean", "weights, unit 0", "weights, unit 3"]
    own = hidden_attention(model, ids, last, reduce=None, units=[3])[0, 0]
    expected = column_and_row(own, length // 2)
    shown = [float(value) for value in found["shown"].split()]
    assert shown == pytest.approx(expected, abs=2 * own.abs().max().item() / 32767)
    assert found["numbers"] and int(found["pinned"]) == length // 2


def test_the_numbers_of_a_page(tmp_path) -> None:
    """Contributions come first, as lengths, and the page loads nothing."""
    model = load_model("tiny")
    page = token_page(model, PROMPT, layers=1)
    assert "http://" not in page and "https://" not in page and "src=" not in page
    lengths = token_contributions(model, PROMPT, 1)[0].norm(dim=-1).numpy()
    same = drawn(
        "tiny", "", ["x"] * len(lengths), [("1, scan", {"contributions to the stream (their length)": lengths})]
    )
    (stored,) = (text.split('"values": "')[1].split('"')[0] for text in (same,))
    assert stored in page


@needs_browser
def test_a_hybrid_has_scans_and_attention(tmp_path) -> None:
    tokenizer = prompt_tokenizer(NAMES)
    module = copy.deepcopy(build("bamba"))
    module.resize_token_embeddings(len(tokenizer))
    model = wrap(module, tokenizer, model_id="bamba")
    page = token_page(model, "Then, Mary and John went to the store.")
    found = body_data(page, tmp_path, fragment="#selftest")
    assert "error" not in found and found["panels"] == "3" and '"1, attention"' in page
    assert page.count(", scan") == 2


@needs_browser
def test_at_the_size_of_large_models(tmp_path) -> None:
    random = np.random.default_rng(0)
    panels = [
        (f"{layer}, scan", {"a": random.normal(size=(100, 100)), "b": np.zeros((100, 100))}) for layer in range(48)
    ]
    page = drawn("large", "<&>", [f"<b>{i}\n" for i in range(100)], panels)
    found = body_data(page, tmp_path, fragment="#selftest")
    assert "error" not in found and (found["panels"], found["tokens"], found["last"]) == ("48", "100", "47, scan")
    assert len(page) < 2e6 and {float(value) for value in found["shown"].split()} == {0.0}


def test_the_command(tmp_path, capsys) -> None:
    out = tmp_path / "a.html"
    assert main(["attention", "--model", "planted", "--prompt", PROMPT, "--units", "1", "--out", str(out)]) == 0
    page = out.read_text(encoding="utf-8")
    assert str(out) in capsys.readouterr().out and "weights, unit 1" in page and "planted: what tokens read" in page
    for words, sentence in (
        (["--prompt", PROMPT, "--units", "a"], "units are whole numbers with commas between"),
        (["--prompt", PROMPT, "--units", "9999"], "units of layer 0 are 0 to"),
        (["--prompt", ""], "the prompt is a text of at least one token"),
    ):
        assert main(["attention", "--model", "planted", *words, "--out", str(tmp_path / "b.html")]) == 2
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "b.html").exists()


def test_refused() -> None:
    with pytest.raises(ValueError, match="layers are whole numbers from 0 to 5"):
        token_page(load_model("tiny"), PROMPT, layers=[9])
    with pytest.raises(ValueError, match="at least one token and one layer"):
        drawn("", "", [], [])
    with pytest.raises(ValueError, match="a finite matrix of 2 by 2 tokens"):
        drawn("", "", ["a", "b"], [("0", {"x": np.full((2, 2), np.nan)})])
