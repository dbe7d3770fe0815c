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

import psutil
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from .dataset import IOIDataset
from .model import MambaModel
from .patching import Change, Patch, Plan, cache, check_patch, forward, read_positions, resolve
from .scan import compute_dtype
from .sites import SITES, open_stages
from .stages import ConvStages, ScanStages, cast


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
    memory: int | None = None,
    description: str | None = None,
) -> Float[Tensor, "I B K"]:
    """The logits at the readout's tokens under each intervention, equal to a `run` of each one.

    Args:
        model: a Mamba.
        tokens: the prompts to run, ``[B, L]``.
        interventions: each one a set of changes made together, at sites inside the layers or ``embed``; ``[]`` is the
            plain run. A tensor's first dimension counts the rows of ``tokens`` (or is 1).
        readout: which logits to return.
        source: the prompts that `Resample` takes its values from, row for row with ``tokens``.
        memory: how many bytes to use at most, about; half of what is free if None. Results do not depend on it.
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
    budget = Budget.of(model, tokens.shape[1], memory)
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
    def of(cls, model: MambaModel, length: int, memory: int | None) -> Budget:
        """Divide the memory: half for what is held of the prompts, half for the forward."""
        if memory is None:
            free = torch.cuda.mem_get_info()[0] if model.device.type == "cuda" else psutil.virtual_memory().available
            memory = free // 2
        if memory <= 0:
            raise ValueError(f"memory={memory}: the sweep needs some bytes to work in")
        states = model.d_inner * (model.d_state + model.d_conv)
        held = 4 * model.n_layers * (2 * length * model.d_model + states + 2 * length * model.d_inner)
        running = 4 * (length * (8 * model.d_model + 16 * model.d_inner) + 4 * model.d_inner * model.d_state)
        running += 4 * model.vocab_size
        return cls(
            prompts=max(1, min(256, memory // 2 // held)),
            rows=max(1, min(256, memory // 2 // running)),
        )


# ---------------------------------------------------------------------------------------------------------------------
# What to change
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Edit:
    """A checked change: at ``layer``, with its value for every row, or None for the source run's."""

    layer: int
    change: Change
    value: Tensor | None

    def rows(self, part: slice, batch: int) -> Edit:
        """The same change for some of the rows."""
        value = self.value
        if value is not None and value.dim() and value.shape[0] == batch:
            value = value[part]
        return Edit(self.layer, self.change, value)

    def start(self, parted: int, length: int) -> int:
        """The first position that changes in a row whose prompts part at ``parted``; ``length`` if none does."""
        positions = range(length) if self.change.positions is None else self.change.positions
        if self.value is not None:
            return min(positions)
        return min((position for position in positions if position >= parted), default=length)


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


SourceValues = dict[tuple[int, str, int], Tensor]
"""The source run's values by (layer, site, position), ``[prompts, ...]``."""


@dataclass
class Item:
    """Some rows of one intervention that start at the same position, and what changes there."""

    intervention: int
    rows: Tensor
    edits: list[Edit]

    @property
    def layer(self) -> int:
        """The first layer that changes."""
        return min(edit.layer for edit in self.edits)


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


# ---------------------------------------------------------------------------------------------------------------------
# Inside the traces
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Job:
    """One patched forward from a position on.

    Attributes:
        start: the position.
        rows: the prompt that each row of the batch is of, in the order in which they join.
        items: what each run of rows changes.
        resid: the clean residual stream before each layer, ``[prompts, L, D]``.
        states: each layer's clean state and last conv inputs before ``start`` (None where they are zero).
        values: the source run's values by (layer, site, position), ``[prompts, ...]``.
        last: the position to read in each row, counted from ``start``.
    """

    start: int
    rows: Tensor
    items: Sequence[Item]
    resid: list[Tensor]
    states: list[tuple[Tensor | None, Tensor | None]]
    values: SourceValues
    last: Tensor


def carry(model, states):
    """Run a segment of the prompts from the states before it; each layer's state and last conv inputs after it."""
    ends = []
    for layer, (h, before) in zip(model.layers, states, strict=True):
        x = layer.in_proj.transpose(1, 2)
        tail = x if before is None else torch.cat([before, x], dim=-1)
        scan = continue_from(layer.mixer, h, before)
        scan.get("y")
        taps = model.d_conv - 1
        tail = torch.nn.functional.pad(tail, (max(0, taps - tail.shape[-1]), 0))
        ends.append((scan.last, tail[..., tail.shape[-1] - taps :].clone()))
    return ends


def continue_from(mixer, h: Tensor | None, before: Tensor | None) -> ScanStages:
    """Let a mixer's conv and scan begin with what earlier positions left; returns its scan."""
    if before is not None:
        conv = open_stages(mixer, ConvStages)
        conv.own, conv.before = True, before
    scan = open_stages(mixer, ScanStages)
    scan.own, scan.initial = True, h
    return scan


def run_job(model, job: Job) -> Float[Tensor, "R V"]:
    """The body of a patched forward's trace: rows join at their first changed layer."""
    first = job.items[0].layer
    for layer in range(first):
        model.layers[layer].skip(model.backbone.embeddings.output if layer == 0 else job.resid[0][:1, job.start :])
    count = 0
    for index in range(first, model.n_layers):
        layer = model.layers[index]
        joining = sum(len(item.rows) for item in job.items if item.layer == index)
        if joining or index == first:
            fresh = job.resid[index][job.rows[count : count + joining], job.start :]
            count += joining
            layer.input = fresh if index == first else torch.cat([layer.input, fresh])
        change_layer(layer, index, job, count)
    positions = torch.arange(count, device=job.rows.device)
    model.backbone.norm_f.output = model.backbone.norm_f.output[positions, job.last].unsqueeze(1)
    return model.lm_head.output[:, 0]


def change_layer(layer, index: int, job: Job, count: int) -> None:
    """Apply the batch's changes at one layer, and continue its conv and scan from the clean states."""
    changes: dict[str, list[tuple[slice, Item, Edit]]] = {}
    offset = 0
    for item in job.items:
        rows = slice(offset, offset + len(item.rows))
        offset = rows.stop
        for edit in item.edits:
            if edit.layer == index:
                changes.setdefault(edit.change.site.name, []).append((rows, item, edit))
    h, before = (None if state is None else state[job.rows[:count]] for state in job.states[index])
    for name, site in SITES.items():
        if name == ConvStages.ORDER[0] and before is not None:
            conv = open_stages(layer.mixer, ConvStages)
            conv.own, conv.before = True, before
        if name == ScanStages.ORDER[0]:
            scan = open_stages(layer.mixer, ScanStages)
            scan.own, scan.initial = True, h
        if name not in changes:
            continue
        envoy = layer if site.owner == "layer" else layer.mixer
        if name == "h":
            hold_states(scan, changes[name], job)
            continue
        value = getattr(envoy, site.attribute)
        for rows, item, edit in changes[name]:
            target = value[rows] if edit.change.tap is None else value[rows][..., edit.change.tap]
            for position, new in new_values(item, edit, job):
                target[:, position] = cast(new, target[:, position])


def new_values(item: Item, edit: Edit, job: Job):
    """(position counted from the start, value) of every position that an edit changes in an item's rows."""
    length = job.resid[0].shape[1]
    positions = range(length) if edit.change.positions is None else edit.change.positions
    for column, position in enumerate(positions):
        if edit.value is None:
            if position >= job.start:
                new = job.values[edit.layer, edit.change.site.name, position][item.rows]
                yield position - job.start, new if edit.change.tap is None else new[..., edit.change.tap]
        else:
            value = edit.value if edit.value.shape[0] == 1 else edit.value[item.rows]
            yield position - job.start, value[:, column if value.shape[1] > 1 else 0]


def hold_states(scan: ScanStages, changes: Sequence[tuple[slice, Item, Edit]], job: Job) -> None:
    """Hold states of some rows at some positions; later ones follow."""
    held: dict[int, list[tuple[slice, Tensor]]] = {}
    for rows, item, edit in changes:
        for position, value in new_values(item, edit, job):
            held.setdefault(position, []).append((rows, value))

    def patch(t: int, h: Tensor) -> Tensor:
        h = h.clone()
        for rows, value in held[t]:
            h[rows] = cast(value, h[rows])
        return h

    scan.hold(lambda t, h: patch(t, h) if t in held else h, held)
