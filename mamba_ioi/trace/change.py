"""Changes of a run, and the visitor that makes them, for whole prompts and for rows that join a batch alike.

This file is shipped to remote servers: it uses torch alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from .cut import NAMES, New, cut_outputs, mask
from .location import StageSite, open_stages
from .sites import SiteInfo, owner
from .stages import cast
from .state import LayerState
from .walk import Visitor

SourceValues = Mapping[tuple[int, str, int], Tensor]
"""The source run's values by (layer, site, position), ``[prompts, ...]``."""


@dataclass(frozen=True)
class Change:
    """A checked change of a run: at ``site`` of ``layer``, ``value`` takes the place of what is at ``positions``.

    Attributes:
        layer: the layer; None outside the layers.
        site: the site's row of the table.
        value: a tensor of the site's number of dimensions, each full or 1; a callable of what is there; or None for the
            source run's value.
        positions: those of all rows, or each row's own, ``[B, k]`` with -1 for none; None for all of them.
        part: which part of the value changes, an index of its last dimensions: one of the conv's terms, or the
            channels of x, B or C; ``()`` for all of it.
        sources: of a cut (at ``y``), the positions whose writes are replaced in the outputs at ``positions``, by zeros
            or (``value`` None) by the source run's: those of all rows, or each row's own; None: no cut.
        lasting: of a cut that several runs of a generation make, its number; None: one run makes it.
    """

    layer: int | None
    site: SiteInfo
    value: Tensor | Callable[[Tensor], Tensor | float] | None
    positions: list[int] | Int[Tensor, "B k"] | None
    part: tuple[slice | int, ...] = ()
    sources: list[int] | Int[Tensor, "B s"] | None = None
    lasting: int | None = None

    def rows(self, part: slice, batch: int) -> Change:
        """The same change for some of the rows."""
        value, own = self.value, {}
        if isinstance(value, Tensor) and value.dim() and self.site.shape[0] == "B" and len(value) == batch:
            value = value[part]
        for name in ("positions", "sources"):
            places = getattr(self, name)
            own[name] = places[part] if isinstance(places, Tensor) else places
        return replace(self, value=value, **own)

    def to(self, device: torch.device) -> Change:
        """The same on a device."""
        return replace(self, value=self.value.to(device)) if isinstance(self.value, Tensor) else self

    def everywhere(self, length: int) -> Sequence[int]:
        """The positions that change in some row."""
        if isinstance(self.positions, Tensor):
            return sorted(set(self.positions.flatten().tolist()) - {-1})
        return range(length) if self.positions is None else self.positions

    def resampled(self, length: int, start: int = 0) -> set[tuple[int, str, int]]:
        """The (layer, site, position) of the source run that the change takes values from, in a run from ``start``."""
        layer = self.layer or 0
        if self.value is not None:
            return set()
        if self.sources is not None:
            return {
                (layer, name, p) for name in NAMES for p in replace(self, positions=self.sources).everywhere(length)
            }
        return {(layer, self.site.name, p) for p in self.everywhere(length) if p >= start}


@dataclass(frozen=True)
class Placed:
    """A change, and where in the batch the rows are that it is for.

    Attributes:
        change: the change.
        rows: the rows' place in the batch.
        prompts: which prompts they are; None where the batch's rows are the prompts.
        carried: of a cut, what the sources before the run give to the state that it begins with, ``[R, ...]``.
        offset: of a cut, what its positions are ahead of the run's.
        after: where a cut's part in the state after the run goes, by its number, where it lasts.
    """

    change: Change
    rows: slice = field(default_factory=lambda: slice(None))
    prompts: Int[Tensor, "R"] | None = None
    carried: Tensor | None = None
    offset: int = 0
    after: dict[int, Tensor | None] = field(default_factory=dict)

    def new_values(self, target: Tensor, start: int, source: SourceValues) -> Iterator[tuple[Any, Any, Tensor]]:
        """(which rows, at which positions, new value) wherever the rows change.

        Args:
            target: what is there: the rows' values from position ``start`` on.
            start: the position at which the run begins; a source run's values before it are those of the base run.
            source: the source run's values.
        """
        change, prompts = self.change, slice(None) if self.prompts is None else self.prompts
        if not change.site.by_position:
            assert change.value is not None  # sweeps, which know a source run, refuse such sites
            yield slice(None), slice(None), self.of_callable(target) if callable(change.value) else change.value
        elif isinstance(change.positions, Tensor):
            yield from self.own_values(target, change.positions.to(target.device)[prompts], start, source)
        else:
            positions = range(start + target.shape[1]) if change.positions is None else change.positions
            kept = [(column, position) for column, position in enumerate(positions) if position >= start]
            if not kept:
                return
            at = slice(None) if change.positions is None else [position - start for _, position in kept]
            if callable(change.value):
                new = self.of_callable(target[:, at])
            elif change.value is None:
                new = torch.stack([self.source_value(position, prompts, source) for _, position in kept], dim=1)
            else:
                new = change.value if len(change.value) == 1 else change.value[prompts]
                new = new if new.shape[1] == 1 else new[:, [column for column, _ in kept]]
            yield slice(None), at, new

    def own_values(self, target: Tensor, positions: Int[Tensor, "R k"], start: int, source: SourceValues) -> Iterator:
        """`new_values` where positions are each row's own."""
        change, every = self.change, torch.arange(len(positions), device=positions.device)
        if change.value is None:
            prompts = every if self.prompts is None else self.prompts
            for position in sorted(set(positions.flatten().tolist())):
                if position >= start:
                    at = (positions == position).any(1).nonzero().flatten()
                    yield at, position - start, self.source_value(position, prompts[at], source)
            return
        row, column = (positions >= start).nonzero(as_tuple=True)
        if callable(change.value):
            new = self.of_callable(target[every[:, None], (positions - start).clamp(min=0)])
        else:
            new = change.value if self.prompts is None or len(change.value) == 1 else change.value[self.prompts]
            new = cast(new, target.new_empty(()).expand(*positions.shape, *target.shape[2:]))
        yield row, positions[row, column] - start, new[row, column]

    def of_callable(self, there: Tensor) -> Tensor:
        """What the callable makes of a copy of what is there."""
        assert callable(self.change.value)
        value = self.change.value(there.clone())
        if not isinstance(value, Tensor | int | float):
            raise ValueError(
                f"the callable at {self.change.site.name!r} must return a tensor or a float, not {type(value).__name__}"
            )
        return cast(value, there)

    def cut(self, scan: Any, start: int, source: SourceValues) -> None:
        """Make a cut in an open scan of positions from ``start`` on."""
        count, length = len(range(*self.rows.indices(scan.x.shape[0]))), scan.x.shape[1]
        start += self.offset
        prompts = slice(None) if self.prompts is None else self.prompts
        sources, targets = (
            mask(places, prompts, count, start, length, scan.x.device)
            for places in (self.change.sources, self.change.positions)
        )
        new = self.new_writes(type(scan), prompts, source, scan.dtype)
        lasting = self.change.lasting
        whole = lasting is not None
        left = cut_outputs(scan, self.rows, sources, targets, lambda t: new(start + t), self.carried, whole)
        if lasting is not None:
            self.after[lasting] = left

    def new_writes(self, kind: Any, prompts, source: SourceValues, dtype: torch.dtype) -> New:
        """Of a cut, what takes the place of the writes at a position."""
        if self.change.value is not None:
            return lambda position: 0.0
        layer = self.change.layer or 0

        def write(position: int) -> Tensor:
            return kind.written(*(source[layer, name, position][prompts].to(dtype) for name in NAMES))

        return write

    def source_value(self, position: int, prompts, source: SourceValues) -> Tensor:
        """The source run's value at a position, ``[R, ...]``."""
        change = self.change
        value = source[change.layer or 0, change.site.name, position][prompts]
        return value[(..., *change.part)]


def change_site(envoy, site: SiteInfo, changes: Sequence[Placed], start: int = 0, source: SourceValues = {}) -> None:  # noqa: B006
    """In a trace: make the changes at one site. States are held where they change; the later ones follow."""
    if site.name == "h":
        hold_states(open_stages(envoy, getattr(type(envoy), site.attribute).stages), changes, start, source)
        return
    value = getattr(envoy, site.attribute)
    for one in changes:
        if one.change.sources is not None:
            one.cut(open_stages(envoy, getattr(type(envoy), site.attribute).stages), start, source)
            continue
        target = value[one.rows][(..., *one.change.part)]
        for rows, at, new in one.new_values(target, start, source):
            where = (rows, at) if site.by_position else ...
            target[where] = cast(new, target[where])


def hold_states(scan, changes: Sequence[Placed], start: int, source: SourceValues) -> None:
    """Hold the states of some rows at some positions, each change on top of those before it; the later ones follow."""
    held: dict[int, list[tuple[Placed, Any, Tensor | None]]] = {}
    for one in changes:
        for position, rows, new in states_held(one, scan.h_shape(), scan.x.shape[1], start, source):
            held.setdefault(position, []).append((one, rows, new))

    def patch(t: int, h: Tensor) -> Tensor:
        h = h.clone()
        for one, rows, new in held[t]:
            states = h[one.rows]
            value = one.of_callable(states[:, None])[rows, 0] if new is None else new
            states[rows] = cast(value, states[rows])
        return h

    scan.hold(lambda t, h: patch(t, h) if t in held else h, held)


def states_held(one: Placed, shape: tuple[int, ...], length: int, start: int, source: SourceValues) -> Iterator:
    """(position from the start, which of the rows, their states or None for what a callable will give)."""
    change, state = one.change, torch.empty(())
    if callable(change.value):
        own = change.positions
        if isinstance(own, Tensor) and one.prompts is not None:
            own = own.to(one.prompts.device)[one.prompts]
        for position in change.everywhere(start + length):
            rows = own.eq(position).any(1).nonzero().flatten() if isinstance(own, Tensor) else slice(None)
            yield position - start, rows, None
        return
    target = state.expand(len(range(*one.rows.indices(shape[0]))), length, *shape[1:])
    for rows, at, new in one.new_values(target, start, source):
        if isinstance(at, int):
            yield at, rows, new
        elif isinstance(at, Tensor):
            for position in sorted(set(at.tolist())):
                yield position, rows[at == position], new[at == position]
        else:
            for column, position in enumerate(range(length) if isinstance(at, slice) else at):
                yield position, rows, new[:, column if new.shape[1] > 1 else 0]


def look_at(envoy, site: SiteInfo) -> Tensor:
    """The site's value, for a reader who does not change it."""
    descriptor = getattr(type(envoy), site.attribute)
    if isinstance(descriptor, StageSite):
        return open_stages(envoy, descriptor.stages).peek(descriptor.name)
    return getattr(envoy, site.attribute)


class Patched(Visitor):
    """Make changes on the way, and keep what is to be read.

    Args:
        changes: by layer (None: outside the layers) and site, in the order in which they are made.
        reads: by layer and site, the key under which the value is kept, and the position that is read (None: all).
        keep: the positions of each row to keep of what is read at all of them, ``[B, k]``; None for all.
        states: what the positions before the run left behind.
        start: the position at which the run begins.
        source: the source run's values.
        after: what lasting cuts change in the states after the run goes here, by their number.
    """

    def __init__(
        self,
        changes: Mapping[int | None, Mapping[str, Sequence[Placed]]],
        reads: Mapping[int | None, Mapping[str, Sequence[tuple[str, int | None]]]],
        keep: Int[Tensor, "B k"] | None = None,
        states: Sequence[LayerState] | None = None,
        start: int = 0,
        source: SourceValues | None = None,
        after: dict[int, Tensor | None] | None = None,
    ) -> None:
        Visitor.__init__(self, states)
        self.after = {} if after is None else after
        self.changes, self.reads, self.keep = changes, reads, keep
        self.start, self.source = start, source or {}
        self.found: dict[str, Tensor] = {}
        self.moved: Tensor | None = None

    def at(self, model, layer, site):
        changes, reads = self.changes.get(layer, {}).get(site.name), self.reads.get(layer, {}).get(site.name, ())
        if site.name == "resid_post" and self.moved is not None:
            model.layers[layer].resid_post += self.moved
            self.moved = None
        if changes:
            envoy = owner(model, site, layer)
            before = envoy.mlp_in.clone() if site.name == "resid_mid" else None
            change_site(envoy, site, changes, self.start, self.source)
            if before is not None:  # the stream after the block has it as well
                self.moved = envoy.mlp_in - before
        for key, position in reads:
            value = look_at(owner(model, site, layer), site).detach()
            if position is not None:
                value = value[:, position].clone()
            elif self.keep is not None and site.by_position:
                keep = self.keep.to(value.device)
                value = value[torch.arange(len(keep), device=keep.device)[:, None], keep]
            self.found[key] = value


class Prefix(Patched):
    """Make changes on the way, and keep what the run leaves behind in each layer.

    Attributes:
        left: that, layer by layer.
    """

    def __init__(self, *args, **kwargs) -> None:
        Patched.__init__(self, *args, **kwargs)
        self.left: list[LayerState] = []
        self.open: list = []

    def enter(self, model, layer):
        self.open = []
        return True

    def opened(self, layer, stages):
        Visitor.opened(self, layer, stages)
        if stages.KIND == "scan":
            stages.ends = True
        self.open.append(stages)

    def leave(self, model, layer):
        conv, scan = self.open
        self.left.append(LayerState(scan.end(), conv.end()))
