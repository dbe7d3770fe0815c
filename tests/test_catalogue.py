"""The catalogue: every row can be called and drawn, and the page on experiments, followed word for word, adds one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from inspect import signature
from pathlib import Path
from pkgutil import resolve_name

import pandas as pd
import pytest

import mamba_ioi
from mamba_ioi import IOIDataset
from mamba_ioi.catalogue import ALSO_DRAWN, CATALOGUE, EVERY, ROWS, STUDIES
from mamba_ioi.experiments import EXPERIMENTS
from mamba_ioi.figures import FIGURES, intervals
from mamba_ioi.report import QUESTIONS
from mamba_ioi.result import Result

ROOT = Path(mamba_ioi.__file__).parents[1]
PAGE = (ROOT / "docs" / "how-to" / "write-an-experiment.md").read_text(encoding="utf-8")


QUESTION_KEYS = {question.key for question in QUESTIONS} | {
    question.key for study in STUDIES.values() for question in resolve_name(study.questions)
}


@pytest.mark.parametrize("row", EVERY.values(), ids=lambda row: row.figure)
def test_every_row_says_what_is_there(row) -> None:
    parameters = signature(resolve_name(row.function)).parameters
    given = {"layer"} if row.takes_layer else set()
    given |= {
        "names": {"n_pairs", "seed"},
        "own": {"pairs", "seed"},
        "prompts": {"seed"},
        "subjects": {"pairs", "seed", "progress"},
    }.get(row.input, set())
    assert given | set(row.arguments) <= set(parameters)
    assert "layer" not in parameters or row.takes_layer
    assert ("channels" in parameters) == row.takes_channels
    assert callable(resolve_name(row.drawn_by))
    assert set(row.decides) | set(row.tells) <= QUESTION_KEYS and not set(row.decides) & set(row.tells)
    assert all(callable(resolve_name(rule)) for rule in (*row.decides.values(), *row.tells.values()))


def test_ids_and_names_are_there_once() -> None:
    assert len(CATALOGUE) == len(ROWS) and len(EVERY) == len({row.experiment for row in EVERY.values()})
    assert len(EVERY) == len(ROWS) + sum(len(study.rows) for study in STUDIES.values())


def test_the_views_are_of_the_catalogue() -> None:
    assert list(EXPERIMENTS) == [row.experiment for row in ROWS if row.input not in ("own", "nothing")]
    first = {row.function: row.experiment for row in reversed(EVERY.values())}
    assert set(FIGURES) - set(ALSO_DRAWN) == set(first.values())


def test_a_table_without_a_figure_of_its_own_is_drawn_as_it_is() -> None:
    table = pd.DataFrame({"layer": [0, 1, 2], "effect": [0.1, 0.9, -0.2], "low": [0.0, 0.8, -0.3]})
    table["high"] = table["effect"] + 0.05
    figure = intervals(Result(table, {"experiment": "gates"}))
    (axes,) = figure.axes
    (points,) = [line for line in axes.lines if line.get_linestyle() == "None" and line.get_marker() == "o"]
    assert points.get_ydata().tolist() == [0.1, 0.9, -0.2]
    ends = axes.collections[0].get_segments()
    assert [segment[:, 1].tolist() for segment in ends] == [
        [pytest.approx(low), pytest.approx(high)] for low, high in zip(table["low"], table["high"], strict=True)
    ]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0", "1", "2"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("layer", "effect")
    with pytest.raises(ValueError, match="one for the value before 'low'"):
        intervals(Result(table[["layer", "low", "high"]], {"experiment": "gates"}))


# --- the page, followed word for word ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the package to which the page's experiment is added."""
    folder = tmp_path_factory.mktemp("followed")
    package = folder / "mamba_ioi"
    shutil.copytree(ROOT / "mamba_ioi", package, ignore=shutil.ignore_patterns("__pycache__"))
    (path,) = re.findall(r"^A file of its own, `(\S+)`:\n\n```python\n", PAGE, re.M)
    function = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.M)[0]
    assert not (folder / path).exists()
    (folder / path).write_text(function, encoding="utf-8")
    ((path, row),) = re.findall(r'^```python title="(\S+)"\n(.*?)^```', PAGE, re.DOTALL | re.M)
    assert f"at the end of `ROWS` in `{path}`, with a comma after it:" in PAGE
    text = (folder / path).read_text(encoding="utf-8")
    start = text.index("\nROWS = (")
    end = text.index("\n)\n", start) + 1
    (folder / path).write_text(f"{text[:end]}{row.rstrip()},\n{text[end:]}", encoding="utf-8")
    return folder


def command(folder: Path, *words: str) -> str:
    """What the command line of the copy says; it must succeed."""
    done = subprocess.run(
        [sys.executable, "-m", "mamba_ioi", *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_page_gives_an_experiment_in_list(followed: Path) -> None:
    said = command(followed, "list")
    assert re.search(r"^gates +gate_ablation +which layers' gates matter.*; 40 pairs$", said, re.M)
    assert re.search(r"^ +columns: layer, effect, low, high, n$", said, re.M)
    lines = said.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("gates "))
    assert lines[:start] + lines[start + 2 :] == command(ROOT, "list").splitlines()


@pytest.mark.slow
def test_the_page_gives_a_figure_in_reproduce_and_in_the_report(followed: Path) -> None:
    said = command(followed, "reproduce", "--only", "gates,fig3", "--pairs", "3", "--out", "out")
    assert "2 of 2 figures are in out" in said and re.search(r"^report +written$", said, re.M)
    out = followed / "out"
    for name, start in (("gates.png", b"\x89PNG"), ("gates.pdf", b"%PDF")):
        assert (out / name).read_bytes().startswith(start)
    result = Result.load(out / "results" / "gates")
    assert list(result.table.columns) == ["layer", "effect", "low", "high", "n"]
    assert result.meta["request"]["pairs"] == result.meta["pairs"] == 3 and result.meta["seed"] == 27

    model = mamba_ioi.load_model("tiny")
    names: dict = {}
    exec(re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.M)[0], names)
    data = IOIDataset.generate(model.tokenizer, 3, seed=27)
    pd.testing.assert_frame_equal(result.table, names["gate_ablation"](model, data).table, check_exact=True)

    for report, picture in (("report.md", "](gates.png)"), ("report.html", '<figure id="gates">')):
        text = (out / report).read_text(encoding="utf-8")
        assert "Gates: which layers" in text and picture in text and "acts as the corrupt prompt" in text
    again = command(followed, "reproduce", "--only", "gates,fig3", "--pairs", "3", "--out", "out")
    assert "gates        kept, it was complete" in again and "report       kept, it was complete" in again


def test_the_page_gives_an_experiment_to_run_and_plot(followed: Path) -> None:
    said = command(followed, "run", "gate_ablation", "--model", "planted", "--pairs", "2", "--out", "run")
    assert "6 rows: layer, effect, low, high, n" in said
    assert Result.load(followed / "run").table["effect"].abs().max() < 1e-3  # its gates are alike in both prompts
    assert "gates.png" in command(followed, "plot", "run")
