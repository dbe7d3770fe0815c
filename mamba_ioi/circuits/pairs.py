"""Pairs of a clean and a corrupt prompt, checked for what resampling edges needs, and cut into batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..checks import whole_number
from ..experiments.common import check_places
from ..interventions.batches import divergence_index
from ..metrics import logit_diff, measure, scale
from ..tasks import generate
from ..tasks.pairs import Metric, PromptPairs, check_fit, check_metric, scored

HELD_OUT_SEED = 28
HELD_OUT_PAIRS = 100
OTHER = "other"
"""What the positions are called that are at none of the marks."""


@dataclass(frozen=True)
class Pairs:
    """Rows of prompts with the same length clean and corrupt, and what their metrics need.

    Attributes:
        clean: token ids of the prompts that run, ``[B, L]``.
        corrupt: token ids of the prompts that resampled values come from, ``[B, L]``.
        last: the position that logits are read at, ``[B]``.
        answers: the clean prompts' answers, ``[B]`` or sets ``[B, A]``.
        corrupt_answers: the corrupt prompts' answers, the same.
        candidates: the tokens that compete, ``[B, C]``, padded with -1.
        start: the position that runs of a row can begin at, ``[B]``, ascending: where the two prompts part, since up to
            there any circuit's run is the clean one; 0 where the model is no Mamba.
        order: the dataset's row that each one is, ``[B]``.
        metric: what is measured, as `PromptPairs` has it.
        data: the dataset, where the metric is a callable, which sees its rows.
        marks: the names of the places that edges are kept apart by, where these are marks; `OTHER` is the last.
        places: each position's number among ``marks``, ``[B, L]``; None without marks.
    """

    clean: Int[Tensor, "B L"]
    corrupt: Int[Tensor, "B L"]
    last: Int[Tensor, "B"]
    answers: Int[Tensor, "B *A"]
    corrupt_answers: Int[Tensor, "B *A2"]
    candidates: Int[Tensor, "B C"]
    start: Int[Tensor, "B"]
    order: Int[Tensor, "B"]
    metric: Metric = "nld"
    data: PromptPairs | None = None
    marks: tuple[str, ...] = ()
    places: Int[Tensor, "B L"] | None = None

    @classmethod
    def of(
        cls,
        model,
        data: PromptPairs,
        *,
        positional: bool = False,
        marks: Sequence[str] | None = None,
        metric: Metric | None = None,
    ) -> Pairs:
        """The dataset's rows, on the model's device, those that begin earlier first.

        Padding after the longest prompt's last token is cut off.

        Args:
            model: the model that runs them.
            data: the dataset.
            positional: whether edges are kept apart by position, for which rows are aligned.
            marks: the marks that edges are kept apart by instead.
            metric: what is measured; the dataset's own if None.

        Raises:
            ValueError: if there are no rows, a token is outside the model's vocabulary, the metric is unknown, or a
                callable where the model runs on a server; if edges are to be kept apart by position and the prompts are
                not aligned, or by marks that are unknown or stand at one position.
        """
        if not isinstance(data, PromptPairs):
            raise ValueError(f"the data are PromptPairs, not {type(data).__name__}")
        if len(data) == 0:
            raise ValueError("the data hold no rows")
        check_fit(model, data)
        metric = check_metric(data, metric)
        if callable(metric) and model.remote is not None:
            raise ValueError(f"the metric {metric!r} is a callable, which {model.remote} does not know: name one")
        clean, corrupt, last = data.clean_tokens, data.corrupt_tokens, data.last_position
        if positional and data.position_labels is None:
            raise ValueError(
                "edges kept apart by position need aligned prompts, whose marks and last token stand at the same "
                "positions in every row: take rows that agree (of the task ioi: templates='aligned')"
            )
        length = int(last.max()) + 1
        clean, corrupt = clean[:, :length], corrupt[:, :length]
        start = torch.minimum(divergence_index(clean, corrupt), last) if model.all_scans else torch.zeros_like(last)
        order = torch.argsort(start, stable=True)
        rows = data.answers, data.corrupt_answers, data.candidates, start, torch.arange(len(last))
        found = cls(clean, corrupt, last, *rows, metric, data if callable(metric) else None)
        if marks is not None:
            names, places = mark_places(data, marks, length)
            found = replace(found, marks=names, places=places)
        return found[order].to(model.device)

    def __len__(self) -> int:
        return len(self.clean)

    @property
    def length(self) -> int:
        """The number of positions L."""
        return self.clean.shape[1]

    def to(self, device: torch.device) -> Pairs:
        """The same on a device."""
        return replace(self, **{name: column.to(device) for name, column in self._columns().items()})

    def __getitem__(self, rows: slice | Int[Tensor, "rows"]) -> Pairs:
        return replace(self, **{name: column[rows] for name, column in self._columns().items()})

    def _columns(self) -> dict[str, Tensor]:
        columns = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: column for name, column in columns.items() if isinstance(column, Tensor)}

    def chunks(self, rows: int) -> Iterator[Pairs]:
        """The pairs in order, at most ``rows`` at a time."""
        rows = whole_number(rows, "batch_rows", least=1)
        for first in range(0, len(self), rows):
            yield self[first : first + rows]

    def batches(self, rows: int) -> Iterator[Pairs]:
        """The pairs in order, at most ``rows`` at a time, to be run from the first one's start.

        Rows that begin later are a batch of their own where that leaves out more than a whole prompt's positions.
        """
        starts, counts = (part.tolist() for part in self.start.unique_consecutive(return_counts=True))
        cuts, begun, row = [0], starts[0], 0
        for start, count in zip(starts, counts, strict=True):
            if count * (start - begun) > self.length:
                cuts.append(row)
                begun = start
            row += count
        for first, stop in zip(cuts, [*cuts[1:], len(self)], strict=True):
            yield from self[first:stop].chunks(rows)

    def scale(
        self, clean: Float[Tensor, "B V"], corrupt: Float[Tensor, "B V"], *, absolute: bool
    ) -> tuple[Float[Tensor, "B"], Float[Tensor, "B"]]:
        """Each row's ``min`` and ``range``: its normalized logit difference is (logit diff - min) / range.

        As `metrics.normalized_logit_diff` has it, with |max - min| for ``range`` if ``absolute`` (App. B).
        """
        return scale(self.logit_diff(clean), self.logit_diff(corrupt), absolute=absolute)

    def logit_diff(self, logits: Float[Tensor, "B V"]) -> Float[Tensor, "B"]:
        """The clean answer's logit less the corrupt one's."""
        return logit_diff(logits, self.answers, self.corrupt_answers)

    def value(self, logits: Float[Tensor, "B V"]) -> Float[Tensor, "B"]:
        """The metric of a run; of ``nld``, which needs two more runs, the logit difference."""
        if callable(self.metric):
            assert self.data is not None
            return scored(self.metric, logits, self.data[self.order])
        return measure(self.metric, logits, self.answers, self.corrupt_answers, self.candidates)


def mark_places(
    data: PromptPairs, marks: Sequence[str], length: int
) -> tuple[tuple[str, ...], Int[Tensor, "B {length}"]]:
    """The names of places, the marks and `OTHER`; and each position's number among them.

    Raises:
        ValueError: for a mark that is unknown, named twice or called `OTHER`, or two that stand at one position in a
            row, where it could not be said of which of them the position's share is.
    """
    names = tuple(str(name) for name in check_places(data, None, marks))
    if OTHER in names:
        raise ValueError(f"{OTHER!r} is what positions at no mark are called; give that mark another name")
    places = torch.full((len(data), length), len(names), device=data.last_position.device)
    for number, name in enumerate(names):
        positions = data.positions_of(name)
        rows = (positions >= 0).nonzero()[:, 0]
        taken = places[rows, positions[rows]]
        if (taken < len(names)).any():
            row, other = next(
                (row, one) for row, one in zip(rows.tolist(), taken.tolist(), strict=True) if one < len(names)
            )
            raise ValueError(
                f"row {row}: the marks {names[other]!r} and {name!r} both stand at position {int(positions[row])}, and "
                f"its share of an edge's score is one mark's; leave one of them out"
            )
        places[rows, positions[rows]] = number
    return (*names, OTHER), places


def held_out(model, data: PromptPairs | None) -> PromptPairs:
    """The data, or held-out pairs of the paper's task where none are given: seed 28, 100 pairs in both directions.

    Raises:
        ValueError: if none are given and the model has no tokenizer to make them with.
    """
    if data is not None:
        return data
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer to make held-out data with: pass the data")
    return generate("ioi", model.tokenizer, 2 * HELD_OUT_PAIRS, seed=HELD_OUT_SEED, symmetric=True)
