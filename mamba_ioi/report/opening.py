"""The report's opening: what was run, from what the results say of themselves, and the command that repeats it."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from typing import Any

from ..catalogue import CATALOGUE
from ..result import Result
from ..zoo import EMBEDDED
from .evidence import Results, Table, shown

SEED = 27


def model_name(results: Results) -> str:
    """The model's name: of a local folder, its last part."""
    every = results.values()
    return next(iter((*_all(every, "request", "model"), *_all(every, "model"))), "no model")


def setting_table(results: Results) -> Table:
    """What was run, in two columns."""
    every = results.values()
    sizes = _sizes(results)
    rows = [
        ("model", ", ".join(_all(every, "request", "model"))),
        ("given as", ", ".join(name for name in _all(every, "model") if name not in _all(every, "request", "model"))),
        ("revision", ", ".join(_all(every, "revision"))),
        ("SHA-256 of its files", ", ".join(_all(every, "request", "weights"))),
        ("sizes", sizes),
        ("precision", ", ".join(name.removeprefix("torch.") for name in _all(every, "dtype"))),
        ("device", ", ".join(_all(every, "device"))),
        ("seed of the prompts", ", ".join(_all(every, "request", "seed"))),
        ("layer chosen", ", ".join(_all(every, "request", "layer"))),
        *((f"version of {name}", ", ".join(_all(every, "versions", name))) for name in _packages(every)),
        ("computed (UTC)", _span(_all(every, "date"))),
    ]
    return Table("Settings and versions", ("", ""), tuple((name, value) for name, value in rows if value))


def figure_rows(results: Results) -> list[dict[str, str]]:
    """For each figure of the paper: its id, name, what it shows, and its pairs and layer where its result is there."""
    rows = []
    for figure, row in CATALOGUE.items():
        result = results.get(figure)
        request, arguments = (_part(result, name) for name in ("request", "arguments"))
        pairs = request.get("pairs")
        layer = arguments.get("layer") if row.takes_layer else None
        rows.append(
            {
                "figure": figure,
                "label": row.label,
                "shows": row.shows,
                "pairs": "" if pairs is None else f"{pairs} {row.per_pair}".strip(),
                "layer": "" if layer is None else str(layer),
            }
        )
    return rows


def commands(results: Results) -> list[str]:
    """Command lines that compute these results again; several where figures were asked for with different options."""
    groups: list[dict[str, Any]] = []
    for figure, result in results.items():
        request = _part(result, "request")
        allowed = _allowed(figure, request)
        for group in groups:
            shared = {key: _both(group["allowed"][key], allowed[key]) for key in allowed}
            if all(values is None or values for values in shared.values()):
                group["allowed"] = shared
                group["figures"].append(figure)
                break
        else:
            groups.append({"allowed": allowed, "figures": [figure], "request": request, "meta": result.meta})
    return [_command(group, whole=len(groups) == 1 and len(results) == len(CATALOGUE)) for group in groups]


def _allowed(figure: str, request: dict[str, Any]) -> dict[str, set | None]:
    """For each option the values that ask for this figure as it is; None where any does."""
    row = CATALOGUE[figure]
    pairs, seed = request.get("pairs"), request.get("seed")
    return {
        "pairs": None if row.pairs is None else {pairs} | ({None} if pairs == row.pairs else set()),
        "seed": None if not row.draws else {seed},
        "layer": {request.get("layer")} if row.takes_layer else None,
    }


def _both(one: set | None, other: set | None) -> set | None:
    return other if one is None else one if other is None else one & other


def _command(group: dict[str, Any], *, whole: bool) -> str:
    request, allowed = group["request"], group["allowed"]
    model, device = str(request.get("model")), str(group["meta"].get("device") or "cpu")
    if request.get("weights") and model not in EMBEDDED:
        model = f"./{model}"  # a folder, wherever it lies
    words = ["mamba-ioi", "reproduce", "--model", model]
    if not whole:
        words += ["--only", ",".join(group["figures"])]
    for option in ("pairs", "seed", "layer"):
        values = allowed[option]
        value = min(values) if values and None not in values else None
        if value is not None and not (option == "seed" and value == SEED):
            words += [f"--{option}", str(value)]
    if request.get("dtype"):
        words += ["--dtype", str(request["dtype"])]
    if device != "cpu":
        words += ["--device", device]
    return shlex.join(words)


def _sizes(results: Results) -> str:
    table = next((results[figure].table for figure in ("fig2", "fig12") if figure in results), None)
    if table is None:
        layers = _all(results.values(), "n_layers")
        return f"n_layers {', '.join(layers)}" if layers else ""
    return ", ".join(f"{size} {shown(int(value))}" for size, value in zip(table["size"], table["value"], strict=True))


def _packages(results: Iterable[Result]) -> list[str]:
    return list(dict.fromkeys(name for result in results for name in _part(result, "versions")))


def _part(result: Result | None, name: str) -> dict[str, Any]:
    """A mapping in the result's meta; empty where it is none."""
    part = None if result is None else result.meta.get(name)
    return part if isinstance(part, dict) else {}


def _all(results: Iterable[Result], *path: str) -> list[str]:
    """The different values that the results have there, as text, in their order."""
    found: list[str] = []
    for result in results:
        value = result.meta.get(path[0]) if len(path) == 1 else _part(result, path[0]).get(path[1])
        if value is not None and str(value) not in found:
            found.append(str(value))
    return found


def _span(dates: list[str]) -> str:
    first, last = min(dates, default=""), max(dates, default="")
    return first if first == last else f"{first} to {last}"
