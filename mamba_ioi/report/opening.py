"""The report's opening: what was run, from what the results say of themselves, and the command that repeats it."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from ..catalogue import CATALOGUE, EVERY, Row, Study
from ..reproduce.plan import Plan, duration
from ..reproduce.source import ROWS
from ..result import Result
from ..zoo import EMBEDDED
from .evidence import Results, Table, of_own_pairs, plural, shown

SEED = 27


def model_name(results: Results) -> str:
    """The model's name: of a local folder, its last part."""
    every = results.values()
    return next(iter((*_all(every, "request", "model"), *_all(every, "model"))), "no model")


def task_name(results: Results) -> str | None:
    """Whose pairs the results are of: a task's name, or a file's; None for the paper's."""
    every = [result for result in results.values() if not of_own_pairs(result)]
    return next(iter((*_all(every, "request", "task"), *_all(every, "data"))), None)


def setting_table(results: Results, bottleneck: Result | None = None, plan: Plan | None = None) -> Table:
    """What was run, in two columns.

    Args:
        results: by figure.
        bottleneck: the folder's record of its bottleneck.
        plan: its record of what was chosen to keep to a budget of time.
    """
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
        *_pairs(every),
        ("seed of the prompts", ", ".join(_all(every, "request", "seed"))),
        ("budget of time", "" if plan is None else _within(plan)),
        ("bottleneck", "" if bottleneck is None else _chosen(bottleneck)),
        ("layer chosen", ", ".join(_all(every, "request", "layer"))),
        *((f"version of {name}", ", ".join(_all(every, "versions", name))) for name in _packages(every)),
        ("computed (UTC)", _span(_all(every, "date"))),
    ]
    return Table("Settings and versions", ("", ""), tuple((name, value) for name, value in rows if value))


def _pairs(results: Iterable[Result]) -> list[tuple[str, str]]:
    """Rows on the pairs of another task."""
    every = [result for result in results if not of_own_pairs(result)]
    rows = ", ".join(plural(int(count), "row") for count in _all(every, "rows"))
    marks = ", ".join(dict.fromkeys(mark for result in every for mark in _part(result, "arguments").get("marks", ())))
    return [
        ("pairs", ", ".join(filter(None, (*_all(every, "request", "task"), *_all(every, "data"), rows)))),
        ("SHA-256 of the file", ", ".join(_all(every, "request", "data"))),
        ("by the marks", marks),
        ("metric", ", ".join(_all(every, "request", "metric"))),
    ]


def _within(plan: Plan) -> str:
    """The budget, and what was chosen for it."""
    pairs = "each figure's own number of pairs" if plan.pairs is None else f"{plural(plan.pairs, 'pair')} a figure"
    out = [f"{EVERY[work.figure].label} (about {duration(work.seconds or 0.0)})" for work in plan.left_out]
    told = f"; left out, since they do not fit: {', '.join(out)}" if out else ""
    return f"{duration(plan.budget or 0.0)} on {plan.device}: {pairs}{told}"


def _chosen(bottleneck: Result) -> str:
    """The bottleneck, and by how much."""
    table = bottleneck.table.sort_values("effect", ascending=False, kind="stable")
    arguments = _part(bottleneck, "arguments")
    metric = arguments.get("metric", "nld")
    first, *others = [f"layer {int(row.layer)} ({shown(row.effect)})" for row in table.itertuples()]
    what = "1 − NLD" if metric == "nld" else f"loss of {metric}"
    next_one = f"; next, {others[0]}" if others else ""
    return (
        f"{first}{next_one}: {what} with the layer's input resampled at all positions, median over rows, mean over "
        f"kinds of pairs; layer 0 set aside; on {plural(int(arguments.get('rows', 0)), 'row')}"
    )


def figure_rows(results: Results, rows_of_all: Mapping[str, Row] = CATALOGUE) -> list[dict[str, str]]:
    """For each figure: its id, name, what it shows, and its pairs and layer where its result is there.

    Of another task, without the figures that speak of names.
    """
    rows, other = [], task_name(results) is not None
    for figure, row in rows_of_all.items():
        result = results.get(figure)
        if other and row.needs_names:
            continue
        request, arguments = (_part(result, name) for name in ("request", "arguments"))
        rows_of = None if result is None or not row.draws else result.meta.get("rows")
        pairs = request.get("pairs")
        told = "" if pairs is None else f"{pairs} {row.per_pair}".strip()
        if other:
            told = "" if rows_of is None else plural(int(rows_of), "row")
        layer = arguments.get("layer") if row.takes_layer else None
        rows.append(
            {
                "figure": figure,
                "label": row.label,
                "shows": row.shows,
                "pairs": told,
                "layer": "" if layer is None else str(layer),
            }
        )
    return rows


def study_command(study: Study, results: Results) -> str:
    """The command line that computes a study's results again."""
    first = next(iter(results.values()), None)
    pairs, seed = (_part(first, "request").get(name) for name in ("pairs", "seed"))
    words = ["mamba-ioi", "reproduce", "--study", study.name]
    words += [] if set(study.catalogue) <= set(results) else ["--only", ",".join(results)]
    words += [] if pairs in (None, study.rows[0].pairs) else ["--pairs", str(pairs)]
    words += [] if seed in (None, SEED) else ["--seed", str(seed)]
    return shlex.join(words)


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
    other = task_name(results) is not None
    every = {figure for figure, row in CATALOGUE.items() if not (other and row.needs_names)}
    return [_command(group, whole=len(groups) == 1 and every <= set(results)) for group in groups]


def _allowed(figure: str, request: dict[str, Any]) -> dict[str, set | None]:
    """For each option the values that ask for this figure as it is; None where any does."""
    row = CATALOGUE[figure]
    pairs, seed = request.get("pairs"), request.get("seed")
    if request.get("data") or request.get("task"):
        layer = {request.get("layer")} if row.takes_layer else None
        return {"pairs": {pairs, *([None] if pairs == ROWS else [])}, "seed": {seed}, "layer": layer}
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
    if request.get("task"):
        words += ["--task", str(request["task"])]
    elif request.get("data"):
        words += ["--data", str(group["meta"].get("data"))]
    words += ["--marks", ",".join(request["marks"])] if request.get("marks") else []
    words += ["--metric", str(request["metric"])] if request.get("metric") else []
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
