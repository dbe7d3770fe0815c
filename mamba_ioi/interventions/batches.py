"""Forwards that go on from a base run: from a layer and a position, with what earlier positions left behind.

What runs inside a trace here uses torch alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..trace.anatomy import given_embeddings, skip_block
from ..trace.change import Change, Patched, Placed, Prefix, SourceValues
from ..trace.state import LayerState
from ..trace.walk import leave_out, logits_at, walk
from .plan import by_layer


def first_changed(change: Change, positions: Sequence[int], differs: int, length: int) -> int:
    """The first of a row's positions that changes where its prompts differ from ``differs`` on; ``length`` if none."""
    if change.value is not None:
        return min(positions, default=length)
    return min((position for position in positions if position >= differs), default=length)


def row_positions(change: Change) -> list[list[int]] | None:
    """The positions that change in each row, where these are each row's own."""
    if not isinstance(change.positions, Tensor):
        return None
    return [[position for position in row if position >= 0] for row in change.positions.tolist()]


@dataclass
class Item:
    """Some rows of one intervention that start at the same position, and what changes there."""

    intervention: int
    start: int
    rows: Tensor
    changes: list[Change]

    def to(self, device: torch.device) -> Item:
        """The same on a device."""
        return Item(self.intervention, self.start, self.rows.to(device), [change.to(device) for change in self.changes])

    @property
    def layer(self) -> int:
        """The first layer that changes."""
        return min(change.layer or 0 for change in self.changes)

    def by_layer(self, n_layers: int) -> list[list[tuple]]:
        """What changes at each layer, comparable with another item's of the same rows."""
        found: list[list[tuple]] = [[] for _ in range(n_layers)]
        for change in self.changes:
            own = isinstance(change.positions, Tensor)  # told apart first: lists of lists and of numbers do not compare
            positions = change.positions.tolist() if isinstance(change.positions, Tensor) else change.positions or []
            cut = change.sources.tolist() if isinstance(change.sources, Tensor) else change.sources or []
            value = "cut" if cut and change.value is not None else str(id(change.value))  # a cut leaves nothing
            where = change.site.name, own, positions, str(change.part)
            found[change.layer or 0].append((*where, value, change.add, cut))
        return found


@dataclass
class Entry:
    """Where an item's rows enter the batch of a patched forward.

    Attributes:
        item: the item.
        layer: the layer before which they enter.
        origin: the entry of the same prompts whose rows they are copied from there; None: from the base run.
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
    """Where each item enters, in order: as late as it is like the base run or like another item of the same prompts.

    The latest layer is found between neighbours once the items are sorted by what they change, layer by layer.
    """
    found: list[Entry] = []
    keyed = [(item.rows.tolist(), item.by_layer(n_layers), item) for item in items]
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
class Batch:
    """One patched forward from a position on.

    Attributes:
        start: the position.
        rows: the prompt that each row of the batch is of, in the order in which they join.
        entries: what each run of rows changes and where it joins, in that order.
        resid: the base run's residual stream before each layer, ``[prompts, L, D]``.
        states: what the base run left behind in each layer before ``start``; None at the first position.
        values: the source run's values by (layer, site, position), ``[prompts, ...]``.
        last: the position to read in each row, counted from ``start``.
        carried: of each entry's cuts, by their place among its item's changes, what the sources before ``start`` give
            to the state there.
    """

    start: int
    rows: Tensor
    entries: Sequence[Entry]
    resid: list[Tensor]
    states: list[LayerState] | None
    values: SourceValues
    last: Tensor
    carried: Sequence[Mapping[int, Tensor]] = ()


class Joining(Patched):
    """Rows join the batch at the layer where they become unlike any others, and are changed from there on."""

    def __init__(self, batch: Batch) -> None:
        placed = (
            Placed(change, entry.rows, entry.item.rows, carried.get(index))
            for entry, carried in zip(batch.entries, batch.carried, strict=True)
            for index, change in enumerate(entry.item.changes)
            if (change.layer or 0) >= entry.layer  # the rows come from others that have those below already
        )
        Patched.__init__(self, by_layer(placed), {}, states=batch.states, start=batch.start, source=batch.values)
        self.batch, self.first = batch, batch.entries[0].layer

    def enter(self, model, layer):
        block, joining = model.layers[layer], [entry for entry in self.batch.entries if entry.layer == layer]
        if given_embeddings(block):  # of a prompt each, while the trace began with one
            (stream, _, *others), kwargs = block.inputs
            there = [entry.item.rows for entry in self.batch.entries if entry.layer <= layer]
            block.inputs = (stream, self.batch.resid[0][torch.cat(there), self.start :], *others), kwargs
        if not joining:
            return True
        stream = [] if layer == self.first else [block.input]
        for entry in joining:
            if entry.origin is None:
                stream.append(self.batch.resid[layer][entry.item.rows, self.start :])
            else:
                stream.append(stream[0][entry.origin.rows])
        block.input = torch.cat(stream)
        return True

    def state(self, layer, rows):
        return LayerState() if self.states is None else self.states[layer].rows(self.batch.rows[:rows])


def run_batch(model, batch: Batch) -> Float[Tensor, "R V"]:
    """The body of a patched forward's trace."""
    visitor = Joining(batch)
    for layer in range(visitor.first):
        skip_block(model, layer, batch.resid[0][:1, batch.start :])  # of no use to anyone: rows join at the first
    walk(model, visitor, visitor.first)
    return logits_at(model, batch.last)


def divergence_index(tokens: Int[Tensor, "B L"], source: Int[Tensor, "B L"]) -> Int[Tensor, "B"]:
    """The first position at which each row's two prompts differ; L where they do not."""
    length = tokens.shape[1]
    return torch.where(tokens != source, torch.arange(length, device=tokens.device), length).amin(1)


def run_prefix(model, segment: Int[Tensor, "B l"], states: list[LayerState] | None) -> list[LayerState]:
    """Run a segment of the prompts from the states before it; what it leaves behind in each layer."""
    with torch.no_grad(), model.trace(segment):
        left = prefix_states(model, states).save()  # pyright: ignore[reportAttributeAccessIssue]
    return left


def prefix_states(model, states: list[LayerState] | None) -> list[LayerState]:
    """The body of `run_prefix`'s trace."""
    visitor = Prefix({}, {}, states=states)
    walk(model, visitor)
    leave_out(model, model.n_layers)
    return visitor.left
