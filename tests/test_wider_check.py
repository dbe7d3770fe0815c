"""The script of the wider check: what it says of a model whose circuit is known, and of one that ships."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from mamba_ioi import planted_recall

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("wider_check", ROOT / "benchmarks" / "tasks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_finds_what_was_planted(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "RANDOM", 2)
    monkeypatch.setitem(script.OPTIONS, "recall", {"pairs": 4})
    model = planted_recall(n_layers=3, layer=1, slice=-3, n_keys=9)
    data, held_out = (script.drawn("recall", model, 12, seed) for seed in (1, 2))
    whole = "1.00 [1.00, 1.00]"
    taken = script.taken(model, data)
    assert script.moved(model, data, "layer_input", taken) == f"layer 1, changed: {whole}"
    assert script.moved(model, data, "out_proj", taken) == f"layer 1, last: {whole}"
    assert script.together(model, data, taken) == "nothing"
    assert script.right(model, data) == f"{whole}; after the corrupt prompt 0.00"
    found = script.circuit(model, data, held_out, taken)
    assert found["minimal circuit"].startswith("5 of ") and found["its accuracy"].startswith(f"{whole}; at random ")
    assert found["its NLD"].startswith(whole) and found["CMD"].startswith("0.")
    most = [line.rpartition(" ")[0] for line in found["EAP: the edges most needed"].split("<br>")]
    assert set(most[:5]) == {"embed → 1", "1 → 1.conv[-2]", "1.conv → 1.ssm", "1.ssm → 1", "1 → output"}


def test_a_column_of_a_subject_that_ships(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "RANDOM", 1)
    columns = {"recall": script.column("recall", tmp_path / "recall", 8, None)}
    assert columns["recall"]["subject"] == "`recall-mamba`" and not (tmp_path / "recall").exists()
    assert "69,760 parameters" in columns["recall"]["size"] and "0.96 (6)" in script.table(columns)
    page = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
    assert [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| ")][2:] == list(
        columns["recall"]
    )
