"""Many patched runs of the same prompts: grouped, batched, and read only where the result needs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from .dataset import IOIDataset
from .model import MambaModel
from .patching import Patch, cache, resolve, run


@dataclass(frozen=True)
class Resample:
    """A `Patch` whose value is that of the same site in the run on the source (corrupt) tokens."""

    site: str
    layer: int | None
    positions: int | Sequence[int] | None = None
    slice: int | None = None


@dataclass(frozen=True)
class Readout:
    """The few logits that the task's metrics need, ``K`` token ids a row, and where each candidate stands in them.

    The columns stand for a small vocabulary: `metrics` functions take logits read at ``tokens`` together with
    ``answers``, ``corrupt_answers`` and ``candidates`` from here.

    Attributes:
        tokens: token ids to read, ``[B, K]``.
        last: the position to read at, ``[B]``.
        answers: the column of the clean answer, ``[B]``.
        corrupt_answers: the column of the corrupt answer, ``[B]``.
        candidates: the columns of the pair's names, ``[B, 4]``, padded with -1.
    """

    tokens: Int[Tensor, "B K"]
    last: Int[Tensor, "B"]
    answers: Int[Tensor, "B"]
    corrupt_answers: Int[Tensor, "B"]
    candidates: Int[Tensor, "B 4"]

    @classmethod
    def of(cls, data: IOIDataset) -> Readout:
        """Read every candidate of each pair at its last position."""
        candidates = data.candidates
        columns = torch.arange(candidates.shape[1]).expand_as(candidates)
        return cls(
            tokens=candidates.clamp(min=0),
            last=data.last_position,
            answers=(candidates == data.answers[:, None]).int().argmax(1),
            corrupt_answers=(candidates == data.corrupt_answers[:, None]).int().argmax(1),
            candidates=columns.where(candidates >= 0, -1),
        )


def sweep(
    model: MambaModel,
    tokens: Int[Tensor, "B L"],
    interventions: Sequence[Sequence[Patch | Resample]],
    readout: Readout,
    *,
    source: Int[Tensor, "B L"] | None = None,
    batch_rows: int = 256,
    description: str | None = None,
) -> Float[Tensor, "I B K"]:
    """The logits at the readout's tokens under each intervention.

    Args:
        model: a Mamba.
        tokens: the prompts to run, ``[B, L]``.
        interventions: each one a set of changes made together; ``[]`` is the plain run.
        readout: which logits to return.
        source: the prompts that `Resample` takes its values from, row for row with ``tokens``.
        batch_rows: how many rows run at once.
        description: the progress bar's title; no bar if None.

    Returns:
        Logits ``[len(interventions), B, K]`` on the CPU.
    """
    results = torch.empty(len(interventions), *readout.tokens.shape)
    rows = range(0, tokens.shape[0], batch_rows)
    with tqdm(total=len(rows) * len(interventions), desc=description, disable=description is None) as bar:
        for start in rows:
            part = slice(start, start + batch_rows)
            corrupt = None if source is None else source[part]
            for index, changes in enumerate(interventions):
                patches = materialize(model, changes, corrupt)
                logits = run(model, tokens[part], patches, positions=readout.last[part])
                results[index, part] = logits.cpu().gather(1, readout.tokens[part])
                bar.update()
    return results


def materialize(
    model: MambaModel, changes: Sequence[Patch | Resample], source: Int[Tensor, "B L"] | None
) -> list[Patch]:
    """The changes with every `Resample` given its value from the source run."""
    wanted = [change for change in changes if isinstance(change, Resample)]
    if not wanted:
        return list(changes)
    if source is None:
        raise ValueError("a Resample needs source tokens to take its values from")
    refs = {change: resolve(model, change.site, change.layer) for change in wanted}
    found = cache(model, source, sorted({ref.key for ref in refs.values()}))
    patches = []
    for change in changes:
        if isinstance(change, Resample):
            value = found[refs[change].key]
            if change.slice is not None:
                value = value[..., change.slice - 1]
            if change.positions is not None:
                positions = [change.positions] if isinstance(change.positions, int) else list(change.positions)
                value = value[:, positions]
            patches.append(Patch(change.site, change.layer, value, change.positions, change.slice))
        else:
            patches.append(change)
    return patches
