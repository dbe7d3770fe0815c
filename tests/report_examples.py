"""Made-up results of every figure, in the form of real ones, whose numbers say what the tests of the report choose."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import pandas as pd

import mamba_ioi
from mamba_ioi.catalogue import CATALOGUE
from mamba_ioi.figures import ModelSizes, residual_edges, save_figure
from mamba_ioi.figures.style import new_figure
from mamba_ioi.result import Result

from .circuit_examples import LABELS, matrices, parts, positional
from .test_figures import CORRUPTIONS, SIZES

CHANGES = dict(zip(CORRUPTIONS, (3, 5, 7, 15, 13), strict=True))
"""The position that each corruption changes."""
TINY, LARGE = "tiny", "state-spaces/mamba-370m-hf"
LAST = 19


def result(figure: str, rows: pd.DataFrame | list[dict], model: str = TINY, **meta) -> Result:
    """A result as `reproduce` stores it."""
    arguments = meta.pop("arguments", {})
    layers = 48 if model == LARGE else 6
    asked = {"figure": figure, "model": model, "weights": None, "dtype": None, "mamba_ioi": mamba_ioi.__version__}
    row = CATALOGUE[figure]
    asked |= {"pairs": row.pairs} if row.pairs else {}
    asked |= {"seed": 27} if row.draws else {}
    asked |= {"layer": None} if row.takes_layer else {}
    experiment = row.experiment.removesuffix("_h").removesuffix("_out_proj").removesuffix("_marks")
    made = Result.create(
        experiment,
        pd.DataFrame(rows),
        model=SimpleNamespace(model_id=model, n_layers=layers, dtype="torch.float32", device="cpu"),
        arguments=arguments,
        request=asked,
        **meta,
    )
    return Result(made.table, made.meta | {"date": "2026-01-02T03:04:05+00:00"})


def cells(effect, over: Mapping[str, Sequence[int]]) -> list[dict]:
    """A row for each corruption, position and what ``over`` names; ``effect`` gets them, and how far the name is."""
    rows = []
    for number, (corruption, name) in enumerate(CHANGES.items()):
        for values in itertools.product(*over.values(), range(LAST + 1)):
            *others, position = values
            value = effect(*others, position - name, position) + 0.001 * number
            label = f"n{LABELS[position][1:]} C->D" if position == name else LABELS[position]
            row = dict(zip(over, others, strict=True)) | {"position": position, "label": label}
            rows.append({"corruption": corruption, **row, "effect": value, "low": value - 0.01, "high": value + 0.02})
    return [row | {"n": 32} for row in rows]


def fig4(peaks: Mapping[int, float], model: str = TINY) -> Result:
    return result(
        "fig4", cells(lambda layer, after, _: peaks[layer] if after == 0 else 0.0, {"layer": list(peaks)}), model
    )


def fig4_marks(peaks: Mapping[int, float], model: str = TINY) -> Result:
    """Each layer's peak is at the name that the corruption changes."""
    names = dict(zip(CORRUPTIONS, ("n1", "n2", "n3", "n5", "n4"), strict=True))
    marks = CATALOGUE["fig4_marks"].arguments["marks"]
    rows = [
        {"corruption": corruption, "layer": layer, "mark": mark, "effect": peak if mark == name else 0.0}
        for (corruption, name), (layer, peak), mark in itertools.product(names.items(), peaks.items(), marks)
    ]
    rows = [row | {"low": row["effect"] - 0.01, "high": row["effect"] + 0.02, "n": 30} for row in rows]
    return result("fig4_marks", rows, model, arguments={"marks": marks})


def scores(value: float, accuracy: float | None = None, spread: float = 0.03) -> dict:
    accuracy = value if accuracy is None else accuracy
    ends = {"low": value - spread, "high": value + spread}
    ends |= {"accuracy_low": accuracy - spread, "accuracy_high": accuracy + spread}
    return {"accuracy": accuracy, "probability": value, **ends, "n": 80}


def fig5(probabilities: Mapping[int, float], model: str = TINY) -> Result:
    return result("fig5", [{"layer": layer, **scores(value)} for layer, value in probabilities.items()], model)


def greedy(accuracies: Sequence[float], removable: int, model: str = TINY) -> Result:
    rows = [{"step": step, "layer": step - 1, **scores(value)} for step, value in enumerate(accuracies)]
    return result("fig5_greedy", rows, model, removable=removable)


def fig6(sets: Sequence[Sequence[int]], unreached: Sequence[int] = (), model: str = TINY) -> Result:
    """Each set is of another kind of prompt; ``unreached`` are numbers of those that miss the target."""
    kinds = list(itertools.product("abcd", CORRUPTIONS))
    rows = []
    for (template, corruption), layers in zip(kinds, sets, strict=False):
        for step, layer in enumerate((-1, *layers)):
            row = {"template": template, "corruption": corruption, "step": step, "layer": layer, "accuracy": 0.5}
            rows.append(row | {"low": 0.4, "high": 0.6, "probability": 0.5, "n": 400})
    missed = [list(kinds[number]) for number in unreached]
    return result("fig6", rows, model, unreached=missed, arguments={"target": 0.9})


def fig7(strengths: Mapping[int, float], layer: int = 1) -> Result:
    """``strengths`` by how far a token is from a name; 0 elsewhere."""
    text = [" Mary", " and", " John", " went", " to", " the", " store", " with", " a", " dog"]
    names = [i for i, token in enumerate(text) if token.strip() in ("Mary", "John")]
    rows = []
    for i, j in itertools.product(range(len(text)), repeat=2):
        near = next((strengths[k] for k in strengths if i - k in names), 0.0)
        rows.append({"prompt": "p", "i": i, "j": j, "similarity": near, "label_i": text[i], "label_j": text[j]})
    return result("fig7", rows, arguments={"layer": layer})


def fig8(taps: Mapping[int, float], layer: int = 1, model: str = TINY, shift: int = 0) -> Result:
    """The peak of each tap, which stands where that tap brings a token from the changed name, or ``shift`` further."""
    table = cells(lambda tap, after, _: taps[tap] if after == shift - tap else 0.0, {"slice": list(taps)})
    return result("fig8", table, model, arguments={"layer": layer})


def fig9(success, layer: int = 1, model: str = TINY, n: int = 100) -> Result:
    """``success`` of method, source and target slot."""
    rows = []
    for method, source, target in itertools.product(("replace", "subtract_add"), range(1, 6), range(1, 6)):
        value = success(method, source, target)
        row = {"method": method, "source_slot": source, "target_slot": target, "success": value}
        rows.append(row | {"low": value - 0.1, "high": value + 0.05, "n": n})
    return result("fig9", rows, model, arguments={"layer": layer, "offset": 1})


def plane() -> Result:
    rows = [{"name": f"N{i}", "slot": 1 + i % 5, "pc1": i, "pc2": -i, "n": 60} for i in range(20)]
    return result("fig9_pca", rows, explained_variance=[0.42, 0.18], arguments={"layer": 1})


def fig10(course: Sequence[float], layer: int = 1, model: str = TINY) -> Result:
    """The effect at +0, +1, … from the changed name; beyond, the last of these. Other layers: nothing."""

    def effect(of: int, after: int, position: int) -> float:
        return 0.0 if of != layer or after < 0 else course[min(after, len(course) - 1)]

    return result("fig10", cells(effect, {"layer": sorted({0, layer})}), model)


def fig11(last: float, earlier: float, layer: int = 1, model: str = TINY) -> Result:
    def effect(of: int, after: int, position: int) -> float:
        return 0.0 if of != layer else last if position == LAST else earlier if after == 1 else 0.0

    return result("fig11", cells(effect, {"layer": sorted({0, layer})}), model)


def circuit(figure: str, count: int = 20, of: int = 100, accuracy: float = 0.9, random: float = 0.3, **meta) -> Result:
    """A circuit of ``count`` of ``of`` edges, its held-out accuracy, and that of the random one beside it."""
    model = meta.pop("model", TINY)
    layers = 48 if model == LARGE else 6
    example = {"appd1": matrices, "appd2": parts, "appd3": positional}[figure](layers)

    def judged(value: float) -> dict:
        ends = {"accuracy_low": value - 0.04, "accuracy_high": value + 0.03, "nld_low": value - 0.2, "nld_high": value}
        return {"accuracy": value, "nld": value - 0.1, **ends, "kl": 0.5, "n_edges": count, "n_rows": 200}

    known = {"n_edges": count, "of": of, "accuracy": 0.86, "nld": 0.7, "found_by": "a test", "target": 0.85}
    known |= {"prefix": count + 2, "on_paths": count - 1}
    table = meta.pop("table", example.table)
    if "score" not in table and figure != "appd2":
        table = table.assign(score=-0.1)
    keep = ("graph", "effects", "position_labels")
    extra = {name: example.meta[name] for name in keep if name in example.meta}
    held_out = judged(accuracy) | {"random": judged(random)}
    return result(figure, table, model, circuit=known | {"held_out": held_out}, n_rows=160, **extra, **meta)


def fine(taps: Mapping[int, float], layer: int = 1, model: str = TINY, **options) -> Result:
    """Appendix D.2 with the effects of the taps that are kept in one layer; no other layer keeps any."""
    table = parts(48 if model == LARGE else 6).table
    is_tap = table["dst"].str.contains(".conv[", regex=False)
    table.loc[is_tap, ["kept", "effect"]] = [False, float("nan")]
    for tap, effect in taps.items():
        table.loc[table["dst"] == f"{layer}.conv[{tap}]", ["kept", "effect"]] = [True, effect]
    return circuit("appd2", model=model, table=table, **options)


def sec44(
    whole: tuple[float, float], cut: tuple[float, float], edges: tuple[int, int], layer: int = 1, model: str = TINY
):
    """(accuracy, NLD) of the circuit and of what is left of it, and their numbers of edges."""
    rows = []
    for name, (accuracy, nld), count in zip(("whole", "cut"), (whole, cut), edges, strict=True):
        ends = {
            "accuracy_low": accuracy - 0.05,
            "accuracy_high": accuracy + 0.04,
            "nld_low": nld - 0.1,
            "nld_high": nld + 0.1,
        }
        rows.append({"circuit": name, "n_edges": count, "nld": nld, "accuracy": accuracy, "kl": 0.5, **ends})
    found_on = [row | {"accuracy": row["accuracy"] - 0.01, "nld": row["nld"] + 0.01} for row in rows]
    return result("sec44", rows, model, n_rows=200, arguments={"layer": layer}, found_on=found_on)


def as_the_paper_says(model: str = TINY) -> dict[str, Result]:
    """Every figure, with results that bear every claim out; the layer is 39 in the large model, else 1."""
    layer, layers = (39, 48) if model == LARGE else (1, 6)
    others = [i for i in range(layers) if i not in (0, layer)]
    sizes = SIZES | {"n_layers": layers}
    found = {
        "fig2": result("fig2", ModelSizes.of(sizes).table(), model),
        "fig3": result("fig3", residual_edges(4), model),
        "fig4": fig4({0: 0.9, layer: 0.8, **dict.fromkeys(others, 0.1)}, model),
        "fig4_marks": fig4_marks({0: 0.9, layer: 0.8, **dict.fromkeys(others, 0.1)}, model),
        "fig5": fig5({-1: 0.96, 0: 0.1, layer: 0.5, **dict.fromkeys(others, 0.9)}, model),
        "fig5_greedy": greedy([0.96] * (layers // 2 + 1) + [0.5] * (layers - layers // 2), layers // 2, model),
        "fig6": fig6([[layer]] * 15 + [[layer, 2]] * 5, model=model),
        "fig7": fig7({0: 0.1, 1: 0.6}, layer),
        "fig8": fig8({-3: 0.0, -2: 0.02, -1: 0.8, 0: 0.1}, layer, model),
        "fig9": fig9(lambda method, source, target: 0.98 if max(source, target) < 4 else 0.6, layer, model),
        "fig9_pca": plane(),
        "fig10": fig10([0.0, 0.9], layer, model),
        "fig11": fig11(0.9, 0.02, layer, model),
        "fig12": result("fig12", ModelSizes.of(sizes).table(), model),
        "appd1": circuit("appd1", model=model),
        "appd2": fine({-1: 0.8, 0: 0.1}, layer, model),
        "appd3": circuit("appd3", model=model),
        "sec44": sec44((0.86, 0.87), (0.84, 0.86), (40, 30), layer, model),
        "knockout": knockout(layer, layers, model),
        "flow": flow(0.9, 0.04, layer, layers, model),
        "lens": lens({i: 8.0 if i >= layer else 0.5 for i in range(-1, layers)}, model),
        "direct": direct({i: 4.0 if i == layer else 1.0 for i in range(layers)}, model),
        "features": features(layer, model),
        "features_edges": features_edges(layer, model),
        "features_kept": features_kept({0: 0.0, 4: 0.3, 16: 0.95, 64: 1.0}, 0.1, layer, model),
    }
    found["probe"] = probes({"n1": 0.9, "n2": 0.8, "n3": 0.95}, layer, model)
    return {figure: found[figure] for figure in CATALOGUE}


def probes(
    kept: Mapping[str, float], layer: int = 1, model: str = TINY, places: Sequence[str] = ("n4-1", "last")
) -> Result:
    """What is read of each slot's name: off the state at the places, off ssm_input a token after the name."""
    rows = []
    for site, (target, share) in itertools.product(("ssm_input", "h"), kept.items()):
        for mark in (f"{target}+1", *places):
            value = share if site == "h" else 0.97 if "+" in mark else 0.02
            row = {"site": site, "target": target, "layer": layer, "mark": mark, "accuracy": value}
            rows.append(row | {"low": value - 0.02, "high": value + 0.02, "control": 0.01, "classes": 40, "n": 800})
    return result("probe", rows, model, arguments={"layer": layer})


def knockout(layer: int, layers: int, model: str = TINY) -> Result:
    """What two names give to the last position, in one layer's scan alone."""
    rows = [
        {"source": source, "target": "last", "layer": i, "effect": value, "low": value - 0.02, "high": value + 0.02}
        | {"accuracy": 0.9, "accuracy_low": 0.8, "accuracy_high": 1.0, "n": 160}
        for source in ("n1+1", "n5+1")
        for i in range(layers)
        for value in [0.4 if i == layer else 0.0]
    ]
    return result("knockout", rows, model)


def flow(at: float, before: float, layer: int = 1, layers: int = 6, model: str = TINY, metric: str = "nld") -> Result:
    """What goes in the layer, before it and (0.05) after it; each changed name goes on by one tap, and to the end."""
    rows = []
    for corruption, name in CHANGES.items():
        found = [("edge", layer, "scan", name + 1, LAST, 0.5 * at), ("edge", layer, "conv", name, name + 1, 0.45 * at)]
        found += [
            ("layer", i, way, -1, -1, at if i == layer else 0.01) for i in range(layers) for way in ("scan", "conv")
        ]
        found += [("before", layer, way, -1, -1, before) for way in ("scan", "conv", "both") if layer]
        found += [("after", layer, way, -1, -1, 0.05) for way in ("scan", "conv", "both")]
        for part, index, way, source, target, effect in found:
            row = {"corruption": corruption, "part": part, "layer": index, "way": way, "source": source}
            row |= {"target": target, "source_label": LABELS[source] if source >= 0 else ""}
            row |= {"target_label": LABELS[target] if target >= 0 else "", "estimate": effect}
            rows.append(row | {"effect": effect, "low": effect - 0.01, "high": effect + 0.02, "n": 32})
    labels = {corruption: list(LABELS) for corruption in CHANGES}
    return result("flow", rows, model, arguments={"layer": layer, "metric": metric}, labels=labels)


def lens(differences: Mapping[int, float], model: str = TINY) -> Result:
    """The logit difference after each layer at the last position, and none at the first."""
    rows = [
        {"layer": i, "position": p, "label": label, "logit_diff": value, "low": value - 0.1, "high": value + 0.1}
        | {"probability": 0.9, "rank": 1.0 if value > 4 else 90.0, "n": 160}
        for i, difference in differences.items()
        for p, label, value in ((0, "BOS", 0.0), (1, "out", difference))
    ]
    return result("lens", rows, model)


def direct(effects: Mapping[int, float], model: str = TINY) -> Result:
    """What each layer's mixer adds to the logit difference."""
    written = [(-1, "embed", 0.0), *((layer, "mixer", effect) for layer, effect in effects.items()), (-1, "bias", 0.0)]
    rows = [
        {"layer": layer, "part": part, "effect": effect, "low": effect - 0.1, "high": effect + 0.1, "n": 160}
        for layer, part, effect in written
    ]
    return result("direct", rows, model, logit_diff=sum(effects.values()))


def features(layer: int, model: str = TINY) -> Result:
    """Two features that carry the answer, and a little that the dictionary does not explain."""
    rows = [
        {"feature": feature, "effect": effect, "low": effect - 0.05, "high": effect + 0.05, "estimate": 0.4, "n": 160}
        for feature, effect in ((7, 0.5), (3, 0.3), (-1, 0.1), (0, float("nan")))
    ]
    return result("features", rows, model, arguments={"site": "ssm_input", "layer": layer, "features": 64})


def features_edges(layer: int, model: str = TINY) -> Result:
    """Each of two features drives one, and the error a third."""
    rows = [
        {"source": source, "target": target, "effect": effect, "low": effect - 0.05, "high": effect + 0.05}
        | {"estimate": effect, "n": 160}
        for source, target, effect in ((-1, -1, 0.9), (7, 2, 0.8), (3, 1, 0.6), (7, 1, 0.0))
    ]
    sides = {
        side: {"site": site, "layer": layer} for side, site in (("upstream", "ssm_input"), ("downstream", "out_proj"))
    }
    return result("features_edges", rows, model, arguments=sides)


def features_kept(accuracies: Mapping[int, float], random: float, layer: int, model: str = TINY) -> Result:
    """Accuracy by the number of features that are kept, beside random ones that all have the same."""
    rows = [
        {"k": k, "kept": kept, "n": 400}
        | {
            f"{name}{end}": value + shift
            for name in ("accuracy", "nld")
            for end, shift in (("", 0), ("_low", -0.02), ("_high", 0.02))
        }
        for k, accuracy in accuracies.items()
        for kept, value in (("top", accuracy), ("random", random))
    ]
    arguments = {"site": "ssm_input", "layer": layer, "features": 64}
    return result("features_kept", rows, model, arguments=arguments, active=64, judged_on="held_out")


def store(out: Path, results: Mapping[str, Result], pictures: bool = True) -> Path:
    """Write results, and pictures of the sizes that the real ones have, as `reproduce` leaves them."""
    for figure, one in results.items():
        one.save(out / "results" / figure)
        if pictures:
            drawn = new_figure(15, 3, layout="none")
            drawn.text(0.1, 0.5, figure)
            save_figure(drawn, out / figure)
    return out
