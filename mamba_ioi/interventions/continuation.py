"""Forwards that go on from a clean run: from a layer and a position, with what earlier positions left behind.

What runs inside a trace here uses torch alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..trace.conv import ConvStages
from ..trace.location import take_over
from ..trace.s6 import ScanStages
from ..trace.sites import SITES
from ..trace.stages import cast
from .patching import Change, Plan, leave_out, logits_at, visit


@dataclass(frozen=True)
class Edit:
    """A checked change: at ``layer``, with its value for every row, or None for the source run's."""

    layer: int
    change: Change
    value: Tensor | None

    def rows(self, part: slice, batch: int) -> Edit:
        """The same change for some of the rows."""
        value, change = self.value, self.change
        if value is not None and value.dim() and value.shape[0] == batch:
            value = value[part]
        return Edit(self.layer, change.rows(part, batch) if isinstance(change.positions, Tensor) else change, value)

    def to(self, device: torch.device) -> Edit:
        """The same on a device."""
        return Edit(self.layer, self.change, None if self.value is None else self.value.to(device))

    def own(self) -> list[list[int]] | None:
        """The positions that change in each row, where these are each row's own."""
        positions = self.change.positions
        if not isinstance(positions, Tensor):
            return None
        return [[position for position in row if position >= 0] for row in positions.tolist()]

    def everywhere(self, length: int) -> Sequence[int]:
        """The positions that change in some row."""
        positions = self.change.positions
        if isinstance(positions, Tensor):
            return sorted(set(positions.flatten().tolist()) - {-1})
        return range(length) if positions is None else positions

    def start(self, positions: Sequence[int], parted: int, length: int) -> int:
        """The first of a row's positions that changes where its prompts part at ``parted``; ``length`` if none does."""
        if self.value is not None:
            return min(positions, default=length)
        return min((position for position in positions if position >= parted), default=length)


States = list[tuple[Tensor | None, Tensor | None]]
"""Each layer's state h ``[B, E, N]`` and last conv inputs ``[B, E, K - 1]`` at some position; None at the first one."""

SourceValues = dict[tuple[int, str, int], Tensor]
"""The source run's values by (layer, site, position), ``[prompts, ...]``."""


@dataclass
class Item:
    """Some rows of one intervention that start at the same position, and what changes there."""

    intervention: int
    start: int
    rows: Tensor
    edits: list[Edit]

    def to(self, device: torch.device) -> Item:
        """The same on a device."""
        return Item(self.intervention, self.start, self.rows.to(device), [edit.to(device) for edit in self.edits])

    @property
    def layer(self) -> int:
        """The first layer that changes."""
        return min(edit.layer for edit in self.edits)

    def changes(self, n_layers: int) -> list[list[tuple]]:
        """What changes at each layer, comparable with another item's of the same rows."""
        found: list[list[tuple]] = [[] for _ in range(n_layers)]
        for edit in self.edits:
            change = edit.change
            tap = -1 if change.tap is None else change.tap
            own = isinstance(change.positions, Tensor)  # told apart first: lists of lists and of numbers do not compare
            positions = change.positions.tolist() if isinstance(change.positions, Tensor) else change.positions or []
            found[edit.layer].append((change.site.name, own, positions, tap, id(edit.value)))
        return found


@dataclass
class Entry:
    """Where an item's rows enter the batch of a patched forward.

    Attributes:
        item: the item.
        layer: the layer before which they enter.
        origin: the entry of the same prompts whose rows they are copied from there; None: from the clean run.
        first: the place of the first of them in the batch.
    """

    item: Item
    layer: int
    origin: Entry | None
    first: int = 0

    @property
    def rows(self) -> slice:
        """Their place in the batch."""
        return slice(self.first, self.first + len(self.item.rows))


def entries(items: Sequence[Item], n_layers: int) -> list[Entry]:
    """Where each item enters, in order: as late as it is like the clean run or like another item of the same prompts.

    The latest layer is found between neighbours once the items are sorted by what they change, layer by layer.
    """
    found: list[Entry] = []
    keyed = [(item.rows.tolist(), item.changes(n_layers), item) for item in items]
    before: tuple[list, list, Entry] | None = None
    for rows, changes, item in sorted(keyed, key=lambda key: key[:2]):
        layer, origin = 0, None
        if before is not None and before[0] == rows:
            same = (a == b for a, b in zip(before[1], changes, strict=True))
            layer = next((index for index, equal in enumerate(same) if not equal), n_layers - 1)
            origin = before[2]
            while origin is not None and origin.layer >= layer:
                origin = origin.origin  # below its own layer an entry is like its origin
        entry = Entry(item, item.layer, None) if item.layer >= layer else Entry(item, layer, origin)
        found.append(entry)
        before = rows, changes, entry
    found.sort(key=lambda entry: entry.layer)
    count = 0
    for entry in found:
        entry.first = count
        count = entry.rows.stop
    return found


@dataclass
class Job:
    """One patched forward from a position on.

    Attributes:
        start: the position.
        rows: the prompt that each row of the batch is of, in the order in which they join.
        entries: what each run of rows changes and where it joins, in that order.
        resid: the clean residual stream before each layer, ``[prompts, L, D]``.
        states: each layer's clean state and last conv inputs before ``start`` (None where they are zero).
        values: the source run's values by (layer, site, position), ``[prompts, ...]``.
        last: the position to read in each row, counted from ``start``.
    """

    start: int
    rows: Tensor
    entries: Sequence[Entry]
    resid: list[Tensor]
    states: States
    values: SourceValues
    last: Tensor


def parting(tokens: Int[Tensor, "B L"], source: Int[Tensor, "B L"]) -> Int[Tensor, "B"]:
    """The first position at which each row's two prompts differ; L where they do not."""
    length = tokens.shape[1]
    return torch.where(tokens != source, torch.arange(length, device=tokens.device), length).amin(1)


def carry(model, segment: Int[Tensor, "B l"], states: States) -> States:
    """Run a segment of the prompts from the states before it; each layer's state and last conv inputs after it."""
    with torch.no_grad(), model.trace(segment):
        ends = carried(model, states).save()  # pyright: ignore[reportAttributeAccessIssue]
    return ends


def carried(model, states: States) -> States:
    """The body of `carry`'s trace."""
    ends = run_layers(model, states, Plan({}, {}, model.n_layers))
    leave_out(model, model.n_layers)
    return ends


def run_layers(model, states: States, plan: Plan) -> States:
    """In a trace: every layer from the states that earlier positions left, changed as planned; what this run leaves."""
    ends, names = [], [name for name, site in SITES.items() if site.owner != "model"]
    conv_at, scan_at, after = (names.index(name) for name in (ConvStages.ORDER[0], ScanStages.ORDER[0], "out_proj"))
    visit(model, None, ("embed",), plan, {})
    for index, (layer, (h, before)) in enumerate(zip(model.layers, states, strict=True)):
        visit(model, index, names[:conv_at], plan, {})
        conv = continue_conv(layer.mixer, before)
        tail = conv.x if before is None else torch.cat([before, conv.x], dim=-1)
        visit(model, index, names[conv_at:scan_at], plan, {})
        scan = continue_scan(layer.mixer, h)
        visit(model, index, names[scan_at:after], plan, {})
        taps = model.d_conv - 1
        tail = torch.nn.functional.pad(tail, (max(0, taps - tail.shape[-1]), 0))
        ends.append((scan.end(), tail[..., tail.shape[-1] - taps :].clone()))
        visit(model, index, names[after:], plan, {})
    return ends


def continue_conv(mixer, before: Tensor | None) -> ConvStages:
    """Let a mixer's conv begin with the inputs that earlier positions left."""
    conv = take_over(mixer, ConvStages)
    conv.before = before
    return conv


def continue_scan(mixer, h: Tensor | None) -> ScanStages:
    """Let a mixer's scan begin with the state that earlier positions left."""
    scan = take_over(mixer, ScanStages)
    scan.initial = h
    return scan


def run_job(model, job: Job) -> Float[Tensor, "R V"]:
    """The body of a patched forward's trace: rows join where they become unlike any others."""
    first, count = job.entries[0].layer, 0
    for layer in range(first):
        model.layers[layer].skip(job.resid[0][:1, job.start :])  # of no use to anyone: rows join at `first`
    for index in range(first, model.n_layers):
        layer = model.layers[index]
        joining = [entry for entry in job.entries if entry.layer == index]
        if joining:
            stream = [] if index == first else [layer.input]
            for entry in joining:
                if entry.origin is None:
                    stream.append(job.resid[index][entry.item.rows, job.start :])
                else:
                    stream.append(stream[0][entry.origin.rows])
            layer.input = torch.cat(stream)
            count = joining[-1].rows.stop
        change_layer(layer, index, job, count)
    return logits_at(model, job.last)


def change_layer(layer, index: int, job: Job, count: int) -> None:
    """Apply the batch's changes at one layer, and continue its conv and scan from the clean states."""
    changes: dict[str, list[tuple[slice, Item, Edit]]] = {}
    for entry in job.entries:
        if entry.layer > index:
            break
        for edit in entry.item.edits:
            if edit.layer == index:
                changes.setdefault(edit.change.site.name, []).append((entry.rows, entry.item, edit))
    h, before = (None if state is None else state[job.rows[:count]] for state in job.states[index])
    for name, site in SITES.items():
        if name == ConvStages.ORDER[0]:
            continue_conv(layer.mixer, before)
        if name == ScanStages.ORDER[0]:
            scan = continue_scan(layer.mixer, h)
        if name not in changes:
            continue
        envoy = layer if site.owner == "layer" else layer.mixer
        if name == "h":
            hold_states(scan, changes[name], job)  # pyright: ignore[reportPossiblyUnboundVariable]
            continue
        value = getattr(envoy, site.attribute)
        for rows, item, edit in changes[name]:
            target = value[rows] if edit.change.tap is None else value[rows][..., edit.change.tap]
            for at, position, new in new_values(item, edit, job):
                target[at, position] = cast(new, target[at, position])


def new_values(item: Item, edit: Edit, job: Job):
    """(which of an item's rows, position counted from the start, value) wherever an edit changes them."""
    length = job.resid[0].shape[1]
    if isinstance(edit.change.positions, Tensor):
        yield from own_values(item, edit, job, edit.change.positions)
        return
    positions = range(length) if edit.change.positions is None else edit.change.positions
    every = slice(None)
    for column, position in enumerate(positions):
        if edit.value is None:
            if position >= job.start:
                new = job.values[edit.layer, edit.change.site.name, position][item.rows]
                yield every, position - job.start, new if edit.change.tap is None else new[..., edit.change.tap]
        else:
            value = edit.value if edit.value.shape[0] == 1 else edit.value[item.rows]
            yield every, position - job.start, value[:, column if value.shape[1] > 1 else 0]


def own_values(item: Item, edit: Edit, job: Job, positions: Int[Tensor, "B k"]):
    """`new_values` where positions are each row's own."""
    positions = positions.to(item.rows.device)[item.rows]
    for position in sorted(set(positions.flatten().tolist()) - {-1}):
        if position < job.start:
            continue  # a resampled value where the prompts have not parted
        at, column = (positions == position).nonzero(as_tuple=True)
        rows = item.rows[at]
        if edit.value is None:
            new = job.values[edit.layer, edit.change.site.name, position][rows]
            new = new if edit.change.tap is None else new[..., edit.change.tap]
        else:
            value = edit.value
            new = value[rows if value.shape[0] > 1 else 0 * rows, column if value.shape[1] > 1 else 0 * column]
        yield at, position - job.start, new


def hold_states(scan: ScanStages, changes: Sequence[tuple[slice, Item, Edit]], job: Job) -> None:
    """Hold states of some rows at some positions; later ones follow."""
    held: dict[int, list[tuple[slice, slice | Tensor, Tensor]]] = {}
    for rows, item, edit in changes:
        for at, position, value in new_values(item, edit, job):
            held.setdefault(position, []).append((rows, at, value))

    def patch(t: int, h: Tensor) -> Tensor:
        h = h.clone()
        for rows, at, value in held[t]:
            target = h[rows]
            target[at] = cast(value, target[at])
        return h

    scan.hold(lambda t, h: patch(t, h) if t in held else h, held)
