"""The wider check: four tasks, a small Mamba each, and what the methods say of it, in one table.

Takes `tiny` (ioi) and `recall-mamba` (recall), which ship with the package, and trains two more by what
`mamba-ioi train --task NAME` trains with. `docs/tasks.md` holds the table; this prints it:

    python benchmarks/tasks.py OUT [--pairs 100] [--steps N] [--tasks induction,greater_than]

A folder OUT/TASK that holds a model is not trained again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import fields
from datetime import date
from importlib.metadata import version
from os import cpu_count
from pathlib import Path
from typing import Any

import torch

from mamba_ioi import PromptPairs, circuits, experiments, load_model
from mamba_ioi.circuits.search import scored_graph
from mamba_ioi.experiments.common import resample_effects
from mamba_ioi.metrics import accuracy
from mamba_ioi.patching import run
from mamba_ioi.result import bootstrap_interval
from mamba_ioi.sweep import Resample
from mamba_ioi.tasks import generate
from mamba_ioi.zoo import EMBEDDED
from mamba_ioi.zoo.train_small import train

SHIPPED = {"ioi": "tiny", "recall": "recall-mamba"}
TRAINED = ("induction", "greater_than")
OPTIONS: dict[str, dict[str, Any]] = {
    "ioi": {"templates": "aligned"},
    "recall": {"pairs": 6},
    "induction": {"before": 3, "between": 3},
}
PLACES = ("changed", "1 after", "2 after", "3 after", "last")
SIDES = {"reads": "layer_input", "gives": "out_proj"}
SHOWN = 0.1
"""The share of the whole effect from which a cell is shown."""
RANDOM = 5
"""How many random rankings stand beside that of EAP."""
FRACTIONS = [step / 20 for step in range(1, 21)]
"""Of all edges, at which faithfulness is measured: graphs of two layers have few edges for MIB's smallest ones."""


def main() -> None:
    """Train what is not there, measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--tasks", default=",".join((*SHIPPED, *TRAINED)))
    given = parser.parse_args()
    columns = {task: column(task, given.out / task, given.pairs, given.steps) for task in given.tasks.split(",")}
    print(table(columns))
    print(f"\n{machine()}")


def column(task: str, folder: Path, pairs: int, steps: int | None) -> dict[str, str]:
    """What there is to say of one task, by what it says."""
    if task in SHIPPED:
        folder = EMBEDDED[SHIPPED[task]]
    elif not (folder / "config.json").is_file():
        train(folder, task=task, steps=steps)
    model = load_model(folder)
    told = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    name = SHIPPED.get(task, f"trained by `mamba-ioi train --task {task}`")
    data, held_out = (drawn(task, model, pairs, seed) for seed in (27, 28))
    found = {
        "subject": f"`{name}`" if task in SHIPPED else name,
        "size": f"{model.n_layers} layers of {model.d_model}, {told['parameters']:,} parameters",
        "training": f"{told['steps']} steps, {told['minutes']} minutes of one core",
        "right over the vocabulary, on new prompts": trained_accuracy(told),
        "pairs": f"{len(data)}, and as many held out; metric `{data.metric}`",
        "right over the candidates": right(model, data),
    }
    whole = taken(model, data)
    found |= {f"what a layer {side}": moved(model, data, site, whole) for side, site in SIDES.items()}
    found["what a layer reads at the three after together"] = together(model, data, whole)
    return found | circuit(model, data, held_out, whole)


def drawn(task: str, model, pairs: int, seed: int) -> PromptPairs:
    """Pairs of the task, without groups; the marks are the changed token, the three after it, and the last."""
    given = generate(task, model.tokenizer, pairs, seed=seed, **OPTIONS.get(task, {}))
    changed = (given.clean_tokens != given.corrupt_tokens).int()
    assert (changed.sum(1) == 1).all()
    at = changed.argmax(1)
    marks = {name: (at + k).where(at + k < given.last_position, -1) for k, name in enumerate(PLACES[:-1])}
    kept = {one.name: getattr(given, one.name) for one in fields(PromptPairs) if one.init}
    return PromptPairs(**kept | {"marks": marks, "groups": {}})


def trained_accuracy(told: dict[str, Any]) -> str:
    """What training measured on new prompts, kind by kind."""
    if "accuracy" in told:
        return ", ".join(f"{value:.2f} ({kind})" for kind, value in told["accuracy"].items())
    return ", ".join(f"{one['vocabulary']:.2f} (template {i})" for i, one in enumerate(told["held_out"], start=1))


def right(model, data: PromptPairs) -> str:
    """How often the best candidate is an answer, and how often in the corrupt prompt."""
    logits = [run(model, tokens) for tokens in (data.clean_tokens, data.corrupt_tokens)]
    clean, corrupt = (accuracy(one, data.answers, data.candidates).double() for one in logits)
    return f"{with_interval(clean)}; after the corrupt prompt {corrupt.mean():.2f}"


def taken(model, data: PromptPairs) -> float:
    """What the corrupt prompt takes of the metric (of the NLD, 1)."""
    whole = experiments.resample_ablation(model, data, "resid_pre", [0], marks=["changed"], progress=False).table
    return float(whole.effect.iloc[0])


def moved(model, data: PromptPairs, site: str, whole: float) -> str:
    """Where resampling a site moves the answer: layers and places, as shares of the whole effect, with intervals."""
    cells = experiments.resample_ablation(model, data, site, marks=PLACES, progress=False).table
    cells = cells[cells.effect / whole >= SHOWN]
    return "<br>".join(
        f"layer {row.layer}, {row.mark}: {row.effect / whole:.2f} [{row.low / whole:.2f}, {row.high / whole:.2f}]"
        for row in cells.itertuples()
    )


def together(model, data: PromptPairs, whole: float) -> str:
    """What each layer reads at the three tokens after the changed one, resampled at once: a share as in `moved`."""
    at = torch.stack([data.marks[place] for place in PLACES[1:4]], dim=1)
    changes = [[Resample(SIDES["reads"], layer, at)] for layer in range(model.n_layers)]
    shares = resample_effects(model, data, changes).double() / whole
    shown = [layer for layer in range(model.n_layers) if shares[layer].mean() >= SHOWN]
    return "<br>".join(f"layer {layer}: {with_interval(shares[layer])}" for layer in shown) or "nothing"


def circuit(model, data: PromptPairs, held_out: PromptPairs, whole: float) -> dict[str, str]:
    """The edges that EAP finds most needed, the minimal circuit, how faithful it is, and random ones beside it."""
    scores = circuits.eap(model, data, fine=True)
    ranked = scores.table.nsmallest(6, "score")
    found = circuits.minimal_circuit(model, data, scores)
    graph, _ = scored_graph(scores, model.n_layers)
    judged = circuits.evaluate(model, held_out, found)
    rankings = [circuits.faithfulness(model, held_out, scores, FRACTIONS, seed=seed).meta for seed in range(RANDOM)]
    random = judged.random
    assert random is not None
    areas = {}
    for name in ("cpr", "cmd"):
        ranking = "signed" if name == "cpr" else "absolute"
        beside = torch.tensor([meta[name]["random"] for meta in rankings])
        spread = f"{beside.mean():.2f} ({beside.min():.2f} to {beside.max():.2f})"
        areas[name.upper()] = f"{rankings[0][name][ranking]:.2f}; at random {spread}"
    reached = "" if found.meta["reached"] else " (target not reached)"
    interval = f"[{judged.accuracy_low:.2f}, {judged.accuracy_high:.2f}]"
    return {
        "EAP: the edges most needed": "<br>".join(
            f"{row.src} → {row.dst} {-row.score / whole:.2f}" for row in ranked.itertuples()
        ),
        "minimal circuit": f"{len(found)} of {len(graph)} edges{reached}",
        "its accuracy": f"{judged.accuracy:.2f} {interval}; at random {random.accuracy:.2f}",
        "its NLD": f"{judged.nld:.2f} [{judged.nld_low:.2f}, {judged.nld_high:.2f}]; at random {random.nld:.2f}",
        **areas,
    }


def with_interval(values: torch.Tensor) -> str:
    """A mean with its bootstrap 95 % interval."""
    low, high = bootstrap_interval(values.numpy())
    return f"{values.mean():.2f} [{float(low):.2f}, {float(high):.2f}]"


def table(columns: dict[str, dict[str, str]]) -> str:
    """The table in Markdown, a task a column."""
    rows: list[Sequence[str]] = [["", *(f"`{task}`" for task in columns)], ["---"] * (len(columns) + 1)]
    rows += [[what, *(found[what] for found in columns.values())] for what in next(iter(columns.values()))]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def machine() -> str:
    """Where and when this was measured."""
    cpu = Path("/proc/cpuinfo")
    names = [line for line in cpu.read_text().splitlines() if line.startswith("model name")] if cpu.is_file() else []
    of = names[0].split(":")[1].strip() if names else "unknown kind"
    return (
        f"{cpu_count()} cores, {of}; torch {torch.__version__}, transformers {version('transformers')}, "
        f"{date.today().isoformat()}"
    )


if __name__ == "__main__":
    main()
