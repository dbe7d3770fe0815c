"""Pairs of a clean and a corrupt prompt, checked for what resampling edges needs, and cut into batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..checks import whole_number
from ..continuation import parting
from ..dataset import IOIDataset
from ..tasks.pairs import PromptPairs, check_fit, require_metric, require_single_answers

HELD_OUT_SEED = 28
HELD_OUT_PAIRS = 100


@dataclass(frozen=True)
class Pairs:
    """Rows of prompts with the same length clean and corrupt, and what their metrics need.

    Attributes:
        clean: token ids of the prompts that run, ``[B, L]``.
        corrupt: token ids of the prompts that resampled values come from, ``[B, L]``.
        last: the position that logits are read at, ``[B]``.
        answers: the clean prompts' answers, ``[B]``.
        corrupt_answers: the corrupt prompts' answers, ``[B]``.
        candidates: the tokens that compete, ``[B, C]``, padded with -1.
        start: the position that runs of a row can begin at, ``[B]``, ascending: where the two prompts part, since up to
            there any circuit's run is the clean one; 0 where the model is no Mamba.
        order: the dataset's row that each one is, ``[B]``.
    """

    clean: Int[Tensor, "B L"]
    corrupt: Int[Tensor, "B L"]
    last: Int[Tensor, "B"]
    answers: Int[Tensor, "B"]
    corrupt_answers: Int[Tensor, "B"]
    candidates: Int[Tensor, "B C"]
    start: Int[Tensor, "B"]
    order: Int[Tensor, "B"]

    @classmethod
    def of(cls, model, data: PromptPairs, *, positional: bool = False) -> Pairs:
        """The dataset's rows, on the model's device, those that begin earlier first.

        Padding after the longest prompt's last token is cut off.

        Raises:
            ValueError: if there are no rows, a token is outside the model's vocabulary, answers are sets, the metric is
                another than NLD, or edges are to be kept apart by position and the prompts are not aligned.
        """
        if not isinstance(data, PromptPairs):
            raise ValueError(f"the data are an IOIDataset, not {type(data).__name__}; any other PromptPairs will do")
        if len(data) == 0:
            raise ValueError("the data hold no rows")
        check_fit(model, data)
        require_single_answers(data, "a circuit")
        require_metric(data, "a circuit")
        clean, corrupt, last = data.clean_tokens, data.corrupt_tokens, data.last_position
        if positional and data.position_labels is None:
            raise ValueError(
                "edges kept apart by position need aligned prompts, whose names and last token stand at the same "
                "positions in every row: generate the data with templates='aligned'"
            )
        length = int(last.max()) + 1
        clean, corrupt = clean[:, :length], corrupt[:, :length]
        start = torch.minimum(parting(clean, corrupt), last) if model.has_scans else torch.zeros_like(last)
        order = torch.argsort(start, stable=True)
        found = cls(
            clean, corrupt, last, data.answers, data.corrupt_answers, data.candidates, start, torch.arange(len(last))
        )
        return found[order].to(model.device)

    def __len__(self) -> int:
        return len(self.clean)

    @property
    def length(self) -> int:
        """The number of positions L."""
        return self.clean.shape[1]

    def to(self, device: torch.device) -> Pairs:
        """The same on a device."""
        return Pairs(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))

    def __getitem__(self, rows: slice | Int[Tensor, "rows"]) -> Pairs:
        return Pairs(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))

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
        least = self.logit_diff(corrupt)
        spread = self.logit_diff(clean) - least
        spread = spread.abs() if absolute else spread
        return least, torch.where(spread == 0, torch.ones_like(spread), spread)

    def logit_diff(self, logits: Float[Tensor, "B V"]) -> Float[Tensor, "B"]:
        """The clean answer's logit less the corrupt one's."""
        return answer_difference(logits, self.answers, self.corrupt_answers)


def held_out(model, data: PromptPairs | None) -> PromptPairs:
    """The data, or held-out pairs where none are given: seed 28, 100 pairs in both directions.

    Raises:
        ValueError: if none are given and the model has no tokenizer to make them with.
    """
    if data is not None:
        return data
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer to make held-out data with: pass the data")
    return IOIDataset.generate(model.tokenizer, HELD_OUT_PAIRS, seed=HELD_OUT_SEED)


def answer_difference(logits: Tensor, answers: Tensor, corrupt_answers: Tensor) -> Tensor:
    """The clean answer's logit less the corrupt one's, ``[B, V] -> [B]``: plain torch, for the inside of a trace."""
    pair = logits.gather(1, torch.stack([answers, corrupt_answers], dim=1))
    pair = pair.to(torch.promote_types(pair.dtype, torch.float32))
    return pair[:, 0] - pair[:, 1]
