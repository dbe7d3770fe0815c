"""No module imports what stands above it, none imports itself by a detour, and names that moved are where they were."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import mamba_ioi
from mamba_ioi.families import FAMILIES

PACKAGE = Path(mamba_ioi.__file__).parent

LAYERS = (
    ("checks", "files", "metrics", "tasks.names", "remote.traffic", "arguments", "catalogue", "models.weights"),
    ("memory", "result", "models.checkpoints", "tasks"),
    ("figures", "zoo"),
    ("trace", "families", "models.batching", "models.slow_path"),
    ("remote",),
    ("models",),
    ("interventions",),
    ("experiments",),
    ("circuits",),
    ("reference",),
    ("reproduce.source", "reproduce.makers", "reproduce.plan", "reproduce.folder", "report", "doctor", "bench"),
    ("reproduce",),
    ("cli",),
    ("__main__",),
)
"""The rooms from the lowest to the highest: each imports those below, and its neighbours without a circle."""

UPWARD = {
    ("memory", "trace.sites"): "for a type alone: memory says how large a site's activation is, and looks at none"
}
"""Arrows that run up, from module to module, and why each is there."""

SPEAKS_OF_IOI = (
    "",
    "tasks",
    "zoo",
    "reference",
    "report",
    "catalogue",
    "cli",
    "bench",
    "dataset",
    "experiments.name_means",
    "experiments.name_steering",
)
"""The rooms and modules that may name the paper's own data; all others take pairs of any task."""

KNOWS_FAMILIES = ("families", "models", "trace")
"""The rooms that may ask a model of which architecture it is."""

MAKES_MODELS = ("zoo", "arguments")
"""Where families are named because models of them are made: those that ship with the package, and `train-tiny`."""

MOVED = {
    "mamba_ioi.dataset": ("mamba_ioi.tasks.ioi", ("IOIDataset", "TEMPLATES", "CORRUPTIONS", "BOS")),
    "mamba_ioi.generation": ("mamba_ioi.interventions.generation", ("generate",)),
    "mamba_ioi.model": ("mamba_ioi.models.model", ("CausalLM", "MambaModel", "load_model", "planted", "wrap")),
    "mamba_ioi.names": ("mamba_ioi.tasks.names", ("NAMES", "name_tokens", "single_token_names")),
    "mamba_ioi.patching": ("mamba_ioi.interventions.run", ("cache", "run")),
    "mamba_ioi.remote": ("mamba_ioi.remote.traffic", ("Traffic", "public_url")),
    "mamba_ioi.reproduce": (
        "mamba_ioi.reproduce.folder",
        ("ANSWERS", "REPORTS", "RESULTS", "locked", "stored_result"),
    ),
    "mamba_ioi.result": ("mamba_ioi.files", ("replace_files",)),
    "mamba_ioi.scan": ("mamba_ioi.trace.s6_scan", ("selective_scan", "scan_states", "held_scan")),
    "mamba_ioi.sites": ("mamba_ioi.trace.sites", ("SITES", "SiteInfo", "owner")),
    "mamba_ioi.sweep": ("mamba_ioi.interventions.sweep", ("Readout", "Resample", "sweep")),
}
"""Where names were, where they are now, and the names that are still to be had where they were."""


def modules() -> dict[str, Path]:
    """The package's modules by their names without the package's; a package by its own name, the whole by ''."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(name: str, tree: ast.AST, *, lazy: bool = True) -> Iterator[tuple[str, str]]:
    """What a module imports from the package, be it for types alone: module and name; ``lazy``: in functions too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not lazy:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == "mamba_ioi":
                    yield alias.name.removeprefix("mamba_ioi").removeprefix("."), ""
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = name.split(".") if name else []
                home = parts if MODULES.get(name, PACKAGE).name == "__init__.py" else parts[:-1]
                home = home[: len(home) - node.level + 1]
                base = ".".join(["mamba_ioi", *home, *([base] if base else [])])
            if base.partition(".")[0] == "mamba_ioi":
                inside = base.removeprefix("mamba_ioi").removeprefix(".")
                for alias in node.names:
                    module = f"{inside}.{alias.name}".removeprefix(".")
                    yield (module, "") if module in MODULES else (inside, alias.name)
        else:
            yield from imports(name, node, lazy=lazy)


def arrows(*, lazy: bool = True) -> dict[str, set[str]]:
    """For each module those that it imports; the package itself, which imports when asked, is none."""
    found = {}
    for name, path in MODULES.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found[name] = {module for module, _ in imports(name, tree, lazy=lazy)} - {name, ""}
    return found


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """What is left when modules that import nothing that is left, or that nothing left imports, are taken away."""
    left = {name: set(others) for name, others in graph.items()}
    while True:
        imported = set().union(*left.values()) if left else set()
        gone = {name for name, others in left.items() if not others or name not in imported}
        if not gone:
            return [[name, *sorted(others)] for name, others in sorted(left.items())]
        left = {name: others - gone for name, others in left.items() if name not in gone}


STUBS = {old.removeprefix("mamba_ioi.") for old in MOVED} & {
    name for name, path in MODULES.items() if path.parent == PACKAGE
}
STUBS -= {"result"}
"""The modules that hold nothing but names that moved."""


def floor(name: str) -> int:
    """How high a module stands, by its own entry or by its room's."""
    room = name.partition(".")[0]
    own = [number for number, rooms in enumerate(LAYERS) if name in rooms]
    return own[0] if own else next(number for number, rooms in enumerate(LAYERS) if room in rooms)


def test_the_imports_are_read() -> None:
    source = """
from . import style
from ..result import Result
import mamba_ioi.checks
if TYPE_CHECKING:
    from ..model import MambaModel
def later():
    from ..circuits import eap
"""
    found = list(imports("figures.heatmap", ast.parse(source)))
    assert found == [
        ("figures.style", ""),
        ("result", "Result"),
        ("checks", ""),
        ("model", "MambaModel"),
        ("circuits.eap", ""),
    ]
    assert ("circuits.eap", "") not in list(imports("figures.heatmap", ast.parse(source), lazy=False))
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"], ["c", "b"]]
    assert "interventions.sweep" in arrows()["experiments.common"] and "report" in arrows()["reproduce.run"]


def test_every_module_has_its_place() -> None:
    rooms = {name.partition(".")[0] for name in MODULES if name and name not in STUBS}
    assert rooms == {room.partition(".")[0] for rooms in LAYERS for room in rooms}
    assert {room for rooms in LAYERS for room in rooms if "." in room} <= set(MODULES)


def test_modules_of_moved_names_are_imported_by_none() -> None:
    assert {"sweep", "model", "dataset", "names", "sites"} <= STUBS
    for name, others in arrows().items():
        assert not others & STUBS, name
    for name in STUBS:
        body = ast.parse(MODULES[name].read_text(encoding="utf-8")).body
        assert all(isinstance(node, ast.Expr | ast.ImportFrom | ast.Assign) for node in body), name


@pytest.mark.parametrize("lazy", [False, True], ids=["at import", "ever"])
def test_no_circle(lazy: bool) -> None:
    assert circles(arrows(lazy=lazy)) == []


def test_no_arrow_runs_up() -> None:
    up = {
        (one, other)
        for one, others in arrows().items()
        if one and one not in STUBS
        for other in others
        if floor(other) > floor(one)
    }
    assert up == set(UPWARD)


def test_figures_know_no_model() -> None:
    for name, others in arrows().items():
        if name.partition(".")[0] == "figures":
            assert {other.partition(".")[0] for other in others} <= {
                "figures",
                "result",
                "files",
                "catalogue",
                "checks",
            }


def test_what_is_below_takes_the_version_alone_from_the_package() -> None:
    for name in MODULES:
        if name and name not in STUBS and floor(name) < floor("doctor"):
            tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
            assert {what for module, what in imports(name, tree) if module == ""} <= {"__version__"}, name


def test_names_that_moved_are_still_where_they_were() -> None:
    for old, (new, names) in MOVED.items():
        for name in names:
            assert getattr(import_module(old), name) is getattr(import_module(new), name), (old, name)


def within(name: str, rooms: tuple[str, ...]) -> bool:
    """Whether a module is one of these, or in a room of theirs."""
    return name in rooms or name.partition(".")[0] in rooms


@pytest.mark.parametrize("name", [name for name in MODULES if not within(name, SPEAKS_OF_IOI)])
def test_what_serves_any_task_does_not_name_the_papers_data(name: str) -> None:
    assert "IOIDataset" not in MODULES[name].read_text(encoding="utf-8")


def architectures(tree: ast.AST) -> list[str]:
    """What a module asks for by name: ``model_type``, a family, a class of a Mamba in ``isinstance``."""
    found = []
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr="model_type") | ast.Constant(value="model_type"):
                found.append("model_type")
            case ast.Constant(value=str(value)) if value in FAMILIES:
                found.append(value)
            case ast.Call(func=ast.Name(id="isinstance" | "issubclass"), args=[_, classes]):
                names = [part.id for part in ast.walk(classes) if isinstance(part, ast.Name)]
                names += [part.attr for part in ast.walk(classes) if isinstance(part, ast.Attribute)]
                found += [one for one in names if "Mamba" in one]
    return found


def test_architectures_are_found() -> None:
    source = """
if model.config.model_type == "mamba2" or isinstance(block, (int, transformers.FalconMambaBlock)):
    kind = getattr(config, "model_type")
"""
    assert sorted(architectures(ast.parse(source))) == ["FalconMambaBlock", "mamba2", "model_type", "model_type"]
    assert architectures(ast.parse('"a mamba"; isinstance(one, dict)')) == []


@pytest.mark.parametrize("name", [name for name in MODULES if not within(name, KNOWS_FAMILIES + MAKES_MODELS)])
def test_no_other_room_asks_for_an_architecture_by_name(name: str) -> None:
    assert architectures(ast.parse(MODULES[name].read_text(encoding="utf-8"))) == []
