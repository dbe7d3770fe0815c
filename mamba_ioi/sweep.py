"""Many patched runs of the same prompts, each started where its first change is.

A change at layer l leaves the layers below as they were, and one at position p leaves the positions before it as
they were: a Mamba carries nothing from p - 1 to p but each layer's state h and the last inputs of its conv. So every
prompt runs once, unpatched; an intervention starts from that run's residual stream at (l, p) and from its states at
p - 1, and runs only the layers from l on and the positions from p on. A resampled value is the clean one where the
two prompts have not yet parted, so there is nothing to run. Interventions that start at the same position run
together: each joins the batch at its own layer. Every forward is one nnsight trace.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from .continuation import Edit, Item, Job, SourceValues, carry, run_job
from .dataset import IOIDataset
from .memory import fitting_rows, forward_bytes, stream_bytes
from .model import MambaModel
from .patching import Change, Patch, Plan, cache, check_patch, forward, read_positions, resolve
from .scan import compute_dtype
from .sites import SITES

MOST_ROWS = 256


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
    candidates: Int[Tensor, "B C"]

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
    description: str | None = None,
) -> Float[Tensor, "I B K"]:
    """The logits at the readout's tokens under each intervention, equal to a `run` of each one.

    Batches are as large as ``model.memory`` allows.

    Args:
        model: a Mamba.
        tokens: the prompts to run, ``[B, L]``.
        interventions: each one a set of changes made together, at sites inside the layers or ``embed``; ``[]`` is the
            plain run. A tensor's first dimension counts the rows of ``tokens`` (or is 1).
        readout: which logits to return.
        source: the prompts that `Resample` takes its values from, row for row with ``tokens``.
        description: the progress bar's title; no bar if None.

    Returns:
        Logits ``[len(interventions), B, K]`` on the CPU.

    Raises:
        ValueError: for a change at an unknown site, layer or position, with a value that does not fit, or at a site
            that has no positions; for a `Resample` without source tokens.
    """
    tokens, _ = model.to_tokens(tokens)
    if source is not None:
        source, _ = model.to_tokens(source)
        if source.shape != tokens.shape:
            raise ValueError(
                f"source tokens have the shape of tokens, {tuple(tokens.shape)}, not {tuple(source.shape)}"
            )
    edits = [_edits(model, tokens, changes, source) for changes in interventions]
    budget = Budget.of(model, tokens.shape[1])
    results = torch.empty(len(interventions), *readout.tokens.shape, dtype=compute_dtype(model.dtype))
    with tqdm(
        total=results.shape[0] * results.shape[1], desc=description, unit="run", disable=description is None
    ) as bar:
        for start in range(0, tokens.shape[0], budget.prompts):
            part = slice(start, start + budget.prompts)
            chunk = _Chunk(
                model, tokens[part], None if source is None else source[part], readout.last[part], readout.tokens[part]
            )
            own = [[edit.rows(part, tokens.shape[0]) for edit in changes] for changes in edits]
            results[:, part] = chunk.run(own, budget.rows, bar)
    return results


@dataclass(frozen=True)
class Budget:
    """How many prompts to hold the clean run of, and how many patched rows to run at once.

    Attributes:
        prompts: rows of the clean run (residual streams and states of every layer).
        rows: rows of one patched forward.
    """

    prompts: int
    rows: int

    @classmethod
    def of(cls, model: MambaModel, length: int) -> Budget:
        """Divide the memory: half for what is held of the prompts, half for the forward."""
        states = model.d_inner * (model.d_state + model.d_conv)
        held = 2 * stream_bytes(model, length) + 4 * model.n_layers * (states + 2 * length * model.d_inner)
        return cls(
            prompts=fitting_rows(model, held, MOST_ROWS, share=0.5),
            rows=fitting_rows(model, forward_bytes(model, length), MOST_ROWS, share=0.5),
        )


# ---------------------------------------------------------------------------------------------------------------------
# What to change
# ---------------------------------------------------------------------------------------------------------------------


def _edits(model, tokens, changes: Sequence[Patch | Resample], source) -> list[Edit]:
    edits = []
    for change in changes:
        resampled = isinstance(change, Resample)
        if resampled and source is None:
            raise ValueError("a Resample needs source tokens to take its values from")
        patch = Patch(change.site, change.layer, 0.0, change.positions, change.slice) if resampled else change
        ref, checked = check_patch(model, tokens, patch)
        site, layer = ref.site, ref.layer
        if site.name == "embed":
            site, layer = SITES["resid_pre"], 0
        if site.owner == "model" or not site.by_position:
            raise ValueError(
                f"a sweep changes sites inside the layers that have positions, and embed; not {site.name!r}"
            )
        value = None
        if not resampled:
            dims = len(site.shape) - (checked.tap is not None)
            value = torch.as_tensor(checked.value, device=tokens.device)
            value = value.reshape((1,) * (dims - value.dim()) + value.shape)
        edits.append(Edit(layer, Change(site, 0.0, checked.positions, checked.tap), value))
    return edits


# ---------------------------------------------------------------------------------------------------------------------
# Running
# ---------------------------------------------------------------------------------------------------------------------


class _Chunk:
    """Some prompts: their clean run, kept as far as patched runs start from it."""

    def __init__(self, model: MambaModel, tokens: Tensor, source: Tensor | None, last: Tensor, read: Tensor) -> None:
        self.model, self.tokens, self.source = model, tokens, source
        self.last, self.read = last.to(tokens.device), read.to(tokens.device)
        self.batch, self.length = tokens.shape
        refs = [resolve(model, "resid_pre", layer) for layer in range(model.n_layers)]
        plan = Plan({}, {ref.layer: [ref] for ref in refs}, model.n_layers)
        where = read_positions(tokens, self.last)
        with torch.no_grad(), model.trace(tokens):
            outcome = forward(model, plan, where).save()
        found, logits = outcome
        self.plain = logits.gather(1, self.read).to(compute_dtype(logits.dtype))
        self.resid = [found[ref.key] for ref in refs]
        self.position = 0  # the states are those before this position
        self.states: list[tuple[Tensor | None, Tensor | None]] = [(None, None)] * model.n_layers
        differs = torch.ones_like(tokens, dtype=torch.bool) if source is None else tokens != source
        steps = torch.arange(self.length, device=tokens.device)
        self.parted = torch.where(differs, steps, self.length).amin(1).tolist()

    def run(self, interventions: Sequence[Sequence[Edit]], limit: int, bar) -> Float[Tensor, "I B K"]:
        """The logits of every intervention; ``limit`` rows at once."""
        results = self.plain.cpu().expand(len(interventions), *self.plain.shape).clone()
        groups = self._items(interventions)
        bar.update(results.shape[0] * results.shape[1] - sum(len(i.rows) for items in groups.values() for i in items))
        for start in sorted(groups):
            self._advance(start)
            values = self._source_values(start, groups[start])
            for items in _batches(sorted(groups[start], key=lambda item: item.layer), limit):
                logits = self._run_from(start, items, values)
                offset = 0
                for item in items:
                    results[item.intervention, item.rows.cpu()] = logits[offset : offset + len(item.rows)]
                    offset += len(item.rows)
                bar.update(offset)
        return results

    def _items(self, interventions: Sequence[Sequence[Edit]]) -> dict[int, list[Item]]:
        """The runs that differ from the clean one, by the position they start at."""
        last = self.last.tolist()
        groups: dict[int, list[Item]] = defaultdict(list)
        for index, edits in enumerate(interventions):
            starts: dict[int, list[int]] = defaultdict(list)
            for row in range(self.batch):
                start = min((edit.start(self.parted[row], self.length) for edit in edits), default=self.length)
                if start <= last[row]:
                    starts[start].append(row)
            for start, rows in starts.items():
                live = [
                    edit for edit in edits if any(edit.start(self.parted[r], self.length) < self.length for r in rows)
                ]
                groups[start].append(Item(index, torch.tensor(rows, device=self.tokens.device), live))
        return groups

    def _advance(self, position: int) -> None:
        """Bring the clean run's states to those before ``position``."""
        if position == self.position:
            return
        segment, states = self.tokens[:, self.position : position], self.states
        model = self.model
        with torch.no_grad(), model.trace(segment):
            ends = carry(model, states).save()
        self.states, self.position = ends, position

    def _run_from(self, start: int, items: Sequence[Item], values: SourceValues) -> Float[Tensor, "R K"]:
        """The logits of a batch of items that start at one position."""
        rows = torch.cat([item.rows for item in items])
        job = Job(
            start=start,
            rows=rows,
            items=items,
            resid=self.resid,
            states=self.states,
            values=values,
            last=self.last[rows] - start,
        )
        dummy = self.tokens[:1, start:]
        model = self.model
        with torch.no_grad(), model.trace(dummy):
            logits = run_job(model, job).save()
        return logits.gather(1, self.read[rows]).to(self.plain).cpu()

    def _source_values(self, start: int, items: Sequence[Item]) -> SourceValues:
        """The source run's value at every (layer, site, position from ``start`` on) that an item resamples."""
        wanted = set()
        for item in items:
            for edit in item.edits:
                if edit.value is None:
                    positions = range(self.length) if edit.change.positions is None else edit.change.positions
                    wanted |= {(edit.layer, edit.change.site.name, p) for p in positions if p >= start}
        if not wanted:
            return {}
        keys = {key: f"blocks.{key[0]}.hook_{key[1]}.{key[2]}" for key in sorted(wanted)}
        found = cache(self.model, self.source, list(keys.values()))
        return {key: found[alias] for key, alias in keys.items()}


def _batches(items: Sequence[Item], limit: int) -> list[list[Item]]:
    """The items in batches of at most ``limit`` rows, large items cut."""
    batches: list[list[Item]] = [[]]
    room = limit
    for item in items:
        rows = item.rows
        while len(rows):
            if not room:
                batches.append([])
                room = limit
            taken, rows = rows[:room], rows[room:]
            batches[-1].append(Item(item.intervention, taken, item.edits))
            room -= len(taken)
    return batches
