"""What the experiments share: checks of arguments, effects of resampling, means with intervals, the best candidate."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..checks import integers, listed
from ..metrics import accuracy, answer_probability, normalized_logit_diff
from ..result import bootstrap_interval
from ..sweep import Readout, Resample, sweep
from ..tasks.pairs import PromptPairs, check_fit, require_metric, require_single_answers

if TYPE_CHECKING:
    from ..model import CausalLM, MambaModel
    from ..patching import Patch

TIE_DIGITS = 6
"""Scores that agree to this many decimals count as equal, so that rounding errors choose no layer."""


def check_data(model: CausalLM, data: PromptPairs, *, aligned: str | None = None) -> list[str] | None:
    """Refuse data without rows, that the model cannot read, and, where ``aligned`` says so, without common positions.

    Returns:
        The data's position labels, None where its rows are not aligned.

    Raises:
        ValueError: if there is no row, a token is outside the model's vocabulary, answers are sets, or positions are
            needed and differ from row to row.
    """
    if not isinstance(data, PromptPairs):
        raise ValueError(f"the data are PromptPairs, such as an IOIDataset, not {type(data).__name__}")
    if len(data) == 0:
        raise ValueError("the dataset has no rows; at least one is needed")
    check_fit(model, data)
    require_single_answers(data, "an experiment")
    labels = data.position_labels
    if aligned is not None and labels is None:
        raise ValueError(
            f"{aligned} needs prompts whose marks and last token stand at the same positions, and these differ from "
            f"row to row: go by marks=[...], or select rows that agree (of an IOIDataset: templates='aligned')"
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
    interventions: Sequence[Sequence[Patch | Resample]],
    *,
    description: str | None = None,
) -> Float[Tensor, "I B"]:
    """1 - NLD of each row under each intervention on its clean prompt: 0 acts as clean, 1 acts as corrupted.

    The normalized logit difference is taken without the absolute value (the paper, Figures 4, 8, 10 and 11), so
    that it is linear in the patched logits. Values of a `Resample` come from the run on the row's corrupt prompt.
    """
    require_metric(data, "an effect of resampling")
    readout = Readout.of(data)
    logits = sweep(
        model, data.clean_tokens, [[], *interventions], readout, source=data.corrupt_tokens, description=description
    )
    clean, corrupt = logits[0], sweep(model, data.corrupt_tokens, [[]], readout)[0]
    answers = readout.answers, readout.corrupt_answers
    scores = [normalized_logit_diff(patched, clean, corrupt, *answers, absolute=False) for patched in logits[1:]]
    return 1 - torch.stack(scores)


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
