"""The table of families: what is committed is what the tests give, and what fails is told."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers

from .conformance import COLUMNS, FAMILIES, Conformance

ROOT = Path(__file__).resolve().parents[1]
TABLES = {path.stem: json.loads(path.read_text("utf-8")) for path in (ROOT / "docs" / "families").glob("*.json")}
PINNED = re.findall(r"^transformers==(\S+)$", (ROOT / "constraints.txt").read_text("utf-8"), re.M)[0]


def test_there_is_a_table_of_every_version_that_is_said_to_be_tested():
    readme = (ROOT / "README.md").read_text("utf-8")
    assert PINNED in TABLES
    said = re.search(r"transformers 5\.15 or newer \(tested with ([^)]*)\)", readme)
    assert said is not None and set(re.findall(r"\d+\.\d+\.\d+", said.group(1))) == set(TABLES)


@pytest.mark.parametrize("version", TABLES)
def test_a_table_holds_every_family_to_everything(version):
    table = TABLES[version]
    assert table["versions"]["transformers"] == version
    assert list(table["families"]) == list(FAMILIES)
    for row in table["families"].values():
        assert list(row) == list(COLUMNS)
        assert all(cell and "failed" not in cell for cell in row.values())


@pytest.mark.slow
def test_the_committed_table_is_what_the_tests_give(tmp_path):
    """As many tests of each family and column as there are now; that they pass, they say themselves."""
    if transformers.__version__ not in TABLES:
        pytest.skip(f"no table of transformers {transformers.__version__} is committed")
    files = [
        *(f"tests/{name}.py" for name in ("test_families", "test_circuits_parts")),
        *(f"tests/{path.name}" for path in sorted((ROOT / "tests").glob("test_hybrids*.py"))),
    ]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "slow or not slow",
        "--collect-only",
        "-p",
        "no:cacheprovider",
        *files,
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    ran = subprocess.run(
        [*command, "--conformance", str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout[-2000:]
    found = json.loads((tmp_path / f"{transformers.__version__}.json").read_text("utf-8"))
    assert found["families"] == TABLES[transformers.__version__]["families"]


def test_outcomes_are_counted():
    plugin = Conformance(None)

    def report(column: str, when: str, outcome: str, meant: str = "passed") -> None:
        told = [("conformance", ["jamba", column, meant])]
        plugin.pytest_runtest_logreport(
            SimpleNamespace(user_properties=told, when=when, **{name: name == outcome for name in STATES})  # type: ignore
        )

    STATES = ("passed", "failed", "skipped")
    for when, outcome in (("setup", "passed"), ("call", "passed"), ("teardown", "passed"), ("call", "failed")):
        report("EAP", when, outcome)
    report("load", "setup", "failed")
    report("logits", "call", "skipped")
    report("fine", "call", "passed", "refused")
    report("remote", "call", "failed", "refused")
    assert plugin.table()["families"] == {
        "jamba": {
            "load": {"failed": 1},
            "EAP": {"passed": 1, "failed": 1},
            "fine": {"refused": 1},
            "remote": {"failed": 1},
        }
    }


def test_the_page_tells_versions_apart(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import hooks

    page = hooks.on_page_markdown((ROOT / "docs" / "families.md").read_text("utf-8"))
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", page, re.M)
    assert [name for name, _ in rows] == list(FAMILIES)
    for name, row in rows:
        cells = row.split(" | ")
        assert len(cells) == len(COLUMNS) and all(re.search(r"✓ \d|refused", cell) for cell in cells), name
    versions = sorted(TABLES, key=lambda version: [int(part) for part in version.split(".")])
    assert [row["versions"]["transformers"] for row in hooks.measured_tables()] == versions
    cell = {"passed": 2}
    for version, other in (("5.9.0", cell), ("5.10.0", {"passed": 1, "failed": 1})):
        packages = {"transformers": version, "nnsight": "1", "torch": "2"}
        table = {"versions": packages, "families": {"jamba": {"load": cell, "EAP": other}}}
        (tmp_path / f"{version}.json").write_text(json.dumps(table))
    monkeypatch.setattr(hooks, "FAMILIES", tmp_path)
    assert "| `jamba` | ✓ 2 | 5.9.0: ✓ 2; 5.10.0: ✓ 1, ✗ 1 |" in hooks.families_table()
