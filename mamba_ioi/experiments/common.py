"""What the experiments share: checks of arguments, effects of resampling, means with intervals, the best candidate."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..checks import integers, listed
from ..interventions.patch import Resample
from ..interventions.readout import Readout
from ..interventions.sweep import sweep
from ..memory import budget
from ..metrics import accuracy, answer_probability, measure, normalized
from ..result import bootstrap_interval
from ..tasks.pairs import Metric, PromptPairs, check_fit, check_metric, scored

if TYPE_CHECKING:
    from ..interventions.cut import Cut
    from ..interventions.patch import Patch
    from ..models.model import CausalLM, MambaModel

ANSWER = "answer"
"""What the answer is called where a mark's token is asked for."""
TIE_DIGITS = 6
"""Scores that agree to this many decimals count as equal, so that rounding errors choose no layer."""


def check_data(model: CausalLM, data: PromptPairs, *, aligned: str | None = None) -> list[str] | None:
    """Refuse data without rows, that the model cannot read, and, where ``aligned`` says so, without common positions.

    Returns:
        The data's position labels, None where its rows are not aligned.

    Raises:
        ValueError: if there is no row, a token is outside the model's vocabulary, or positions are needed and
            differ from row to row.
    """
    if not isinstance(data, PromptPairs):
        raise ValueError(f"the data are PromptPairs, not {type(data).__name__}")
    if len(data) == 0:
        raise ValueError("the dataset has no rows; at least one is needed")
    check_fit(model, data)
    labels = data.position_labels
    if aligned is not None and labels is None:
        raise ValueError(
            f"{aligned} needs prompts whose marks and last token stand at the same positions, and these differ from "
            f"row to row: go by marks=[...], or take rows that agree (of the task ioi: templates='aligned')"
        )
    return labels


def check_layer(model: CausalLM, layer: int) -> int:
    """The layer, if the model has it.

    Raises:
        ValueError: if ``layer`` is no whole number from 0 to the last layer.
    """
    return _indices([layer], model.n_layers, "layer")[0]


def check_layers(model: CausalLM, layers: Sequence[int] | int | None) -> list[int]:
    """The layers to go through: all of them where None is given.

    Raises:
        ValueError: for an empty list, a layer that the model does not have, or one that is named twice.
    """
    return _indices(range(model.n_layers) if layers is None else layers, model.n_layers, "layer")


def check_positions(data: PromptPairs, positions: Sequence[int] | int | None) -> list[int]:
    """The positions to go through: all of the prompts' where None is given.

    Raises:
        ValueError: for an empty list, a position outside the prompts, or one that is named twice.
    """
    length = data.clean_tokens.shape[1]
    return _indices(range(length) if positions is None else positions, length, "position")


def check_places(
    data: PromptPairs, positions: Sequence[int] | int | None, marks: Sequence[str] | str | None
) -> list[int] | list[str]:
    """The places to go through: positions, or the marks where these are given.

    Raises:
        ValueError: as `check_positions`; for marks and positions together, or a mark that is unknown or named twice.
    """
    if marks is None:
        return check_positions(data, positions)
    if positions is not None:
        raise ValueError(f"positions={positions!r} and marks={marks!r}: give one of the two")
    given = [marks] if isinstance(marks, str) else list(marks) if isinstance(marks, Iterable) else []
    names = [name for name in given if isinstance(name, str)]
    if not names or len(set(names)) < len(given):
        raise ValueError(f"marks are names of positions, at least one, each once, not {marks!r}")
    for name in names:
        data.positions_of(name)
    return names


def check_any_places(
    data: PromptPairs, positions: Sequence[int] | int | None, marks: Sequence[str] | str | None
) -> list[int] | list[str]:
    """As `check_places`; but of data whose rows are not aligned all of their marks and ``last`` where none is given."""
    if positions is None and marks is None and data.position_labels is None:
        marks = [*data.marks, "last"]
    return check_places(data, positions, marks)


def positions_at(data: PromptPairs, places: Sequence[int | str]) -> Int[Tensor, "B places"]:
    """Each row's position of each place, -1 for none, on the CPU."""
    columns = (torch.as_tensor(where(data, place)).cpu().reshape(-1, 1) for place in places)
    return torch.cat([column.expand(len(data), 1) for column in columns], dim=1)


def tokens_at(data: PromptPairs, target: str, prompts: Literal["clean", "corrupt"] = "clean") -> Int[Tensor, "B"]:
    """Each row's token at a mark, -1 for none; or, as ``answer``, its answer. On the CPU.

    Raises:
        ValueError: for an unknown mark, or answers that are sets of tokens.
    """
    clean = prompts == "clean"
    if target == ANSWER and ANSWER not in data.marks:
        if data.has_sets:
            raise ValueError("the answers are sets of tokens, and one token a row is needed: name a mark")
        return (data.answers if clean else data.corrupt_answers).cpu()
    tokens, at = (data.clean_tokens if clean else data.corrupt_tokens).cpu(), data.positions_of(target).cpu()
    return tokens.gather(1, at.clamp(min=0)[:, None])[:, 0].where(at >= 0, -1)


def cell_columns(data: PromptPairs, layers: Sequence[int], places: Sequence[int | str]) -> dict[str, list]:
    """A table's columns of each layer and place: ``layer``, and ``mark``, or ``position`` and ``label``."""
    cells = list(product(layers, places))
    columns: dict[str, list] = {"layer": [layer for layer, _ in cells]}
    if isinstance(places[0], str):
        return columns | {"mark": [place for _, place in cells]}
    labels = data.position_labels
    names = [str(place) if labels is None else labels[int(place)] for _, place in cells]
    return columns | {"position": [place for _, place in cells], "label": names}


def where(data: PromptPairs, place: int | str) -> int | Int[Tensor, "B 1"]:
    """A place as a patch's positions: the position, or each row's own at a mark."""
    return place if isinstance(place, int) else data.positions_of(place)[:, None]


def present(data: PromptPairs, place: int | str) -> Bool[Tensor, "B"]:
    """The rows that have a place."""
    return torch.ones(len(data), dtype=torch.bool) if isinstance(place, int) else data.positions_of(place).cpu() >= 0


def mean_where(effects: Float[Tensor, "I B"], there: Bool[Tensor, "I B"]) -> tuple[Any, Any, Any]:
    """`mean_with_interval` of each row of ``effects`` over the entries that are there; NaN where none is."""
    if there.all():
        return mean_with_interval(effects)
    found = np.full((3, len(effects)), np.nan)
    for mask in there.unique(dim=0):  # those that share their rows share resamples
        alike = (there == mask).all(1)
        if mask.any():
            found[:, alike.numpy()] = np.stack(mean_with_interval(effects[alike][:, mask]))
    return found[0], found[1], found[2]


def _indices(values: Sequence[int] | int, count: int, kind: str) -> list[int]:
    listed_ones = listed(values)
    try:
        numbers = integers(listed_ones)
    except ValueError:
        numbers = []
    if not numbers or not all(number in range(count) for number in numbers):
        shown = listed_ones[0] if len(listed_ones) == 1 else listed_ones
        raise ValueError(f"{kind}s are whole numbers from 0 to {count - 1}, at least one of them, not {shown!r}")
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"each {kind} is named once, not {numbers!r}")
    return numbers


def resample_effects(
    model: MambaModel,
    data: PromptPairs,
    interventions: Sequence[Sequence[Patch | Resample | Cut]],
    *,
    metric: Metric | None = None,
    description: str | None = None,
) -> Float[Tensor, "I B"]:
    """1 - NLD of each row under each intervention on its clean prompt: 0 acts as clean, 1 acts as corrupted.

    See `measured_runs`.
    """
    return measured_runs(model, data, interventions, metric=metric, description=description)[0]


def measured_runs(
    model: MambaModel,
    data: PromptPairs,
    interventions: Sequence[Sequence[Patch | Resample | Cut]],
    *,
    metric: Metric | None = None,
    description: str | None = None,
) -> tuple[Float[Tensor, "I B"], Float[Tensor, "I B"]]:
    """1 - NLD of each row under each intervention on its clean prompt, and whether its answer is right.

    Under another metric than ``nld``, what the metric loses: that of the clean run less that of the patched one.

    The normalized logit difference is taken without the absolute value (the paper, Figures 4, 8, 10 and 11), so
    that it is linear in the patched logits. Values of a `Resample` come from the run on the row's corrupt prompt.
    """
    metric = check_metric(data, metric)
    tokens, source = data.clean_tokens, data.corrupt_tokens
    if callable(metric):
        return _effects_of_callable(model, data, interventions, metric, description)
    readout = Readout.of(data, total=metric == "prob_diff")
    logits = sweep(model, tokens, [[], *interventions], readout, source=source, description=description)
    columns = readout.answers, readout.corrupt_answers, readout.candidates

    def value(run: Float[Tensor, "B K"]) -> Float[Tensor, "B"]:
        return measure(metric, run, *columns, total=run[:, -1] if readout.total else None)

    clean, patched = value(logits[0]), torch.stack([value(run) for run in logits[1:]])
    small = logits[1:, :, :-1] if readout.total else logits[1:]
    right = torch.stack([accuracy(run, readout.answers, readout.candidates) for run in small]).double()
    if metric != "nld":
        return clean - patched, right
    corrupt = value(sweep(model, source, [[]], readout)[0])
    return 1 - normalized(patched, clean, corrupt, absolute=False), right


def _effects_of_callable(
    model: MambaModel, data: PromptPairs, interventions: Sequence, metric: Any, description: str | None
) -> tuple[Float[Tensor, "I B"], Float[Tensor, "I B"]]:
    """What a callable metric loses, and whether answers are right.

    The metric sees the logits of all tokens and rows, of so many runs as there is room for.
    """
    whole = torch.arange(model.vocab_size).expand(len(data), -1)
    readout = Readout(whole, data.last_position, data.answers, data.corrupt_answers, data.candidates)
    room = max(1, budget(model) // (16 * whole.numel()))
    runs, found, right = [[], *interventions], [], []
    for start in range(0, len(runs), room):
        some = runs[start : start + room]
        logits = sweep(model, data.clean_tokens, some, readout, source=data.corrupt_tokens, description=description)
        found += [scored(metric, run, data) for run in logits]
        right += [accuracy(run, data.answers.cpu(), data.candidates.cpu()).double() for run in logits]
    return found[0] - torch.stack(found[1:]), torch.stack(right[1:])


def rows_by_group(
    data: PromptPairs, columns: Sequence[str] = (), *, names: Sequence[str] = ()
) -> tuple[list[str], dict[tuple, list[int]]]:
    """The rows of each label of the data's first group, or of each combination of labels of ``names`` if all are there.

    Args:
        data: the pairs.
        columns: what else the table has, whose names no group may take.
        names: the groups to combine, where the data have them.

    Returns:
        The groups' names, and the rows by labels; ``group`` with the label ``all`` if the data have no group.

    Raises:
        ValueError: for a group with the name of one of the columns.
    """
    if not data.groups:
        return ["group"], {("all",): list(range(len(data)))}
    chosen = list(names) if names and all(name in data.groups for name in names) else [next(iter(data.groups))]
    if taken := [name for name in chosen if name in columns]:
        raise ValueError(f"the group {taken[0]!r} of the data has the name of a column of the table: rename it")
    found: dict[tuple, list[int]] = {kind: [] for kind in product(*(data.labels_of(name) for name in chosen))}
    for row, kind in enumerate(zip(*(data.groups[name] for name in chosen), strict=True)):
        found[kind].append(row)
    return chosen, {kind: rows for kind, rows in found.items() if rows}


def mean_with_interval(values: Float[Tensor, "*rows B"]) -> tuple[Any, Any, Any]:
    """The mean over the last axis and the ends of its bootstrap 95 % interval, each ``[*rows]``, as numpy has them."""
    array = values.double().cpu().numpy()
    return array.mean(-1), *bootstrap_interval(array)


def candidate_scores(
    logits: Float[Tensor, "I B K"], readout: Readout
) -> tuple[Float[Tensor, "I B"], Float[Tensor, "I B"]]:
    """Accuracy and the answer's probability, both among the pair's candidates, of each run and row."""
    judged = [
        (
            accuracy(run, readout.answers, readout.candidates),
            answer_probability(run, readout.answers, readout.candidates),
        )
        for run in logits
    ]
    accuracies, probabilities = zip(*judged, strict=True)
    return torch.stack(accuracies).double(), torch.stack(probabilities).double()


def best_run(accuracies: Float[Tensor, "I B"], probabilities: Float[Tensor, "I B"]) -> int:
    """The run of highest mean accuracy; of several, that of highest mean probability; of several, the first."""
    scores = [
        (round(one, TIE_DIGITS), round(other, TIE_DIGITS))
        for one, other in zip(accuracies.mean(1).tolist(), probabilities.mean(1).tolist(), strict=True)
    ]
    return scores.index(max(scores))
