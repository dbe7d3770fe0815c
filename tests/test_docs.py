"""The Python of the README and of every page of the documentation works as pasted, in a folder of its own."""

from __future__ import annotations

import json
import re
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from mamba_ioi import families, tasks

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    path.relative_to(ROOT).as_posix(): re.findall(r"^```python\n(.*?)^```", path.read_text("utf-8"), re.DOTALL | re.M)
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
}
NEEDS = "# needs scikit-learn"
"""How a block begins that is left out where that is not installed."""
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.untyped
@pytest.mark.parametrize("page", [page for page, blocks in PAGES.items() if blocks])
def test_the_python_runs_as_pasted(page, tmp_path, monkeypatch, capsys):
    """A page's blocks are one script, from top to bottom."""
    script = tmp_path / "pasted.py"
    blocks = [block for block in PAGES[page] if find_spec("sklearn") or not block.startswith(NEEDS)]
    script.write_text("\n".join(blocks), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tasks, "TASKS", dict(tasks.TASKS))  # to which a page adds its own
    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))  # likewise
    runpy.run_path(str(script), run_name="__main__")
    if page == "README.md":
        assert (tmp_path / "out" / "h" / "table.parquet").is_file()
        assert re.search(r"tensor\(\[.*\d", capsys.readouterr().out)


def test_the_pages_that_promise_python_have_it():
    expected = ("README.md", "docs/index.md", "docs/tutorial.md", *(page for page in PAGES if "/how-to/" in page))
    assert len(expected) == 12
    assert all(PAGES[page] for page in expected)


def test_each_recipe_has_at_most_twelve_lines_and_checks_what_it_says():
    page = (ROOT / "docs" / "how-to" / "recipes.md").read_text(encoding="utf-8")
    recipes = [part.split("\n", 1)[0] for part in page.split("\n## ")[1:]]
    blocks = PAGES["docs/how-to/recipes.md"]
    assert len(recipes) == len(set(recipes)) == 12 and len(blocks) == 1 + len(recipes)
    for recipe, block in zip(["the shared lines", *recipes], blocks, strict=True):
        assert len([line for line in block.splitlines() if line.strip()]) <= 12, recipe
        assert recipe == "the shared lines" or "assert" in block, recipe


def test_the_readme_s_files_and_commands_are_there():
    for path in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / path).exists(), path
    start = README.split("## Start")[1].split("## Trace")[0]
    commands = [line for line in start.splitlines() if line.startswith("python3 -m venv")]
    assert len(commands) == 2
    assert all("-c constraints.txt" in command for command in commands)


def test_versions_agree():
    """The package's version is that of the citation and has an entry in the changelog."""
    from mamba_ioi import __version__

    assert f"version: {__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"version = {{{__version__}}}" in (ROOT / "docs" / "cite.md").read_text(encoding="utf-8")
    assert re.search(rf"^## {re.escape(__version__)}\b", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)


def test_the_sites_page_takes_its_table_from_the_code():
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        from hooks import on_page_markdown
    finally:
        sys.path.remove(str(ROOT / "docs"))
    from mamba_ioi import load_model
    from mamba_ioi.trace.sites import SITES

    page = on_page_markdown((ROOT / "docs" / "sites.md").read_text(encoding="utf-8"))
    rows = re.findall(r"^\| `(\w+)` \| `([\w.]+)` \| \[([\w, ]+)\]", page, re.M)
    here, other = list(SITES), load_model("tiny-mamba2").known_sites()
    assert [row[0] for row in rows[: len(here)]] == here
    assert ("h", "mixer.h", "B, L, E, N") in rows and ("h", "mixer.h", "B, L, H, P, N") in rows
    told = {row[0] for row in rows[len(here) :]}
    assert {name: other[name].shape for name in told} == {
        row[0]: tuple(row[2].split(", ")) for row in rows[len(here) :]
    }
    assert all(other[name].shape == SITES[name].shape for name in other.keys() - told)


def test_every_public_name_is_in_the_api_pages():
    import mamba_ioi
    from mamba_ioi import circuits, experiments, figures, metrics, reference

    pages = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "api").glob("*.md"))
    documented = {name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)$", pages, re.M)}
    for module in (mamba_ioi, circuits, experiments, figures, reference):
        assert set(module.__all__) <= documented, module.__name__
    assert "::: mamba_ioi.metrics\n" in pages and metrics.logit_diff.__doc__  # that page takes the whole module


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_committed_as_executed(path):
    """From top to bottom, without an error or a warning, small, and free of the machine they were run on."""
    text = path.read_text(encoding="utf-8")
    cells = json.loads(text)["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert len(text) < 600_000
    assert str(Path.home()) + "/" not in text and "/tmp/" not in text
    opening = "".join(cells[0]["source"])
    for words in ('MODEL = "state-spaces/mamba-370m-hf"', "remote=True", "colab.research.google.com"):
        assert words in opening or (words.startswith("MODEL") and 'load_model("state-spaces/mamba-370m-hf")' in opening)


def test_there_are_notebooks():
    assert sorted(int(path.stem.partition("_")[0]) for path in NOTEBOOKS) == [*range(1, 11)]
