"""The command line in environments that are not a plain terminal's: notebooks, closed streams, other locales, ~."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import pandas as pd
import pytest

import mamba_ioi
from mamba_ioi import load_model
from mamba_ioi.arguments import parse
from mamba_ioi.circuits import Circuit
from mamba_ioi.circuits.export import to_mib
from mamba_ioi.cli import COMMANDS, main
from mamba_ioi.figures.style import new_figure, save_figure
from mamba_ioi.report import write_report
from mamba_ioi.reproduce.run import redraw
from mamba_ioi.result import Result

from .conftest import random_mamba
from .plain import prompt_tokenizer

ROOT = Path(mamba_ioi.__file__).parents[1]


def command(
    words: str, *, env: dict[str, str] | None = None, cwd: Path, redirect: str = ""
) -> subprocess.CompletedProcess:
    """Run ``mamba-ioi`` in a shell, so that it gets the streams and the environment that are said."""
    line = f"{sys.executable} -m mamba_ioi {words} {redirect}"
    env = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
    return subprocess.run(["bash", "-c", line], cwd=cwd, env=env, capture_output=True, timeout=300)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a stored result that takes no time."""
    folder = tmp_path_factory.mktemp("stored") / "result"
    assert main(["run", "architecture", "--out", str(folder)]) == 0
    return folder


@pytest.mark.parametrize(
    "backend", ["module://matplotlib_inline.backend_inline", "module://no.such.module", "no-such-backend"]
)
def test_a_backend_that_the_environment_names(result: Path, backend: str) -> None:
    for path in result.glob("fig2.*"):
        path.unlink()
    done = command("plot .", env={"MPLBACKEND": backend}, cwd=result)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert (result / "fig2.png").stat().st_size > 1000


@pytest.mark.parametrize("backend", [None, "module://matplotlib_inline.backend_inline"])
def test_a_caller_s_backend_stays(result: Path, backend: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MPLBACKEND", raising=False)
    if backend is not None:
        monkeypatch.setenv("MPLBACKEND", backend)
    before = mpl.rcParams._get("backend")  # pyright: ignore[reportAttributeAccessIssue]
    assert main(["plot", str(result)]) == 0
    assert os.environ.get("MPLBACKEND") == backend
    assert mpl.rcParams._get("backend") == before  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("words", ["list", "list --sites", "--version", "--help"])
def test_a_closed_output(tmp_path: Path, words: str) -> None:
    done = command(words, cwd=tmp_path, redirect=">&-")
    assert done.returncode == 0 and not done.stderr, done.stderr


@pytest.mark.slow
def test_closed_streams_and_files(tmp_path: Path) -> None:
    """A file that is opened does not get the number of a closed stream, into which other things are written."""
    assert command("run architecture --out out", cwd=tmp_path, redirect="<&- >&- 2>&-").returncode == 0
    assert len(Result.load(tmp_path / "out").table) == 7
    done = command("plot out", cwd=tmp_path, redirect=">&-")
    assert done.returncode == 0 and not done.stderr
    assert (tmp_path / "out" / "fig2.png").read_bytes().startswith(b"\x89PNG")
    assert command("no-such-command", cwd=tmp_path, redirect="2>&-").returncode == 2


@pytest.mark.parametrize("words", ["list", "list --sites"])
def test_a_reader_that_goes(tmp_path: Path, words: str) -> None:
    done = command(words, cwd=tmp_path, redirect="| head -1")
    assert len(done.stdout.splitlines()) == 1 and b"Traceback" not in done.stderr and b"Broken" not in done.stderr


@pytest.mark.parametrize("arguments", [["--out", "~/x"], ["--out=~/x"], ["--out", "~/x/../x"]])
def test_home_in_the_arguments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str]) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for words in (["reproduce"], ["run", "architecture"], ["train-tiny"]):
        assert parse(COMMANDS, [*words, *arguments]).out.resolve() == tmp_path / "x"
    assert parse(COMMANDS, ["plot", "~/x"]).folder == tmp_path / "x"


def test_home_on_the_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir(), here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    random_mamba(vocab_size=600).save_pretrained(home / "model")
    prompt_tokenizer(["Mary", "John"]).save_pretrained(home / "model")
    assert main(["run", "architecture", "--model", "~/model", "--out=~/a/b"]) == 0
    assert main(["plot", "~/a/b"]) == 0
    assert main(["reproduce", "--only", "fig2", "--model=~/model", "--out", "~/c"]) == 0
    assert (home / "a" / "b" / "fig2.png").exists() and (home / "c" / "report.html").exists()
    assert not list(here.iterdir())


def test_home_in_every_path_of_the_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, result: Path) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir(), here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    stored = Result.load(result)
    random_mamba().save_pretrained(home / "model")
    circuit = Circuit((("embed", "output"),), 2)
    for kind in (str, Path):
        stored.save(kind("~/result"))
        assert Result.load(kind("~/result")).table.equals(stored.table)
        circuit.save(kind("~/circuit.json"))
        assert Circuit.load(kind("~/circuit.json")).edges == circuit.edges
        assert to_mib(kind("~/mib.json"), circuit, d_model=8) == home / "mib.json"
        assert load_model(kind("~/model")).n_layers == 3
        assert save_figure(new_figure(1, 1), kind("~/figure"))[0] == home / "figure.png"
        stored.save(kind("~/all/results/fig2"))
        assert all(outcome.error is None for outcome in redraw(kind("~/all")))
        assert (home / "all" / "fig2.png").exists()
        (home / "all" / "report.html").unlink()
        write_report(kind("~/all"))
        assert (home / "all" / "report.html").exists()
    assert not list(here.iterdir())


@pytest.mark.slow
def test_a_locale_of_ascii_alone(tmp_path: Path) -> None:
    """Models with other characters in their files; what is written is UTF-8 all the same."""
    random_mamba(vocab_size=600).save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8")) | {"note": "mamba 曼巴 é"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
    ascii_alone = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}
    for words in ("run architecture --model model --out réf", "plot réf", "list", "--help"):
        done = command(words, env=ascii_alone, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert Result.load(tmp_path / "réf").table.equals(pd.read_parquet(tmp_path / "réf" / "table.parquet"))
